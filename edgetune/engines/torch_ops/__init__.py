"""The operators of the torch engine: one file per family, and the table of them all.

Every operator in ``OPERATORS`` passes the ONNX project's own backend tests for it, whatever opset they are written for.
"""

from __future__ import annotations

from edgetune.engines.torch_ops import (
    control,
    convolution,
    elementwise,
    indexing,
    layout,
    loss,
    matrix,
    normalization,
    pooling,
    reduction,
    resize,
)
from edgetune.engines.torch_ops.base import ALIASING, Call, Kernel

OPERATORS: dict[str, Kernel] = {
    **control.KERNELS,
    **convolution.KERNELS,
    **elementwise.KERNELS,
    **indexing.KERNELS,
    **layout.KERNELS,
    **loss.KERNELS,
    **matrix.KERNELS,
    **normalization.KERNELS,
    **pooling.KERNELS,
    **reduction.KERNELS,
    **resize.KERNELS,
}
IN_PLACE: dict[str, Kernel] = {**elementwise.IN_PLACE, **normalization.IN_PLACE}

__all__ = ["ALIASING", "IN_PLACE", "OPERATORS", "Call", "Kernel"]
