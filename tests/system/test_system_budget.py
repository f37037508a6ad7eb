"""The promise of the budget, held to the process's own high-water mark on every step that is logged."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from edgetune.agent import baseline
from edgetune.errors import BudgetError
from edgetune.planning.plan import make_plan
from edgetune.telemetry import runlog
from edgetune.units import MIB
from tests.engines.workshop import bundle_of
from tests.system.device import make_images, run

BATCH = 32
LAST = 5
WHOLE: dict[str, Any] = {"trained": LAST, "tail_micro_batch": BATCH}
"""The knobs that a planner would turn for a lossless codec."""


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("images"), bundle_of("hosvd", "large", last=LAST), 80)


@pytest.fixture(scope="module")
def runtime_bytes() -> int:
    """What a process on a device takes before anything of a plan is in memory."""
    return baseline.runtime_bytes(bundle_of("hosvd", "large", last=LAST))


@pytest.fixture(scope="module")
def least(images: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """How the agent refuses a budget of 1 MiB."""
    bundle = bundle_of("hosvd", "large", last=LAST)
    return run(bundle, images, tmp_path_factory.mktemp("least") / "state", batch=BATCH, budget_bytes=MIB)


def budget_too_small_for_dense(least: dict[str, Any], runtime_bytes: int) -> int:
    """Return a budget half way between what hosvd needs at least and what dense training needs."""
    dense = bundle_of("dense", "large", last=LAST).manifest
    with pytest.raises(BudgetError) as caught:
        make_plan(dense, batch=BATCH, calibration=None, budget_bytes=MIB, runtime_bytes=runtime_bytes, **WHOLE)
    assert caught.value.least_bytes > least["least_bytes"] + 25 * MIB
    return (caught.value.least_bytes + int(least["least_bytes"])) // 2


def test_a_budget_that_rules_out_dense_training_is_kept_on_every_step(
    least: dict[str, Any], runtime_bytes: int, images: Path, tmp_path: Path
) -> None:
    budget_bytes = budget_too_small_for_dense(least, runtime_bytes)
    dense = run(
        bundle_of("dense", "large", last=LAST), images, tmp_path / "dense", batch=BATCH, budget_bytes=budget_bytes,
        **WHOLE,
    )  # fmt: skip
    assert dense["error"] == "BudgetError" and dense["least_bytes"] > budget_bytes
    state = tmp_path / "hosvd"
    bundle = bundle_of("hosvd", "large", last=LAST)
    result = run(bundle, images, state, batch=BATCH, budget_bytes=budget_bytes, epochs=2, checkpoint_every=2)
    assert result["error"] is None
    steps = runlog.steps(state / "log.jsonl")
    assert len(steps) == result["step"] >= 3
    for record in steps:
        assert record["measured_peak_bytes"] <= record["budget_bytes"] == budget_bytes
        assert record["predicted_peak_bytes"] <= budget_bytes
        assert 0 < record["epsilon"] <= 1
    # calibration and evaluation are part of the process too
    others = [r for r in runlog.read(state / "log.jsonl") if r["event"] in ("calibrated", "evaluated")]
    assert others and all(record["measured_peak_bytes"] <= budget_bytes for record in others)
    # the first step has corrected the plan: from then on the prediction is close
    for record in steps[1:]:
        if record["samples"] == BATCH:
            assert record["measured_peak_bytes"] == pytest.approx(record["predicted_peak_bytes"], rel=0.1)


def test_an_infeasible_budget_names_the_least_one(least: dict[str, Any]) -> None:
    assert least["error"] == "BudgetError" and least["exit_code"] == BudgetError.exit_code
    assert f"({least['least_bytes']} bytes)" in least["message"]
    assert "the budget of 1.00 MiB (1048576 bytes) is too small" in least["message"]
    # what drives it, and what to do
    assert re.search(r"its largest parts are \w+ [\d.]+ MiB, .*the peak is at \w+/", least["message"])
    assert "choose a smaller batch" in least["message"]


def test_the_least_budget_works(least: dict[str, Any], images: Path, tmp_path: Path) -> None:
    bundle = bundle_of("hosvd", "large", last=LAST)
    # In another process, to the byte: what its runtime takes is remembered.
    less = run(bundle, images, tmp_path / "less", batch=BATCH, budget_bytes=least["least_bytes"] - 1)
    assert less["error"] == "BudgetError" and less["least_bytes"] == least["least_bytes"]
    budget_bytes = int(least["least_bytes"])
    result = run(bundle, images, tmp_path / "state", batch=BATCH, budget_bytes=budget_bytes, max_steps=2, epochs=2)
    assert result["error"] is None, result
    for record in runlog.steps(tmp_path / "state" / "log.jsonl"):
        assert record["measured_peak_bytes"] <= budget_bytes


@pytest.mark.parametrize("codec", ["dense", "hosvd", "svd"])
def test_the_least_budget_is_exact(codec: str, runtime_bytes: int) -> None:
    manifest = bundle_of(codec, "large", last=LAST).manifest

    def planned(budget_bytes: int) -> int:
        plan = make_plan(
            manifest, batch=BATCH, calibration=None, budget_bytes=budget_bytes, runtime_bytes=runtime_bytes
        )
        return dataclasses.replace(plan, calibration=None).predicted_peak_bytes

    with pytest.raises(BudgetError) as caught:
        planned(MIB)
    least_bytes = caught.value.least_bytes
    assert f"({least_bytes} bytes)" in str(caught.value)
    assert planned(least_bytes) <= least_bytes
    with pytest.raises(BudgetError):
        planned(least_bytes - 1)
