"""However small the ranks are, torch's products of factors give what onnxruntime gives."""

from __future__ import annotations

import dataclasses
import functools

import pytest

import edgetune
from edgetune.bundle import Array
from edgetune.engines.session import TrainingSession
from tests.autodiff.parity import worst_error
from tests.engines.workshop import bundle_of, plan_of, samples

BATCH = 8


@functools.cache
def session(engine: str, codec: str) -> TrainingSession:
    bundle = bundle_of(codec)
    return edgetune.TrainingSession(bundle, plan_of(bundle, BATCH), engine=engine, seed=0)


def gradients(engine: str, ranks: dict[str, int], codec: str = "hosvd") -> dict[str, Array]:
    plan = plan_of(bundle_of(codec), BATCH)
    cut = {
        name: {letter: ranks.get(letter, rank) for letter, rank in modes.items()} for name, modes in plan.ranks.items()
    }
    one = session(engine, codec)
    one.set_plan(dataclasses.replace(plan, ranks=cut))
    return one.gradients(*samples(BATCH, bundle_of(codec).manifest.inputs[0].shape))[1]


@pytest.mark.parametrize("b", [2, BATCH])
@pytest.mark.parametrize("c", [1, 5])
@pytest.mark.parametrize(("h", "w"), [(1, 1), (1, 3), (2, 1), (3, 1), (2, 2)])
def test_the_engines_agree_at_any_ranks(b: int, c: int, h: int, w: int) -> None:
    ranks = {"b": b, "c": c, "h": h, "w": w}
    assert worst_error(gradients("torch", ranks), gradients("onnxruntime", ranks)) <= 1e-4


@pytest.mark.parametrize("cut", ["c", "hw", "w"])
def test_the_engines_agree_whichever_modes_are_cut(cut: str) -> None:
    ranks, codec = {"b": 3, "c": 5, "h": 2, "w": 1}, f"hosvd:cut={cut}"
    ours = gradients("torch", ranks, codec)
    assert worst_error(ours, gradients("onnxruntime", ranks, codec)) <= 1e-4
    assert worst_error(ours, gradients("torch", ranks)) > 1e-3, "another truncation"
