"""Adaptive average pooling in operators that every exporter knows. Knows torch (inside functions).

Its windows differ in size where the output does not divide the input, which ONNX has no operator for. Each output is a
mean along one axis after the other, so a product with a constant matrix per axis computes it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from edgetune.codecs.base import Array


def pooling_matrix(size: int, pooled: int) -> Array:
    """Return float32 [pooled, size]: row i averages the window [⌊i·size/pooled⌋, ⌈(i+1)·size/pooled⌉[, as torch's."""
    matrix = np.zeros((pooled, size), np.float32)
    for i in range(pooled):
        start, end = i * size // pooled, -(-(i + 1) * size // pooled)
        matrix[i, start:end] = 1.0 / (end - start)
    return matrix


def _pool(x: Any, pooled: Sequence[int | None]) -> Any:
    """Return ``x`` [..., *extents] averaged to [..., *pooled]; None leaves an axis as it is."""
    import torch

    for place, target in enumerate(pooled):
        axis = x.dim() - len(pooled) + place
        size = int(x.shape[axis])
        if target is None or target == size:
            continue
        if target == 1:
            x = x.mean(axis, keepdim=True)
            continue
        matrix = torch.from_numpy(pooling_matrix(size, target)).to(x.dtype)
        x = torch.matmul(x.transpose(axis, -1), matrix.t()).transpose(axis, -1)
    return x


@contextlib.contextmanager
def plain_adaptive_pooling() -> Iterator[None]:
    """Within this context torch's functional adaptive average pooling consists of means and matrix products."""
    from torch.nn import functional

    def replacement(axes: int) -> Any:
        def pool(input: Any, output_size: Any) -> Any:
            sizes = (output_size,) * axes if isinstance(output_size, int) or output_size is None else tuple(output_size)
            return _pool(input, sizes)

        return pool

    names = {f"adaptive_avg_pool{axes}d": replacement(axes) for axes in (1, 2, 3)}
    originals = {name: getattr(functional, name) for name in names}
    try:
        for name, function in names.items():
            setattr(functional, name, function)
        yield
    finally:
        for name, function in originals.items():
            setattr(functional, name, function)
