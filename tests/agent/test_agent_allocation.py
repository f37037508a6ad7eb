"""What the agent decides where each saved tensor may have its own codec: on menus of numbers, with known gradients."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgetune.agent.budget import PER_LAYER, Budgeter, PlanRequest, same_shape
from edgetune.agent.comparing import Compared, chooses, compare
from edgetune.agent.config import AgentConfig
from edgetune.bundle import Array, GraphSpec, TensorUse
from edgetune.engines.gradient_error import Batch
from edgetune.errors import BudgetError, UsageError
from edgetune.planning.calibration import Calibration, Spectrum
from edgetune.planning.candidates import Limits
from edgetune.planning.plan import Plan, make_plan
from edgetune.planning.rates import comparable
from edgetune.planning.selection import described
from tests.agent.fakes import RUNTIME_BYTES, FakeMeter
from tests.engines.test_gradient_error import BATCH, DESCRIBED, Known
from tests.planning.menus import menu_calibration, menu_manifest

SHAPES = [(8, 32, 32), (8, 32, 32), (8, 32, 32), (8, 16, 16), (8, 16, 16)]
MANIFEST = menu_manifest(SHAPES)
KNOWN = menu_calibration(MANIFEST, BATCH)


def budgeter(budget_bytes: int | None, **changed: Any) -> Budgeter:
    # All layers, whatever the budget: what is asked is what becomes of each.
    asked = {"allocation": PER_LAYER, "trained": len(SHAPES), **changed}
    request = PlanRequest(BATCH, budget_bytes, None, None, **asked)
    return Budgeter(MANIFEST, request, RUNTIME_BYTES)


def least_bytes(**changed: Any) -> int:
    with pytest.raises(BudgetError) as caught:
        budgeter(1, **changed)
    return caught.value.least_bytes


def tight() -> int:
    """A budget between the least one and that of dense training."""
    return (least_bytes() + least_bytes(allocation="uniform", codec="dense")) // 2


def test_a_codec_that_is_asked_for_keeps_all() -> None:
    plan = budgeter(None, allocation="uniform", codec="int8").replan(KNOWN)
    assert set(plan.selection.values()) == {"int8"} and plan.allocation == "uniform"
    with pytest.raises(UsageError, match="choose one of"):
        budgeter(None, allocation="uniform", codec="haar")


def test_before_codecs_are_compared_a_lossy_one_comes_before_fewer_layers() -> None:
    least = least_bytes()
    for budget in (least, tight(), least_bytes(allocation="uniform", codec="dense") - 1):
        assert budgeter(budget, trained=None).plan.trained == len(SHAPES)
    assert least_bytes(trained=None) < least
    assert budgeter(least - 1, trained=None).plan.trained < len(SHAPES)


def test_a_codec_is_known_though_no_layer_is_trained_that_it_could_serve() -> None:
    head = dataclasses.replace(MANIFEST.layers[-1], role="head")
    saved = [*MANIFEST.saved[:-1], dataclasses.replace(MANIFEST.saved[-1], options=MANIFEST.saved[-1].options[-1:])]
    manifest = dataclasses.replace(MANIFEST, layers=(*MANIFEST.layers[:-1], head), saved=tuple(saved))
    assert [option.label for option in manifest.saved[-1].options] == ["dense"]
    with pytest.raises(BudgetError, match="the last 0 of 4 layers trained"):
        make_plan(manifest, batch=BATCH, calibration=None, codec="hosvd", budget_bytes=1, runtime_bytes=0)
    with pytest.raises(UsageError, match="keeps no tensor as 'haar'; choose one of: dct, dense, hosvd, int8"):
        make_plan(manifest, batch=BATCH, calibration=None, codec="haar", runtime_bytes=0)


def test_what_excludes_each_other_is_refused_at_once() -> None:
    base = AgentConfig(data=Path("data"), state=Path("state"), allocation=PER_LAYER)
    base.check({})
    for changed in ({"epsilon": 0.9}, {"codec": "int8"}, {"allocation": "by-hand"}):
        with pytest.raises(UsageError, match="--allocation"):
            dataclasses.replace(base, **changed).check({})


def test_before_codecs_are_compared_a_plan_that_fits_is_in_force() -> None:
    assert set(budgeter(None).plan.selection.values()) == {"dense"}, "nothing need be lost yet"
    budget = tight()
    plan = budgeter(budget).plan
    assert plan.predicted_peak_bytes <= budget
    assert budgeter(least_bytes()).plan.predicted_peak_bytes <= least_bytes()


def test_each_tensor_gets_its_own_codec_and_a_smaller_budget_another_selection() -> None:
    budget = tight()
    keeps = budgeter(budget)
    plan = keeps.replan(KNOWN)
    assert plan.allocation == PER_LAYER and len(set(plan.selection.values())) > 1
    assert plan.predicted_peak_bytes <= budget and plan.calibration is KNOWN
    # a step takes more than predicted: solved again with what is left, from the same calibration
    excess = (plan.predicted_peak_bytes - least_bytes()) // 2
    corrected = keeps.correct(plan.predicted_peak_bytes + excess)
    assert corrected.correction_bytes == excess and corrected.predicted_peak_bytes <= budget
    assert corrected.calibration is KNOWN and not same_shape(corrected, plan)
    assert corrected.error is not None and plan.error is not None and corrected.error >= plan.error


def test_a_step_is_compared_with_the_graphs_that_it_runs() -> None:
    big = TensorUse("gram", ("batch", "1000000"), "float32", "transient", 0, 0, "gram")
    calibrate = GraphSpec("c.onnx", "c.flat.onnx", (), (), ("sort",), (big,))
    manifest = dataclasses.replace(MANIFEST, graphs={**MANIFEST.graphs, "calibrate": calibrate})
    request = PlanRequest(BATCH, None, None, None, PER_LAYER)
    small, large = (Budgeter(which, request, RUNTIME_BYTES) for which in (MANIFEST, manifest))
    step_bytes = small.replan(KNOWN).predicted_peak_bytes
    assert large.replan(KNOWN).predicted_peak_bytes > step_bytes + 10_000_000
    assert [keeps.correct(step_bytes + 5000).correction_bytes for keeps in (small, large)] == [5000, 5000]


def test_two_plans_that_differ_in_their_codecs_alone_differ() -> None:
    plan = budgeter(tight()).replan(KNOWN)
    assert not same_shape(plan, dataclasses.replace(plan, selection={**plan.selection, "l0": "other"}))


def test_an_option_whose_error_is_unknown_is_never_chosen() -> None:
    without = {name: {k: v for k, v in table.items() if k != "int8"} for name, table in KNOWN.errors.items()}
    known = dataclasses.replace(KNOWN, errors=without)
    budget = tight()
    assert "int8" in budgeter(budget).replan(KNOWN).selection.values(), "or this shows nothing"
    plan = budgeter(budget).replan(known)
    assert plan.allocation == PER_LAYER and "int8" not in plan.selection.values()
    assert all([o.label for o in s.options] == ["hosvd", "dct", "dense"] for s in comparable(MANIFEST, known).saved)


def test_without_any_error_one_codec_keeps_all() -> None:
    plan = budgeter(tight()).replan(dataclasses.replace(KNOWN, errors={}))
    assert plan.predicted_peak_bytes <= tight()


def drifted(factor: float) -> Calibration:
    """KNOWN of newer data, whose eigenvalues fall faster (factor above 1) or more slowly."""
    spectra = {
        name: {key: Spectrum(s.eigenvalues**factor, s.basis) for key, s in modes.items()}
        for name, modes in KNOWN.spectra.items()
    }
    return dataclasses.replace(KNOWN, spectra=spectra, errors={})


def test_a_refresh_keeps_the_selection_where_the_ranks_suffice_and_else_plans_anew() -> None:
    manifest = menu_manifest(SHAPES, ("hosvd",))  # ranks per layer, nothing else to choose
    assert chooses(manifest)
    errors = {name: {"hosvd": table["hosvd"]} for name, table in KNOWN.errors.items()}
    known = dataclasses.replace(KNOWN, errors=errors, counts={})
    request = PlanRequest(BATCH, None, None, None, PER_LAYER)
    free = Budgeter(manifest, request, RUNTIME_BYTES).replan(known)
    request = dataclasses.replace(request, activation_budget_bytes=free.saved_bytes // 2)
    keeps = Budgeter(manifest, request, RUNTIME_BYTES)
    old = keeps.replan(known)
    assert len({row.epsilon for row in old.rows}) > 1, "or this is a uniform plan"
    newer = drifted(1.5)
    same = keeps.refresh(newer)
    assert (same.selection, same.ranks) == (old.selection, old.ranks)
    assert same.calibration is not None and same.calibration.spectra is newer.spectra
    assert same.calibration.errors is errors, "the next plan needs them"
    other = keeps.refresh(drifted(0.3))
    assert other.allocation == PER_LAYER and other.saved_bytes <= free.saved_bytes // 2
    assert [row.epsilon for row in other.rows] != [row.epsilon for row in old.rows]


# ---- comparing ----------------------------------------------------------------------------------------------------


def compared(
    budget_bytes: int | None, measure: Callable[[], int] = lambda: 0, resettable: bool = True
) -> tuple[Compared, Known, list[int]]:
    session, asked = Known(), list[int]()
    meter = FakeMeter(measure)
    meter.resettable = resettable

    def feed(samples: int) -> list[Batch]:
        asked.append(samples)
        return [((np.full(samples, float(scale)),), np.zeros(samples, np.int64)) for scale in (1, 2)]

    def limits(samples: int, held_bytes: int) -> Limits:
        return Limits(samples, RUNTIME_BYTES, budget_bytes, correction_bytes=held_bytes)

    known = dataclasses.replace(menu_calibration(DESCRIBED, BATCH), errors={})
    return compare(session, DESCRIBED, known, feed, limits, meter), session, asked  # type: ignore[arg-type]


def peaks(plans: list[Plan]) -> list[int]:
    return [plan.predicted_peak_bytes for plan in plans]


def errors(found: Compared) -> dict[str, dict[str, Array]]:
    return {name: dict(table) for name, table in found.calibration.errors.items()}


def test_without_a_budget_all_options_are_compared_on_whole_batches() -> None:
    found, _, asked = compared(None)
    assert asked == [BATCH] == [found.samples] and not found.left_out
    assert {label for table in errors(found).values() for label in table} == {"hosvd", "dct", "int8"}
    assert "compared 6 options on 2 batches of 4 samples" in str(found)


def needed(samples: int) -> int:
    """The least budget with which dense training on ``samples`` can be measured."""
    low, high = 1, 64 << 20
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if compared(middle)[0].samples >= samples else (middle, high)
    return high


def test_less_memory_means_fewer_samples_then_fewer_options_then_none() -> None:
    whole = needed(BATCH)
    exact = compared(whole)[0]
    assert exact.samples == BATCH
    fewer = compared(whole - 1)[0]
    assert fewer.samples == BATCH // 2
    # dct needs more than dense here: its scratch
    assert set(exact.left_out) <= {"dct", "hosvd", "int8"} and exact.left_out.get("dct")
    assert "dct of 2 tensors" in str(exact) and all("int8" in table for table in errors(exact).values())
    none, session, asked = compared(1)
    assert none.samples == 0 and not session.plans and not asked and "one codec keeps all" in str(none)


def test_what_the_meter_finds_beyond_the_prediction_counts_for_the_next_option() -> None:
    budget = needed(BATCH) * 3 // 2
    free, more = compared(budget)[0], compared(budget, lambda: 2 * budget)[0]
    assert not free.left_out and more.left_out == {"hosvd": 2, "dct": 2, "int8": 2}
    assert not compared(budget, lambda: 2 * budget, resettable=False)[0].left_out, "it tells of no single run"


def test_a_selection_is_described_shortly() -> None:
    assert described({"a": "int8", "b": "dense", "c": "int8", "d": "hosvd"}) == "2 int8, 1 dense, 1 hosvd"
