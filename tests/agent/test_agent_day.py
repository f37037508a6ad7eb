"""The simulated day's own arithmetic and world; the day itself is run by hand (tools/day.py)."""

from __future__ import annotations

import os
import random
from pathlib import Path

import numpy as np

from edgetune.units import MIB
from tools import day

EVENTS = dict.fromkeys(("step", "drift", "yielded", "yield_ended", "checkpoint", "evaluated"), 1)


def samples(rise_bytes: float, noise_bytes: float = MIB) -> list[day.Sample]:
    """A day whose memory rises by ``rise_bytes`` from a third of it to the end, after a steep beginning."""
    dice = random.Random(0)
    found = []
    for number in range(480):
        hour = number / 20
        memory = 100 * MIB + rise_bytes * (hour - 8) / 16 + dice.gauss(0, noise_bytes)
        memory -= max(0.0, 4 - hour) * 10 * MIB
        found.append(day.Sample(hour, int(memory), 50 * MIB, 12, 4, 5 * MIB, {"ledger": 5 * MIB}))
    return found


def test_a_line_through_what_was_seen_after_the_warm_up() -> None:
    seen = samples(4 * MIB)
    fit = day.fitted(seen, "resident_bytes")
    late = [one for one in seen if one.hour >= 24 / 3]
    slope, begin = np.polyfit([one.hour - late[0].hour for one in late], [one.resident_bytes for one in late], 1)
    span = late[-1].hour - late[0].hour
    assert abs(fit.rise - slope * span) < 0.1 * MIB and abs(fit.begin - begin) < 0.1 * MIB
    assert abs(fit.rise - 4 * MIB) < 3 * fit.error < MIB and fit.grows


def test_what_grows_is_told_and_what_stays_is_not() -> None:
    assert day.verdict(samples(0.0), EVENTS) == []
    (text,) = day.verdict(samples(4 * MIB), EVENTS)
    assert text.startswith("resident_bytes grows by 4")
    assert day.verdict(samples(0.0), {**EVENTS, "drift": 0}) == ["not one event 'drift' was logged"]
    shown = day.table(samples(0.0), EVENTS)
    assert "| resident | 99.95 MiB |" in shown and "| ledger | 5.00 MiB | 5.00 MiB |" in shown
    assert day.picture(samples(0.0)).startswith("<svg")


def test_a_look_and_a_world(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    world = day.World(tmp_path / "data", 0)
    try:
        world.live(12.5, 0.1)
        assert world.guest is not None and len(list((tmp_path / "data").glob("*/*.png"))) == 30
        world.live(14.0, 0.0)
        assert world.guest is None
    finally:
        world.end()
    (tmp_path / "state" / "replay").mkdir(parents=True)
    (tmp_path / "state" / "ledger.sqlite-wal").write_bytes(bytes(5000))
    (tmp_path / "state" / "replay" / "one").write_bytes(bytes(100))
    seen = day.look(os.getpid(), tmp_path / "state", 1.5)
    assert seen.parts == {"ledger": 8192, "replay": 4096} and seen.disk_bytes == 12288
    assert 10 * MIB < seen.anonymous_bytes < seen.resident_bytes and seen.files > 2 and seen.threads >= 1
