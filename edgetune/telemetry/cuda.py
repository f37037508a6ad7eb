"""What the CUDA runtime says of the GPU's memory, through whatever runtime is in the process already, or installed.

torch is asked if it is loaded (its allocator knows this process's own share); it is never imported for that. Otherwise
``libcudart`` is called through ctypes. On a Jetson the GPU's memory is the system's: ``free_bytes`` then counts neither
what the kernel could reclaim nor what swap could take, so ``telemetry/available.py`` is the better guide there.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import sys
from dataclasses import dataclass

LIBRARIES = ("libcudart.so.13", "libcudart.so.12", "libcudart.so.11.0", "libcudart.so")


@dataclass(frozen=True)
class CudaMemory:
    """Bytes of the current device. ``own_bytes`` and ``own_peak_bytes``: what this process's tensors hold and held at
    most; None: only torch's allocator tells. ``source``: who answered."""

    free_bytes: int
    total_bytes: int
    own_bytes: int | None
    own_peak_bytes: int | None
    source: str


@dataclass(frozen=True)
class Unavailable:
    """Nothing to read; ``reason`` says why, in words."""

    reason: str


def read_cuda(libraries: tuple[str, ...] = LIBRARIES) -> CudaMemory | Unavailable:
    """Return the memory of the current CUDA device. Calling ``libcudart`` makes a CUDA context, which takes memory of
    its own: ask only where one is wanted anyway."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        free_bytes, total_bytes = torch.cuda.mem_get_info()
        own, peak = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
        return CudaMemory(free_bytes, total_bytes, own, peak, "torch")
    for name in libraries:
        try:
            runtime = ctypes.CDLL(name)
        except OSError:
            continue
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        code = int(runtime.cudaMemGetInfo(ctypes.byref(free), ctypes.byref(total)))
        if code != 0:
            runtime.cudaGetErrorString.restype = ctypes.c_char_p
            said = runtime.cudaGetErrorString(code) or b""
            return Unavailable(f"{name} answers with error {code}: {said.decode(errors='replace')}")
        return CudaMemory(free.value, total.value, None, None, name)
    return Unavailable(f"no CUDA runtime is installed (looked for {', '.join(libraries)})")
