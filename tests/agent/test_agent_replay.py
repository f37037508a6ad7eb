"""Replay in a run: what is drawn, what is on the disk and in the ledger, and what a crash or damage does to it."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from edgetune.agent import checkpoint
from edgetune.agent.config import AgentConfig
from edgetune.agent.ledger import Ledger, Sample
from edgetune.agent.loop import run_agent
from edgetune.agent.replay.config import ReplayConfig
from edgetune.agent.replay.index import digests_of
from edgetune.agent.replay.store import Store
from edgetune.agent.view import QuietView
from edgetune.bundle import Bundle
from edgetune.errors import StorageError, UsageError
from edgetune.telemetry import runlog
from tests.agent.fakes import POISON, FakeSession, Workshop, make_bundle, make_folder, make_image

SCRIPT = Path(__file__).with_name("run_fake.py")
LIMITS = {"raw": 80 * 4096, "features": 40 * 4096}
"""Of the 30 samples, a file each in a block, they keep 60 (all) and 24."""


def config(root: Path, name: str, kind: str, **changed: Any) -> dict[str, Any]:
    replay = {"kind": kind, "limit_bytes": LIMITS.get(kind, 0), **changed.pop("replay", {})}
    return {
        "data": root / "data", "state": root / name, "batch": 4, "epsilon": 0.9, "once": True, "quiet": True,
        "checkpoint_every": 3, "settle_seconds": 0.05, "epochs": 2, "replay": ReplayConfig(**replay), **changed,
    }  # fmt: skip


def run(root: Path, name: str, kind: str, shop: Workshop | None = None, **changed: Any) -> None:
    settings = AgentConfig(**config(root, name, kind, **changed))
    run_agent(Bundle.open(root / "bundle"), settings, parts=(shop or Workshop()).parts(), view=QuietView())


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle, 30 samples of three classes, and for each kind of replay the state of an undisturbed run."""
    root = tmp_path_factory.mktemp("replay")
    make_bundle(root / "bundle")
    make_folder(root / "data", 12)
    for kind in LIMITS:
        run(root, kind, kind)
    return root


def rows(state: Path) -> list[Sample]:
    ledger = Ledger(state / "ledger.sqlite")
    try:
        return list(ledger.samples())
    finally:
        ledger.close()


def newest(state: Path) -> checkpoint.Checkpoint:
    found = checkpoint.load_newest(state, lambda path: pytest.fail(f"{path} is damaged"))
    assert found is not None
    return found


def buffer(state: Path) -> set[str]:
    return {digest for digest, _ in digests_of(newest(state).parts["replay"])}


def assert_same_end(one: Path, other: Path) -> None:
    """Weights, ledger, losses and the buffer, on the disk too, are bit for bit the same."""
    ends = newest(one), newest(other)
    for part in ("tensors", "parts"):
        a, b = (getattr(end, part) for end in ends)
        assert a.keys() == b.keys() and all(a[name].tobytes() == b[name].tobytes() for name in a)
    assert ends[0].position["replay"] == ends[1].position["replay"]
    known = [[(s.path, s.sha256, s.status, s.step, s.passes, s.replays) for s in rows(state)] for state in (one, other)]
    assert known[0] == known[1]
    logs = [
        [(s["step"], s["loss"], s["replayed"]) for s in runlog.steps(state / "log.jsonl")] for state in (one, other)
    ]
    assert logs[0] == logs[1]
    for state in (one, other):
        for digest in buffer(state):
            (file,) = (state / "replay").glob(f"{digest}.*")
            assert file.read_bytes() == next((one / "replay").glob(f"{digest}.*")).read_bytes()


# ---- a whole run ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", LIMITS)
def test_half_of_each_batch_is_replayed_and_every_sample_is_trained_once_a_pass(place: Path, kind: str) -> None:
    state, steps = place / kind, runlog.steps(place / kind / "log.jsonl")
    known = rows(state)
    assert [step["replayed"] for step in steps[:4]] == [0, 2, 2, 2] and {step["samples"] for step in steps} <= {4, 3}
    status = Counter(row.status for row in known)
    assert status["heldout"] == 6 and status["new"] == status["quarantined"] == 0
    assert all(row.passes == 2 for row in known if row.status != "heldout")
    assert sum(row.replays for row in known) == sum(step["replayed"] for step in steps)
    assert sum(row.passes for row in known) == sum(step["samples"] - step["replayed"] for step in steps) == 60
    assert {row.sha256 for row in known if row.status == "replayable"} == buffer(state)
    assert status["replayable"] == {"raw": 30, "features": 24}[kind]


@pytest.mark.parametrize("kind", LIMITS)
def test_the_disk_stays_within_its_limit(tmp_path: Path, place: Path, kind: str) -> None:
    """Counted at every step, with room for 48 samples of 180: what was dropped takes room besides."""
    limit_bytes, most = 64 * 4096, [0]

    def on_step(session: FakeSession) -> None:
        folder = tmp_path / "state" / "replay"
        files = list(folder.iterdir()) if folder.is_dir() else []
        most[0] = max(most[0], sum(-(-file.stat().st_size // 4096) * 4096 for file in files))

    changed = {"replay": {"limit_bytes": limit_bytes, "choice": "reservoir"}, "checkpoint_every": 20, "epochs": 1}
    make_folder(tmp_path / "data", 60)
    shutil.copytree(place / "bundle", tmp_path / "bundle")
    run(tmp_path, "state", kind, Workshop(on_step=on_step), **changed)
    assert 50 * 4096 <= most[0] <= limit_bytes
    saves = [record["step"] for record in events(tmp_path / "state", "checkpoint")]
    assert any(step % 20 for step in saves[:-1]), "checkpoints were made to free what waits for it"


def test_without_replay_nothing_is_kept(place: Path, tmp_path: Path) -> None:
    run(place, str(tmp_path / "none"), "none")
    assert not (tmp_path / "none" / "replay").exists() and not newest(tmp_path / "none").parts
    assert all(row.status != "replayable" and not row.replays for row in rows(tmp_path / "none"))


def test_raw_replay_does_not_need_the_user_s_files(tmp_path: Path, place: Path) -> None:
    """They are deleted after the first pass; the second one and the replays read the buffer."""
    shutil.copytree(place / "bundle", tmp_path / "bundle")
    for kind, kept in (("raw", 60 * 4096), ("features", 40 * 4096)):
        shutil.copytree(place / "data", tmp_path / "data")

        def on_step(session: FakeSession) -> None:
            if session.step_number == 30:
                for file in (tmp_path / "data").rglob("*.png"):
                    file.unlink()

        changed = {"epochs": 4, "replay": {"limit_bytes": kept + 20 * 4096, "ratio": 0.25}, "holdout": 0}
        run(tmp_path, kind, kind, Workshop(on_step=on_step), **changed)
        known = rows(tmp_path / kind)
        assert Counter((row.status, row.passes) for row in known) == {("replayable", 4): 36}
        shutil.rmtree(tmp_path / "data")


# ---- kill -9 -------------------------------------------------------------------------------------------------------
def start(root: Path, name: str, kind: str, *, every: int = 3, **told: Any) -> tuple[int, str]:
    settings = config(root, name, kind, checkpoint_every=every)
    settings["replay"] = vars(settings["replay"])
    message = {"bundle": str(root / "bundle"), "config": settings, **told}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), json.dumps(message, default=str)], capture_output=True, text=True, timeout=30
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("kind", LIMITS)
def test_killed_at_its_writes_and_resumed_it_ends_as_if_undisturbed(place: Path, kind: str) -> None:
    number, deaths, dice, name = 5, 0, random.Random(3), f"killed-{kind}"
    while True:
        code, output = start(place, name, kind, kill_at_sync=number)
        if code == 0:
            break
        assert code == -signal.SIGKILL, output
        deaths += 1
        number += dice.randint(25, 45)
    assert deaths >= 3
    assert_same_end(place / kind, place / name)


def test_a_sample_that_breaks_a_step_later_leaves_the_buffer_and_a_killed_run_ends_the_same(
    place: Path, tmp_path: Path
) -> None:
    """It was replayed until then. A run that goes on from before draws it as often, though the ledger knows by then."""
    kind = "features"
    shutil.copytree(place / "bundle", tmp_path / "bundle")
    make_folder(tmp_path / "data", 9)
    Image.new("RGB", (12, 12), POISON).save(tmp_path / "data" / "cat" / "000.png")
    told = {"every": 1000, "poison_after": 9}  # so that a killed run begins again well before the step that broke
    assert start(tmp_path, "whole", kind, **told)[0] == 0
    (bad,) = (row for row in rows(tmp_path / "whole") if row.status == "quarantined")
    assert (bad.path, bad.passes) == ("cat/000.png", 1) and bad.sha256 not in buffer(tmp_path / "whole")
    number, deaths = 25, 0
    while (code := start(tmp_path, "killed", kind, **told, kill_at_sync=number)[0]) == -signal.SIGKILL:
        deaths, number = deaths + 1, number + 12
    assert code == 0 and deaths >= 2
    assert_same_end(tmp_path / "whole", tmp_path / "killed")


# ---- damage and change ---------------------------------------------------------------------------------------------
def stopped(place: Path, tmp_path: Path, kind: str, steps: int = 9, **changed: Any) -> Path:
    """Return the state of a run that was stopped; its bundle and data lie beside it."""
    for name in ("bundle", "data"):
        shutil.copytree(place / name, tmp_path / name)
    run(tmp_path, "state", kind, max_steps=steps, **changed)
    return tmp_path / "state"


def events(state: Path, *kinds: str) -> list[dict[str, Any]]:
    return [record for record in runlog.read(state / "log.jsonl") if record["event"] in kinds]


@pytest.mark.parametrize("kind", LIMITS)
def test_damaged_and_missing_files_leave_the_buffer_and_are_named(place: Path, tmp_path: Path, kind: str) -> None:
    state = stopped(place, tmp_path, kind)
    files = sorted((state / "replay").iterdir())
    for file in files[::2]:
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
    files[1].unlink()
    run(tmp_path, "state", kind)
    told = events(state, "replay_lost")
    assert told[0]["samples"] == 1 and len(told) > 3 and "content" in told[1]["reason"]
    known = rows(state)
    assert {row.sha256 for row in known if row.status == "replayable"} == buffer(state)
    assert {row.passes for row in known if row.status in ("trained", "replayable")} == {2}, (
        "none was quarantined for it"
    )
    assert Counter(row.status for row in known)["quarantined"] == 0


def test_features_of_another_trunk_are_dropped_and_that_is_said(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = stopped(place, tmp_path, "features")
    before = {file.name for file in (state / "replay").iterdir()}
    monkeypatch.setattr("edgetune.agent.replay.buffer.trunk_digest", lambda bundle: "f" * 64)
    run(tmp_path, "state", "features")
    (told,) = events(state, "replay_dropped")
    assert told["samples"] == len(before) and "another trunk" in told["reason"]
    assert not before & {file.name for file in (state / "replay").iterdir()}
    assert {row.sha256 for row in rows(state) if row.status == "replayable"} == buffer(state)


@pytest.mark.parametrize(("kind", "other"), [("raw", "features"), ("features", "none"), ("raw", "none")])
def test_another_kind_begins_anew(place: Path, tmp_path: Path, kind: str, other: str) -> None:
    state = stopped(place, tmp_path, kind)
    count = len(buffer(state))
    run(tmp_path, "state", other)
    (told,) = events(state, "replay_dropped")
    assert told["samples"] == count and f"kind was {kind}, is {other}" in told["reason"]
    left = {file.suffix for file in (state / "replay").iterdir()}
    assert left == ({".f16"} if other == "features" else set())
    assert {row.sha256 for row in rows(state) if row.status == "replayable"} == (
        buffer(state) if other != "none" else set()
    )


def test_a_step_that_is_not_finite_leaves_the_buffer_as_the_checkpoint_has_it(place: Path, tmp_path: Path) -> None:
    for name in ("bundle", "data"):
        shutil.copytree(place / name, tmp_path / name)
    Image.new("RGB", (12, 12), POISON).save(tmp_path / "data" / "cat" / "poison.png")
    run(tmp_path, "state", "raw", holdout=0)
    known = rows(tmp_path / "state")
    bad = [row for row in known if row.status == "quarantined"]
    assert 1 <= len(bad) <= 4 and any(row.path == "cat/poison.png" for row in bad)
    assert all(row.passes in (0, 1) for row in bad) and not any(row.replays for row in bad if row.passes == 0)
    assert {row.sha256 for row in known if row.status == "replayable"} == buffer(tmp_path / "state")


@pytest.mark.parametrize("kind", LIMITS)
def test_what_the_disk_refuses_is_left_out_of_the_buffer(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    write, calls = Store.write, [0]

    def refusing(store: Store, digest: str, content: bytes) -> None:
        calls[0] += 1
        if 3 <= calls[0] <= 6:
            raise StorageError("no space left")
        write(store, digest, content)

    monkeypatch.setattr(Store, "write", refusing)
    run(place, str(tmp_path / "state"), kind)
    said = capsys.readouterr().err
    assert "no space left" in said and "works again" in said
    known = rows(tmp_path / "state")
    assert Counter(row.passes for row in known if row.status in ("trained", "replayable")) == {2: 30}
    assert {row.sha256 for row in known if row.status == "replayable"} == buffer(tmp_path / "state")
    assert len(buffer(tmp_path / "state")) == {"raw": 26, "features": 24}[kind]


def test_a_limit_too_small_for_the_features_is_refused(place: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"give at least 80\.00 KiB"):
        run(place, str(tmp_path / "small"), "features", replay={"limit_bytes": 10 * 4096})


def test_a_sample_that_is_too_large_is_said_once(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "bundle", tmp_path / "bundle")
    make_folder(tmp_path / "data", 3)
    for seed in (10, 11):
        make_image(tmp_path / "data" / "cat" / f"large{seed}.png", 0, seed, size=200)
    run(tmp_path, "state", "raw", holdout=0, replay={"limit_bytes": 20 * 4096})
    assert len(events(tmp_path / "state", "replay_too_large")) == 1
    kept = {row.path for row in rows(tmp_path / "state") if row.status == "replayable"}
    assert kept and not any("large" in path for path in kept)
