"""The heap of the process: freed memory goes back to the system. For every engine that computes on the CPU.

Knows the C library.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable
from typing import Any

_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD, _M_ARENA_MAX = -3, -1, -8
_THRESHOLD_BYTES = 128 * 1024
KEPT_BLOCK_BYTES = 4 << 20
_RELEASES: list[Callable[[], None]] = []
_CONFINES: list[Callable[[int | None], None]] = []


@functools.cache
def _glibc() -> Any:
    """Return the C library if it is glibc, else None."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        libc = ctypes.CDLL("libc.so.6")
        return libc if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") else None
    except OSError:
        return None  # musl: its allocator returns large blocks anyway


def return_memory_to_the_system() -> None:
    """Make glibc hand every freed block above 128 KiB back at once.

    By default its threshold grows with use, and freed activations stay with the process: the peak would then depend on
    the history, not on the plan. Elsewhere than on glibc nothing is done.
    """
    libc = _glibc()
    if libc is not None:
        libc.mallopt(_M_MMAP_THRESHOLD, _THRESHOLD_BYTES)
        libc.mallopt(_M_TRIM_THRESHOLD, _THRESHOLD_BYTES)
        libc.mallopt(_M_ARENA_MAX, 1)


def keep_blocks() -> None:
    """Make glibc use freed blocks of up to 4 MiB again, rather than hand them back: :func:`trim` does that later.

    For an engine whose larger tensors lie elsewhere. Call it after :func:`return_memory_to_the_system`.
    """
    libc = _glibc()
    if libc is not None:
        libc.mallopt(_M_MMAP_THRESHOLD, KEPT_BLOCK_BYTES)
        libc.mallopt(_M_TRIM_THRESHOLD, 8 * KEPT_BLOCK_BYTES)


def trim() -> None:
    """Give all that is free back to the system, what engines keep for their next step too (:func:`at_trim`)."""
    for release in _RELEASES:
        release()
    trim_blocks()


def trim_blocks() -> None:
    """Trim the C library's heap: smaller blocks, freed between others in use, would otherwise add up over the steps."""
    libc = _glibc()
    if libc is not None:
        libc.malloc_trim(0)


def at_trim(release: Callable[[], None]) -> None:
    """Have :func:`trim` call ``release`` too, which gives memory back to the system that nothing uses."""
    _RELEASES.append(release)


def confine(more_bytes: int | None) -> None:
    """Let what engines map for themselves grow by at most ``more_bytes`` from now on; None: without a limit."""
    for limit in _CONFINES:
        limit(more_bytes)


def at_confine(limit: Callable[[int | None], None]) -> None:
    """Have :func:`confine` call ``limit`` too: for memory that the system's resource limits do not see."""
    _CONFINES.append(limit)
