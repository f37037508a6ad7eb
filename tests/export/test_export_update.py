"""update.onnx against torch.optim: five steps, every parameter, on gradients that both get from the same batches."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch

import edgetune
from edgetune.autodiff.builder import GraphBuilder
from edgetune.bundle import Array
from edgetune.errors import UsageError
from edgetune.export import optimizers
from edgetune.export.optimizers import OPTIMIZERS, emit_update, optimizer_named
from tests.autodiff.handmade import CLASSES, CONVS
from tests.autodiff.parity import Bundles, batch_of, relative_error

STEPS = 5
RATE = 0.05
CASES: dict[str, tuple[str, dict[str, float]]] = {
    "sgd-plain": ("sgd", {"momentum": 0.0}),
    "sgd-momentum": ("sgd", {"momentum": 0.9}),
    "sgd-momentum-decay": ("sgd", {"momentum": 0.9, "weight_decay": 0.03}),
    "sgd-momentum-decay-clip": ("sgd", {"momentum": 0.9, "weight_decay": 0.03, "clip_norm": 0.05}),
    "sgd-clip-that-does-not-bite": ("sgd", {"clip_norm": 1e6}),
    "adamw": ("adamw", {}),
    "adamw-decay": ("adamw", {"weight_decay": 0.1, "beta1": 0.8, "beta2": 0.95}),
    "adamw-decay-clip": ("adamw", {"weight_decay": 0.1, "clip_norm": 0.05}),
}


def torchs_optimizer(kind: str, parameters: list[torch.Tensor], h: dict[str, float]) -> torch.optim.Optimizer:
    if kind == "sgd":
        return torch.optim.SGD(parameters, h["learning_rate"], h["momentum"], weight_decay=h["weight_decay"])
    return torch.optim.AdamW(
        parameters, h["learning_rate"], (h["beta1"], h["beta2"]), h["epsilon"], weight_decay=h["weight_decay"]
    )


def loss_of(p: dict[str, torch.Tensor], x: Array, y: Array) -> Any:
    case = CONVS["everything_at_once"]
    top, left, bottom, right = case.pads
    padded = torch.nn.functional.pad(torch.from_numpy(x).double(), (left, right, top, bottom))
    a = torch.nn.functional.conv2d(
        padded, p["conv.weight"], p["conv.bias"], case.strides, 0, case.dilations, case.groups
    )
    logits = torch.relu(a).flatten(1) @ p["head.weight"].T + p["head.bias"]
    return torch.nn.functional.cross_entropy(logits, torch.from_numpy(y))


@pytest.mark.parametrize("name", CASES)
def test_five_steps_equal_torchs(bundles: Bundles, name: str) -> None:
    kind, chosen = CASES[name]
    case = CONVS["everything_at_once"]
    bundle = bundles.onnx("update", case.model, last=1, codec="dense", optimizer=kind)
    hyper = {**OPTIMIZERS[kind].scalars, "learning_rate": RATE, **chosen}
    session = edgetune.TrainingSession(
        bundle, edgetune.plan(bundle, batch=6), hyper={k: v for k, v in hyper.items() if k != "step"}
    )
    tensors = {k: torch.from_numpy(v).double().requires_grad_(True) for k, v in bundle.initial_parameters().items()}
    optimizer = torchs_optimizer(kind, list(tensors.values()), hyper)
    for step in range(STEPS):
        x, y = batch_of(case.shape, 6, CLASSES, seed=step)
        found = session.step(x, y)
        optimizer.zero_grad()
        loss = loss_of(tensors, x, y)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(list(tensors.values()), hyper["clip_norm"] or float("inf"))
        if "clip" in name:
            assert (float(norm) > hyper["clip_norm"]) == (hyper["clip_norm"] < 1)
        optimizer.step()
        assert found == pytest.approx(float(loss.detach()), rel=1e-5)
        assert session.report.gradient_norm == pytest.approx(float(norm), rel=1e-5)
    after, before = session.parameters(), bundle.initial_parameters()
    for key, tensor in tensors.items():
        assert relative_error(after[key], tensor.detach().numpy()) <= 1e-5, key
        # The change, not only the sum of a large start and a small change.
        assert relative_error(after[key] - before[key], tensor.detach().numpy() - before[key]) <= 1e-4, key
    assert session.state()["step"] == STEPS


def test_gradients_change_nothing(bundles: Bundles) -> None:
    case = CONVS["everything_at_once"]
    bundle = bundles.onnx("update", case.model, last=1, codec="dense", optimizer="sgd")
    session = edgetune.TrainingSession(bundle, edgetune.plan(bundle, batch=6))
    session.gradients(*batch_of(case.shape, 6, CLASSES, seed=0))
    before = bundle.initial_parameters()
    assert all(np.array_equal(value, before[name]) for name, value in session.parameters().items())


def test_an_unknown_optimizer_lists_the_known_ones() -> None:
    with pytest.raises(UsageError, match=r"'lion'.*adamw, sgd"):
        optimizer_named("lion")


SHAPES: dict[str, tuple[int, ...]] = {"conv.weight": (4, 3, 2, 2), "fc.weight": (5, 4), "fc.bias": (5,), "scale": ()}


def emitted(kind: str) -> tuple[dict[str, str], dict[str, str], list[Any]]:
    """Return the results, what they replace, and the nodes of an update."""
    optimizer = OPTIMIZERS[kind]
    slots = [f"{slot}/{name}" for name in SHAPES for slot in (*optimizer.slots, "gradient")]
    g = GraphBuilder(taken={*SHAPES, *slots, *optimizer.scalars})
    results, in_place = emit_update(g, kind, SHAPES)
    return results, in_place, g.nodes


def too_early(results: dict[str, str], in_place: dict[str, str], nodes: list[Any]) -> list[str]:
    """Return the nodes that a runtime may execute after what they read has been replaced."""
    makers = {name: node for node in nodes for name in node.output}
    before: dict[str, set[str]] = {}  # everything that must have been made when a tensor is there
    for node in nodes:
        before[node.output[0]] = {node.output[0]}.union(*(before.get(name, {name}) for name in node.input))
    contents: dict[str, list[str]] = {}
    for output, replaced in in_place.items():
        contents.setdefault(replaced, [replaced]).append(results[output])
    problems = []
    for held in contents.values():
        for old, new in itertools.pairwise(held):
            readers = [node.output[0] for node in nodes if old in node.input and makers.get(new) is not node]
            problems += [reader for reader in readers if reader not in before[new]]
    return problems


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_nothing_is_replaced_before_all_have_read_it_in_whatever_order_nodes_run(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert too_early(*emitted(kind)) == []
    monkeypatch.setattr(optimizers, "_after", lambda _g, scalar, _tensor, _rank: scalar)
    assert len(too_early(*emitted(kind))) == len(SHAPES)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_an_update_makes_no_tensor_of_a_parameters_size_outside_the_buffers(kind: str) -> None:
    results, in_place, nodes = emitted(kind)
    kept = {results[output] for output in in_place}
    large = set(in_place.values()) | kept
    # An element-wise operator makes what its largest operand is; Slice and the sum of squares make one number.
    made = [n for n in nodes if large.intersection(n.input) and n.op_type not in ("Slice", "ReduceSumSquare", "Where")]
    assert {name for node in made for name in node.output} == kept
