"""The GPU's share of what a process takes: NVML, NvMap's table and torch's allocator, each played by a stand-in."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from edgetune.telemetry.device import BoardMeter, DeviceMemory
from edgetune.telemetry.process import PeakMeter, resident_bytes

# The layout is that of nvmap's debugfs on L4T 35 and 36 (the expression by which jetson_stats reads it).
NVMAP = """CLIENT                        PROCESS      PID        SIZE
user                         python3     4711      20480K
user                         python3     4712         12M
user                            Xorg     1200         64K
total                                              32832K
"""


@pytest.fixture(autouse=True)
def no_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide what this machine has."""
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setitem(sys.modules, "torch", None)


def fake_nvml(processes: list[tuple[int, int | None]], *, refuse: bool = False) -> ModuleType:
    """Return a ``pynvml`` with one device on which ``processes`` (pid, bytes) run."""
    module = ModuleType("pynvml")

    class NVMLError(Exception):
        pass

    def running(handle: object) -> list[SimpleNamespace]:
        if refuse:
            raise NVMLError("Not Supported")
        return [SimpleNamespace(pid=pid, usedGpuMemory=used) for pid, used in processes]

    module.__dict__.update(
        NVMLError=NVMLError, nvmlInit=lambda: None, nvmlShutdown=lambda: None, nvmlDeviceGetCount=lambda: 1,
        nvmlDeviceGetHandleByIndex=lambda index: index, nvmlDeviceGetComputeRunningProcesses=running,
    )  # fmt: skip
    return module


def fake_torch(reserved: int, most: int) -> ModuleType:
    """Return a ``torch`` whose allocator holds ``reserved`` bytes and held ``most``."""
    module = ModuleType("torch")
    state = {"most": most}
    module.__dict__["cuda"] = SimpleNamespace(
        is_initialized=lambda: True, memory_reserved=lambda: reserved, max_memory_reserved=lambda: state["most"],
        reset_peak_memory_stats=lambda: state.update(most=reserved),
    )  # fmt: skip
    return module


def nvmap(root: Path) -> Path:
    place = root / "sys/kernel/debug/nvmap/iovmm"
    place.mkdir(parents=True)
    (place / "maps").write_text(NVMAP)
    return root


def test_nvml_tells_of_this_process_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml([(4711, 300 << 20), (99, 5 << 20), (4711, None)]))
    memory = DeviceMemory(nvmap(tmp_path), pid=4711)
    assert (memory.now_bytes(), memory.source) == (300 << 20, "nvml")


def test_where_nvml_does_not_support_it_nvmap_is_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml([], refuse=True))
    memory = DeviceMemory(nvmap(tmp_path), pid=4711)
    assert (memory.now_bytes(), memory.source) == (20 << 20, "nvmap")
    assert DeviceMemory(tmp_path, pid=4712).now_bytes() == 12 << 20
    assert DeviceMemory(tmp_path, pid=5000).now_bytes() is None


def test_torch_adds_the_peak_that_it_gave_back(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "torch", fake_torch(reserved=100, most=160))
    memory = DeviceMemory(nvmap(tmp_path), pid=4711)
    assert memory.peak_bytes() == (20 << 20) + 60
    memory.reset()
    assert memory.peak_bytes() == 20 << 20
    alone = DeviceMemory(tmp_path / "nothing")
    assert (alone.now_bytes(), alone.source) == (100, "torch")


def test_nobody_tells(tmp_path: Path) -> None:
    memory = DeviceMemory(tmp_path)
    memory.reset()
    assert (memory.now_bytes(), memory.peak_bytes(), memory.source) == (None, None, None)


def test_a_budget_is_for_host_and_device_together(tmp_path: Path) -> None:
    host = PeakMeter()
    both = BoardMeter(host, DeviceMemory(nvmap(tmp_path), pid=4711), lambda: 1000)
    both.reset()
    assert both.resettable == host.resettable
    assert both.peak_bytes() >= (20 << 20) + (1 << 20)
    assert both.now_bytes() == (20 << 20) + 1000
    silent = BoardMeter(host, DeviceMemory(tmp_path, pid=5000), resident_bytes)
    assert silent.peak_bytes() == pytest.approx(host.peak_bytes(), rel=0.05)
