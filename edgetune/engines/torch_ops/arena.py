"""Memory for large tensors on the CPU that is used again within a step, at no cost to the peak. Knows torch and mmap.

The system clears every page that it hands out, which costs more than the arithmetic on it. So what a tensor leaves
behind is kept for the next one, as long as both together stay within the most that tensors ever took at once.
"""

from __future__ import annotations

import math
import mmap
import sys
import threading
import weakref
from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgetune.engines import heap

LEAST_BYTES = 1 << 18  # smaller tensors are the C library's
_PAGE_BYTES = mmap.PAGESIZE
_RESERVED_BYTES = 1 << 38  # of addresses, not of memory
_NO_RESERVE = 0x4000  # MAP_NORESERVE of Linux
_TYPES: dict[torch.dtype, Any] = {
    torch.bool: np.bool_,
    torch.uint8: np.uint8,
    torch.int32: np.int32,
    torch.int64: np.int64,
    torch.float32: np.float32,
    torch.float64: np.float64,
}


class _Extents:
    """Stretches of the region, none of which touches another: begin and end in bytes, sorted."""

    def __init__(self, *whole: tuple[int, int]) -> None:
        self.all = list(whole)
        self.bytes = sum(end - begin for begin, end in whole)

    def add(self, begin: int, end: int) -> None:
        self.bytes += end - begin
        place = bisect_left(self.all, (begin, end))
        if place < len(self.all) and self.all[place][0] == end:
            end = self.all.pop(place)[1]
        if place and self.all[place - 1][1] == begin:
            place -= 1
            begin = self.all.pop(place)[0]
        self.all.insert(place, (begin, end))

    def cut(self, begin: int, end: int) -> None:
        """Take out a stretch that lies in one of them."""
        self.bytes -= end - begin
        place = bisect_left(self.all, (begin + 1,)) - 1
        first, last = self.all.pop(place)
        if end < last:
            self.all.insert(place, (end, last))
        if first < begin:
            self.all.insert(place, (first, begin))


class _Lease(weakref.ref[Any]):
    """Tells when the array that a tensor lies in is gone."""

    __slots__ = ("begin", "end")
    begin: int
    end: int


class Arena:
    """Hands out memory for tensors and takes it back when the last of their views is gone.

    ``resident_bytes``, in use or kept for the next tensor, never exceeds ``peak_bytes``, the most that was ever in use:
    pages beyond that are given back to the system at once.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._region: mmap.mmap | None = None
        self._tried = False
        self._kept, self._fresh = _Extents(), _Extents((0, _RESERVED_BYTES))
        self._leases: dict[int, _Lease] = {}
        # What is free again waits here: an array may be collected in the middle of anything.
        self._returned: deque[tuple[int, int]] = deque()
        self.used_bytes, self.peak_bytes = 0, 0
        self._most_bytes: int | None = None

    def confine(self, more_bytes: int | None) -> None:
        """Take at most ``more_bytes`` of new pages from now on; None: as many as there are.

        The system's own limits do not see them: the whole region counts as taken from the first moment.
        """
        with self._lock:
            self._collect()
            self._most_bytes = None if more_bytes is None else self.resident_bytes + max(0, more_bytes)

    @property
    def resident_bytes(self) -> int:
        """How much memory is in use or kept."""
        return self.used_bytes + self._kept.bytes

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor | None:
        """Return an uninitialised tensor; None where there is no such memory."""
        kind = _TYPES.get(dtype)
        if kind is None or not self.reserve():
            return None
        size = -(-math.prod(shape) * dtype.itemsize // _PAGE_BYTES) * _PAGE_BYTES
        with self._lock:
            self._collect()
            begin = self._find(size)
            if begin is None:
                return None
            array: Any = np.ndarray(tuple(shape), kind, self._region, begin)
            lease = _Lease(array, self._end)
            lease.begin, lease.end = begin, begin + size
            self._leases[begin] = lease
        return torch.from_numpy(array)

    def release(self) -> None:
        """Give all memory that no tensor uses back to the system."""
        with self._lock:
            self._collect()
            self._give_back(self._kept.bytes)

    def reserve(self) -> bool:
        """Take the addresses, once; return whether there are any."""
        if not self._tried:
            self._tried = True
            if sys.platform == "linux":
                try:
                    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE
                    self._region = mmap.mmap(-1, _RESERVED_BYTES, flags=flags)
                except (OSError, ValueError):  # addresses are rationed: the C library serves all
                    self._region = None
        return self._region is not None

    def _end(self, lease: _Lease) -> None:
        self._leases.pop(lease.begin, None)
        self._returned.append((lease.begin, lease.end))

    def _collect(self) -> None:
        while self._returned:
            begin, end = self._returned.popleft()
            self.used_bytes -= end - begin
            self._kept.add(begin, end)

    def _find(self, size: int) -> int | None:
        """Return where ``size`` bytes begin, now in use: of what is kept the smallest stretch, else few new pages."""
        fitting = [(end - begin, begin) for begin, end in self._kept.all if end - begin >= size]
        if fitting:
            begin = min(fitting)[1]
            self._kept.cut(begin, begin + size)
        elif self._most_bytes is not None and self.used_bytes + size > self._most_bytes:
            # Pages that are kept would be given back for the new ones, so those in use are what counts.
            raise MemoryError(f"a tensor of {size} bytes, where {self._most_bytes - self.used_bytes} may be taken")
        else:
            ends = {end: begin for begin, end in self._kept.all}
            places = ((ends.get(begin, begin), begin) for begin, end in self._fresh.all)
            roomy = [
                (size - (border - begin), begin, border)
                for (begin, border), (_, end) in zip(places, self._fresh.all, strict=True)
                if end - begin >= size
            ]
            if not roomy:
                return None
            more, begin, border = min(roomy)
            if border > begin:
                self._kept.cut(begin, border)
            self._fresh.cut(border, border + more)
        self.used_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.used_bytes)
        self._give_back(self.resident_bytes - self.peak_bytes)
        return begin

    def _give_back(self, excess: int) -> None:
        assert excess <= self._kept.bytes
        while excess > 0:
            begin, end = max(self._kept.all, key=lambda extent: extent[1] - extent[0])
            begin = max(begin, end - excess)
            excess -= end - begin
            self._kept.cut(begin, end)
            assert self._region is not None
            self._region.madvise(mmap.MADV_DONTNEED, begin, end - begin)
            self._fresh.add(begin, end)


ARENA = Arena()
heap.at_trim(ARENA.release)
heap.at_confine(ARENA.confine)


def fresh(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor | None:
    """Return memory for a large result on the CPU; None where torch's own allocator serves as well."""
    if device.type != "cpu" or math.prod(shape) * dtype.itemsize < LEAST_BYTES:
        return None
    return ARENA.take(shape, dtype)


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return an uninitialised tensor."""
    made = fresh(shape, dtype, device)
    return torch.empty(tuple(shape), dtype=dtype, device=device) if made is None else made
