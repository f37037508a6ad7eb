"""update.onnx: one optimizer step for all parameters, as standard operators. Knows the builder.

Every new value depends on its old one through element-wise operators alone, the last of which writes it. So an engine
writes it over the old one: by the time it is written, nothing is left that reads what it replaces. The gradient's
buffer serves in the same way for what becomes of the gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from edgetune.autodiff.builder import GraphBuilder
from edgetune.errors import UsageError, choices


@dataclass(frozen=True)
class Optimizer:
    """One update rule.

    ``emit`` maps (builder, parameter, gradient, slots by name, scalars by name) to the emitted names of ``value``, of
    every slot, and of any tensor to be kept in the gradient's buffer, named ``gradient.<something>``.
    """

    slots: tuple[str, ...]
    scalars: Mapping[str, float]
    emit: Callable[[GraphBuilder, str, str, Mapping[str, str], Mapping[str, str]], dict[str, str]]


def _sgd(g: GraphBuilder, p: str, gradient: str, slots: Mapping[str, str], s: Mapping[str, str]) -> dict[str, str]:
    # v ← μ·v + g + λ·p;  p ← p - η·v          (as torch.optim.SGD, dampening 0)
    decayed = g.op("Add", g.op("Mul", p, s["weight_decay"], hint="decay"), gradient, hint="decayed")
    velocity = g.op("Add", g.op("Mul", slots["momentum"], s["momentum"], hint="inertia"), decayed, hint="momentum")
    value = g.op("Sub", p, g.op("Mul", velocity, s["learning_rate"], hint="step"), hint="value")
    return {"value": value, "momentum": velocity, "gradient.decayed": decayed}


def _adamw(g: GraphBuilder, p: str, gradient: str, slots: Mapping[str, str], s: Mapping[str, str]) -> dict[str, str]:
    # m ← β₁m + (1-β₁)g;  v ← β₂v + (1-β₂)g²;  p ← p·(1 - ηλ) - η·(m/(1-β₁ᵗ)) / (√(v/(1-β₂ᵗ)) + ε)
    # Loshchilov & Hutter 2019, algorithm 2
    one = g.const(1.0)

    def average(slot: str, value: str, beta: str) -> str:
        kept = g.op("Mul", slots[slot], beta, hint="kept")
        fresh = g.op("Mul", value, g.op("Sub", one, beta, hint="rest"), hint="fresh")
        return str(g.op("Add", kept, fresh, hint=slot))

    def unbiased(value: str, beta: str) -> str:
        power = g.op("Pow", beta, s["step"], hint="power")
        return str(g.op("Div", value, g.op("Sub", one, power, hint="bias"), hint="unbiased"))

    first = average("first_moment", gradient, s["beta1"])
    second = average("second_moment", g.op("Mul", gradient, gradient, hint="square"), s["beta2"])
    root = g.op("Sqrt", unbiased(second, s["beta2"]), hint="root")
    ratio = g.op("Div", unbiased(first, s["beta1"]), g.op("Add", root, s["epsilon"], hint="root"), hint="ratio")
    shrink = g.op("Sub", one, g.op("Mul", s["learning_rate"], s["weight_decay"], hint="decay"), hint="shrink")
    step = g.op("Mul", ratio, s["learning_rate"], hint="step")
    value = g.op("Sub", g.op("Mul", p, shrink, hint="shrunk"), step, hint="value")
    return {"value": value, "first_moment": first, "second_moment": second}


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


def emit_update(g: GraphBuilder, kind: str, parameters: Sequence[str]) -> tuple[dict[str, str], dict[str, str]]:
    """Emit the update of ``parameters``; return output name -> emitted name, and output name -> input it replaces.

    Inputs by name: every parameter, ``gradient/<parameter>``, ``<slot>/<parameter>``, and the optimizer's scalars.
    Outputs by name: ``new/<parameter>``, ``new/<slot>/<parameter>``, ``gradient_norm`` (before clipping), and what
    passes through the gradients' buffers.
    """
    optimizer = optimizer_named(kind)
    scalars = {name: name for name in optimizer.scalars}
    squares = [g.op("ReduceSumSquare", f"gradient/{name}", keepdims=0, hint="square") for name in parameters]
    total = squares[0] if len(squares) == 1 else g.op("Sum", *squares, hint="total")
    norm = g.op("Sqrt", total, hint="norm")
    # torch.nn.utils.clip_grad_norm_: scale by min(1, clip / (norm + 1e-6))
    fit = g.op("Div", "clip_norm", g.op("Add", norm, g.const(1e-6), hint="norm_safe"), hint="fit")
    bounded = g.op("Min", fit, g.const(1.0), hint="bounded")
    scale = g.op("Where", g.op("Greater", "clip_norm", g.const(0.0), hint="clips"), bounded, g.const(1.0), hint="scale")
    results, in_place = {"gradient_norm": norm}, {}
    for name in parameters:
        g.scope = f"update/{name}"
        gradient = g.op("Mul", f"gradient/{name}", scale, hint="clipped")
        slots = {slot: f"{slot}/{name}" for slot in optimizer.slots}
        made = {"gradient.clipped": gradient, **optimizer.emit(g, name, gradient, slots, scalars)}
        for role, emitted in made.items():
            if role.startswith("gradient."):
                output, replaced = f"{role}/{name}", f"gradient/{name}"
            else:
                output, replaced = (f"new/{name}", name) if role == "value" else (f"new/{role}/{name}", slots[role])
            results[output], in_place[output] = emitted, replaced
    return results, in_place
