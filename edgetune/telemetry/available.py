"""How much memory this process may still take before the system, or its control group, runs out of it."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from edgetune.telemetry.cgroup import read_groups
from edgetune.telemetry.meminfo import read_meminfo

UNKNOWN_BYTES = sys.maxsize
"""What is available where nothing tells: no limit is known."""


@dataclass(frozen=True)
class Available:
    """``bytes`` may still be taken; ``source`` names what sets that limit, in words."""

    bytes: int
    source: str


def available_bytes(root: Path = Path("/")) -> Available:
    """Return what may still be taken: the least of the system's MemAvailable and the room in each control group.

    Swap and zram do not count: a training step that is swapped out is no step any more, and zram takes from the same
    memory. Never negative. :data:`UNKNOWN_BYTES` where there is no source at all. A handful of small files are read, so
    it can be asked before every step.
    """
    found = []
    memory = read_meminfo(root)
    if memory is not None and memory.available_bytes is not None:
        found.append(Available(memory.available_bytes, "MemAvailable"))
    for group in read_groups(root):
        if group.room_bytes is not None:
            found.append(Available(max(0, group.room_bytes), f"cgroup {group.path}"))
    if not found:
        return Available(UNKNOWN_BYTES, "neither /proc/meminfo nor a control group tells")
    return min(found, key=lambda item: item.bytes)
