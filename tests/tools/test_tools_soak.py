"""The soak's checks on logs that are as they should be, and on logs that are not; the thief really takes memory."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgetune.telemetry.available import available_bytes
from edgetune.units import MIB
from tools.soak import ROOT, verdict


def step(number: int, limit: int = 100, peak: int = 90, epsilon: float = 1.0) -> dict[str, Any]:
    return {
        "event": "step", "step": number, "effective_budget_bytes": limit, "measured_peak_bytes": peak,
        "epsilon": epsilon, "ranks": {}, "planned_bytes": limit, "predicted_peak_bytes": limit,
    }  # fmt: skip


def good() -> list[dict[str, Any]]:
    down = {"event": "degrade", "reason": "less memory"}
    up = {"event": "recover", "reason": "more memory"}
    return [step(1), step(2), down, step(3, 80, 81, 0.5), step(4, 80, 79, 0.5), up, step(5)]


def test_a_log_in_order_has_no_violation() -> None:
    found = verdict(good(), 5)
    assert found.violations == [] and (found.steps, found.plans, found.limits) == (5, 2, 2)
    assert (found.over, found.graces, found.largest_over_bytes) == (1, 1, 1), "step 3 is the grace step"


@pytest.mark.parametrize(
    ("spoil", "violation"),
    [
        (lambda log: log[4].update(measured_peak_bytes=81), "and no grace step"),
        (lambda log: log[5].update(reason=""), "the log says nothing of it"),
        (lambda log: log.pop(2), "the log says nothing of it"),
        (lambda log: log.pop(1), "step 3 follows step 1"),
        (lambda log: log.pop(), "4 steps in the log, expected 5"),
        (lambda log: log.pop(5), "not one recover was seen"),
    ],
)
def test_each_violation_is_seen(spoil: Callable[[list[dict[str, Any]]], Any], violation: str) -> None:
    log = good()
    spoil(log)
    assert any(violation in one for one in verdict(log, 5).violations)


def test_the_thief_takes_memory_and_gives_it_back(tmp_path: Path) -> None:
    target = tmp_path / "available"
    target.write_text("0")
    held = [sys.executable, str(ROOT / "tools" / "memory_thief.py"), str(target)]
    before = available_bytes().bytes
    target.write_text(str(before - 32 * MIB))
    thief = subprocess.Popen(held)
    try:
        status, until = Path(f"/proc/{thief.pid}/status"), time.monotonic() + 20
        resident = 0
        while resident < 16 << 10 and time.monotonic() < until:  # other processes give memory back, or take it
            target.write_text(str(available_bytes().bytes - 32 * MIB))
            time.sleep(0.05)
            line = next(text for text in status.read_text().splitlines() if text.startswith("VmRSS"))
            resident = int(line.split()[1])
        assert resident >= 16 << 10
        target.unlink()
        assert thief.wait(20) == 0
    finally:
        thief.kill()
        thief.wait()
