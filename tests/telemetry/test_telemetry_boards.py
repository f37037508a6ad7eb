"""Readers of Jetson's own files, on trees of four boards under JetPack 5, 6 and 7."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from edgetune.telemetry.available import available_bytes
from edgetune.telemetry.board import Board, jetpack_of, read_board
from edgetune.telemetry.cuda import CudaMemory, Unavailable, read_cuda
from edgetune.telemetry.gpu import read_gpu
from edgetune.telemetry.meminfo import read_meminfo, read_swaps
from edgetune.telemetry.nvml import NvmlDevice, read_nvml
from edgetune.telemetry.power import Rail, read_power_mode, read_rails, total_watts
from edgetune.telemetry.process import proportional_bytes
from edgetune.telemetry.thermal import Zone, read_throttling, read_zones
from edgetune.units import MIB
from tests.telemetry.board_trees import BOARDS, unpack


@pytest.fixture(params=BOARDS)
def board(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def root(board: str, tmp_path: Path) -> Path:
    return unpack(board, tmp_path)


ORIN_NANO = "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super"
EXPECTED = {
    "orin-jetpack5": Board("Jetson AGX Orin", "tegra23x", "Orin", "8.7", "35.4.1", "5.1.2"),
    "orin-jetpack6": Board(
        "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super",
        "tegra234",
        "Orin",
        "8.7",
        "36.4.4",
        "6.2.1",
    ),
    "thor-jetpack7": Board("NVIDIA Jetson AGX Thor Developer Kit", "tegra264", "Thor", "11.0", "38.2.0", "7.0"),
    "xavier-jetpack5": Board("Jetson-AGX", "tegra194", "Xavier", "7.2", "35.6.5", "5.x"),
}


def test_which_board_and_release(board: str, root: Path) -> None:
    assert read_board(root) == EXPECTED[board]


def test_releases_that_are_not_in_the_table() -> None:
    assert [jetpack_of(l4t) for l4t in ("36.4.3", "36.9.9", "39.2.0", "41.0.0")] == ["6.2", "6.x", "7.2", None]


def test_memory(board: str, root: Path) -> None:
    memory, swaps = read_meminfo(root), read_swaps(root)
    assert memory is not None and swaps is not None
    nvmap_mib = {"orin-jetpack5": 512, "orin-jetpack6": 1024, "thor-jetpack7": None, "xavier-jetpack5": 256}[board]
    assert memory.nvmap_used_bytes == (None if nvmap_mib is None else nvmap_mib * MIB)
    kinds = {"orin-jetpack5": ["zram", "zram"], "orin-jetpack6": ["zram", "file"]}
    assert [swap.kind for swap in swaps] == kinds.get(board, [])
    available, source = {
        "orin-jetpack5": (25600 * MIB, "MemAvailable"),
        "orin-jetpack6": (700 * MIB, "MemAvailable"),  # less than what is left of the service's 1 GiB
        "thor-jetpack7": (112640 * MIB, "MemAvailable"),
        "xavier-jetpack5": (368 * MIB, "cgroup /"),  # a container of the older version, with a limit of 768 MiB
    }[board]
    assert (available_bytes(root).bytes, available_bytes(root).source) == (available, source)


def test_gpu(board: str, root: Path) -> None:
    gpu = read_gpu(root)
    assert gpu is not None
    name, load, max_hz = {
        "orin-jetpack5": ("ga10b", 0.345, 1_300_500_000),
        "orin-jetpack6": ("gpu", 0.0, 1_020_000_000),
        "thor-jetpack7": ("gpu-gpc-0", None, 1_575_000_000),
        "xavier-jetpack5": ("gv11b", 0.0, 1_377_000_000),
    }[board]
    assert (gpu.name, gpu.load, gpu.max_hz) == (name, load, max_hz)


def test_power(board: str, root: Path) -> None:
    rails, mode = read_rails(root), read_power_mode(root)
    assert mode is not None
    names, watts, number, mode_name, chosen = {
        "orin-jetpack5": (
            ["VDDQ_VDD2_1V8AO", "VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"], 5064 * 120e-6 + 14, 0, "MAXN", True,
        ),
        "orin-jetpack6": (["VDD_IN", "VDD_CPU_GPU_CV", "VDD_SOC"], 5.016 * 1.55, 2, "MAXN_SUPER", True),
        "thor-jetpack7": (["VDD_GPU", "VDD_CPU_SOC_MSS", "VIN_SYS_5V0", "VIN"], 23.0, 1, "120W", False),
        "xavier-jetpack5": (["GPU", "CPU", "SOC"], 5 * (0.093 + 0.124 + 0.587), 2, "MODE_15W", False),
    }[board]  # fmt: skip
    assert [rail.name for rail in rails] == names and total_watts(rails) == pytest.approx(watts)
    assert (mode.number, mode.name, mode.set) == (number, mode_name, chosen)
    assert [rail.alarm for rail in rails][:2] == {"orin-jetpack5": [None, False], "orin-jetpack6": [True, None]}.get(
        board, [None, None]
    )


def test_power_before_jetpack_5(tmp_path: Path) -> None:
    monitor = tmp_path / "sys/bus/i2c/devices/6-0040/iio:device0"
    monitor.mkdir(parents=True)
    for name, content in {"rail_name_0": "POM_5V_IN", "in_power0_input": "2345", "rail_name_1": "POM_5V_GPU"}.items():
        (monitor / name).write_text(content + "\n")
    assert read_rails(tmp_path) == (Rail("POM_5V_IN", 2.345, None),)


def test_heat_and_throttling(board: str, root: Path) -> None:
    zones, throttling = {zone.name: zone for zone in read_zones(root)}, read_throttling(root)
    hottest, cooling, events = {
        "orin-jetpack5": (Zone("tj-therm", 48.156, 99.0, 104.5), {}, {}),
        "orin-jetpack6": (Zone("cpu-thermal", 51.218, 99.0, 104.5), {}, {"instantaneous over-current": 27390}),
        "thor-jetpack7": (Zone("tj-thermal", 55.1, None, 114.5), {}, {"instantaneous over-current": 179}),
        "xavier-jetpack5": (Zone("CPU-therm", 31.5, None, None), {"cpu-throttle-alert": 1}, {}),
    }[board]
    assert zones[hottest.name] == hottest and throttling.cooling == cooling
    assert {kind: count for kind, count in throttling.over_current.items() if count} == events
    unread = {"orin-jetpack5": "CV0-therm", "orin-jetpack6": "cv0-thermal", "thor-jetpack7": "gpu-thermal"}
    assert "PMIC-Die" not in zones and (board not in unread or zones[unread[board]].celsius is None)


def test_nothing_there_is_no_error(tmp_path: Path) -> None:
    assert (read_board(tmp_path), read_gpu(tmp_path), read_power_mode(tmp_path)) == (None, None, None)
    assert (read_rails(tmp_path), read_zones(tmp_path), total_watts(())) == ((), (), None)
    throttling = read_throttling(tmp_path)
    assert throttling.cooling == {} and throttling.over_current == {}
    assert proportional_bytes(tmp_path) is None


def test_no_cuda_runtime_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    found = read_cuda(("libno-such-thing.so",))
    assert isinstance(found, Unavailable) and "libno-such-thing.so" in found.reason


def test_torchs_allocator_is_asked_where_torch_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = SimpleNamespace(
        is_available=lambda: True, mem_get_info=lambda: (3, 10), memory_allocated=lambda: 1,
        max_memory_allocated=lambda: 2,
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    found = read_cuda()
    assert not isinstance(found, Unavailable)
    assert (found.free_bytes, found.total_bytes, found.own_bytes, found.own_peak_bytes) == (3, 10, 1, 2)


@pytest.mark.parametrize("code", [0, 35])
def test_the_cuda_runtime_is_asked_without_torch(code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def memory(free: Any, total: Any) -> int:
        free._obj.value, total._obj.value = 3 * MIB, 8 * MIB
        return code

    def say(number: int) -> bytes:
        return f"driver version {number}".encode()

    def load(name: str) -> SimpleNamespace:
        if name != "libcudart.so.12":
            raise OSError(name)
        return SimpleNamespace(cudaMemGetInfo=memory, cudaGetErrorString=say)

    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.setattr(ctypes, "CDLL", load)
    found = read_cuda()
    if code:
        assert found == Unavailable("libcudart.so.12 answers with error 35: driver version 35")
    else:
        assert found == CudaMemory(3 * MIB, 8 * MIB, None, None, "libcudart.so.12")


class NotSupportedError(Exception):
    """As pynvml's errors."""


def test_nvml_on_a_jetson_supports_little(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise NotSupportedError("Not Supported")

    fake = ModuleType("pynvml")
    names = ("MemoryInfo", "UtilizationRates", "PowerUsage", "Temperature")
    vars(fake).update({f"nvmlDeviceGet{name}": refuse for name in names})
    vars(fake).update(
        NVMLError=NotSupportedError, NVML_TEMPERATURE_GPU=0, nvmlInit=lambda: None, nvmlShutdown=lambda: None,
        nvmlDeviceGetCount=lambda: 1, nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetName=lambda _: "NVIDIA Thor", nvmlDeviceGetCudaComputeCapability=lambda _: (11, 0),
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    assert read_nvml() == (NvmlDevice("NVIDIA Thor", "11.0", None, None, None, None, None),)
    monkeypatch.setattr(fake, "nvmlInit", refuse)
    found = read_nvml()
    assert isinstance(found, Unavailable) and "Not Supported" in found.reason
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert isinstance(read_nvml(), Unavailable)
