"""Definitions of operators, in float64 and without haste, where onnx's own evaluator errs or narrows to float32."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from onnx.reference.op_run import OpRun
from scipy import special

from edgetune.bundle import Array


def _windows(
    x: Array,
    kernel: Sequence[int],
    pads: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
    ceil_mode: int,
    border: float,
) -> Array:
    """Return [taps, b, c, *output]: every element of every window; ``border`` outside."""
    n = len(kernel)
    sizes = []
    for i, k in enumerate(kernel):
        free = x.shape[2 + i] + pads[i] + pads[n + i] - dilations[i] * (k - 1) - 1
        out = (-(-free // strides[i]) if ceil_mode else free // strides[i]) + 1
        # a window that begins behind the input and its first border does not count
        sizes.append(out - (ceil_mode and (out - 1) * strides[i] >= x.shape[2 + i] + pads[i]))
    reach = [(s - 1) * strides[i] + dilations[i] * (kernel[i] - 1) + 1 for i, s in enumerate(sizes)]
    behind = [max(0, reach[i] - x.shape[2 + i] - pads[i]) for i in range(n)]
    wide = np.pad(x, [(0, 0), (0, 0), *((pads[i], behind[i]) for i in range(n))], constant_values=border)
    taps = []
    for tap in itertools.product(*(range(k) for k in kernel)):
        places = [slice(None), slice(None)]
        for i, k in enumerate(tap):
            start = k * dilations[i]
            places.append(slice(start, start + (sizes[i] - 1) * strides[i] + 1, strides[i]))
        taps.append(wide[tuple(places)])
    return np.stack(taps)


class MaxPool(OpRun):
    op_domain = ""

    def _run(
        self,
        x: Array,
        kernel_shape: Sequence[int],
        pads: Sequence[int] | None = None,
        strides: Sequence[int] | None = None,
        dilations: Sequence[int] | None = None,
        ceil_mode: int = 0,
        **_: Any,
    ) -> tuple[Array]:
        n = len(kernel_shape)
        given = pads or [0] * 2 * n, strides or [1] * n, dilations or [1] * n
        return (_windows(x, kernel_shape, *given, ceil_mode, -np.inf).max(axis=0),)


class AveragePool(OpRun):
    op_domain = ""

    def _run(
        self,
        x: Array,
        kernel_shape: Sequence[int],
        pads: Sequence[int] | None = None,
        strides: Sequence[int] | None = None,
        dilations: Sequence[int] | None = None,
        ceil_mode: int = 0,
        count_include_pad: int = 0,
        **_: Any,
    ) -> tuple[Array]:
        n = len(kernel_shape)
        pads, strides, dilations = pads or [0] * 2 * n, strides or [1] * n, dilations or [1] * n
        total = _windows(x, kernel_shape, pads, strides, dilations, ceil_mode, 0.0).sum(axis=0)
        ones, counted = np.ones_like(x), list(pads)
        if count_include_pad:
            ones = np.pad(ones, [(0, 0), (0, 0), *((pads[i], pads[n + i]) for i in range(n))])
            ones[...] = 1.0
            counted = [0] * 2 * n
        if ceil_mode and count_include_pad:
            count = _windows(ones, kernel_shape, counted, strides, dilations, 1, 0.0).sum(axis=0)
            return (total / count[tuple(slice(0, s) for s in total.shape)],)
        return (total / _windows(ones, kernel_shape, counted, strides, dilations, ceil_mode, 0.0).sum(axis=0),)


class Erf(OpRun):
    op_domain = ""

    def _run(self, x: Array) -> tuple[Array]:
        return (special.erf(x),)


class Gelu(OpRun):
    op_domain = ""

    def _run(self, x: Array, approximate: str = "none") -> tuple[Array]:
        tanh = np.tanh(np.sqrt(2.0 / np.pi) * (x + 0.044715 * x**3))
        return (0.5 * x * (1.0 + (tanh if approximate == "tanh" else special.erf(x / np.sqrt(2.0)))),)


class Swish(OpRun):
    op_domain = ""

    def _run(self, x: Array, alpha: float = 1.0) -> tuple[Array]:
        return (x * special.expit(alpha * x),)


class LpNormalization(OpRun):
    op_domain = ""

    def _run(self, x: Array, axis: int = -1, p: int = 2) -> tuple[Array]:
        return (x / np.linalg.norm(x, p, axis, keepdims=True),)


class Pad(OpRun):
    op_domain = ""

    def _run(
        self, x: Array, pads: Array, value: Array | None = None, axes: Array | None = None, mode: str = "constant"
    ) -> tuple[Array]:
        both = np.zeros((2, x.ndim), np.int64)
        both[:, slice(None) if axes is None else axes] = pads.reshape(2, -1)
        low, high = np.maximum(both, 0)
        options: dict[str, Any] = {"constant_values": 0 if value is None else value} if mode == "constant" else {}
        padded: Array = np.pad(x, list(zip(low, high, strict=True)), mode=mode, **options)  # type: ignore[call-overload]
        return (padded[tuple(slice(max(-b, 0), n - max(-e, 0)) for b, e, n in zip(*both, padded.shape, strict=True))],)


DEFINITIONS = [MaxPool, AveragePool, Erf, Gelu, Swish, LpNormalization, Pad]
