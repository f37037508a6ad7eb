"""Streams: what a user's function gives is spooled, recorded and trained exactly once, and never too much is taken."""

from __future__ import annotations

import io
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from edgetune.agent import checkpoint
from edgetune.agent.config import AgentConfig
from edgetune.agent.drift.config import DriftConfig
from edgetune.agent.images import Decoder
from edgetune.agent.intake import Intake, Taken
from edgetune.agent.ledger import Ledger
from edgetune.agent.loop import run_agent
from edgetune.agent.samples import every, labelled_batches
from edgetune.agent.sources import IntakeConfig, Source, open_source
from edgetune.agent.sources.camera import pictures
from edgetune.agent.sources.spool import Spool
from edgetune.agent.sources.stream import StreamSource, opener
from edgetune.agent.view import QuietView
from edgetune.bundle import Array, Bundle
from edgetune.errors import DataError, StorageError
from edgetune.telemetry import runlog
from tests.agent.fakes import CLASSES, FakeSession, Workshop, make_bundle, make_manifest
from tests.agent.test_agent_faults import SCRIPT, finish

Item = tuple[Any, Any]


def never() -> bool:
    return False


def picture(number: int) -> Item:
    rng = np.random.default_rng(number)
    pixels = rng.integers(0, 120, (8, 8, 3)).astype(np.uint8)
    pixels[..., number % 3] += 110
    return pixels, number % 3


def stream(begin: Any, folder: Path, **changed: Any) -> StreamSource:
    return StreamSource("test", "feed", CLASSES, opener(begin), folder, IntakeConfig(**changed))


def intake(source: Source, ledger: Path) -> Intake:
    return Intake(source, Decoder(make_manifest()), Ledger(ledger), holdout=0, settle_seconds=0)


def until(condition: Callable[[], object], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.005)


def drained(looker: Intake) -> Taken:
    """Record until the stream has ended."""
    total = Taken()
    until_ended = time.monotonic() + 10
    while not looker.source.ended() and time.monotonic() < until_ended:
        taken = looker.look(never)
        total.accepted += taken.accepted
        total.quarantined += taken.quarantined
        looker.source.waiter(1).wait(0.05, never)
    return total


# ---- what a stream may give ----------------------------------------------------------------------------------------
def test_samples_of_all_kinds(tmp_path: Path) -> None:
    pixels, _ = picture(5)
    encoded = io.BytesIO()
    Image.fromarray(pixels).save(encoded, format="BMP")
    items = [
        (encoded.getvalue(), "owl"),
        (Image.fromarray(picture(1)[0]), 1),
        (picture(2)[0], np.int64(2), "outside"),
        ((picture(3)[0] / 255).transpose(2, 0, 1).astype(np.float32), 0),
        (memoryview(b"no image"), 0),
        (picture(4)[0], "cow"),
        (picture(4)[0], 1.5),
        (picture(4)[0], 1, 5),
        ("words", 1),
        (object(), 1),
        picture(4)[0],
        (b"x" * 600_000, 1),
        picture(7),
    ]
    looker = intake(stream(lambda: iter(items), tmp_path / "spool", spool_bytes=2**20), tmp_path / "ledger")
    taken = drained(looker)
    assert [(row.label, row.task) for row in taken.accepted] == [
        (2, None),
        (1, None),
        (2, "outside"),
        (0, None),
        (1, None),
    ]
    assert all(row.path.startswith("feed#") for row in taken.accepted)
    why = [row.reason or "" for row in taken.quarantined]
    for said, text in zip(
        why,
        ("not a readable image", "unknown label 'cow'", "label is a float", "task is a int", "sample is a str",
         "sample is a object", "the stream gave a ndarray", "may take half of intake.spool_bytes"),
        strict=True,
    ):  # fmt: skip
        assert text in said
    one, grey = Decoder(make_manifest()), Decoder(make_manifest()).decode(encoded.getvalue())
    np.testing.assert_array_equal(one.decode(looker.source.read(taken.accepted[0].path)), grey)
    looker.source.close()


class MapStyle:
    """As torch's data sets are: a length, and samples by index."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.asked: list[int] = []

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Item:
        self.asked.append(index)
        return picture(index)


@pytest.mark.parametrize("kind", ["generator", "list", "map", "start"])
def test_a_stream_goes_on_where_it_was(tmp_path: Path, kind: str) -> None:
    told: list[int] = []
    data = MapStyle(20)

    def with_start(start: int) -> Iterator[Item]:
        told.append(start)
        return (picture(number) for number in range(start, 20))

    target = {
        "generator": lambda: (picture(n) for n in range(20)), "list": [picture(n) for n in range(20)],
        "map": lambda: data, "start": with_start,
    }[kind]  # fmt: skip
    first = intake(stream(target, tmp_path / "spool", max_pending=8), tmp_path / "ledger")
    until(lambda: first.look(never) is not None and first.ledger.counts()["new"] >= 8)
    first.source.heed(8)
    taken = first.ledger.counts()["new"]
    first.source.close()
    assert taken < 20
    again = intake(stream(target, tmp_path / "spool"), tmp_path / "ledger")
    drained(again)
    again.source.close()
    rows = list(again.ledger.samples())
    assert [row.label for row in rows] == [number % 3 for number in range(20)]  # each once, in order
    assert all(row.status == "new" for row in rows)
    if kind == "start":
        assert told[0] == 0 and told[1] >= taken
        (tmp_path / "spool").joinpath("position.json").stat()
        for file in (tmp_path / "spool").glob("?" * 64):
            file.unlink()
        third = stream(target, tmp_path / "spool")
        list(third.scan())
        third.close()
        assert told[2] == 20  # nothing is in the spool any more, and yet it is known
    if kind == "map":
        assert sorted(set(data.asked)) == list(range(20)) and len(data.asked) <= 21  # one was in hand


def test_a_function_that_fails_is_opened_again_behind_what_was_taken(tmp_path: Path) -> None:
    told: list[int] = []

    def flaky(start: int) -> Iterator[Item]:
        told.append(start)
        yield picture(start)
        if start < 1:
            raise OSError("no signal")

    looker = intake(stream(flaky, tmp_path / "spool"), tmp_path / "ledger")
    until(lambda: looker.look(never) is not None and looker.ledger.counts()["new"] == 1)
    with pytest.raises(DataError, match=r"failed after 1 samples \(OSError: no signal\)"):
        until(lambda: looker.source.check())
    looker.source.check()  # told once
    assert len(drained(looker).accepted) == 1 and told == [0, 1]
    looker.source.close()


@pytest.mark.parametrize(
    ("target", "said"),
    [
        (lambda: 5, "returned a int"),
        (lambda start, other: [], "missing 1 required"),
        (lambda: 1 / 0, "ZeroDivisionError"),
    ],
)
def test_a_function_that_is_no_source_is_told(tmp_path: Path, target: Any, said: str) -> None:
    looker = intake(stream(target, tmp_path / "spool"), tmp_path / "ledger")
    looker.look(never)
    with pytest.raises(DataError, match=said):
        until(lambda: looker.source.check())
    looker.source.close()


def test_what_is_neither_function_nor_data_is_refused() -> None:
    with pytest.raises(DataError, match="a int is no source"):
        opener(5)


# ---- back-pressure -------------------------------------------------------------------------------------------------
def test_no_more_is_taken_than_may_wait(tmp_path: Path) -> None:
    given = itertools.count()
    source = stream(lambda: (picture(next(given)) for _ in itertools.count()), tmp_path / "spool", max_pending=10)
    looker = intake(source, tmp_path / "ledger")
    list(source.scan())
    until(lambda: len(source._unrecorded) == 10)
    time.sleep(0.05)
    taken = next(given)
    assert 10 <= taken <= 11 and len(source._unrecorded) == 10  # one more is in hand
    source.heed(10)
    assert len(looker.look(never).accepted) == 10
    until(source.stalled)
    assert not looker.look(never).accepted
    source.heed(4)
    until(lambda: len(source._unrecorded) == 6)
    source.close()


def test_no_more_is_kept_than_the_spool_may_take(tmp_path: Path) -> None:
    source = stream(
        lambda: (picture(number) for number in itertools.count()),
        tmp_path / "spool",
        spool_bytes=2**20,
        max_pending=9999,
    )
    looker = intake(source, tmp_path / "ledger")

    def full() -> bool:
        looker.look(never)
        return source.stalled()

    def size() -> int:
        return sum(-(-file.stat().st_size // 4096) * 4096 for file in (tmp_path / "spool").iterdir())

    until(full)
    held = list(source.held())
    assert 2**20 - 8192 <= size() <= 2**20 and len(held) == 255
    source.release(held[:100])
    until(full)
    assert len(source.held()) == 255 and size() <= 2**20 and list(source.held())[:155] == held[100:]
    with pytest.raises(DataError, match="not in the spool any more"):
        source.read(held[0])
    source.close()


def test_a_disk_that_refuses_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refusals = 2
    put = Spool.put

    def refusing(self: Spool, *args: Any) -> Any:
        nonlocal refusals
        if args[0] == 3 and refusals:
            refusals -= 1
            raise StorageError("the disk is full")
        return put(self, *args)

    monkeypatch.setattr(Spool, "put", refusing)
    monkeypatch.setattr("edgetune.agent.sources.stream._LEAST_RETRY_SECONDS", 0.05)
    looker = intake(stream(lambda: map(picture, range(6)), tmp_path / "spool"), tmp_path / "ledger")
    list(looker.source.scan())
    with pytest.raises(StorageError):
        until(lambda: looker.source.check())
    assert [row.label for row in drained(looker).accepted] == [0, 1, 2, 0, 1, 2]
    looker.source.close()


def test_a_torn_or_foreign_file_in_the_spool_is_let_be(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    entry, new = spool.put(7, b"content", "cat", "t")
    assert new and not spool.put(8, b"content", "dog", None)[1]
    (tmp_path / ("0" * 64)).write_bytes(b"torn")
    (tmp_path / "x.tmp").write_bytes(b"torn")
    again = Spool(tmp_path)
    assert list(again.entries.values()) == [entry] and again.read(entry.sha256) == b"content"
    assert not (tmp_path / "x.tmp").exists() and (tmp_path / ("0" * 64)).exists()
    again.remove(entry.sha256)
    assert again.bytes == 4096 and not Spool(tmp_path).entries
    (tmp_path / "position.json").write_text("[]")
    assert again.position("feed") == 0


# ---- in the agent --------------------------------------------------------------------------------------------------
FEED = """
import numpy as np, time, os

def picture(number):
    pixels = np.random.default_rng(number).integers(0, 120, (8, 8, 3)).astype(np.uint8)
    pixels[..., number % 3] += 110
    return pixels, number % 3

def feed(start=0):
    for number in range(start, 60):
        if number % 7 == int(os.environ.get("SLOW", 8)):
            time.sleep(0.02)
        yield picture(number)

def long(start=0):
    for number in range(start, 160):
        if number % 9 == int(os.environ.get("SLOW", 10)):
            time.sleep(0.02)
        yield picture(number)

def again():
    return (picture(number) for number in range(60))

def endless(start=0):
    number = start
    while True:
        yield picture(number)
        number += 1

def large(start=0):
    for pixels, label in endless(start):
        yield pixels.repeat(19, 0).repeat(19, 1), label

def label(pixels):
    found = int(pixels.mean(axis=(0, 1)).argmax())
    return None if found == 2 else found
"""


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("stream")
    make_bundle(root / "bundle")
    (root / "feed.py").write_text(textwrap.dedent(FEED))
    return root


def settings(root: Path, name: str, function: str = "feed", **changed: Any) -> dict[str, Any]:
    return {
        "data": f"{root}/feed.py:{function}", "state": root / name, "batch": 4, "epsilon": 0.9, "once": True,
        "quiet": True, "checkpoint_every": 2, "holdout": 6, "settle_seconds": 0.05, **changed,
    }  # fmt: skip


def run(root: Path, name: str, function: str = "feed", *, shop: Workshop | None = None, **changed: Any) -> list[Any]:
    shop = Workshop() if shop is None else shop
    config = AgentConfig(**settings(root, name, function, **changed))
    run_agent(Bundle.open(root / "bundle"), config, parts=shop.parts(), view=QuietView())
    return ended(root / name)


def ended(state: Path) -> list[Any]:
    """What became of every sample, and what every step was like."""
    ledger = Ledger(state / "ledger.sqlite")
    rows = [(s.path, s.sha256, s.label, s.status, s.step, s.passes) for s in ledger.samples()]
    ledger.close()
    return [rows, [(s["step"], s["loss"], s["samples"]) for s in runlog.steps(state / "log.jsonl")]]


@pytest.mark.parametrize("function", ["feed", "again"])
def test_every_sample_of_a_stream_is_trained_once_and_leaves_the_spool(workshop: Path, function: str) -> None:
    rows, steps = run(workshop, f"once-{function}", function)
    assert len(rows) == 60 and sum(count for _, _, count in steps) == sum(row[3] == "trained" for row in rows)
    assert {row[3] for row in rows} == {"trained", "heldout"} and all(row[5] == (row[3] == "trained") for row in rows)
    files = {file.name for file in (workshop / f"once-{function}" / "spool").iterdir()} - {"position.json"}
    oldest = min(step for step, _ in checkpoint.listed(workshop / f"once-{function}"))
    kept = {row[1] for row in rows if row[3] == "heldout" or (row[4] or 0) > oldest}
    assert files == kept  # what only the newest checkpoint has is kept too
    again, same = run(workshop, f"once-{function}", function)  # nothing is new, and nothing is done
    assert (again, same) == (rows, steps)


@pytest.mark.parametrize(("epochs", "window"), [(1, 16), (1, 80), (2, 16)])
def test_with_a_window_the_end_does_not_depend_on_when_samples_arrive(
    workshop: Path, monkeypatch: pytest.MonkeyPatch, epochs: int, window: int
) -> None:
    """The oracle: an archive of the same samples, which are all there from the beginning."""
    options: dict[str, Any] = {"epochs": epochs, "batch": 16, "intake": IntakeConfig(window=window)}
    name = f"{epochs}-{window}"
    values, labels = zip(*map(picture, range(160)), strict=True)
    np.savez(workshop / "long.npz", x=np.stack(values), y=np.array(labels))
    rows, steps = run(workshop, f"archive{name}", data=workshop / "long.npz", **options)
    monkeypatch.setenv("SLOW", "3")
    slow = run(workshop, f"slow{name}", "long", **options)
    assert steps == slow[1] and [row[1:] for row in rows] == [row[1:] for row in slow[0]]
    if (epochs, window) == (1, 16):
        options["intake"] = IntakeConfig(window=16, max_pending=30)
        assert slow == run(workshop, f"tight{name}", "long", **options)
        found: dict[int, set[int]] = {}
        for arrival, row in enumerate(rows):
            if row[3] == "trained":
                found.setdefault(row[4], set()).add(arrival // 16)
        # Blocks come one after the other; within them the order is another than that of arrival.
        blocks = [min(found[step]) for step in sorted(found)]
        assert blocks == sorted(blocks) and blocks[-1] > 7 and all(len(one) <= 3 for one in found.values())
        trained = [row[4] for row in rows if row[3] == "trained"]
        assert trained != sorted(trained)


def test_without_a_window_what_is_there_is_trained_at_once(workshop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLOW", "3")
    rows, steps = run(workshop, "at-once", "long", batch=16)
    assert len(rows) == 160 and sum(count for _, _, count in steps) == sum(row[3] == "trained" for row in rows)


@pytest.mark.parametrize(("part", "function"), [(0, "feed"), (1, "again")])
def test_killed_at_its_writes_a_stream_ends_as_if_undisturbed(workshop: Path, part: int, function: str) -> None:
    name = f"whole-{function}"
    if not (workshop / name).exists():
        run(workshop, name, function, intake=IntakeConfig(window=16))
    dice, number, deaths = random.Random(part), 1 + 5 * part, 0
    config = settings(workshop, f"killed{part}", function, intake={"window": 16})
    while True:
        message = json.dumps({"bundle": workshop / "bundle", "config": config, "kill_at_sync": number}, default=str)
        process = subprocess.Popen(
            [sys.executable, str(SCRIPT), message], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        code, output = finish(process)
        if code == 0:
            break
        assert code == -signal.SIGKILL, output
        deaths += 1
        number += dice.randint(30, 110)
    assert deaths >= 3
    assert ended(workshop / f"killed{part}") == ended(workshop / name)


def test_an_endless_stream_takes_bounded_room(workshop: Path) -> None:
    sizes: list[int] = []

    def on_step(session: FakeSession) -> None:
        sizes.append(len(os.listdir(workshop / "endless" / "spool")))

    intake = IntakeConfig(max_pending=20)
    rows, steps = run(
        workshop,
        "endless",
        "endless",
        shop=Workshop(on_step=on_step),
        once=False,
        max_steps=60,
        intake=intake,
        holdout=0,
    )
    assert len(steps) == 60 and len(rows) <= 60 * 4 + 30
    assert max(sizes) < 20 + 4 * 4 * 4 and max(sizes[30:]) <= max(sizes[:30]) + 4


def test_a_full_spool_does_not_end_in_a_standstill(workshop: Path) -> None:
    """Every second sample is held out, more than half of the spool takes; and a window never gets full."""
    intake = IntakeConfig(spool_bytes=2**20, max_pending=100, window=100)  # the spool takes 14 samples
    rows, steps = run(workshop, "full", "large", once=False, max_steps=12, intake=intake, holdout=2)
    assert len(steps) == 12
    assert any(record["event"] == "source_full" for record in runlog.read(workshop / "full" / "log.jsonl"))
    assert 5 < sum(row[3] == "heldout" for row in rows) < 14 and any(row[3] == "quarantined" for row in rows)


def test_a_run_that_rests_goes_on_when_its_stream_is_full(workshop: Path) -> None:
    """A stream that is not read any more would never show that the world has changed."""
    _, steps = run(
        workshop, "resting", "endless", once=False, max_steps=24, rescan_seconds=0.05, pause_seconds=0.02,
        intake=IntakeConfig(max_pending=12), drift=DriftConfig(quiet_after=1),
    )  # fmt: skip
    events = [record["event"] for record in runlog.read(workshop / "resting" / "log.jsonl")]
    assert len(steps) == 24 and "quiet" in events and "quiet_ended" in events


def test_a_stream_that_ends_ends_a_run_that_watches(workshop: Path) -> None:
    rows, steps = run(workshop, "watched", once=False)
    assert len(rows) == 60 and sum(count for _, _, count in steps) == sum(row[3] == "trained" for row in rows)


def test_a_stream_without_samples_is_an_error(workshop: Path, tmp_path: Path) -> None:
    (tmp_path / "none.py").write_text("def feed():\n    return []\ndef bad():\n    raise OSError('no signal')\n")
    config = settings(workshop, "empty") | {"data": f"{tmp_path}/none.py:feed"}
    with pytest.raises(DataError, match="holds no samples"):
        run_agent(Bundle.open(workshop / "bundle"), AgentConfig(**config), parts=Workshop().parts(), view=QuietView())
    config = settings(workshop, "failing") | {"data": f"{tmp_path}/none.py:bad"}
    with pytest.raises(DataError, match="no signal"):
        run_agent(Bundle.open(workshop / "bundle"), AgentConfig(**config), parts=Workshop().parts(), view=QuietView())


def test_plans_are_measured_on_a_stream_and_on_archives(workshop: Path, tmp_path: Path) -> None:
    before = threading.active_count()
    batches = list(labelled_batches(make_manifest(), f"{workshop}/feed.py:endless", 4, 2))
    assert [(x.shape, y.shape) for x, y in batches] == [((4, 3, 8, 8), (4,))] * 2
    np.savez(tmp_path / "x.npz", x=np.stack([picture(n)[0] for n in range(9)]), y=np.arange(9) % 3)
    assert len(list(labelled_batches(make_manifest(), tmp_path / "x.npz", 4, 9))) == 2
    assert threading.active_count() == before


def test_every_sample_of_a_stream_can_be_had_once_in_little_room(workshop: Path, tmp_path: Path) -> None:
    source = open_source(f"{workshop}/feed.py:again", CLASSES, {".png"}, IntakeConfig(max_pending=7), tmp_path)
    found = []
    for entry in every(source):
        found.append((entry.label, len(source.read(entry.path))))
        assert len(os.listdir(tmp_path / "spool")) <= 10
    assert [label for label, _ in found] == [number % 3 for number in range(60)]
    source.close()


# ---- entry points --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("feed.py:missing", "has no 'missing'; it has: .*endless, feed"),
        ("missing.py:feed", "there is no file"),
        ("no.such.module:feed", "cannot be imported"),
        ("broken.py:feed", "ZeroDivisionError"),
        ("math:pi", "a float is no source"),
    ],
)
def test_entry_points_that_are_none(
    workshop: Path, monkeypatch: pytest.MonkeyPatch, spec: str, said: str, tmp_path: Path
) -> None:
    (workshop / "broken.py").write_text("1 / 0")
    monkeypatch.chdir(workshop)
    with pytest.raises(DataError, match=said):
        open_source(spec, CLASSES, Decoder(make_manifest()).suffixes, IntakeConfig(), tmp_path)


# ---- a camera ------------------------------------------------------------------------------------------------------
class Capture:
    """What is used of OpenCV's VideoCapture: gives six pictures, then nothing."""

    def __init__(self, device: int | str) -> None:
        self.device, self.taken, self.released = device, 0, False
        captures.append(self)

    def isOpened(self) -> bool:
        return self.device != 9

    def get(self, what: int) -> float:
        return 2.0

    def grab(self) -> bool:
        self.taken += 1
        return self.taken <= 6

    def retrieve(self) -> tuple[bool, Array]:
        return True, picture(self.taken - 1)[0][..., ::-1]  # blue first

    def release(self) -> None:
        self.released = True


captures: list[Capture] = []


def encode(ending: str, value: Array) -> tuple[bool, Array]:
    stream = io.BytesIO()
    Image.fromarray(value[..., ::-1]).save(stream, format="PNG")
    return True, np.frombuffer(stream.getvalue(), np.uint8)


@pytest.fixture
def cv2(monkeypatch: pytest.MonkeyPatch) -> None:
    captures.clear()
    monkeypatch.setitem(sys.modules, "cv2", SimpleNamespace(VideoCapture=Capture, imencode=encode, CAP_PROP_FPS=5))


def taken(device: str, labeller: str, interval_s: float = 0) -> Iterable[Any]:
    return pictures(device, labeller, interval_s)(0)[0]


@pytest.mark.usefixtures("cv2")
def test_a_camera_gives_what_the_labeller_names(workshop: Path) -> None:
    found: list[Any] = []
    with pytest.raises(DataError, match="gives no picture any more"):
        found.extend(taken("0", f"{workshop}/feed.py:label"))
    assert [label for _, label in found] == [0, 1, 0, 1]  # the third class is left out
    for (data, _), number in zip(found, (0, 1, 3, 4), strict=True):
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(data))), picture(number)[0])
    assert captures[0].device == 0 and captures[0].released


@pytest.mark.usefixtures("cv2")
def test_a_film_gives_a_picture_every_so_many_seconds_of_its_own(workshop: Path, tmp_path: Path) -> None:
    (tmp_path / "film.avi").write_bytes(b"")
    found = list(taken(str(tmp_path / "film.avi"), f"{workshop}/feed.py:label", 1.5))  # every third at 2 per second
    assert len(found) == 2 and captures[0].released
    source = open_source(
        f"camera:{tmp_path}/film.avi", CLASSES, {".png"}, IntakeConfig(labeller=f"{workshop}/feed.py:label"), tmp_path
    )
    rows = drained(intake(source, tmp_path / "ledger")).accepted
    assert [row.path.partition("#")[0] for row in rows] == ["camera:film.avi"] * 2
    source.close()


@pytest.mark.usefixtures("cv2")
def test_a_camera_waits_between_two_pictures(workshop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = itertools.count(0, 0.5)
    monkeypatch.setattr("edgetune.agent.sources.camera.time", SimpleNamespace(monotonic=lambda: float(next(now))))
    with pytest.raises(DataError, match="no picture any more"):
        list(taken("0", f"{workshop}/feed.py:label", 1.5))
    assert captures[0].taken == 7


@pytest.mark.usefixtures("cv2")
def test_a_camera_that_cannot_be_used_is_told(workshop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="cannot be opened"):
        list(taken("9", f"{workshop}/feed.py:label"))
    with pytest.raises(DataError, match=r"set intake\.labeller"):
        pictures("0", None, 1)
    with pytest.raises(DataError, match="expected a function"):
        pictures("0", "math:pi", 1)
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(DataError, match=r"edgetune\[camera\]"):
        pictures("0", f"{workshop}/feed.py:label", 1)
