"""The tool that takes the power away: what it may drop, what it must keep, and that it sees a forgotten fsync."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest

from tools.powerloss import Tally, summary, table
from tools.powerloss_disk import MODES, ROOT, Change, Data, Made, Names, Size, Sync, after_power_loss
from tools.powerloss_trace import Recorder, record, usable

OLD, NEW = b"old " * 400, b"new! " * 400
PROGRAM = """
import os, sys
root, sync = sys.argv[1], sys.argv[2]
def put(content):
    with open(f"{root}/state.tmp", "wb", buffering=0) as stream:
        stream.write(content[:700])
        stream.write(content[700:])
        if "file" in sync:
            os.fsync(stream.fileno())
    os.replace(f"{root}/state.tmp", f"{root}/state")
    if "directory" in sync:
        descriptor = os.open(root, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
put(b"old " * 400)
with open(f"{root}/done", "wb") as stream:
    stream.write(b"x")
    stream.flush()
    os.fsync(stream.fileno())
descriptor = os.open(root, os.O_RDONLY)
os.fsync(descriptor)
os.close(descriptor)
put(b"new! " * 400)
"""
"""Replaces a file, as an agent does; ``done`` promises that the first content is there. What is synced is told."""


def contents(changes: list[Change], seeds: int) -> set[tuple[bytes | None, bool]]:
    """Return what may be in ``state``, and whether ``done`` is there, after a power loss at any point."""
    found = set()
    for at in range(len(changes) + 1):
        for seed in range(seeds):
            for mode in MODES:
                disk = after_power_loss(changes[:at], mode, random.Random(seed))
                found.add((disk.content("state"), disk.content("done") == b"x"))
    return found


@pytest.mark.skipif(not usable(), reason="needs strace, and leave to trace")
def test_a_forgotten_fsync_is_seen_and_a_right_program_passes(tmp_path: Path) -> None:
    def run(sync: str) -> set[tuple[bytes | None, bool]]:
        root = tmp_path / f"state-{sync or 'nothing'}"
        root.mkdir()
        words = [sys.executable, "-S", "-c", PROGRAM, str(root), sync]
        code, said, changes = record(words, root, tmp_path / "trace")
        assert code == 0, said
        assert (root / "state").read_bytes() == NEW, "the program itself is right"
        last = after_power_loss(
            [*changes, Sync(ROOT), *(Sync(node) for node in range(1, 9))], "nothing", random.Random(0)
        )
        assert (last.content("state"), last.content("done")) == (NEW, b"x"), "the recording is complete"
        return contents(changes, 6)

    assert run("file,directory") == {(None, False), (OLD, False), (OLD, True), (NEW, True)}
    without_directory = run("file")
    assert {state for state, _ in without_directory} <= {None, OLD, NEW}, "never a torn one"
    torn = {state for state, _ in run("directory")} - {None, OLD, NEW}
    assert b"" in torn and any(state and len(set(state)) > 1 for state in torn), "empty, and in part"
    assert (None, True) in run(""), "promised and lost"


def test_what_is_synced_stays_and_all_else_may_go() -> None:
    named = Names(((ROOT, "a", 1),))
    changes: list[Change] = [
        named,
        Data(1, 0, b"x" * 2000),
        Sync(1),
        Sync(ROOT),
        Data(1, 1000, b"y" * 2000),
        Size(1, 10),
    ]
    for mode in MODES:
        for seed in range(20):
            content = after_power_loss(changes[:4], mode, random.Random(seed)).content("a")
            assert content == b"x" * 2000
            content = after_power_loss(changes[:5], mode, random.Random(seed)).content("a")
            assert content is not None and content[:1000] == b"x" * 1000 and len(content) >= 2000
    found = {after_power_loss(changes, "any", random.Random(seed)).content("a") for seed in range(60)}
    lengths = {len(content or b"") for content in found}
    assert {10, 2000, 3000} <= lengths and any(b"x" in c[1000:] and b"y" in c for c in found if c), "torn"
    assert after_power_loss(changes, "nothing", random.Random(0)).content("a") == b"x" * 2000
    assert after_power_loss([named, Sync(1)], "nothing", random.Random(0)).content("a") is None, "no name is synced"


def test_in_order_keeps_names_up_to_some_point() -> None:
    changes: list[Change] = [Names(((ROOT, str(n), n + 1),)) for n in range(4)]
    kept = {tuple(after_power_loss(changes, "in order", random.Random(seed)).directories[ROOT]) for seed in range(60)}
    assert kept == {tuple("0123"[:n]) for n in range(5)}
    any_of = {tuple(after_power_loss(changes, "any", random.Random(seed)).directories[ROOT]) for seed in range(200)}
    assert len(any_of) == 16


def test_a_rename_is_one_change_and_links_stay_links(tmp_path: Path) -> None:
    changes: list[Change] = [
        Made(5), Names(((ROOT, "sub", 5),)), Names(((5, "a", 1),)), Data(1, 0, b"one"), Sync(1), Sync(5), Sync(ROOT),
        Names(((5, "a", None), (5, "b", 1))), Names(((5, "c", 1),)), Sync(5),
    ]  # fmt: skip
    for seed in range(20):
        disk = after_power_loss(changes[:8], "any", random.Random(seed))
        assert (disk.content("sub/a"), disk.content("sub/b")) in {(b"one", None), (None, b"one")}
    after_power_loss(changes, "nothing", random.Random(0)).write(tmp_path / "disk")
    assert (tmp_path / "disk/sub/b").samefile(tmp_path / "disk/sub/c") and not (tmp_path / "disk/sub/a").exists()


def test_what_the_recorder_does_not_know_is_an_error() -> None:
    def hexed(text: str) -> str:
        return "".join(f"\\x{byte:02x}" for byte in text.encode())

    opened = f'7 openat(AT_FDCWD</>, "{hexed("/s/f")}", O_RDWR|O_CREAT, 0666) = 3<{hexed("/s/f")}>\n'
    for call in ("fallocate(3<P>, 0, 0, 9) = 0", "mmap(NULL, 9, PROT_READ|PROT_WRITE, MAP_SHARED, 3<P>, 0) = 0x7f00"):
        line = "7 " + call.replace("P>", hexed("/s/f") + ">") + "\n"
        with pytest.raises(RuntimeError, match=r"known here|mapped"):
            Recorder(Path("/s")).read([opened, line])
    with pytest.raises(RuntimeError, match="opening was not seen"):
        Recorder(Path("/s")).read([f'7 write(4<{hexed("/s/f")}>, "{hexed("x")}", 1) = 1\n'])
    recorder = Recorder(Path("/s"))
    half = [f'8 write(3<{hexed("/s/f")}>, "{hexed("xyz")}", 3 <unfinished ...>\n', "8 <... write resumed>) = 2\n"]
    lines = ["7 clone3({flags=CLONE_THREAD}, 88 <unfinished ...>\n", opened, *half, "7 <... clone3 resumed>) = 8\n"]
    recorder.read_threads(lines)
    recorder.read(lines)
    assert recorder.changes == [Names(((ROOT, "f", 1),)), Data(1, 0, b"xy")]


def test_the_table_and_what_was_recorded() -> None:
    assert (
        table({"any": Tally(20, 3, ["weights (point 7)"])}).splitlines()[-1] == "| any | 20 | 3 | weights (point 7) |"
    )
    assert "3 bytes, 1 syncs" in summary([Data(1, 0, b"abc"), Sync(1)])
