"""A run whose earlier workers were killed for want of memory: it plans with less, and returns to all with time."""

from __future__ import annotations

import dataclasses
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from edgetune.agent.baseline import measure_runtime_apart
from edgetune.agent.config import AgentConfig
from edgetune.agent.deaths import KEPT
from edgetune.agent.loop import run_agent
from edgetune.agent.view import QuietView
from edgetune.bundle import Bundle
from edgetune.errors import MemoryExhaustedError
from edgetune.planning.plan import make_plan
from edgetune.telemetry import runlog
from tests.agent.fakes import Workshop, make_bundle, make_folder

CALM_STEPS = 25
SMALL_BYTES = 10_000  # of a runtime: so that a sixth of the whole can be given up


def run(tmp_path: Path, bundle: Bundle, **changed: Any) -> list[dict[str, Any]]:
    def measure() -> int:
        plan = shop.session.plans[-1]
        return plan.predicted_peak_bytes - plan.correction_bytes if shop.session.step_number else SMALL_BYTES

    shop = Workshop(measure=measure)
    settings: dict[str, Any] = {"batch": 16, "epsilon": None, "holdout": 0, "once": True, "quiet": True, **changed}
    config = AgentConfig(data=tmp_path / "data", state=tmp_path / "state", **settings)
    parts = dataclasses.replace(shop.parts(), runtime_bytes=lambda *_: SMALL_BYTES)
    run_agent(bundle, config, parts=parts, view=QuietView())
    return list(runlog.read(tmp_path / "state" / "log.jsonl"))


def died(tmp_path: Path, lowerings: int, planned_bytes: int | None, at_step: int = 0) -> None:
    (tmp_path / "state").mkdir(exist_ok=True)
    found = {"lowerings": lowerings, "at_step": at_step, "calm_steps": CALM_STEPS, "planned_bytes": planned_bytes}
    (tmp_path / "state" / "deaths.json").write_text(json.dumps(found))


def full_bytes(bundle: Bundle) -> int:
    return make_plan(bundle.manifest, batch=16, calibration=None, runtime_bytes=SMALL_BYTES).predicted_peak_bytes


def test_the_next_worker_plans_with_less_and_returns_to_all(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    make_folder(tmp_path / "data", 20)
    whole = full_bytes(bundle)
    ceiling = round(whole * KEPT)
    died(tmp_path, lowerings=1, planned_bytes=whole)
    records = run(tmp_path, bundle, budget_bytes=whole + 5000, epochs=13)
    lowered = next(record for record in records if record["event"] == "degrade")
    assert "earlier workers were killed" in lowered["reason"] and lowered["step"] == 0
    steps = {record["step"]: record for record in records if record["event"] == "step"}
    assert all(record["predicted_peak_bytes"] <= ceiling for step, record in steps.items() if step <= CALM_STEPS)
    assert steps[max(steps)]["predicted_peak_bytes"] >= whole
    assert [record["event"] for record in records].count("recover") == 1


def test_a_resumed_run_heeds_them_and_never_waits_for_what_cannot_come(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    make_folder(tmp_path / "data", 20)
    run(tmp_path, bundle, budget_bytes=full_bytes(bundle) + 5000, epochs=1)
    died(tmp_path, lowerings=9, planned_bytes=1, at_step=2)  # less than any plan needs
    records = run(tmp_path, bundle, budget_bytes=full_bytes(bundle) + 5000, epochs=2)
    assert [record["event"] for record in records].count("degrade") == 1
    # started again, it is lower already than the plan that died, and stays as it is
    died(tmp_path, lowerings=9, planned_bytes=full_bytes(bundle), at_step=2)
    records = run(tmp_path, bundle, budget_bytes=full_bytes(bundle) + 5000, epochs=3)
    events = [record["event"] for record in records]
    assert events[-1] == "stopped" and "paused" not in events and events.count("degrade") == 1
    peaks = [record["predicted_peak_bytes"] for record in records if record["event"] == "step"]
    assert peaks[-1] < peaks[0], "half way to the least that there is"


def test_a_measurement_that_the_kernel_killed_is_a_lack_of_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "run", lambda line, **_: subprocess.CompletedProcess(line, -9, "", ""))
    with pytest.raises(MemoryExhaustedError, match="was killed"):
        measure_runtime_apart(make_bundle(tmp_path / "bundle"))


def test_no_death_no_change(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    make_folder(tmp_path / "data", 8)
    died(tmp_path, lowerings=0, planned_bytes=1)
    assert "degrade" not in [
        record["event"] for record in run(tmp_path, bundle, budget_bytes=full_bytes(bundle) + 5000)
    ]
