"""What this process holds of the GPU's memory. Where CPU and GPU share one, a budget for the process is for both.

What is resident (``telemetry/process.py``) leaves it out. Three tell of one process, and the first that does is asked:

- NVML, context and code included; in JetPack 7 and on ordinary computers;
- NvMap's table in debugfs, for root alone; on a Jetson before that (source: jetson_stats, ``core/processes.py``);
- torch's allocator, if torch is loaded: its tensors, not the context.

Knows those three; must not know what the memory is for.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from edgetune.telemetry.files import text

ROOT = Path("/")
_NVMAP = Path("sys/kernel/debug/nvmap/iovmm/maps")
_NVMAP_LINE = re.compile(r"^\S+[ \t]+\S+[ \t]+(\d+)[ \t]+(\d+)([KM]?)[ \t]*$", re.MULTILINE)
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20}


class HostMeter(Protocol):
    """Measures resident memory (``telemetry.process.PeakMeter``)."""

    resettable: bool | None

    def reset(self) -> None: ...
    def peak_bytes(self) -> int: ...


class DeviceMemory:
    """What the process ``pid`` (None: this one) holds of every CUDA device. ``source``: who was found to tell."""

    def __init__(self, root: Path = ROOT, pid: int | None = None) -> None:
        self.root, self.pid = root, os.getpid() if pid is None else pid
        self.source: str | None = None
        self._readers: dict[str, Callable[[], int | None]] = {
            "nvml": self._nvml, "nvmap": self._nvmap, "torch": self._torch,
        }  # fmt: skip

    def now_bytes(self) -> int | None:
        """Return the bytes held now; None: nobody tells, or nothing is held."""
        # A source that was found once may fall silent (no context yet): the others are asked again only then.
        for name in [self.source] if self.source else self._readers:
            found = self._readers[name]()
            if found is not None:
                self.source = name
                return found
        return None

    def reset(self) -> None:
        """Start anew with the peak of what torch's allocator holds."""
        torch = _cuda_torch()
        if torch is not None:
            torch.cuda.reset_peak_memory_stats()

    def peak_bytes(self) -> int | None:
        """Return the most bytes held since the last :meth:`reset`.

        onnxruntime's arena on a device gives nothing back, so what is held after a step is the most of it; torch's
        cache may, and tells what it held at most.
        """
        now, torch = self.now_bytes(), _cuda_torch()
        if now is None or torch is None:
            return now
        return now + int(torch.cuda.max_memory_reserved()) - int(torch.cuda.memory_reserved())

    def _nvml(self) -> int | None:
        try:
            import pynvml
        except ImportError:
            return None
        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError:
            return None
        try:
            used = [
                process.usedGpuMemory
                for index in range(pynvml.nvmlDeviceGetCount())
                for process in pynvml.nvmlDeviceGetComputeRunningProcesses(pynvml.nvmlDeviceGetHandleByIndex(index))
                if process.pid == self.pid
            ]
        except pynvml.NVMLError:  # not supported: the normal answer of a Jetson
            return None
        finally:
            pynvml.nvmlShutdown()
        known = [int(size_bytes) for size_bytes in used if size_bytes is not None]
        return sum(known) if known else None

    def _nvmap(self) -> int | None:
        table = text(self.root / _NVMAP)
        sizes = [
            int(match[2]) * _UNITS[match[3]] for match in _NVMAP_LINE.finditer(table or "") if int(match[1]) == self.pid
        ]
        return sum(sizes) if sizes else None

    def _torch(self) -> int | None:
        torch = _cuda_torch()
        return None if torch is None else int(torch.cuda.memory_reserved())


class BoardMeter:
    """The high-water mark of the process in the memory of host and device together; see ``PeakMeter``.

    The two marks are added, though they need not have been reached at the same instant: never too low.
    """

    def __init__(self, host: HostMeter, device: DeviceMemory, resident_bytes: Callable[[], int]) -> None:
        self.host, self.device, self._resident_bytes = host, device, resident_bytes

    @property
    def resettable(self) -> bool | None:
        """As of the host's."""
        return self.host.resettable

    def reset(self) -> None:
        """Lower both marks to what is held now, as far as each can."""
        self.host.reset()
        self.device.reset()

    def peak_bytes(self) -> int:
        """Return the sum of both marks."""
        return self.host.peak_bytes() + (self.device.peak_bytes() or 0)

    def now_bytes(self) -> int:
        """Return what is held of both now."""
        return self._resident_bytes() + (self.device.now_bytes() or 0)


def _cuda_torch() -> Any:
    """Return torch if it is loaded and has used CUDA; it is never imported for this."""
    torch = sys.modules.get("torch")
    return torch if torch is not None and torch.cuda.is_initialized() else None
