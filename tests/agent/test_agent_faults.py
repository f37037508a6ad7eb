"""What must not go wrong when everything else does: kill -9, a full disk, a second agent, damaged files, signals."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edgetune.agent import checkpoint
from edgetune.agent.config import AgentConfig
from edgetune.agent.ledger import Ledger
from edgetune.agent.loop import run_agent
from edgetune.agent.view import QuietView
from edgetune.bundle import Array, Bundle
from edgetune.errors import StorageError
from edgetune.telemetry import runlog
from tests.agent.disks import fill, mounted
from tests.agent.fakes import FakeSession, Workshop, make_bundle, make_folder

SCRIPT = Path(__file__).with_name("run_fake.py")
EPOCHS, EVERY = 2, 3


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle, a data folder, and the state of a run that nobody disturbed."""
    root = tmp_path_factory.mktemp("faults")
    bundle = make_bundle(root / "bundle")
    make_folder(root / "data", 8)
    (root / "data" / "dog" / "corrupt.png").write_bytes(b"x")
    os.utime(root / "data" / "dog" / "corrupt.png", (1e9, 1e9))  # long ago: it is not still being written
    run_agent(bundle, AgentConfig(**config(root, "whole")), parts=Workshop().parts(), view=QuietView())
    return root


def config(root: Path, name: str, **changed: Any) -> dict[str, Any]:
    return {
        "data": root / "data", "state": root / name, "batch": 4, "epsilon": 0.9, "once": True, "quiet": True,
        "epochs": EPOCHS, "checkpoint_every": EVERY, "settle_seconds": 0.05, **changed,
    }  # fmt: skip


def start(root: Path, name: str, *, changed: dict[str, Any] | None = None, **told: Any) -> subprocess.Popen[str]:
    settings = config(root, name, **(changed or {}))
    message = {"bundle": str(root / "bundle"), "config": settings, **told}
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), json.dumps(message, default=str)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    output = "".join(process.communicate(timeout=30))
    return process.returncode, output


def final_state(state: Path) -> dict[str, Array]:
    found = checkpoint.load_newest(state, lambda path: pytest.fail(f"{path} is damaged"))
    assert found is not None
    return dict(found.tensors)


def assert_same_end(root: Path, name: str) -> None:
    """The state is, bit for bit, that of the undisturbed run, and so is the ledger."""
    one, other = final_state(root / "whole"), final_state(root / name)
    assert one.keys() == other.keys() and all(one[key].tobytes() == other[key].tobytes() for key in one)
    rows = [
        [(s.path, s.sha256, s.status, s.step, s.passes) for s in Ledger(root / which / "ledger.sqlite").samples()]
        for which in ("whole", name)
    ]
    assert rows[0] == rows[1]
    steps = [runlog.steps(root / which / "log.jsonl") for which in ("whole", name)]
    assert [(s["step"], s["loss"], s["ranks"]) for s in steps[0]] == [
        (s["step"], s["loss"], s["ranks"]) for s in steps[1]
    ]


# ---- kill -9 -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("part", range(4))
def test_killed_at_its_writes_and_resumed_it_ends_as_if_undisturbed(workshop: Path, part: int) -> None:
    """Each case dies again and again, every time at a later write of the process, and then runs to its end."""
    name, dice = f"killed{part}", random.Random(part)
    number, deaths = 1 + part, 0
    while True:
        code, output = finish(start(workshop, name, kill_at_sync=number))
        if code == 0:
            break
        assert code == -signal.SIGKILL, output
        deaths += 1
        number += dice.randint(3, 11)
    assert deaths >= 3
    assert_same_end(workshop, name)
    shutil.rmtree(workshop / name)


def test_killed_at_random_instants_and_resumed_it_ends_as_if_undisturbed(workshop: Path) -> None:
    dice, deaths = random.Random(7), 0
    for _ in range(5):
        process = start(workshop, "random", step_seconds=0.03)
        log = workshop / "random" / "log.jsonl"
        size_bytes, deadline = log.stat().st_size if log.exists() else 0, time.monotonic() + 10
        while process.poll() is None and time.monotonic() < deadline:
            if log.exists() and log.stat().st_size > size_bytes + 600:  # it is on its way
                break
            time.sleep(0.005)
        time.sleep(dice.random() * 0.15)
        process.kill()
        deaths += process.wait() == -signal.SIGKILL
        process.communicate()
    assert deaths >= 2
    code, output = finish(start(workshop, "random"))
    assert code == 0, output
    assert_same_end(workshop, "random")


def test_a_graceful_stop_keeps_every_step(workshop: Path) -> None:
    process = start(workshop, "graceful", step_seconds=0.05)
    log = workshop / "graceful" / "log.jsonl"
    while process.poll() is None and len(runlog.steps(log)) < 4:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    code, output = finish(process)
    assert code == 0 and "received SIGTERM" in output
    steps = len(runlog.steps(log))
    assert (
        int(final_state(workshop / "graceful")["step"]) == steps < len(runlog.steps(workshop / "whole" / "log.jsonl"))
    )
    assert finish(start(workshop, "graceful"))[0] == 0
    assert_same_end(workshop, "graceful")


def test_an_interrupted_watch_stops_while_it_waits(workshop: Path) -> None:
    process = start(workshop, "watching", changed={"once": False})
    log = workshop / "watching" / "log.jsonl"
    deadline = time.monotonic() + 15
    while not any(record["event"] == "waiting" for record in runlog.read(log)) and time.monotonic() < deadline:
        time.sleep(0.02)
    # What is trained is stored before the wait begins.
    assert int(final_state(workshop / "watching")["step"]) == len(runlog.steps(log)) > 0
    process.send_signal(signal.SIGINT)
    code, output = finish(process)
    assert code == 0 and "received SIGINT" in output


def test_a_second_agent_is_refused(workshop: Path) -> None:
    process = start(workshop, "shared", step_seconds=0.2)
    while not (workshop / "shared" / "ledger.sqlite").exists() and process.poll() is None:
        time.sleep(0.02)
    code, output = finish(start(workshop, "shared"))
    assert code == 9 and "in use by another agent" in output
    process.terminate()
    assert finish(process)[0] == 0


# ---- damage --------------------------------------------------------------------------------------------------------
def test_a_truncated_checkpoint_falls_back_to_the_previous_and_ends_the_same(workshop: Path) -> None:
    run_agent(
        Bundle.open(workshop / "bundle"), AgentConfig(**config(workshop, "cut", max_steps=8)),
        parts=Workshop().parts(), view=QuietView(),
    )  # fmt: skip
    (newest, path), (older, _) = checkpoint.listed(workshop / "cut")
    assert (newest, older) == (8, 6)
    os.truncate(path, path.stat().st_size - 100)
    code, output = finish(start(workshop, "cut"))
    assert code == 0, output
    records = list(runlog.read(workshop / "cut" / "log.jsonl"))
    assert [r["file"] for r in records if r["event"] == "damaged"] == [path.name]
    assert [r["step"] for r in records if r["event"] == "restored"] == [6]
    assert_same_end(workshop, "cut")


# ---- a full disk ---------------------------------------------------------------------------------------------------
@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 400 KiB."""
    with mounted(tmp_path / "disk", "400k") as place:
        yield place


def test_a_disk_that_is_full_for_a_while_costs_nothing(
    workshop: Path, small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def on_step(session: FakeSession) -> None:
        if session.step_number == 4:
            fill(small_disk)
        if session.step_number == 8:
            (small_disk / "filler").unlink()

    settings = AgentConfig(**config(workshop, "unused") | {"state": small_disk / "full"})
    run_agent(Bundle.open(workshop / "bundle"), settings, parts=Workshop(on_step=on_step).parts(), view=QuietView())
    said = capsys.readouterr().err
    assert said.count("storage error") == 1 and "Training goes on in memory" in said and "works again" in said
    assert any(record["event"] == "storage_error" for record in runlog.read(small_disk / "full" / "log.jsonl"))
    shutil.copytree(small_disk / "full", workshop / "full")
    assert_same_end(workshop, "full")


def test_a_disk_that_stays_full_ends_with_an_error_and_harms_nothing(workshop: Path, small_disk: Path) -> None:
    def on_step(session: FakeSession) -> None:
        if session.step_number == 4:
            fill(small_disk)

    settings = AgentConfig(**config(workshop, "unused") | {"state": small_disk / "stuck"})
    shop = Workshop(on_step=on_step)
    with pytest.raises(StorageError, match="everything up to step 3 is stored"):
        run_agent(Bundle.open(workshop / "bundle"), settings, parts=shop.parts(), view=QuietView())
    assert shop.session.step_number == len(runlog.steps(workshop / "whole" / "log.jsonl"))  # it trained to the end
    assert int(final_state(small_disk / "stuck")["step"]) == 3
    lines = (small_disk / "stuck" / "log.jsonl").read_bytes().splitlines()
    assert all(json.loads(line) for line in lines)
    (small_disk / "filler").unlink()
    run_agent(Bundle.open(workshop / "bundle"), settings, parts=Workshop().parts(), view=QuietView())
    shutil.copytree(small_disk / "stuck", workshop / "stuck")
    assert_same_end(workshop, "stuck")


def test_a_limit_on_file_sizes_is_a_storage_error(workshop: Path) -> None:
    """The same without a mount: from step 4 on no file may grow beyond 3000 bytes, which stops log and ledger."""
    code, output = finish(start(workshop, "limited", file_limit=[4, 3000]))
    assert code == StorageError.exit_code and "storage error" in output and "refused to the end" in output
    assert int(final_state(workshop / "limited")["step"]) == 3
    assert finish(start(workshop, "limited"))[0] == 0
    assert_same_end(workshop, "limited")


def test_a_disk_full_from_the_beginning_is_an_error(workshop: Path, small_disk: Path) -> None:
    fill(small_disk)
    settings = AgentConfig(**config(workshop, "unused") | {"state": small_disk / "never"})
    with pytest.raises(StorageError):
        run_agent(Bundle.open(workshop / "bundle"), settings, parts=Workshop().parts(), view=QuietView())
