"""A hard stop: within it an allocation beyond the limit fails, instead of waking the kernel's out-of-memory killer.

On the CPU that is the soft resource limit on data (``man 2 setrlimit``, RLIMIT_DATA: heap and private mappings), set
around what an engine does and taken back afterwards; engines that map memory of their own are told through
``engines.heap``. What CUDA's allocators may take is the engines' business. Knows the resource limits and
``/proc/self/status``; nothing of plans.
"""

from __future__ import annotations

import functools
import resource
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from edgetune.engines import heap
from edgetune.telemetry.process import data_bytes
from edgetune.units import MIB

SLACK_BYTES = 32 * MIB
"""Mappings count whole, resident or not: stacks of threads, pages that nobody touched yet."""


@functools.cache
def _warm_blas() -> None:
    """Have BLAS take its buffers: OpenBLAS does at its first large work, and ends the process if it is refused them."""
    np.linalg.eigh(np.ones((512, 512), np.float32) @ np.ones((512, 512), np.float32))


@contextmanager
def ceiling(more_bytes: int | None) -> Iterator[None]:
    """Within the block, data may grow by ``more_bytes`` and the slack, and no further; None: without a limit."""
    if more_bytes is None:
        yield
        return
    _warm_blas()
    allowed_bytes = max(0, more_bytes) + SLACK_BYTES
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    infinite = resource.RLIM_INFINITY
    limits = [limit for limit in (data_bytes() + allowed_bytes, soft, hard) if limit != infinite]
    resource.setrlimit(resource.RLIMIT_DATA, (min(limits), hard))
    heap.confine(allowed_bytes)
    try:
        yield
    finally:
        heap.confine(None)
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
