"""The table of docs/faults.md with real processes: what is done to an agent, what it answers, what is kept.

Every agent here is the worker that the supervisor starts, with the real engine. What needs more than a process (every
instant of a kill, every byte of a damaged archive) is tested in tests/agent.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import numpy as np
import pytest

from edgetune.agent.config import AgentConfig
from edgetune.agent.ledger import Ledger
from edgetune.agent.order import order
from edgetune.agent.sources.arrays import npy
from edgetune.agent.worker import command
from edgetune.bundle import FORMAT_VERSION
from edgetune.errors import BundleError, DataError, StateError, StorageError
from edgetune.telemetry import runlog
from edgetune.units import MIB
from tests.agent.disks import fill, mounted
from tests.engines.workshop import ROOT, bundle_of, copied, same_bits
from tests.system.device import final_state, last_step, make_images, trained

EPOCHS = 5


@dataclass
class Ended:
    """A process that has ended: what it returned and said, and the most memory that it ever took."""

    code: int
    said: str
    peak_bytes: int


class Agent:
    """An agent in a process of its own."""

    def __init__(self, bundle: Path, config: AgentConfig, **environment: str) -> None:
        self._errors = TemporaryFile()  # noqa: SIM115  (open until the end)
        self.process = subprocess.Popen(
            command(bundle, config), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=self._errors,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        )  # fmt: skip

    def end(self, seconds: float = 60) -> Ended:
        """Wait for the end of it."""
        deadline, peak_bytes = time.monotonic() + seconds, 0
        while self.process.poll() is None:
            if time.monotonic() > deadline:
                self.process.kill()
            # Of its own address space: what wait4 tells counts the process from which it was forked.
            with suppress(OSError, StopIteration):
                lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
                peak_bytes = 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
            time.sleep(0.005)
        self._errors.seek(0)
        with self._errors:
            return Ended(self.process.returncode, self._errors.read().decode(), peak_bytes)


def config(data: Path | str, state: Path, **changed: Any) -> AgentConfig:
    settings: dict[str, Any] = {
        "batch": 8, "epsilon": 0.9, "once": True, "quiet": True, "settle_seconds": 0.0, "epochs": EPOCHS,
        "checkpoint_every": 4,
    }  # fmt: skip
    return AgentConfig(data=data, state=state, **(settings | changed))


def run(data: Path | str, state: Path, bundle: Path | None = None, **changed: Any) -> Ended:
    return Agent(bundle_of("hosvd").path if bundle is None else bundle, config(data, state, **changed)).end()


def reasons(state: Path) -> dict[str, str]:
    ledger = Ledger(state / "ledger.sqlite", read_only=True)
    try:
        return {row.path: row.reason or "" for row in ledger.samples() if row.status == "quarantined"}
    finally:
        ledger.close()


def assert_same_end(one: Path, other: Path) -> None:
    """The weights are the same, bit for bit, and so is what became of every sample."""
    assert same_bits(final_state(one), final_state(other))
    rows = [{row for row in trained(state) if row[1] != "quarantined"} for state in (one, other)]
    assert rows[0] == rows[1]


def until(condition: Callable[[], object], agent: Agent) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert agent.process.poll() is None and time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.005)


@dataclass(frozen=True)
class Place:
    """A folder with good and bad samples, and the state of a run on it that nobody disturbed."""

    data: Path
    state: Path
    ended: Ended


@cache
def png_bomb(side: int) -> bytes:
    """A PNG of side x side white pixels, one bit each, packed as well as they can be."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = zlib.compressobj(9)
    packed = b"".join([rows.compress(b"\0" + b"\xff" * (side // 8)) for _ in range(side)] + [rows.flush()])
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    root = tmp_path_factory.mktemp("faults")
    data = make_images(root / "data", bundle_of("hosvd"), 40)
    whole = next((data / "class0").iterdir()).read_bytes()
    (data / "class1" / "torn.png").write_bytes(whole[: len(whole) // 2])
    (data / "class1" / "text.png").write_text("no image")
    (data / "class1" / "bomb.png").write_bytes(png_bomb(20_000))  # 1.6 GB as 8-bit pixels, in 200 KB
    (data / "zebra").mkdir()
    (data / "zebra" / "1.png").write_bytes(whole)
    return Place(data, root / "whole", run(data, root / "whole"))


# ---- what is taken in ----------------------------------------------------------------------------------------------
def test_corrupt_and_unknown_files_and_bombs_are_quarantined_and_the_rest_is_trained(place: Place) -> None:
    assert place.ended.code == 0, place.ended.said
    why = reasons(place.state)
    assert set(why) == {"class1/bomb.png", "class1/text.png", "class1/torn.png", "zebra/1.png"}
    assert "too many pixels" in why["class1/bomb.png"] and "not a readable image" in why["class1/torn.png"]
    assert "unknown label 'zebra'; valid labels: class0" in why["zebra/1.png"]
    assert sum(row[3] for row in trained(place.state)) == EPOCHS * sum(
        row[1] == "trained" for row in trained(place.state)
    )
    assert place.ended.peak_bytes < 300 * MIB


def test_a_truncated_tar_with_a_bomb_in_it_gives_what_is_whole_and_then_the_rest(place: Place, tmp_path: Path) -> None:
    pictures = [path for path in sorted(place.data.rglob("[0-9]*.png")) if path.parent.name != "zebra"]
    with tarfile.open(tmp_path / "whole", "w") as archive:
        info = tarfile.TarInfo("class1/bomb.png")
        info.size = len(bomb := png_bomb(20_000))
        archive.addfile(info, io.BytesIO(bomb))
        for path in pictures:
            archive.add(path, str(path.relative_to(place.data)))
    whole = (tmp_path / "whole").read_bytes()
    shard = tmp_path / "photos.tar"
    cut = len(whole) - (len(whole) - len(bomb)) // 3
    shard.write_bytes(whole[:cut])
    first = run(shard, tmp_path / "state", epochs=1)
    assert first.code == 0 and first.peak_bytes < 300 * MIB, first.said
    why = reasons(tmp_path / "state")
    (rest,) = (name for name in why if name.startswith("photos.tar@"))
    assert "is taken up when the file has grown" in why.pop(rest)
    assert list(why) == ["photos.tar#class1/bomb.png"] and "too many pixels" in why["photos.tar#class1/bomb.png"]
    before = len(trained(tmp_path / "state"))
    shard.write_bytes(whole)
    assert run(shard, tmp_path / "state", epochs=1).code == 0
    rows = [row for row in trained(tmp_path / "state") if row[1] in ("trained", "heldout")]
    assert 20 < before < len(rows) == len(pictures)
    assert all(row[3] == (row[1] == "trained") for row in rows)  # each once


def test_an_npz_that_unpacks_to_too_much_is_refused(tmp_path: Path) -> None:
    count = 40_000  # 312 MiB of zeros in 400 KB
    np.savez_compressed(tmp_path / "set.npz", x=np.zeros((count, 64, 128), np.uint8), y=np.zeros(count, np.int64))
    assert (tmp_path / "set.npz").stat().st_size < MIB
    ended = run(tmp_path / "set.npz", tmp_path / "state")
    assert ended.code == DataError.exit_code and "refused: its samples unpack to" in ended.said
    assert ended.peak_bytes < 250 * MIB


def test_samples_that_make_the_loss_nan_are_found_and_the_step_undone(tmp_path: Path) -> None:
    """Oracle: a run in which those samples never existed ends with the same weights, bit for bit."""
    values = np.random.default_rng(0).normal(0, 1, (40, 1, 16, 16)).astype(np.float32)
    poisoned = [5, 25]
    values[poisoned] *= 3e38 / np.abs(values[poisoned]).max()  # finite; what a layer makes of them is not
    contents = [hashlib.sha256(npy(value)).hexdigest() for value in values]

    def fits(seed: int) -> bool:
        visited = order(seed, 0, contents)  # the one comes in the calibration, the other later
        return visited.index(5) < 16 < visited.index(25) < 38

    seed = next(seed for seed in range(99) if fits(seed))
    good = [row for row in range(40) if row not in poisoned]
    np.savez(tmp_path / "bad.npz", x=values, y=np.arange(40) % 4)
    np.savez(tmp_path / "good.npz", x=values[good], y=(np.arange(40) % 4)[good])
    for name in ("bad", "good"):
        ended = run(tmp_path / f"{name}.npz", tmp_path / name, holdout=0, seed=seed, epochs=2)
        assert ended.code == 0, ended.said
    why = reasons(tmp_path / "bad")
    assert set(why) == {"bad.npz#5", "bad.npz#25"}
    assert "in the calibration" in why["bad.npz#5"] and "was not finite at step" in why["bad.npz#25"]
    events = [record for record in runlog.read(tmp_path / "bad" / "log.jsonl") if record["event"] == "not_finite"]
    assert [event["culprits"] for event in events] == [1]
    assert same_bits(final_state(tmp_path / "bad"), final_state(tmp_path / "good"))


# ---- the disk ------------------------------------------------------------------------------------------------------
@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB of its own."""
    with mounted(
        tmp_path / "disk", "1m", otherwise="tests/agent/test_agent_faults.py limits the size of files"
    ) as disk:
        yield disk


def test_a_full_and_a_read_only_disk_end_with_an_error_and_cost_nothing_afterwards(
    place: Place, small_disk: Path
) -> None:
    state = small_disk / "state"
    agent = Agent(bundle_of("hosvd").path, config(place.data, state))
    until(lambda: last_step(state) >= 5, agent)
    fill(small_disk)
    ended = agent.end()
    assert ended.code == StorageError.exit_code and "the disk refused to the end" in ended.said
    stored = int(final_state(state)["step"])
    assert 0 < stored < last_step(place.state)
    (small_disk / "filler").unlink()
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    ended = run(place.data, state)
    assert ended.code == StorageError.exit_code and "Read-only file system" in ended.said
    shown = subprocess.run(
        [sys.executable, "-m", "edgetune", "status", state, "--json"], capture_output=True, cwd=ROOT, text=True
    )
    assert shown.returncode == 0 and json.loads(shown.stdout)["step"] == stored  # it stays readable
    subprocess.run(["mount", "-o", "remount,rw", small_disk], check=True)
    assert run(place.data, state).code == 0
    assert_same_end(state, place.state)


# ---- other agents, clocks and bundles ------------------------------------------------------------------------------
def test_a_second_agent_on_the_same_state_is_refused_and_the_first_goes_on(place: Place, tmp_path: Path) -> None:
    first = Agent(bundle_of("hosvd").path, config(place.data, tmp_path / "state", once=False))
    until(lambda: last_step(tmp_path / "state") >= 1, first)
    second = run(place.data, tmp_path / "state")
    assert second.code == StateError.exit_code and "in use by another agent" in second.said
    assert first.process.poll() is None
    first.process.send_signal(signal.SIGTERM)
    assert first.end().code == 0


SHIFTED = """
import os, time
_true, _true_ns, _calls = time.time, time.time_ns, 0
_after, _back_s = (int(part) for part in os.environ["CLOCK_JUMPS"].split(":"))
def _jumped():
    global _calls
    _calls += 1
    return _back_s if _calls > _after else 0
time.time = lambda: _true() - _jumped()
time.time_ns = lambda: _true_ns() - _jumped() * 10**9
"""


def test_a_clock_that_is_set_back_changes_nothing(place: Place, tmp_path: Path) -> None:
    """To before the files were written, in the midst of a run, and further back at the next start; and files that are
    said to be written in the year 2100."""
    (tmp_path / "shim").mkdir()
    (tmp_path / "shim" / "sitecustomize.py").write_text(SHIFTED)
    data = shutil.copytree(place.data, tmp_path / "data")
    for path in data.rglob("*.png"):
        os.utime(path, (4.1e9, 4.1e9))
    places = os.pathsep.join(filter(None, (str(tmp_path / "shim"), os.environ.get("PYTHONPATH"))))
    year = 365 * 86400
    for jump, most in ((f"150:{10 * year}", 9), (f"0:{20 * year}", None)):
        settings = config(data, tmp_path / "state", max_steps=most, settle_seconds=0.1)
        ended = Agent(bundle_of("hosvd").path, settings, PYTHONPATH=places, CLOCK_JUMPS=jump).end()
        assert ended.code == 0, ended.said
    times = [record["time"] for record in runlog.read(tmp_path / "state" / "log.jsonl")]
    assert times[0] > times[-1] + 19 * year and min(np.diff(times)) < -9 * year  # it did jump
    assert_same_end(tmp_path / "state", place.state)


@pytest.mark.parametrize("damage", ["weights", "manifest", "version"])
def test_a_bundle_that_is_tampered_with_or_of_another_version_is_refused(
    place: Place, tmp_path: Path, damage: str
) -> None:
    bundle = copied(bundle_of("hosvd"), tmp_path / "bundle").path
    state = shutil.copytree(place.state, tmp_path / "state")
    before = sorted((path.name, path.stat().st_size) for path in state.iterdir())
    manifest = bundle / "manifest.json"
    if damage == "weights":
        data = bytearray((bundle / "weights.safetensors").read_bytes())
        data[len(data) // 2] ^= 1
        (bundle / "weights.safetensors").write_bytes(data)
    else:
        told = json.loads(manifest.read_text())
        told |= {"format_version": FORMAT_VERSION - 1} if damage == "version" else {"codec": "dense"}
        manifest.write_text(json.dumps(told))
    ended = run(place.data, state, bundle)
    if damage == "manifest":  # a bundle of its own, but not the one that the state was made with
        assert ended.code == StateError.exit_code and "was made with another bundle" in ended.said
    else:
        assert ended.code == BundleError.exit_code and ended.said.startswith("edgetune: ")
    assert sorted((path.name, path.stat().st_size) for path in state.iterdir()) == before


def test_a_source_that_goes_away_ends_the_run_and_no_sample_is_blamed(place: Place, tmp_path: Path) -> None:
    data = shutil.copytree(place.data, tmp_path / "data")
    agent = Agent(bundle_of("hosvd").path, config(data, tmp_path / "state", epochs=60))
    until(lambda: last_step(tmp_path / "state") >= 5, agent)
    data.rename(tmp_path / "away")
    ended = agent.end()
    assert ended.code == DataError.exit_code and "is gone; mount it and run again" in ended.said
    assert set(reasons(tmp_path / "state")) == set(reasons(place.state))
