"""update.onnx: one optimizer step for all parameters, and accumulate.onnx: the gradient of a batch in pieces, as
standard operators. Knows the builder.

No tensor of a parameter's size is made but what lies in the buffers that are there already: those of the parameter, its
slots and its gradient. Memory that is asked for anew at every step costs more than the arithmetic: an operator over 2.4
million numbers took 0.3 to 1 ms into a buffer that was there and 14 ms into a new one (onnxruntime 1.31, two cores). So
every value is written over one that nothing reads any more, and an engine does so (``GraphSpec.in_place``).

Nothing rests on the order in which a runtime executes the nodes: each value depends on all that reads what it replaces.
Where arithmetic alone does not say so, :func:`_after` does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from edgetune.autodiff.builder import GraphBuilder
from edgetune.errors import UsageError, choices

Rule = Callable[[str, int, str, Mapping[str, str]], dict[str, str]]
"""The update of one parameter: (parameter, its number of axes, gradient, slots by name) to the emitted names of what is
kept, in the order in which it is made: ``value`` and every slot, and as ``<buffer>.<something>`` what lies in the
buffer of the ``value``, of a slot, or of the ``gradient`` for a while."""


@dataclass(frozen=True)
class Optimizer:
    """One update rule. ``rule`` emits what all parameters share (from the builder and the scalars by name, of which
    ``clip`` is the factor by which gradients are to be clipped) and returns the rule for one of them."""

    slots: tuple[str, ...]
    scalars: Mapping[str, float]
    rule: Callable[[GraphBuilder, Mapping[str, str]], Rule]


def _after(g: GraphBuilder, scalar: str, tensor: str, rank: int) -> str:
    """Return ``scalar`` [1, ..., 1] in a form that is not known before ``tensor`` of ``rank`` axes is.

    What is computed from it may be written over anything that ``tensor`` was made from. Its value is not touched, even
    where that of ``tensor`` is not finite.
    """
    first = tensor
    if rank:
        first = g.op("Slice", tensor, g.const([0] * rank), g.const([1] * rank), g.const(range(rank)), hint="first")
    return str(g.op("Where", g.const(np.array(False), hint="never"), first, scalar, hint="after"))


def _sgd(g: GraphBuilder, s: Mapping[str, str]) -> Rule:
    # v ← μ·v + g + λ·p;  p ← p - η·v          (as torch.optim.SGD, dampening 0)
    def rule(p: str, rank: int, gradient: str, slots: Mapping[str, str]) -> dict[str, str]:
        clipped = g.op("Mul", gradient, s["clip"], hint="clipped")
        inertia = g.op("Mul", slots["momentum"], s["momentum"], hint="inertia")
        pushed = g.op("Add", inertia, clipped, hint="pushed")
        decay = g.op("Mul", p, _after(g, s["weight_decay"], pushed, rank), hint="decay")
        velocity = g.op("Add", pushed, decay, hint="momentum")
        step = g.op("Mul", velocity, s["learning_rate"], hint="step")
        value = g.op("Sub", p, step, hint="value")
        return {
            "gradient.clipped": clipped, "momentum.inertia": inertia, "momentum.pushed": pushed,
            "gradient.decay": decay, "momentum": velocity, "gradient.step": step, "value": value,
        }  # fmt: skip

    return rule


def _adamw(g: GraphBuilder, s: Mapping[str, str]) -> Rule:
    # m ← β₁m + (1-β₁)g;  v ← β₂v + (1-β₂)g²;  p ← p·(1 - ηλ) - η·(m/(1-β₁ᵗ)) / (√(v/(1-β₂ᵗ)) + ε)
    # Loshchilov & Hutter 2019, algorithm 2. What is one number for all is computed first: with a = (1-β₁)·clip·g,
    # (1-β₂)(clip·g)² = (a·√(1-β₂)/(1-β₁))², and the last fraction is η·√(1-β₂ᵗ)/(1-β₁ᵗ) · m / (√v + ε·√(1-β₂ᵗ)).
    one = g.const(1.0)

    def rest(beta: str) -> str:
        return str(g.op("Sub", one, beta, hint="rest"))

    rest1, rest2 = rest(s["beta1"]), rest(s["beta2"])
    bias1 = rest(g.op("Pow", s["beta1"], s["step"], hint="power"))
    bias2 = g.op("Sqrt", rest(g.op("Pow", s["beta2"], s["step"], hint="power")), hint="bias")
    least = g.op("Mul", s["epsilon"], bias2, hint="least")
    rate = g.op("Div", g.op("Mul", s["learning_rate"], bias2, hint="rate"), bias1, hint="rate")
    keep = g.op("Sub", one, g.op("Mul", s["learning_rate"], s["weight_decay"], hint="decay"), hint="keep")
    share = g.op("Mul", rest1, s["clip"], hint="share")
    between = g.op("Div", g.op("Sqrt", rest2, hint="between"), rest1, hint="between")

    def rule(p: str, rank: int, gradient: str, slots: Mapping[str, str]) -> dict[str, str]:
        fresh = g.op("Mul", gradient, share, hint="fresh")
        kept1 = g.op("Mul", slots["first_moment"], s["beta1"], hint="kept")
        first = g.op("Add", kept1, fresh, hint="first_moment")
        scaled = g.op("Mul", fresh, _after(g, between, first, rank), hint="scaled")
        square = g.op("Mul", scaled, scaled, hint="square")
        kept2 = g.op("Mul", slots["second_moment"], s["beta2"], hint="kept")
        second = g.op("Add", kept2, square, hint="second_moment")
        root = g.op("Sqrt", second, hint="root")
        bounded = g.op("Add", root, least, hint="bounded")
        ratio = g.op("Div", first, bounded, hint="ratio")
        step = g.op("Mul", ratio, rate, hint="step")
        shrunk = g.op("Mul", p, keep, hint="shrunk")
        value = g.op("Sub", shrunk, step, hint="value")
        return {
            "gradient.fresh": fresh, "first_moment.kept": kept1, "first_moment": first, "gradient.scaled": scaled,
            "gradient.square": square, "second_moment.kept": kept2, "second_moment": second, "gradient.root": root,
            "gradient.bounded": bounded, "gradient.ratio": ratio, "gradient.step": step, "value.shrunk": shrunk,
            "value": value,
        }  # fmt: skip

    return rule


# ``step`` counts from 1 and is set by the engine; clip_norm 0 turns clipping off.
OPTIMIZERS: dict[str, Optimizer] = {
    "sgd": Optimizer(
        ("momentum",), {"learning_rate": 0.01, "momentum": 0.9, "weight_decay": 0.0, "clip_norm": 0.0}, _sgd
    ),
    "adamw": Optimizer(
        ("first_moment", "second_moment"),
        {
            "learning_rate": 0.001, "beta1": 0.9, "beta2": 0.999, "epsilon": 1e-8, "weight_decay": 0.01,
            "clip_norm": 0.0, "step": 1.0,
        },
        _adamw,
    ),
}  # fmt: skip


def optimizer_named(kind: str) -> Optimizer:
    """Return the optimizer called ``kind``.

    Raises:
        UsageError: there is none; the message lists those that there are.
    """
    if kind not in OPTIMIZERS:
        raise UsageError(f"there is no optimizer '{kind}'; choose one of: {choices(OPTIMIZERS)}")
    return OPTIMIZERS[kind]


def emit_update(
    g: GraphBuilder, kind: str, parameters: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, str], dict[str, str]]:
    """Emit the update of ``parameters`` (names and shapes); return output name -> emitted name, and output name -> the
    input that it replaces, in the order in which the outputs are made.

    Inputs by name: every parameter, ``gradient/<parameter>``, ``<slot>/<parameter>``, and the optimizer's scalars.
    Outputs by name: ``new/<parameter>``, ``new/<slot>/<parameter>``, ``gradient_norm`` (before clipping), and what
    lies in one of the buffers for a while.
    """
    optimizer = optimizer_named(kind)
    squares = [g.op("ReduceSumSquare", f"gradient/{name}", keepdims=0, hint="square") for name in parameters]
    total = squares[0] if len(squares) == 1 else g.op("Sum", *squares, hint="total")
    norm = g.op("Sqrt", total, hint="norm")
    # torch.nn.utils.clip_grad_norm_: scale by min(1, clip / (norm + 1e-6))
    fit = g.op("Div", "clip_norm", g.op("Add", norm, g.const(1e-6), hint="norm_safe"), hint="fit")
    bounded = g.op("Min", fit, g.const(1.0), hint="bounded")
    scale = g.op("Where", g.op("Greater", "clip_norm", g.const(0.0), hint="clips"), bounded, g.const(1.0), hint="scale")
    rule = optimizer.rule(g, {name: name for name in optimizer.scalars} | {"clip": scale})
    results, in_place = {"gradient_norm": norm}, {}
    for name, shape in parameters.items():
        g.scope = f"update/{name}"
        buffers = {"value": name, "gradient": f"gradient/{name}"} | {slot: f"{slot}/{name}" for slot in optimizer.slots}
        slots = {slot: buffers[slot] for slot in optimizer.slots}
        for role, emitted in rule(name, len(shape), buffers["gradient"], slots).items():
            place = role.partition(".")[0]
            output = f"{role}/{name}" if role != place else f"new/{buffers[place]}"
            results[output], in_place[output] = emitted, buffers[place]
    return results, in_place


ACCUMULATED = "accumulated"
KEEP, SHARE = "keep", "share"
"""Inputs of accumulate.onnx: the weights of what was accumulated before and of what is added."""


def emit_accumulation(
    g: GraphBuilder, parameters: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, str], dict[str, str]]:
    """Emit ``a <- keep * a + share * g`` for the gradients of ``parameters``; return as :func:`emit_update`.

    Inputs by name: ``accumulated/<parameter>``, ``gradient/<parameter>``, and the scalars ``keep`` and ``share``.
    Outputs by name: ``new/accumulated/<parameter>``, and what lies in one of the buffers for a while.
    """
    results: dict[str, str] = {}
    in_place: dict[str, str] = {}
    for name in parameters:
        g.scope = f"accumulate/{name}"
        before, fresh = f"{ACCUMULATED}/{name}", f"gradient/{name}"
        kept = g.op("Mul", before, KEEP, hint="kept")
        shared = g.op("Mul", fresh, SHARE, hint="share")
        made = {f"kept/{name}": (kept, before), f"share/{name}": (shared, fresh)}
        made[f"new/{before}"] = g.op("Add", kept, shared, hint="sum"), before
        results |= {output: emitted for output, (emitted, _) in made.items()}
        in_place |= {output: buffer for output, (_, buffer) in made.items()}
    return results, in_place
