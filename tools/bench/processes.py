"""What a worker measures of its own process, whatever it runs: memory, processor time. Knows glibc and /proc alone."""

from __future__ import annotations

import gc
import resource
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from edgetune.engines import heap
from edgetune.telemetry.process import PeakMeter, resident_bytes


def processor_seconds() -> float:
    """Return the seconds that processors spent on this process, all threads, user and system."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def save_gradients(file: str, made: Mapping[str, Any]) -> None:
    """Write arrays by name, for the parent."""
    save: Any = np.savez  # its signature would have a tensor's name be a flag of its own
    save(file, **made)


def settle() -> None:
    """Free what is garbage, and give free memory back to the system."""
    gc.collect()
    heap.trim()  # what an engine keeps for its next step, too


def peak_of(load: Callable[[], Any], step: Callable[[Any], object]) -> dict[str, int]:
    """Return the most bytes that were resident during ``step(load())``: ``peak`` above what was before ``load``, and
    ``process`` in all.

    What allocators kept of earlier steps is given back before, because it would count as being there anyway. The larger
    of two: ``step`` empties what it is given, so it is loaded anew each time.
    """
    meter, found = PeakMeter(), []
    for _ in range(2):
        settle()
        before = resident_bytes()
        given = load()
        meter.reset()
        step(given)
        del given
        found.append((meter.peak_bytes() - before, meter.peak_bytes()))
    return {"peak": max(f[0] for f in found), "process": max(f[1] for f in found)}
