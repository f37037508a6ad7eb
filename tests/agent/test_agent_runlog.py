"""The run log is bounded: what is full is put aside, the oldest is deleted, and readers see one log."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgetune.agent import supervisor
from edgetune.agent.journal import Journal
from edgetune.agent.service.states import State
from edgetune.agent.view import QuietView
from edgetune.telemetry import runlog
from edgetune.telemetry.runlog import RunLog


def test_a_log_is_bounded_and_read_as_one(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "log", segment_bytes=2000, kept=3)
    for step in range(400):
        log.append("step", step=step, loss=0.5)
        files = [path.stat().st_size for path in tmp_path.iterdir()]
        assert len(files) <= 4 and sum(files) <= 4 * 2100
        seen = [record["step"] for record in runlog.read(tmp_path / "log")]
        assert seen == list(range(seen[0], step + 1)), "nothing is missing in between, nothing twice"
    assert 60 < len(seen) < 400 and log.begun > 5
    numbers = sorted(int(path.suffix[1:]) for path in tmp_path.glob("log.*"))
    assert numbers == list(range(log.begun - 2, log.begun + 1))
    log.close()
    again = RunLog(tmp_path / "log", segment_bytes=2000, kept=3)
    while again.begun == 0:
        again.append("step", step=len(seen))
    assert (tmp_path / f"log.{log.begun + 1}").exists() and not (tmp_path / f"log.{log.begun - 2}").exists()
    assert runlog.steps(tmp_path / "log", ("step",))[0].keys() == {"step"}


def test_a_reader_misses_nothing_while_another_file_is_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = RunLog(tmp_path / "log", segment_bytes=600, kept=50)
    for step in range(40):
        log.append("step", step=step)
    listed, real = [0], runlog._segments

    def meddle(path: Path) -> list[tuple[int, Path]]:
        found = real(path)
        listed[0] += 1
        if listed[0] == 1:  # between the look at the folder and the opening of its files
            begun = log.begun
            while log.begun == begun:
                log.append("step", step=40)
        return found

    monkeypatch.setattr(runlog, "_segments", meddle)
    seen = [record["step"] for record in runlog.read(tmp_path / "log")]
    assert sorted(set(seen)) == list(range(41)) and seen == sorted(seen)


def test_a_state_is_told_at_the_beginning_of_every_file(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "log", segment_bytes=1000, kept=1)
    journal = Journal(log, QuietView())
    journal.enter(State.PAUSED, "'serve' runs")
    for step in range(100):
        journal.event("step", step=step)
    records = list(runlog.read(tmp_path / "log"))
    states = [record for record in records if record["event"] == "state"]
    assert records[1] == states[0] and states[0]["reason"] == "'serve' runs" and states[0]["continued"]
    assert states[0]["since"] <= states[0]["time"] and log.begun > 3


def test_the_supervisor_finds_the_last_plan_behind_a_new_file(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "log.jsonl", segment_bytes=500, kept=3)
    assert supervisor.planned_bytes(str(tmp_path)) is None
    log.append("planned", predicted_peak_bytes=7)
    log.append("planned", predicted_peak_bytes=8)
    while log.begun < 2:
        log.append("waiting", message="for samples")
    assert supervisor.planned_bytes(str(tmp_path)) == 8
    assert supervisor.full_logs(str(tmp_path)) == ["log.jsonl.1", "log.jsonl.2"]
