"""Pooling over one, two or three axes."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from edgetune.engines.torch_ops.base import Call, Kernel, pad_spatial, spatial_padding


@dataclass(frozen=True)
class _Window:
    """The numbers of one pooling node, one per spatial axis. ``extra`` is what ceil_mode needs beyond the padding."""

    input: list[int]
    kernel: list[int]
    strides: list[int]
    dilations: list[int]
    begin: list[int]
    end: list[int]
    output: list[int]
    extra: list[int]

    @staticmethod
    def of(n: Call, x: Tensor) -> _Window:
        extents, kernel = list(x.shape[2:]), list(n.get("kernel_shape"))
        spatial = len(kernel)
        strides, dilations = list(n.get("strides", [1] * spatial)), list(n.get("dilations", [1] * spatial))
        pads = spatial_padding(n, extents, kernel, strides, dilations)
        begin, end = pads[:spatial], pads[spatial:]
        output, extra = [], []
        for i in range(spatial):
            covered = dilations[i] * (kernel[i] - 1) + 1
            free = extents[i] + begin[i] + end[i] - covered
            count = (-(-free // strides[i]) if n.get("ceil_mode", 0) else free // strides[i]) + 1
            if (count - 1) * strides[i] >= extents[i] + begin[i]:
                count -= 1  # a window must begin inside the input or the padding before it
            output.append(count)
            extra.append(max((count - 1) * strides[i] + covered - (extents[i] + begin[i] + end[i]), 0))
        return _Window(extents, kernel, strides, dilations, begin, end, output, extra)

    @property
    def plain(self) -> bool:
        """Whether torch's own pooling knows this geometry."""
        symmetric = self.begin == self.end and not any(self.extra)
        return symmetric and all(2 * b <= k for b, k in zip(self.begin, self.kernel, strict=True))

    def padded(self, x: Tensor, value: float) -> Tensor:
        """Return ``x`` with padding and what ceil_mode needs; the last windows may leave rows over."""
        return pad_spatial(x, self.begin, [e + m for e, m in zip(self.end, self.extra, strict=True)], value)

    def tap(self, x: Tensor, offset: tuple[int, ...]) -> Tensor:
        """Return the elements of a padded ``x`` that stand at place ``offset`` of every window; a view."""
        for axis, k in enumerate(offset):
            start = k * self.dilations[axis]
            stop = start + (self.output[axis] - 1) * self.strides[axis] + 1
            index = [slice(None)] * (2 + axis) + [slice(start, stop, self.strides[axis])]
            x = x[tuple(index)]
        return x

    def total(self, x: Tensor) -> Tensor:
        """Return the sum over each window of a padded ``x``."""
        result: Tensor | None = None
        for offset in itertools.product(*(range(k) for k in self.kernel)):
            tap = self.tap(x, offset)
            result = tap.clone() if result is None else result.add_(tap)
        assert result is not None
        return result


_MAX: dict[int, Any] = {1: functional.max_pool1d, 2: functional.max_pool2d, 3: functional.max_pool3d}
_AVERAGE: dict[int, Any] = {1: functional.avg_pool1d, 2: functional.avg_pool2d, 3: functional.avg_pool3d}


def _max_pool(n: Call, x: Tensor) -> Tensor | tuple[Tensor, ...]:
    window, spatial = _Window.of(n, x), x.ndim - 2
    source = x if x.dtype.is_floating_point else x.to(torch.float64)  # torch pools no bytes; float64 holds them
    begin = window.begin
    if not window.plain:
        source, begin = window.padded(source, -math.inf), [0] * spatial
    made = _MAX[spatial](
        source, window.kernel, window.strides, begin, window.dilations, return_indices=n.outputs > 1
    )  # fmt: skip
    if n.outputs == 1:
        return _cut(made, window).to(x.dtype)
    values, places = (_cut(t, window) for t in made)
    return values.to(x.dtype), _global_places(n, places, window, list(source.shape[2:]), x)


def _cut(y: Tensor, window: _Window) -> Tensor:
    """Return ``y`` without the windows that begin in the padding behind the input."""
    for axis, size in enumerate(window.output):
        y = y.narrow(2 + axis, 0, size) if y.shape[2 + axis] > size else y
    return y.contiguous()


def _global_places(n: Call, places: Tensor, window: _Window, extents: list[int], x: Tensor) -> Tensor:
    """Turn places within one plane of ``extents`` into ONNX's indices into the whole of ``x``."""
    spatial = len(extents)
    shift = [0] * spatial if window.plain else window.begin
    if n.get("storage_order", 0) or any(shift) or extents != window.input:
        rows = []
        for axis in reversed(range(spatial)):
            rows.append(places % extents[axis] - shift[axis])
            places = torch.div(places, extents[axis], rounding_mode="trunc")
        rows.reverse()
        order = list(range(spatial))
        if n.get("storage_order", 0):
            order.reverse()
        places = torch.zeros_like(places)
        for axis in order:
            places = places * window.input[axis] + rows[axis]
    plane = math.prod(window.input)
    planes = torch.arange(x.shape[0] * x.shape[1], device=x.device) * plane
    return places + planes.reshape(x.shape[0], x.shape[1], *[1] * spatial)


def _average_pool(n: Call, x: Tensor) -> Tensor:
    window, include = _Window.of(n, x), bool(n.get("count_include_pad", 0))
    if window.plain and set(window.dilations) == {1}:
        average = _AVERAGE[x.ndim - 2]
        made: Tensor = average(x, window.kernel, window.strides, window.begin, count_include_pad=include)
        return made
    mask = torch.ones([1, 1, *window.input], dtype=x.dtype, device=x.device)
    if include:
        mask = pad_spatial(mask, window.begin, window.end, 1.0)
        mask = pad_spatial(mask, [0] * len(window.extra), window.extra)
    else:
        mask = window.padded(mask, 0.0)
    return window.total(window.padded(x, 0.0)) / window.total(mask)


def _lp_pool(n: Call, x: Tensor) -> Tensor:
    window, p = _Window.of(n, x), n.get("p", 2)
    return window.total(window.padded(x, 0.0).abs().pow(p)).pow(1.0 / p)


def _spatial(x: Tensor) -> list[int]:
    return list(range(2, x.ndim))


KERNELS: dict[str, Kernel] = {
    "AveragePool": _average_pool,
    "GlobalAveragePool": lambda n, x: x.mean(_spatial(x), keepdim=True),
    "GlobalLpPool": lambda n, x: x.abs().pow(n.get("p", 2)).sum(_spatial(x), keepdim=True).pow(1.0 / n.get("p", 2)),
    "GlobalMaxPool": lambda n, x: x.amax(_spatial(x), keepdim=True),
    "LpPool": _lp_pool,
    "MaxPool": _max_pool,
}
