"""The search for a plan: what it promises, as laws over random bundles, spectra and budgets."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgetune.bundle import Manifest
from edgetune.errors import BudgetError, BundleError, StateError, UsageError
from edgetune.planning.plan import Plan, make_plan, predict
from edgetune.planning.prediction import saved_bytes_by_tensor
from edgetune.planning.spectra import Calibration, breakpoints, identity_calibration, ranks_at
from tests.planning.synthetic import decaying_calibration, manifest

RUNTIME = 5000
SHAPE = st.tuples(st.sampled_from([4, 8, 12]), st.integers(1, 7), st.integers(1, 7))
relaxed = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])


@st.composite
def cases(draw: st.DrawFn) -> tuple[Manifest, Calibration, int]:
    """A bundle that truncates something, spectra for it, and a batch."""
    described = manifest(
        draw(st.lists(SHAPE, min_size=1, max_size=4)),
        letters=draw(st.sampled_from(["bchw", "chw", "c", "bhw"])),
        groups=draw(st.sampled_from([1, 2])),
        trunk=draw(st.booleans()),
        workspace_elements=draw(st.sampled_from([0, 100])),
    )
    batch = draw(st.integers(1, 12))
    return described, decaying_calibration(described, draw(st.integers(1, 12)), draw(st.integers(0, 99))), batch


def peak_at(described: Manifest, calibration: Calibration, batch: int, epsilon: float, micro_batch: int = 1) -> int:
    ranks = ranks_at(described, calibration, epsilon, batch)
    return predict(described, batch=batch, micro_batch=micro_batch, ranks=ranks, runtime_bytes=RUNTIME).peak_bytes


def saved_at(described: Manifest, calibration: Calibration, batch: int, epsilon: float) -> int:
    ranks = ranks_at(described, calibration, epsilon, batch)
    return sum(sum(t.values()) for t in saved_bytes_by_tensor(described, batch=batch, ranks=ranks).values())


def between(low: int, high: int, share: float) -> int:
    return low + round(share * (high - low))


@relaxed
@given(cases(), st.floats(0.01, 1.0), st.floats(0.01, 1.0))
def test_peak_and_saved_bytes_never_fall_as_epsilon_rises(
    case: tuple[Manifest, Calibration, int], one: float, other: float
) -> None:
    low, high = sorted((one, other))
    assert peak_at(*case, low) <= peak_at(*case, high)
    assert saved_at(*case, low) <= saved_at(*case, high)


@relaxed
@given(cases(), st.floats(0.0, 1.1))
def test_the_chosen_epsilon_fits_and_the_next_does_not(case: tuple[Manifest, Calibration, int], share: float) -> None:
    described, calibration, batch = case
    steps = breakpoints(calibration)
    budget = between(peak_at(*case, steps[0]), peak_at(*case, 1.0), share)
    plan = make_plan(described, batch=batch, calibration=calibration, budget_bytes=budget, runtime_bytes=RUNTIME)
    assert plan.epsilon is not None
    assert plan.predicted_peak_bytes <= budget
    # Against a walk over every step, without any assumption of order.
    assert plan.epsilon == max(e for e in steps.tolist() if peak_at(*case, e) <= budget)
    assert plan.ranks == ranks_at(described, calibration, plan.epsilon, batch)
    # The micro-batch: a power of two that fits, and twice as many would not (or may not be).
    runs = plan.micro_batch
    assert runs & (runs - 1) == 0
    assert plan.predicted_peak_bytes == peak_at(*case, plan.epsilon, runs)
    assert 2 * runs > min(batch, 32) or peak_at(*case, plan.epsilon, 2 * runs) > budget


@relaxed
@given(cases(), st.floats(0.0, 1.0))
def test_an_activation_budget_is_held(case: tuple[Manifest, Calibration, int], share: float) -> None:
    described, calibration, batch = case
    steps = breakpoints(calibration)
    budget = between(saved_at(*case, steps[0]), saved_at(*case, 1.0), share)
    plan = make_plan(
        described, batch=batch, calibration=calibration, activation_budget_bytes=budget, runtime_bytes=RUNTIME
    )
    assert plan.epsilon is not None
    assert plan.epsilon == max(e for e in steps.tolist() if saved_at(*case, e) <= budget)
    assert plan.saved_bytes == saved_at(*case, plan.epsilon) <= budget
    assert plan.micro_batch == min(8, batch)


@relaxed
@given(cases(), st.sampled_from([None, 0.5, 1.0]))
def test_the_least_budget_is_tight(case: tuple[Manifest, Calibration, int], epsilon: float | None) -> None:
    described, calibration, batch = case

    def attempt(budget: int) -> Plan:
        return make_plan(
            described,
            batch=batch,
            calibration=calibration,
            budget_bytes=budget,
            epsilon=epsilon,
            runtime_bytes=RUNTIME,
        )

    with pytest.raises(BudgetError) as caught:
        attempt(1)
    least = caught.value.least_bytes
    assert attempt(least).predicted_peak_bytes == least
    with pytest.raises(BudgetError) as again:
        attempt(least - 1)
    assert again.value.least_bytes == least
    assert f"{least} bytes" in str(again.value)


@relaxed
@given(cases())
def test_the_least_activation_budget_is_tight(case: tuple[Manifest, Calibration, int]) -> None:
    described, calibration, batch = case

    def attempt(budget: int) -> Plan:
        return make_plan(
            described, batch=batch, calibration=calibration, activation_budget_bytes=budget, runtime_bytes=RUNTIME
        )

    with pytest.raises(BudgetError, match="activation budget") as caught:
        attempt(1)
    least = caught.value.least_bytes
    assert attempt(least).saved_bytes == least
    with pytest.raises(BudgetError):
        attempt(least - 1)


@relaxed
@given(cases(), st.floats(0.05, 1.0), st.integers(-100, 100))
def test_a_plan_round_trips_and_adds_up(
    case: tuple[Manifest, Calibration, int], epsilon: float, correction: int
) -> None:
    described, calibration, batch = case
    plan = make_plan(
        described,
        batch=batch,
        calibration=calibration,
        epsilon=epsilon,
        runtime_bytes=RUNTIME,
        correction_bytes=correction,
    )
    again = Plan.from_json(plan.to_json())
    assert again == plan
    assert again.calibration is None
    assert again.symbols() == plan.symbols()
    assert sum(plan.ledger.values()) == plan.predicted_peak_bytes
    assert plan.epsilon == epsilon
    assert plan.calibration is calibration
    assert plan.saved_bytes == sum(row.stored_bytes for row in plan.rows)
    assert plan.dense_saved_bytes == sum(row.dense_bytes for row in plan.rows)
    for row in plan.rows:
        assert row.captured_energy is not None
        modes = len(row.ranks)
        if calibration.batch <= batch or "b" not in row.ranks:  # else a cap on the batch's rank may cost energy
            assert row.captured_energy >= max(0.0, 1 - modes * (1 - epsilon)) - 1e-9
        assert row.ratio == row.dense_bytes / row.stored_bytes


def test_symbols_are_those_of_the_bundle() -> None:
    described = manifest([(8, 4, 4)], letters="chw")
    plan = make_plan(described, batch=3, calibration=None, epsilon=0.5, runtime_bytes=RUNTIME)
    assert plan.symbols() == {"batch": 3, "rank.l0.c": 4, "rank.l0.h": 2, "rank.l0.w": 2}
    assert set(plan.symbols()) == {"batch"} | {mode.rank for mode in described.saved[0].modes}


def test_without_budgets_all_is_kept() -> None:
    described = manifest([(8, 4, 4)])
    plan = make_plan(described, batch=16, calibration=None, runtime_bytes=RUNTIME)
    assert plan.epsilon == 1.0
    assert plan.ranks == {"l0": {"b": 16, "c": 8, "h": 4, "w": 4}}
    assert plan.micro_batch == 8
    assert plan.rows[0].captured_energy == 1.0
    assert plan.calibration is not None
    assert plan.calibration.samples == 0


def test_without_data_the_energy_is_unknown() -> None:
    plan = make_plan(manifest([(8, 4, 4)]), batch=4, calibration=None, epsilon=0.5, runtime_bytes=RUNTIME)
    assert plan.rows[0].captured_energy is None


def test_a_lossless_codec_has_no_epsilon() -> None:
    described = manifest([(8, 4, 4), (4, 2, 2)], letters="")
    for epsilon in (None, 0.5):
        plan = make_plan(described, batch=4, calibration=None, epsilon=epsilon, runtime_bytes=RUNTIME)
        assert (plan.epsilon, plan.ranks, plan.codec) == (None, {}, "dense")
        assert plan.saved_bytes == plan.dense_saved_bytes == 4 * 4 * (8 * 16 + 4 * 4)
        assert [(row.ratio, row.captured_energy, row.ranks) for row in plan.rows] == [(1.0, None, {})] * 2
        assert Plan.from_json(plan.to_json()) == plan
    with pytest.raises(BudgetError, match="least is") as caught:
        make_plan(described, batch=4, calibration=None, budget_bytes=1, runtime_bytes=RUNTIME)
    least = caught.value.least_bytes
    plan = make_plan(described, batch=4, calibration=None, budget_bytes=least, runtime_bytes=RUNTIME)
    assert (plan.predicted_peak_bytes, plan.micro_batch) == (least, 1)


def test_an_infeasible_budget_says_what_drives_it() -> None:
    described = manifest([(8, 4, 4)], workspace_elements=10**5)
    with pytest.raises(BudgetError) as caught:
        make_plan(
            described,
            batch=4,
            calibration=None,
            budget_bytes=2**20,
            activation_budget_bytes=1,
            runtime_bytes=2**30,
        )
    text = str(caught.value)
    assert caught.value.least_bytes > 2**30
    assert "runtime 1.00 GiB, workspace 1.53 MiB" in text
    assert "the peak is at train/node1" in text
    assert "the activation budget of 1 B (1 bytes) is too small" in text
    assert "smaller batch" in text


def test_a_correction_moves_the_plan() -> None:
    described = manifest([(8, 7, 7)])
    calibration = decaying_calibration(described, 8, 3)
    budget = peak_at(described, calibration, 8, 0.9)

    def epsilon(correction: int) -> float:
        plan = make_plan(
            described,
            batch=8,
            calibration=calibration,
            budget_bytes=budget,
            runtime_bytes=RUNTIME,
            correction_bytes=correction,
        )
        assert plan.predicted_peak_bytes <= budget
        assert plan.correction_bytes == correction
        assert plan.epsilon is not None
        return plan.epsilon

    assert epsilon(200) < epsilon(0) <= epsilon(-200)


def test_what_the_budget_has_left_goes_to_speed_and_nothing_else_does() -> None:
    described = manifest([(32, 9, 9), (2, 3, 3), (16, 9, 9), (1, 2, 2), (24, 9, 9)], letters="c")
    known = decaying_calibration(described, 8, 3)
    kinds: list[str] = []
    roomy = make_plan(described, batch=8, calibration=known, runtime_bytes=0, epsilon=0.9, micro_batch=1, memory="fast")
    for budget_bytes in range(roomy.predicted_peak_bytes - 25_000, roomy.predicted_peak_bytes + 2500, 2500):
        how = {
            "batch": 8,
            "calibration": known,
            "runtime_bytes": 0,
            "budget_bytes": budget_bytes,
            "epsilon": 0.9,
            "micro_batch": 1,
        }
        try:
            lean = make_plan(described, **how)  # type: ignore[arg-type]
        except BudgetError:
            continue
        auto = make_plan(described, **how, memory="auto")  # type: ignore[arg-type]
        assert auto.predicted_peak_bytes <= budget_bytes and sum(auto.ledger.values()) == auto.predicted_peak_bytes
        same = (auto.ranks, auto.micro_batch, auto.tail_micro_batch, auto.trained, auto.saved_bytes)
        assert same == (lean.ranks, lean.micro_batch, lean.tail_micro_batch, lean.trained, lean.saved_bytes)
        assert auto.predicted_peak_bytes >= lean.predicted_peak_bytes and Plan.from_json(auto.to_json()) == auto
        kinds.append(auto.memory)
    assert kinds[0] == "lean" and kinds[-1] == "fast" and roomy.memory == "fast"
    free = make_plan(described, batch=8, calibration=known, runtime_bytes=0, epsilon=0.9, memory="auto")
    assert free.memory == "fast"
    with pytest.raises(UsageError, match=r"'huge' is unknown; choose one of: auto, fast, lean"):
        make_plan(described, batch=8, calibration=known, runtime_bytes=0, memory="huge")


@pytest.mark.parametrize(
    ("arguments", "pattern"),
    [
        ({"batch": 0}, "batch is 0"),
        ({"epsilon": 1.5}, "epsilon is 1.5"),
        ({"budget_bytes": 0}, "the budget is 0"),
        ({"activation_budget_bytes": -1}, "the activation budget is -1"),
    ],
)
def test_senseless_arguments(arguments: dict[str, float], pattern: str) -> None:
    with pytest.raises(UsageError, match=pattern):
        make_plan(manifest([(8, 4, 4)]), **{"batch": 4, "calibration": None, "runtime_bytes": 0, **arguments})  # type: ignore[arg-type]


def test_another_bundles_calibration_is_refused() -> None:
    calibration = identity_calibration(manifest([(8, 4, 4)]), 4)
    with pytest.raises(StateError, match="another bundle"):
        make_plan(manifest([(8, 5, 4)]), batch=4, calibration=calibration, runtime_bytes=0)


def test_a_plan_that_is_not_one() -> None:
    with pytest.raises(UsageError, match="not JSON"):
        Plan.from_json("{")
    with pytest.raises(BundleError, match="missing fields"):
        Plan.from_json("{}")


def test_a_large_network_is_planned_within_a_second() -> None:
    """Five layers of four modes and graphs of more than six hundred tensors each, as in a ResNet-50."""
    described = manifest([(2048, 7, 7), (512, 14, 14), (1024, 14, 14), (512, 7, 7), (512, 7, 7)], filler=300)
    assert min(len(described.graphs[name].tensors) for name in ("train", "trunk", "predict")) > 600
    calibration = decaying_calibration(described, 64, 0)
    low, high = (peak_at(described, calibration, 64, e) for e in (float(breakpoints(calibration)[0]), 1.0))
    start = time.process_time()
    plan = make_plan(
        described, batch=64, calibration=calibration, budget_bytes=(low + high) // 2, runtime_bytes=RUNTIME
    )
    assert time.process_time() - start < 1.0
    assert plan.epsilon is not None
    assert np.isclose(plan.predicted_peak_bytes, (low + high) // 2, rtol=0.2)
