"""Out of memory, in whatever words a runtime says it. Knows the words of numpy, onnxruntime, CUDA, Jetson and torch.

Where the words come from: onnxruntime's arena (core/framework/bfc_arena.cc) and its CUDA calls (cuda_call.cc); the C++
library's ``std::bad_alloc``; CUDA's, cuBLAS's and cuDNN's names of their error codes; NvMap, the allocator of a
Jetson's kernel driver; torch's allocators (c10/core/impl/alloc_cpu.cpp, c10/cuda/CUDACachingAllocator.cpp). On a
Jetson, torch reports a failed cudaMalloc as a failed assertion about NVML, because it asks NVML before it says why.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from edgetune.errors import MemoryExhaustedError

_WORDS = re.compile(
    "|".join(
        (
            r"Failed to allocate memory",  # onnxruntime, BFCArena
            r"Available memory of \d+ is smaller than requested bytes",  # the same, at its gpu_mem_limit
            r"std::bad_alloc|bad allocation",
            r"out of memory",  # CUDA's text for error 2, torch, the kernel
            r"cudaErrorMemoryAllocation|CUDA_ERROR_OUT_OF_MEMORY",
            r"CUBLAS_STATUS_ALLOC_FAILED|CUDNN_STATUS_(?:INTERNAL_ERROR_DEVICE_)?ALLOC\w*_FAILED",
            r"CUDNN_STATUS_INTERNAL_ERROR_(?:HOST|DEVICE)_ALLOCATION_FAILED",
            r"CUSOLVER_STATUS_ALLOC_FAILED|CUFFT_ALLOC_FAILED|CUSPARSE_STATUS_ALLOC_FAILED",
            r"NvMapMem\w*.*error 12|NvMap\w*.*(?:failed to alloc|ENOMEM)",
            r"NVML_SUCCESS == r INTERNAL ASSERT FAILED",  # torch on a Jetson
            r"can't allocate memory|Cannot allocate memory|not enough memory: you tried to allocate",
            r"Unable to allocate [\d.]+ .*for an array",  # numpy
        )
    ),
    re.IGNORECASE,
)
_NAMES = frozenset({"OutOfMemoryError", "_ArrayMemoryError"})


def is_exhaustion(error: BaseException | None) -> bool:
    """Tell whether ``error``, or what it was raised from, says that memory ran out."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, MemoryError | MemoryExhaustedError) or type(error).__name__ in _NAMES:
            return True
        if _WORDS.search(str(error)):
            return True
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return False


@contextmanager
def telling_exhaustion(what: str) -> Iterator[None]:
    """Turn every way to run out of memory inside the block into a :class:`MemoryExhaustedError` that names ``what``."""
    try:
        yield
    except MemoryExhaustedError:
        raise
    except Exception as error:
        if is_exhaustion(error):
            raise exhausted(what, error) from error
        raise


def exhausted(what: str, error: BaseException) -> MemoryExhaustedError:
    """Return the error that says that memory ran out in ``what``, in the runtime's own words."""
    words = (str(error).strip() or type(error).__name__).splitlines()[0]
    return MemoryExhaustedError(f"memory ran out in {what}: {words}; lower --budget, or leave more to this process")
