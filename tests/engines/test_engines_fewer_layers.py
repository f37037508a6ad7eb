"""Fewer trained layers: the gradients and updates of torch with the others frozen, back and forth in one session."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

import edgetune
from edgetune.bundle import Array, Bundle
from edgetune.errors import UsageError
from edgetune.planning.freezing import frozen_parameters, narrow
from edgetune.planning.plan import Plan, make_plan, predict
from edgetune.planning.rebase import settled_for
from tests.engines.workshop import bundle_of, network, plan_of, samples

BATCH = 8
each_engine = pytest.mark.parametrize("engine", ["onnxruntime", "torch"])


def plan(bundle: Bundle, trained: int | None, **options: Any) -> Plan:
    return make_plan(
        bundle.manifest, batch=BATCH, calibration=None, epsilon=1.0, runtime_bytes=0, trained=trained, **options
    )


def oracle(names: set[str], x: Array, y: Array) -> dict[str, Array]:
    model = network("small")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
    torch.nn.functional.cross_entropy(model(torch.from_numpy(x)), torch.from_numpy(y)).backward()  # type: ignore[no-untyped-call]
    return {n: p.grad.numpy() for n, p in model.named_parameters() if p.grad is not None}


@each_engine
@pytest.mark.parametrize("codec", ["dense", "hosvd+int8+dense"])
def test_the_gradients_are_those_of_torch_with_the_rest_frozen(engine: str, codec: str) -> None:
    bundle, (x, y) = bundle_of(codec), samples(BATCH)
    options: dict[str, Any] = {"codec": "dense"} if "+" in codec else {}
    session = edgetune.TrainingSession(bundle, plan(bundle, None, **options), engine=engine, verify=False)
    names = [layer.name for layer in bundle.manifest.layers]
    for trained in (1, 0, 3):
        session.set_plan(plan(bundle, trained, **options))
        loss, found = session.gradients(x, y)
        expected = oracle(set(found), x, y)
        assert found.keys() == expected.keys() and loss > 0
        last = {layer.weight for layer in bundle.manifest.layers[len(names) - trained - 1 :]}
        assert {name for name in found if name.endswith("weight")} == last
        for name, value in expected.items():
            assert np.linalg.norm(found[name] - value) <= 1e-4 * np.linalg.norm(value) + 1e-7


@pytest.mark.parametrize(("engine", "optimizer"), [("onnxruntime", "sgd"), ("torch", "adamw")])
def test_what_is_frozen_stays_and_its_optimizer_state_too(engine: str, optimizer: str) -> None:
    bundle, (x, y) = bundle_of("dense", optimizer=optimizer), samples(BATCH)
    hyper = {"weight_decay": 0.1, "clip_norm": 0.5}
    session = edgetune.TrainingSession(bundle, plan(bundle, None), engine=engine, hyper=hyper, verify=False)
    session.step(x, y)
    before, (_, gradients) = session.state(), session.gradients(x, y)
    session.set_plan(dataclasses.replace(plan(bundle, 1), tail_micro_batch=3))  # the accumulation is narrowed, too
    session.step(x, y)
    after, frozen = session.state(), frozen_parameters(bundle.manifest, 1)
    kept = {name: value for name, value in gradients.items() if name not in frozen}
    assert frozen and kept
    norm = np.sqrt(sum(float(np.sum(np.square(value, dtype=np.float64))) for value in kept.values()))
    assert session.report.gradient_norm == pytest.approx(norm, rel=1e-4)
    for name, value in before.items():
        if name != "step":
            assert np.array_equal(after[name], value) == any(name.endswith(f) for f in frozen), name
    session.set_plan(plan(bundle, None))
    session.step(x, y)
    assert all(not np.array_equal(session.state()[name], after[name]) for name in frozen)


def test_fewer_layers_save_and_take_less() -> None:
    bundle, (x, y) = bundle_of("svd"), samples(BATCH)
    plans = [
        make_plan(
            bundle.manifest, batch=BATCH, calibration=plan_of(bundle, BATCH).calibration, epsilon=0.9, runtime_bytes=0,
            trained=k,
        )
        for k in range(4)
    ]  # fmt: skip
    saved = [one.saved_bytes for one in plans]
    assert saved == sorted(saved) and saved[0] < saved[1] < saved[3]
    peaks = []
    for one in plans:
        settled = settled_for(bundle.manifest, one)
        found = predict(settled, batch=BATCH, micro_batch=1, ranks=one.ranks, runtime_bytes=0)
        peaks.append(found.peaks["train"].bytes)
        session = edgetune.TrainingSession(bundle, one, verify=one.trained == 1)
        session.step(x, y)
        assert set(session.report.energy) == set(one.ranks) == set(session.promises)
    assert peaks == sorted(peaks) and peaks[0] < peaks[3]


def test_all_layers_are_the_whole_bundle_and_more_are_refused() -> None:
    manifest = bundle_of("dense").manifest
    assert narrow(manifest, 3).manifest is manifest
    with pytest.raises(UsageError, match="--trained 4: expected 0 to 3"):
        plan(bundle_of("dense"), 4)
