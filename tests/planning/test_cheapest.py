"""The search over all knobs: nothing that fits is cheaper, what is pinned stays, and the least budget is the least."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import pytest

from edgetune.bundle import Manifest
from edgetune.errors import BudgetError, UsageError
from edgetune.planning.candidates import Candidate, Limits, Workbench
from edgetune.planning.cheapest import Cost, cost_of
from edgetune.planning.freezing import narrow
from edgetune.planning.knobs import pieces_of, trained_of
from edgetune.planning.per_layer import PerLayer
from edgetune.planning.plan import Plan, make_plan
from edgetune.planning.spectra import Calibration
from edgetune.planning.uniform import Uniform
from tests.planning.menus import menu_calibration, menu_manifest

BATCH, RUNTIME = 20, 5000
SHAPES = [(8, 12, 12), (12, 8, 8), (16, 5, 5)]
SHARES = (0.0, 0.01, 0.03, 0.06, 0.1, 0.15, 0.2, 0.3, 0.45, 0.6, 0.8, 1.0)


def described(seed: int) -> tuple[Manifest, Calibration]:
    """A bundle, in which now the gradients and now the activations are what takes memory, and what is known of it."""
    shapes = [(24, 2, 2), (32, 2, 2)] if seed == 2 else SHAPES[: 2 + seed]
    manifest = menu_manifest(shapes, ("hosvd", "int8", "dense"), pieces=True)
    return manifest, menu_calibration(manifest, BATCH, seed)


def plan(manifest: Manifest, calibration: Calibration | None, budget: int | None, **how: Any) -> Plan:
    return make_plan(
        manifest,
        batch=BATCH,
        calibration=calibration,
        budget_bytes=budget,
        runtime_bytes=RUNTIME,
        reserve_bytes=30,
        **how,
    )


def least_of(manifest: Manifest, calibration: Calibration, **how: Any) -> int:
    with pytest.raises(BudgetError) as caught:
        plan(manifest, calibration, 1, **how)
    return caught.value.least_bytes


def every_setting(manifest: Manifest, calibration: Calibration) -> list[tuple[Cost, Candidate]]:
    """All uniform candidates of all knobs, with what each costs."""
    method, most = Uniform(), len(manifest.layers)
    found = []
    for trained in trained_of(manifest):
        for piece in pieces_of(manifest, BATCH):
            limits = Limits(BATCH, RUNTIME, reserve_bytes=30, tail_micro_batch=piece)
            bench = Workbench(narrow(manifest, trained).manifest, calibration, limits)
            for epsilon in bench.breakpoints():
                candidate = bench.uniform(None, epsilon)
                cost = cost_of(limits, most - trained, piece, method.loss(bench, candidate))
                found.append((cost, candidate))
    return found


def cost(found: Plan, manifest: Manifest) -> Cost:
    assert found.error is not None
    loss = found.error / len(found.rows)
    return cost_of(Limits(BATCH, 0), len(manifest.layers) - found.trained, found.tail_micro_batch, loss)


@pytest.mark.parametrize("seed", range(3))
def test_nothing_that_fits_is_cheaper(seed: int) -> None:
    manifest, calibration = described(seed)
    every = every_setting(manifest, calibration)
    needed = [candidate.needed_bytes() for _, candidate in every]
    low, high = min(needed), max(needed)
    assert least_of(manifest, calibration) == low
    met = set()
    for share in SHARES:
        budget = low + round(share * (high - low))
        found = plan(manifest, calibration, budget)
        assert found.predicted_peak_bytes + 30 <= budget
        fitting = [one for (one, candidate), size in zip(every, needed, strict=True) if size <= budget]
        assert cost(found, manifest) == pytest.approx(min(fitting))
        met.add((found.trained, found.tail_micro_batch))
        assert bool(found.reasons) == (found.trained < len(manifest.layers) or found.tail_micro_batch < BATCH)
        assert found.saved_bytes <= found.dense_saved_bytes
    # The budgets are such that knobs are turned.
    assert len(met) > (1 if seed == 2 else 4) and (len(manifest.layers), BATCH) in met


@pytest.mark.parametrize("allocation", ["uniform", "per-layer"])
@pytest.mark.parametrize("pins", [{}, {"tail_micro_batch": 5}, {"trained": 2}, {"trained": 1, "tail_micro_batch": 20}])
def test_the_least_budget_over_what_is_not_pinned_is_the_least(allocation: str, pins: dict[str, int]) -> None:
    manifest, calibration = described(1)
    least = least_of(manifest, calibration, allocation=allocation, **pins)
    found = plan(manifest, calibration, least, allocation=allocation, **pins)
    assert found.predicted_peak_bytes + 30 <= least
    assert all(getattr(found, name) == value for name, value in pins.items())
    with pytest.raises(BudgetError, match=f"{least} bytes"):
        plan(manifest, calibration, least - 1, allocation=allocation, **pins)
    if pins:
        assert least > least_of(manifest, calibration, allocation=allocation)


def test_what_is_pinned_stays_and_the_rest_is_found_around_it() -> None:
    manifest, calibration = described(1)
    free = plan(manifest, calibration, None)
    assert (free.tail_micro_batch, free.trained, free.cache_bytes, free.reasons) == (BATCH, 3, 0, ())
    assert free.epsilon == max(Workbench(manifest, calibration, Limits(BATCH, 0)).breakpoints())
    budget = (free.predicted_peak_bytes + least_of(manifest, calibration)) // 2
    for pins in ({"tail_micro_batch": 4}, {"micro_batch": 3}, {"trained": 2}, {"cache_bytes": 1000}, {"epsilon": 0.6}):
        found = plan(manifest, calibration, budget, **pins)
        assert all(getattr(found, name) == value for name, value in pins.items())
        assert found.ledger.get("replay", 0) == found.cache_bytes
    # A given ε costs nothing to keep, so the batch goes into pieces for it.
    exact = plan(manifest, calibration, budget, epsilon=1.0)
    assert exact.epsilon == 1.0 and exact.tail_micro_batch < BATCH
    assert exact.reasons == (f"the batch is trained in pieces of {exact.tail_micro_batch}: the whole does not fit",)
    assert Plan.from_json(exact.to_json()) == exact


@pytest.mark.parametrize(
    ("pins", "pattern"),
    [
        ({"tail_micro_batch": BATCH + 1}, "--tail-micro-batch is 21 samples; expected 1 to 20"),
        ({"micro_batch": 0}, "--micro-batch is 0 samples"),
        ({"trained": 4}, "--trained 4: expected 1 to 3"),
        ({"cache_bytes": -1}, "the cache is -1 bytes"),
    ],
)
def test_senseless_pins(pins: dict[str, int], pattern: str) -> None:
    manifest, calibration = described(1)
    with pytest.raises(UsageError, match=pattern):
        plan(manifest, calibration, None, **pins)


def test_a_bundle_that_needs_whole_batches_is_never_cut() -> None:
    manifest, calibration = described(1)
    graphs = {name: graph for name, graph in manifest.graphs.items() if name != "accumulate"}
    whole = dataclasses.replace(manifest, graphs=graphs)
    assert plan(whole, calibration, least_of(whole, calibration)).tail_micro_batch == BATCH
    with pytest.raises(UsageError, match="cannot be trained in pieces"):
        plan(whole, calibration, None, tail_micro_batch=4)


def test_per_layer_pieces_come_before_errors_that_cost_accuracy() -> None:
    manifest, calibration = described(1)
    low = least_of(manifest, calibration, allocation="per-layer")
    high = plan(manifest, calibration, None, epsilon=1.0).predicted_peak_bytes + 30
    turned = 0
    for share in (0.1, 0.3, 0.6):
        budget = low + round(share * (high - low))
        limits = Limits(BATCH, RUNTIME, budget, reserve_bytes=30)
        found = plan(manifest, calibration, budget, allocation="per-layer")
        whole = PerLayer().find(Workbench(manifest, calibration, limits))
        assert found.trained == len(manifest.layers) and found.error is not None
        if whole is None or PerLayer().loss(Workbench(manifest, calibration, limits), whole[0]) > 0.03**0.5:
            turned += 1
            assert found.tail_micro_batch < BATCH
        else:
            assert found.tail_micro_batch == BATCH and found.error == pytest.approx(whole[0].error)
    assert 0 < turned < 3


def test_five_layers_of_fifteen_options_are_planned_within_seconds() -> None:
    manifest = menu_manifest([(8, 12, 12)] * 5, pieces=True)
    calibration = menu_calibration(manifest, BATCH)
    least = least_of(manifest, calibration, allocation="per-layer")
    begin = time.process_time()
    plan(manifest, calibration, least + least // 10, allocation="per-layer")
    assert time.process_time() - begin < 10.0
