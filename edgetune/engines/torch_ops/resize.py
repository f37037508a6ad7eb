"""Resize: every interpolation is a weighted sum of a few neighbours, one axis after the other.

The coordinate transformations, filters and borders are those of the ONNX standard, operator Resize.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from edgetune.bundle import Array
from edgetune.engines.torch_ops.base import Call, Kernel
from edgetune.errors import EngineError


@dataclass(frozen=True)
class _Axis:
    """How one axis is resized: from ``size`` to ``output`` positions; ``roi`` as fractions of the axis."""

    axis: int
    size: int
    output: int
    scale: float
    roi: tuple[float, float]


def _resize(
    n: Call, x: Tensor, roi: Tensor | None = None, scales: Tensor | None = None, sizes: Tensor | None = None
) -> Tensor:
    if n.opset < 11:
        roi, scales = None, roi
        given = [None, n.listed(1, scales), None]
    else:
        given = [n.listed(i, t) or None for i, t in enumerate((roi, scales, sizes), start=1)]
    plan = _plan(n, list(x.shape), *given)
    mode = n.get("mode", "nearest")
    if _is_plain(n, x, plan, mode):
        target = [x.shape[2], x.shape[3]]
        for part in plan:
            target[part.axis - 2] = part.output
        corners = n.get("coordinate_transformation_mode") == "align_corners"
        return functional.interpolate(x, target, mode="bilinear", align_corners=corners)
    if not plan:
        return x.clone()
    crops = _transformation(n) == "tf_crop_and_resize"
    outside: Tensor | None = None
    for part in plan:
        places = _coordinates(_transformation(n), part)
        if crops:
            beyond = torch.from_numpy((places < 0) | (places > part.size - 1)).to(x.device)
            shape = [-1 if i == part.axis else 1 for i in range(x.ndim)]
            outside = beyond.reshape(shape) if outside is None else outside | beyond.reshape(shape)
        x = _along(n, x, part, places, mode)
    return x if outside is None else torch.where(outside, x.new_tensor(n.get("extrapolation_value", 0.0)), x)


def _transformation(n: Call) -> str:
    default = "half_pixel" if n.opset >= 11 else "asymmetric"
    return str(n.get("coordinate_transformation_mode", default))


def _plan(
    n: Call, shape: list[int], roi: list[float] | None, scales: list[float] | None, sizes: list[int] | None
) -> list[_Axis]:
    """Return the axes that change."""
    axes = [a % len(shape) for a in n.get("axes", range(len(shape)))]
    policy = n.get("keep_aspect_ratio_policy", "stretch")
    if sizes is not None:
        factors = [size / shape[a] for size, a in zip(sizes, axes, strict=True)]
        outputs = list(sizes)
        if policy != "stretch":
            factor = min(factors) if policy == "not_larger" else max(factors)
            factors = [factor] * len(axes)
            outputs = [int(factor * shape[a] + 0.5) for a in axes]
    elif scales is not None:
        factors = list(scales)
        outputs = [math.floor(shape[a] * factor) for a, factor in zip(axes, factors, strict=True)]
    else:
        raise EngineError(f"Resize '{n.name}' has neither scales nor sizes")
    count = len(axes)
    plan = []
    for i, axis in enumerate(axes):
        part = (roi[i], roi[count + i]) if roi and _transformation(n) == "tf_crop_and_resize" else (0.0, 1.0)
        if outputs[i] != shape[axis] or factors[i] != 1.0 or part != (0.0, 1.0):
            plan.append(_Axis(axis, shape[axis], outputs[i], factors[i], part))
    return plan


def _is_plain(n: Call, x: Tensor, plan: list[_Axis], mode: str) -> bool:
    """Tell whether torch's own bilinear interpolation is the same, which is faster."""
    known = _transformation(n) in ("half_pixel", "pytorch_half_pixel", "align_corners")
    if mode != "linear" or not known or n.get("antialias", 0) or n.get("exclude_outside", 0):
        return False
    exact = all(part.output == part.size * part.scale and part.output > 1 for part in plan)
    return bool(plan) and exact and x.ndim == 4 and all(part.axis >= 2 for part in plan) and x.dtype.is_floating_point


def _coordinates(transformation: str, part: _Axis) -> Array:
    """Return the position in the input of every output position, as float64."""
    y, width = np.arange(part.output, dtype=np.float64), part.scale * part.size
    if transformation == "asymmetric":
        return y / part.scale
    if transformation == "align_corners":
        return y * 0.0 if width == 1 else y * (part.size - 1) / (width - 1)
    if transformation == "tf_crop_and_resize":
        begin, end = part.roi
        if width == 1:
            return y * 0.0 + 0.5 * (begin + end) * (part.size - 1)
        return begin * (part.size - 1) + y * (end - begin) * (part.size - 1) / (width - 1)
    if transformation == "pytorch_half_pixel" and part.output == 1:
        return y * 0.0 - 0.5
    half = (y + 0.5) / part.scale - 0.5
    if transformation == "half_pixel_symmetric":
        return half + part.size / 2 * (1 - part.output / width)
    if transformation in ("half_pixel", "pytorch_half_pixel"):
        return half
    raise EngineError(f"Resize knows no coordinate transformation '{transformation}'")


def _along(n: Call, x: Tensor, part: _Axis, places: Array, mode: str) -> Tensor:
    first, weights = _filter(n, part, places, mode)  # neighbours first .. first + taps - 1, and their weights
    neighbours = first[:, None] + np.arange(weights.shape[1])
    if n.get("exclude_outside", 0):
        weights = np.where((neighbours < 0) | (neighbours >= part.size), 0.0, weights)
        total = weights.sum(axis=1, keepdims=True)
        weights = weights / np.where(total == 0.0, 1.0, total)
    index = torch.from_numpy(np.clip(neighbours, 0, part.size - 1)).to(x.device)
    if mode == "nearest":
        return x.index_select(part.axis, index[:, 0])
    shape = [-1 if i == part.axis else 1 for i in range(x.ndim)]
    kind = x.dtype if x.dtype.is_floating_point else torch.float64
    factors = torch.from_numpy(weights).to(x.device, kind)
    result: Tensor | None = None
    for tap in range(weights.shape[1]):
        piece = x.index_select(part.axis, index[:, tap]) * factors[:, tap].reshape(shape)
        result = piece if result is None else result.add_(piece)
    assert result is not None
    return result if x.dtype.is_floating_point else result.round().to(x.dtype)


def _filter(n: Call, part: _Axis, places: Array, mode: str) -> tuple[Array, Array]:
    floor = np.floor(places)
    ratio = places - floor
    if mode == "nearest":
        return _nearest(n, places, floor), np.ones((len(places), 1))
    scale = min(part.scale, 1.0) if n.get("antialias", 0) else 1.0
    if mode == "linear":
        reach = 1.0
    elif mode == "cubic":
        reach = 2.0
    else:
        raise EngineError(f"Resize '{n.name}' has the mode '{mode}'; known are cubic, linear, nearest")
    # All neighbours whose distance, in units of the widened filter, is below its reach.
    start = math.floor(-reach / scale) + 1
    offsets = np.arange(start, 2 - start)
    distance = np.abs((offsets[None, :] - ratio[:, None]) * scale)
    weights = np.clip(1.0 - distance, 0.0, 1.0) if mode == "linear" else _cubic(distance, n.get("cubic_coeff_a", -0.75))
    if scale < 1.0:
        weights = weights / weights.sum(axis=1, keepdims=True)
    return (floor + start).astype(np.int64), weights


def _nearest(n: Call, places: Array, floor: Array) -> Array:
    rounding = n.get("nearest_mode", "round_prefer_floor" if n.opset >= 11 else "floor")
    chosen = {
        "floor": floor,
        "ceil": np.ceil(places),
        "round_prefer_floor": np.ceil(places - 0.5),
        "round_prefer_ceil": np.floor(places + 0.5),
    }
    if rounding not in chosen:
        raise EngineError(f"Resize '{n.name}' has the nearest_mode '{rounding}'; known are {', '.join(chosen)}")
    return np.asarray(chosen[rounding].astype(np.int64))


def _cubic(d: Array, a: float) -> Array:
    """Return Keys' cubic convolution at the distances ``d`` (Keys 1981, eq. 15 with a free)."""
    inner = ((a + 2) * d - (a + 3)) * d * d + 1
    outer = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
    return np.where(d <= 1, inner, np.where(d < 2, outer, 0.0))


KERNELS: dict[str, Kernel] = {"Resize": _resize}
