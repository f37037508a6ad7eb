"""Plans that mix codecs: the least error that any choice has, within the true peak."""

from __future__ import annotations

import dataclasses
import itertools
import time

import numpy as np
import pytest

from edgetune.bundle import Manifest
from edgetune.errors import BudgetError, StateError, UsageError
from edgetune.planning import per_layer, rates
from edgetune.planning.candidates import Candidate, Limits, Workbench
from edgetune.planning.per_layer import PerLayer, pareto_front
from edgetune.planning.plan import Plan, make_plan
from edgetune.planning.rates import all_rates
from edgetune.planning.spectra import Calibration
from edgetune.planning.uniform import labels_of, uniform_of_every_codec
from tests.planning.menus import MENU, menu_calibration, menu_manifest

BATCH, RUNTIME = 8, 5000
SHAPES = [(8, 12, 12), (12, 10, 10), (16, 5, 5)]


def limits(budget_bytes: int | None = None, activation_budget_bytes: int | None = None) -> Limits:
    return Limits(BATCH, RUNTIME, budget_bytes, activation_budget_bytes, correction_bytes=100, reserve_bytes=30)


def every_choice(bench: Workbench) -> list[Candidate]:
    """All combinations of the rates of all tensors, those of the uniform candidates among them."""
    assert bench.calibration is not None
    extra = {one.epsilon for c in uniform_of_every_codec(bench) for one in c.rates.values() if one.epsilon}
    saved = bench.manifest.saved
    options = [all_rates(spec, bench.calibration, BATCH, extra) for spec in saved]
    return [
        bench.mixed(dict(zip((spec.name for spec in saved), chosen, strict=True)))
        for chosen in itertools.product(*options)
    ]


@pytest.fixture
def few_levels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates, "LEVELS", (1e-6, 0.7, 0.95, 1.0))
    monkeypatch.setattr(rates, "FINER", ())
    monkeypatch.setattr(per_layer, "LEVELS", (1e-6, 0.7, 0.95, 1.0))
    monkeypatch.setattr(per_layer, "FINER", ())


@pytest.mark.usefixtures("few_levels")
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("what", ["budget", "activation budget", "both"])
def test_no_choice_has_a_lower_error_within_the_limits(seed: int, what: str) -> None:
    described = menu_manifest(SHAPES[seed % 2 :][:2])
    calibration = menu_calibration(described, BATCH, seed)
    free = every_choice(Workbench(described, calibration, limits()))
    needed = sorted(candidate.needed_bytes() for candidate in free)
    stored = sorted(candidate.saved_bytes for candidate in free)
    for share in (0.02, 0.3, 0.6, 1.0):
        budget = needed[int(share * (len(needed) - 1))] if what != "activation budget" else None
        activation = stored[int(share * (len(stored) - 1))] if what != "budget" else None
        bench = Workbench(described, calibration, limits(budget, activation))
        fitting = [candidate for candidate in every_choice(bench) if candidate.fits()]
        if not fitting:
            continue
        chosen = PerLayer().find(bench)
        assert chosen is not None
        found, bound = chosen
        assert found.fits()
        best = min(candidate.error or 0.0 for candidate in fitting)
        assert found.error == pytest.approx(best, abs=1e-12)
        assert bound <= best + 1e-9


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 0.6, 0.9])
def test_a_mixed_plan_is_never_worse_than_a_uniform_one(share: float) -> None:
    described = menu_manifest(SHAPES)
    calibration = menu_calibration(described, BATCH)
    low, high = least_of(described, calibration), peak_of(described, calibration, "dense")
    budget = low + round(share * (high - low))
    mixed = plan(described, calibration, budget, allocation="per-layer")
    assert mixed.predicted_peak_bytes <= budget
    assert mixed.allocation == "per-layer"
    assert mixed.error is not None and mixed.error_bound is not None
    assert mixed.error_bound <= mixed.error
    uniform = []
    for label in MENU:
        try:
            uniform.append(plan(described, calibration, budget, codec=label))
        except BudgetError:
            continue
    assert all(one.error is not None and mixed.error <= one.error for one in uniform)
    assert {row.codec for row in mixed.rows} == set(mixed.selection.values())
    assert mixed.error == pytest.approx(sum(row.error or 0.0 for row in mixed.rows))


def least_of(described: Manifest, calibration: Calibration) -> int:
    with pytest.raises(BudgetError) as caught:
        plan(described, calibration, 1, allocation="per-layer")
    return caught.value.least_bytes


def peak_of(described: Manifest, calibration: Calibration, codec: str) -> int:
    return plan(described, calibration, None, codec=codec, epsilon=1.0).predicted_peak_bytes


def plan(described: Manifest, calibration: Calibration | None, budget: int | None, **how: object) -> Plan:
    every = len(described.layers)  # what is asked is what becomes of all of them
    return make_plan(
        described,
        batch=BATCH,
        calibration=calibration,
        budget_bytes=budget,
        runtime_bytes=RUNTIME,
        trained=every,
        **how,  # type: ignore[arg-type]
    )


def test_the_least_budget_is_tight() -> None:
    described = menu_manifest(SHAPES)
    calibration = menu_calibration(described, BATCH)
    least = least_of(described, calibration)
    assert plan(described, calibration, least, allocation="per-layer").predicted_peak_bytes <= least
    with pytest.raises(BudgetError, match=f"{least} bytes"):
        plan(described, calibration, least - 1, allocation="per-layer")


def test_the_least_activation_budget_is_tight() -> None:
    described = menu_manifest(SHAPES)
    calibration = menu_calibration(described, BATCH)
    with pytest.raises(BudgetError, match="activation budget") as caught:
        plan(described, calibration, None, activation_budget_bytes=1, allocation="per-layer")
    least = caught.value.least_bytes
    found = plan(described, calibration, None, activation_budget_bytes=least, allocation="per-layer")
    assert found.saved_bytes == least
    with pytest.raises(BudgetError):
        plan(described, calibration, None, activation_budget_bytes=least - 1, allocation="per-layer")


def test_without_a_budget_nothing_is_lost() -> None:
    described = menu_manifest(SHAPES)
    found = plan(described, menu_calibration(described, BATCH), None, allocation="per-layer")
    assert (found.error, found.error_bound) == (0.0, 0.0)


def test_a_mixed_plan_round_trips() -> None:
    described = menu_manifest(SHAPES)
    calibration = menu_calibration(described, BATCH)
    found = plan(described, calibration, least_of(described, calibration), allocation="per-layer")
    assert found.epsilon is None
    assert any(row.epsilon for row in found.rows)
    assert Plan.from_json(found.to_json()) == found


def test_the_front_falls_and_holds_every_uniform_point() -> None:
    described = menu_manifest(SHAPES)
    bench = Workbench(described, menu_calibration(described, BATCH), limits())
    front = pareto_front(bench, 8)
    peaks, errors = [p.peak_bytes for p in front.mixed], [p.error for p in front.mixed]
    assert peaks == sorted(set(peaks))
    assert errors == sorted(set(errors), reverse=True)
    assert errors[-1] == 0.0
    assert {p.label for p in front.uniform} == set(labels_of(described))
    for point in front.uniform:
        assert any(p.peak_bytes <= point.peak_bytes and p.error <= point.error for p in front.mixed)


def test_errors_are_needed() -> None:
    described = menu_manifest(SHAPES)
    calibration = dataclasses.replace(menu_calibration(described, BATCH), errors={})
    with pytest.raises(StateError, match="no gradient errors"):
        plan(described, calibration, None, allocation="per-layer")
    with pytest.raises(StateError, match="no gradient errors"):
        plan(described, None, None, allocation="per-layer")


@pytest.mark.parametrize(
    ("how", "pattern"),
    [
        ({"allocation": "best"}, "choose one of: per-layer, uniform"),
        ({"allocation": "per-layer", "epsilon": 0.5}, "leave out epsilon"),
        ({"allocation": "per-layer", "codec": "dct", "rate": 2.0}, "leave out codec, rate"),
        ({"epsilon": 0.5, "rate": 10.0}, "give one of them"),
        ({"rate": 10.0, "codec": "hosvd"}, "a rate is for codecs that count elements; 'hosvd' has none"),
        ({"rate": 0.5, "codec": "dct"}, "at least 1"),
        ({"codec": "svd"}, "choose one of: dct, dense, hosvd, int8"),
    ],
)
def test_senseless_choices(how: dict[str, object], pattern: str) -> None:
    described = menu_manifest(SHAPES)
    with pytest.raises(UsageError, match=pattern):
        plan(described, menu_calibration(described, BATCH), None, **how)


def test_fifty_layers_are_planned_within_seconds() -> None:
    described = menu_manifest([(8, 24, 24)] * 50)
    calibration = menu_calibration(described, BATCH)
    low, high = (peak_of(described, calibration, codec) for codec in ("int8", "dense"))
    budget = (low + high) // 2
    begin = time.process_time()
    found = plan(described, calibration, budget, allocation="per-layer")
    assert time.process_time() - begin < 20.0
    assert found.error is not None and found.error_bound is not None
    assert found.predicted_peak_bytes <= budget
    assert found.error - found.error_bound <= 0.05 * found.error
    assert np.isfinite(found.error)
