"""What NVIDIA's management library says, through ``pynvml`` (distribution ``nvidia-ml-py``, an optional extra).

Before JetPack 7 a Jetson has no NVML, and with it much is not supported: its GPU has no memory of its own. That is
normal; every answer that is missing is None.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from edgetune.telemetry.cuda import Unavailable


@dataclass(frozen=True)
class NvmlDevice:
    """One device as NVML sees it. None: not supported there. ``load`` in [0, 1]."""

    name: str | None
    capability: str | None
    total_bytes: int | None
    used_bytes: int | None
    load: float | None
    celsius: int | None
    watts: float | None


def read_nvml() -> tuple[NvmlDevice, ...] | Unavailable:
    """Return every device that NVML lists, or why there is nothing to list."""
    try:
        import pynvml
    except ImportError:
        return Unavailable("the optional package nvidia-ml-py is not installed")
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return Unavailable(f"NVML does not start: {error}")
    try:
        count = pynvml.nvmlDeviceGetCount()
        return tuple(_device(pynvml, pynvml.nvmlDeviceGetHandleByIndex(index)) for index in range(count))
    except pynvml.NVMLError as error:
        return Unavailable(f"NVML lists no devices: {error}")
    finally:
        pynvml.nvmlShutdown()


def _device(pynvml: Any, handle: Any) -> NvmlDevice:
    def ask(question: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return question(handle, *arguments)
        except pynvml.NVMLError:  # NotSupported, on a Jetson for nearly everything
            return None

    name, memory = ask(pynvml.nvmlDeviceGetName), ask(pynvml.nvmlDeviceGetMemoryInfo)
    capability = ask(pynvml.nvmlDeviceGetCudaComputeCapability)
    load, milliwatts = ask(pynvml.nvmlDeviceGetUtilizationRates), ask(pynvml.nvmlDeviceGetPowerUsage)
    return NvmlDevice(
        name.decode() if isinstance(name, bytes) else name,
        None if capability is None else "{}.{}".format(*capability),
        None if memory is None else int(memory.total),
        None if memory is None else int(memory.used),
        None if load is None else load.gpu / 100,
        ask(pynvml.nvmlDeviceGetTemperature, pynvml.NVML_TEMPERATURE_GPU),
        None if milliwatts is None else milliwatts / 1000,
    )
