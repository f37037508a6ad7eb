"""The process's own memory, on this machine and from captured text."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edgetune.errors import EngineError
from edgetune.telemetry.process import PeakMeter, proportional_bytes, resident_bytes
from edgetune.units import MIB

# The memory lines of /proc/self/status in the format of Linux 6.x.
STATUS = """Name:\tpython3
Umask:\t0022
State:\tR (running)
Pid:\t4242
VmPeak:\t 1193740 kB
VmSize:\t 1128204 kB
VmLck:\t       0 kB
VmPin:\t       0 kB
VmHWM:\t  231516 kB
VmRSS:\t  165980 kB
RssAnon:\t  101132 kB
RssFile:\t   64848 kB
RssShmem:\t       0 kB
Threads:\t5
"""


def fake_root(tmp_path: Path, text: str) -> Path:
    (tmp_path / "self").mkdir()
    (tmp_path / "self" / "status").write_text(text)
    return tmp_path


def touch(size_bytes: int) -> None:
    """Take memory, write to all of it, and give it back."""
    np.ones(size_bytes, np.uint8)


def test_the_high_water_mark_sees_what_was_freed() -> None:
    meter = PeakMeter()
    assert meter.resettable is None
    touch(128 * MIB)  # an older, higher mark, which reset must forget
    meter.reset()
    if not meter.resettable:
        pytest.skip("this kernel does not reset the high-water mark")
    before = meter.peak_bytes()
    assert before < resident_bytes() + 4 * MIB
    touch(64 * MIB)
    moved = meter.peak_bytes() - before
    assert 60 * MIB < moved < 72 * MIB
    assert resident_bytes() < before + 8 * MIB
    meter.reset()
    assert meter.peak_bytes() < before + 8 * MIB


def test_captured_status(tmp_path: Path) -> None:
    root = fake_root(tmp_path, STATUS)
    assert resident_bytes(root) == 165980 * 1024
    assert PeakMeter(root).peak_bytes() == 231516 * 1024


def test_reset_writes_five_to_clear_refs(tmp_path: Path) -> None:
    root = fake_root(tmp_path, STATUS)
    (root / "self" / "clear_refs").touch()
    meter = PeakMeter(root)
    meter.reset()
    assert meter.resettable is True
    assert (root / "self" / "clear_refs").read_text() == "5"


def test_a_kernel_without_clear_refs_is_told_apart(tmp_path: Path) -> None:
    meter = PeakMeter(fake_root(tmp_path, STATUS))
    meter.reset()
    assert meter.resettable is False
    assert not (tmp_path / "self" / "clear_refs").exists()
    assert meter.peak_bytes() == 231516 * 1024


def test_the_proportional_share(tmp_path: Path) -> None:
    shared = proportional_bytes()
    assert shared is not None and 0 < shared <= resident_bytes() + MIB
    root = fake_root(tmp_path, STATUS)
    (root / "self" / "smaps_rollup").write_text("Rss:  9000 kB\nPss:                5120 kB\nPss_Anon: 1000 kB\n")
    assert proportional_bytes(root) == 5 * MIB


def test_no_proc_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="cannot be read"):
        resident_bytes(tmp_path)
    with pytest.raises(EngineError, match="no field VmHWM"):
        PeakMeter(fake_root(tmp_path, "Name:\tpython3\nVmRSS:\t 12 kB\n")).peak_bytes()
