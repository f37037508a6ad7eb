"""What the system says of its memory and swap: ``/proc/meminfo``, ``/proc/swaps`` and the zram devices.

Swap on a disk and swap in compressed memory (zram, which Jetson systems come with) are told apart: the second takes
from the very memory that it extends. Sources: ``man 5 proc_meminfo``, the kernel's ``admin-guide/blockdev/zram.rst``,
and for the NvMap lines NVIDIA's L4T kernel (``drivers/video/tegra/nvmap``), which adds them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from edgetune.telemetry.files import folders, integer, text

ROOT = Path("/")


@dataclass(frozen=True)
class MemInfo:
    """The lines of ``/proc/meminfo`` that matter here, in bytes. None: this kernel does not have the line.

    ``nvmap_used_bytes`` is what the GPU and the other engines of a Jetson hold of the shared memory.
    """

    total_bytes: int
    available_bytes: int | None
    swap_total_bytes: int
    swap_free_bytes: int
    nvmap_used_bytes: int | None
    nvmap_free_bytes: int | None


@dataclass(frozen=True)
class Swap:
    """One area of swap. ``kind``: ``zram`` (compressed memory), ``partition`` or ``file``."""

    name: str
    kind: str
    size_bytes: int
    used_bytes: int


@dataclass(frozen=True)
class Zram:
    """One compressed block device. ``memory_bytes`` is what it takes now for the ``stored_bytes`` in it."""

    name: str
    size_bytes: int
    stored_bytes: int
    memory_bytes: int


def read_meminfo(root: Path = ROOT) -> MemInfo | None:
    """Return the system's memory; None: there is no such file, or it names no total."""
    found = text(root / "proc" / "meminfo")
    if found is None:
        return None
    lines = {name: int(kib) * 1024 for name, kib in re.findall(r"^(\w+):\s*([0-9]+) kB$", found, re.MULTILINE)}
    if "MemTotal" not in lines:
        return None
    return MemInfo(
        total_bytes=lines["MemTotal"],
        available_bytes=lines.get("MemAvailable"),
        swap_total_bytes=lines.get("SwapTotal", 0),
        swap_free_bytes=lines.get("SwapFree", 0),
        nvmap_used_bytes=lines.get("NvMapMemUsed"),
        nvmap_free_bytes=lines.get("NvMapMemFree"),
    )


def read_swaps(root: Path = ROOT) -> tuple[Swap, ...] | None:
    """Return the areas of swap in use; None: this kernel has no swap at all."""
    found = text(root / "proc" / "swaps")
    if found is None:
        return None
    swaps = []
    for line in found.splitlines()[1:]:
        words = line.split()
        if len(words) >= 4 and words[2].isdigit() and words[3].isdigit():
            # In a container, or after a rename, the name alone tells: the kernel gives zram devices no other.
            kind = "zram" if Path(words[0]).name.startswith("zram") else words[1]
            swaps.append(Swap(words[0], kind, int(words[2]) * 1024, int(words[3]) * 1024))
    return tuple(swaps)


def read_zram(root: Path = ROOT) -> tuple[Zram, ...]:
    """Return the zram devices that have been given a size."""
    devices = []
    for folder in folders(root / "sys" / "block", "zram*"):
        size_bytes, stat = integer(folder / "disksize"), (text(folder / "mm_stat") or "").split()
        if size_bytes and len(stat) >= 3 and all(word.isdigit() for word in stat[:3]):
            devices.append(Zram(folder.name, size_bytes, stored_bytes=int(stat[0]), memory_bytes=int(stat[2])))
    return tuple(devices)
