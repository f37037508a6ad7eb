"""``--allocation per-layer`` with the real engine: the budget on every step, and the same bits after ``kill -9``."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import pytest

from edgetune.agent.summary import report, status
from edgetune.planning.selection import described
from edgetune.telemetry import runlog
from edgetune.units import MIB
from tests.engines.workshop import bundle_of, same_bits
from tests.system.device import final_state, last_step, make_images, run, start, trained

MENU = "hosvd+svd+int8+dense"
OPTIONS: dict[str, Any] = {"allocation": "per-layer", "batch": 8, "epochs": 8, "checkpoint_every": 5}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("images"), bundle_of(MENU), 40)


def test_a_mixed_plan_keeps_the_budget_and_survives_a_kill(images: Path, tmp_path: Path) -> None:
    bundle, whole = bundle_of(MENU), tmp_path / "whole"
    # A sixth of what dense training saves: int8 alone is not enough, and dense training fits with one sample only.
    saved = sum(4 * 8 * math.prod(spec.shape) for spec in bundle.manifest.saved) // 6
    options = {**OPTIONS, "activation_budget_bytes": saved, "budget_bytes": 160 * MIB}
    result = run(bundle, images, whole, **options)
    assert result["error"] is None, result
    records = list(runlog.read(whole / "log.jsonl"))
    (compared,) = (r for r in records if r["event"] == "compared")
    assert compared["samples"] == 1 and not compared["left_out"]
    for record in records:
        assert record.get("measured_peak_bytes", 0) <= 160 * MIB
    plan = status(whole)["plan"]
    assert plan["allocation"] == "per-layer" and len(set(plan["selection"].values())) > 1 and plan["ranks"]
    assert plan["saved_bytes"] <= saved
    told = report(whole)
    assert (told["allocation"], told["codecs"]) == ("per-layer", described(plan["selection"]))
    state = tmp_path / "killed"
    agent = start(bundle, images, state, **options)
    try:
        until = time.monotonic() + 60
        while last_step(state) < 12 and agent.poll() is None and time.monotonic() < until:
            time.sleep(0.005)
    finally:
        agent.kill()
    assert agent.wait() == -9, "the agent ended before it could be killed"
    assert 12 <= last_step(state) < last_step(whole)
    assert run(bundle, images, state, **options)["error"] is None
    assert same_bits(final_state(state), final_state(whole)) and trained(state) == trained(whole)
    assert status(state)["plan"]["selection"] == plan["selection"]
