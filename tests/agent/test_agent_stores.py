"""Ledger, checkpoints, run log and state directory: what is on the disk, and what a crash or damage does to it."""

from __future__ import annotations

import json
import os
import sqlite3
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from edgetune.agent import checkpoint
from edgetune.agent.ledger import Ledger, Sample
from edgetune.agent.state import StateDirectory
from edgetune.agent.storage import write_atomic
from edgetune.bundle import Array
from edgetune.errors import StateError
from edgetune.telemetry import runlog
from edgetune.telemetry.runlog import RunLog


def ledger_with(path: Path, count: int) -> Ledger:
    ledger = Ledger(path)
    with ledger.transaction():
        for number in range(count):
            ledger.accept(f"{number}.png", f"hash{number}", (1, 1), 0, holdout=0)
    return ledger


# ---- ledger --------------------------------------------------------------------------------------------------------
def test_marks_count_only_once_flushed(tmp_path: Path) -> None:
    ledger = ledger_with(tmp_path / "l", 3)
    ledger.mark_trained([1, 2], step=1)
    assert {i: p for i, _, p in ledger.trainable()} == {1: 1, 2: 1, 3: 0}
    assert Ledger(tmp_path / "l", read_only=True).counts()["trained"] == 0
    ledger.flush()
    assert Ledger(tmp_path / "l", read_only=True).counts() == {
        "new": 1, "heldout": 0, "trained": 2, "replayable": 0, "quarantined": 0,
    }  # fmt: skip


step_marks = st.tuples(
    st.lists(st.integers(1, 5), unique=True, min_size=1),  # trained
    st.lists(st.integers(1, 5), unique=True, max_size=3),  # of them, or of those before: replayed
    st.sets(st.integers(1, 5), max_size=3),  # in the buffer after the step, if trained
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    steps=st.lists(step_marks, max_size=8), flushed=st.integers(0, 8), kept=st.integers(0, 8), pruned=st.integers(-1, 8)
)
def test_rollback_gives_the_ledger_of_that_step(
    tmp_path_factory: pytest.TempPathFactory,
    steps: list[tuple[list[int], list[int], set[int]]],
    flushed: int,
    kept: int,
    pruned: int,
) -> None:
    """Oracle: a ledger in which only the first ``kept`` steps ever happened."""
    root = tmp_path_factory.mktemp("ledger")

    def rows(ledger: Ledger) -> list[tuple[object, ...]]:
        return [(row.id, row.status, row.step, row.passes, row.replays) for row in ledger.samples()]

    ledger, oracle = ledger_with(root / "a", 5), ledger_with(root / "b", 5)
    seen, buffer, buffer_then = set[int](), set[int](), set[int]()
    for step, (samples, again, wanted) in enumerate(steps, start=1):
        seen |= set(samples)
        before, buffer = buffer, wanted & seen
        for one in (ledger, oracle) if step <= kept else (ledger,):
            one.mark_trained(samples, step)
            one.mark_replayed(seen & set(again), step)
            for sample in before ^ buffer:
                one.mark_kept(sample, sample in buffer)
        if step == flushed:
            ledger.flush(prune_through_step=min(pruned, kept))
        if step <= kept:
            buffer_then = buffer
    dropped = ledger.rollback(kept)
    ledger.flush()
    assert ledger.set_replayable(buffer_then) == []
    oracle.flush()
    assert rows(ledger) == rows(oracle)
    assert {row.id for row in ledger.samples() if row.status == "replayable"} == buffer_then
    assert dropped == sum(len(samples) for samples, _, _ in steps[kept:])
    ledger.close()
    oracle.close()


def test_what_the_buffer_holds_and_was_quarantined_since_is_told(tmp_path: Path) -> None:
    ledger = ledger_with(tmp_path / "l", 3)
    ledger.mark_trained([1, 2], step=1)
    ledger.flush()
    ledger.quarantine([2], "poison", 2)
    assert ledger.set_replayable([1, 2, 99]) == [2, 99]
    assert [row.status for row in ledger.samples()] == ["replayable", "quarantined", "new"]
    ledger.mark_trained([1], step=3)
    ledger.flush()
    assert (ledger.get(1).status, ledger.get(1).passes) == ("replayable", 2), "trained again, it stays in the buffer"


VERSION_1 = """
CREATE TABLE samples (
    id INTEGER PRIMARY KEY, path TEXT NOT NULL, sha256 TEXT NOT NULL, size INTEGER NOT NULL, mtime_ns INTEGER NOT NULL,
    label INTEGER, status TEXT NOT NULL CHECK (status IN ('new', 'heldout', 'trained', 'quarantined')),
    step INTEGER, passes INTEGER NOT NULL DEFAULT 0, reason TEXT, seen_at REAL NOT NULL, changed_at REAL NOT NULL,
    UNIQUE (path, sha256));
CREATE INDEX samples_by_content ON samples (sha256);
CREATE INDEX samples_by_status ON samples (status);
CREATE TABLE visits (step INTEGER, sample INTEGER, previous_step INTEGER, PRIMARY KEY (step, sample));
CREATE TABLE arrivals (label INTEGER PRIMARY KEY, count INTEGER NOT NULL);
INSERT INTO samples VALUES (3, 'a.png', 'h1', 10, 11, 2, 'trained', 7, 2, NULL, 1.5, 2.5);
INSERT INTO samples VALUES (5, 'b.png', 'h2', 20, 21, NULL, 'quarantined', NULL, 0, 'bad', 1.5, 2.5);
INSERT INTO visits VALUES (7, 3, 4);
INSERT INTO arrivals VALUES (2, 9);
PRAGMA user_version=1;
"""
ROWS_OF_1 = [
    Sample(3, "a.png", "h1", 10, 11, 2, "trained", 7, 2, None),
    Sample(5, "b.png", "h2", 20, 21, None, "quarantined", None, 0, "bad"),
]


def test_a_ledger_of_version_1_is_read_and_brought_up_to_date(tmp_path: Path) -> None:
    old = sqlite3.connect(tmp_path / "l")
    old.executescript(VERSION_1)
    old.close()
    reader = Ledger(tmp_path / "l", read_only=True)
    assert list(reader.samples()) == ROWS_OF_1 and reader.counts()["replayable"] == 0
    reader.close()
    ledger = Ledger(tmp_path / "l")
    assert list(ledger.samples()) == ROWS_OF_1
    ledger.mark_replayed([3], 8)
    ledger.mark_kept(3, True)
    ledger.flush()
    assert (ledger.get(3).status, ledger.get(3).replays) == ("replayable", 1)
    assert ledger.rollback(6) == 1, "the visits came along"
    assert (ledger.get(3).step, ledger.get(3).passes, ledger.get(3).replays) == (4, 1, 0)
    with ledger.transaction():
        assert ledger.accept("c.png", "h3", (1, 1), 2, holdout=10, task="night").status == "heldout", (
            "so did the counts"
        )
    ledger.close()
    again = Ledger(tmp_path / "l")
    assert (again.get(6).task, again.get(3).task) == ("night", None)
    again.close()


def test_a_migration_that_is_broken_off_leaves_the_old_ledger(tmp_path: Path) -> None:
    old = sqlite3.connect(tmp_path / "l")
    old.executescript(VERSION_1 + "CREATE TABLE replayed (step INTEGER);")  # in the way
    old.close()
    with pytest.raises(sqlite3.OperationalError, match="already exists"):
        Ledger(tmp_path / "l")
    reader = Ledger(tmp_path / "l", read_only=True)
    assert list(reader.samples()) == ROWS_OF_1
    reader.close()


def test_quarantine_is_immediate_and_survives_a_rollback(tmp_path: Path) -> None:
    ledger = ledger_with(tmp_path / "l", 3)
    ledger.mark_trained([1], step=1)
    ledger.flush()
    ledger.quarantine([1], "poison", 2)
    ledger.rollback(0)
    first = next(Ledger(tmp_path / "l", read_only=True).samples())
    assert (first.status, first.reason) == ("quarantined", "poison")
    assert [i for i, _, _ in ledger.trainable()] == [2, 3]


def test_only_what_is_over_is_finished(tmp_path: Path) -> None:
    ledger = ledger_with(tmp_path / "l", 8)
    with ledger.transaction():
        ledger.accept("0.png", "changed", (1, 1), 0, holdout=0)  # 9: a newer content of the first path
    ledger.mark_trained([1, 2, 3, 4, 5], step=1)
    ledger.mark_trained([1, 2, 3, 4], step=2)
    ledger.mark_kept(2, True)
    ledger.flush(prune_through_step=2)
    ledger.quarantine([6], "poison", 3)
    ledger.mark_replayed([3], step=4)
    assert ledger.finished(2, 0, 9) == [(1, "0.png", True), (4, "3.png", False), (6, "5.png", False)]
    ledger.flush()
    assert [row[0] for row in ledger.finished(2, 0, 9)] == [1, 4, 6], "a rollback may still change the third"
    ledger.flush(prune_through_step=4)
    assert [row[0] for row in ledger.finished(2, 1, 2)] == [3, 4]
    ledger.quarantine([9], "poison", 5)
    assert 9 not in [row[0] for row in ledger.finished(2, 0, 9)], "the newest row's number would be given again"
    ledger.forget([1, 3])
    assert [row.id for row in ledger.samples()] == [2, 4, 5, 6, 7, 8, 9] and len(ledger) == 7
    assert ledger.by_content("hash0") is None


def test_ledgers_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "noise").write_bytes(b"not a database at all" * 100)
    with pytest.raises(StateError, match="damaged"):
        Ledger(tmp_path / "noise")
    ledger = Ledger(tmp_path / "new")
    ledger._db.execute("PRAGMA user_version=99")
    ledger.close()
    with pytest.raises(StateError, match="version 99"):
        Ledger(tmp_path / "new")


# ---- checkpoints ---------------------------------------------------------------------------------------------------
TENSORS: dict[str, Array] = {
    "a": np.arange(7, dtype=np.float32),
    "b/c": np.arange(6, dtype=np.int64).reshape(2, 3)[:, ::-1],
    "empty": np.empty((0, 4), np.float16),
    "flag": np.array([True, False, True]),
    "step": np.array(5, np.int64),
}


def damaged_list(directory: Path) -> tuple[checkpoint.Checkpoint | None, list[str]]:
    seen: list[str] = []
    return checkpoint.load_newest(directory, lambda path: seen.append(path.name)), seen


def test_a_checkpoint_round_trips_and_is_an_ordinary_safetensors_file(tmp_path: Path) -> None:
    path = checkpoint.write(tmp_path, 5, TENSORS, {"epoch": 1, "text": "ε"})
    oracle = load_file(path)
    found, damaged = damaged_list(tmp_path)
    assert found is not None and not damaged and found.step == 5
    assert found.position == {"schema": checkpoint.SCHEMA_VERSION, "step": 5, "epoch": 1, "text": "ε"}
    for name, value in TENSORS.items():
        for read in (oracle[name], found.tensors[name]):
            assert read.dtype == value.dtype and read.shape == value.shape
            np.testing.assert_array_equal(read, value)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_the_last_two_are_kept(tmp_path: Path) -> None:
    for step in (0, 20, 40, 60):
        written = checkpoint.write(tmp_path, step, TENSORS, {})
        oldest = checkpoint.prune(tmp_path, written)
    assert [step for step, _ in checkpoint.listed(tmp_path)] == [60, 40] and oldest == 40


@pytest.mark.parametrize("harm", ["truncate", "flip", "empty"])
def test_a_damaged_checkpoint_is_reported_and_the_previous_used(tmp_path: Path, harm: str) -> None:
    good, bad = (checkpoint.write(tmp_path, step, TENSORS, {}) for step in (20, 40))
    data = bytearray(bad.read_bytes())
    data[-1] ^= 1
    bad.write_bytes({"truncate": bytes(data[:-9]), "flip": bytes(data), "empty": b""}[harm])
    found, damaged = damaged_list(tmp_path)
    assert found is not None and found.path == good and damaged == [bad.name]
    good.write_bytes(b"")
    with pytest.raises(StateError, match="none of the 2 checkpoints"):
        damaged_list(tmp_path)


def test_a_checkpoint_of_another_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "SCHEMA_VERSION", 99)
    checkpoint.write(tmp_path, 1, TENSORS, {})
    monkeypatch.undo()
    with pytest.raises(StateError, match="version 99"):
        damaged_list(tmp_path)


# ---- run log -------------------------------------------------------------------------------------------------------
def test_a_torn_last_line_is_skipped_and_not_continued(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "log")
    log.append("step", step=1, loss=float("nan"), ranks={"a": np.int64(3)}, energy=np.float32(0.5))
    log.close()
    with (tmp_path / "log").open("ab") as stream:
        stream.write(b'{"event": "step", "st')
    assert [record["step"] for record in runlog.read(tmp_path / "log")] == [1]
    RunLog(tmp_path / "log").append("step", step=2)
    records = list(runlog.read(tmp_path / "log"))
    assert [record["step"] for record in records] == [1, 2]
    assert records[0]["loss"] is None and records[0]["ranks"] == {"a": 3} and records[0]["energy"] == 0.5
    assert list(runlog.read(tmp_path / "missing")) == []


def test_of_repeated_steps_the_last_counts(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "log")
    for step, loss in ((1, 1.0), (2, 2.0), (3, 3.0), (2, 2.5)):
        log.append("step", step=step, loss=loss)
    assert [record["loss"] for record in runlog.steps(tmp_path / "log")] == [1.0, 2.5, 3.0]


@given(st.binary(max_size=200))
def test_the_reader_survives_any_bytes(tmp_path_factory: pytest.TempPathFactory, noise: bytes) -> None:
    path = tmp_path_factory.mktemp("log") / "log"
    path.write_bytes(noise + b'\n{"event": "x"}\n')
    assert list(runlog.read(path))[-1] == {"event": "x"}


# ---- state directory -----------------------------------------------------------------------------------------------
def open_state(path: Path, **changed: object) -> StateDirectory:
    return StateDirectory(path, **{"digest": "d", "model": "m", "batch": None, "seed": None, **changed})  # type: ignore[arg-type]


def test_a_state_directory_knows_what_it_was_made_with(tmp_path: Path) -> None:
    with open_state(tmp_path / "s", batch=4, seed=7):
        pass
    with open_state(tmp_path / "s") as state:
        assert (state.batch, state.seed) == (4, 7)
    for changed, word in (({"batch": 5}, "--batch 4"), ({"seed": 1}, "--seed 7"), ({"digest": "e"}, "another bundle")):
        with pytest.raises(StateError, match=word):
            open_state(tmp_path / "s", **changed)
    (tmp_path / "s" / "state.json").write_text(json.dumps({"schema": 9}))
    with pytest.raises(StateError, match="version"):
        open_state(tmp_path / "s")


def test_the_lock_is_exclusive_and_ends_with_its_holder(tmp_path: Path) -> None:
    with open_state(tmp_path / "s"), pytest.raises(StateError, match="in use"):
        open_state(tmp_path / "s")
    with open_state(tmp_path / "s"):
        pass


def test_an_atomic_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_atomic(tmp_path / "x", b"old")

    def refuse(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(Exception, match="No space left"):
        write_atomic(tmp_path / "x", b"new")
    assert (tmp_path / "x").read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["x"]
