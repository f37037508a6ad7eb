"""Operators that move elements or make tensors without changing values."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from onnx import TensorProto
from torch import Tensor
from torch.nn import functional

from edgetune.engines.torch_ops.arena import empty, fresh
from edgetune.engines.torch_ops.base import Call, Kernel, broadcast
from edgetune.errors import EngineError


def _reshape(n: Call, x: Tensor, shape: Tensor) -> Tensor:
    target = list(n.listed(1, shape) or [])
    if not n.get("allowzero", 0):
        target = [x.shape[i] if extent == 0 else extent for i, extent in enumerate(target)]
    if -1 in target and x.numel() == 0:  # torch cannot infer an extent of an empty tensor that has other zeros
        known = math.prod(extent for extent in target if extent != -1)
        target = [(0 if known == 0 else x.numel() // known) if extent == -1 else extent for extent in target]
    return _viewed(x, target)


def _viewed(x: Tensor, shape: Sequence[int]) -> Tensor:
    """Return ``x`` in another shape; a copy only where its strides allow no view."""
    try:
        return x.view(shape)
    except RuntimeError:
        return copied(x).reshape(shape)


def _flatten(n: Call, x: Tensor) -> Tensor:
    axis = n.get("axis", 1)
    axis = axis + x.ndim if axis < 0 else axis
    return _viewed(x, [math.prod(x.shape[:axis]), math.prod(x.shape[axis:])])


def _axes(n: Call, axes: Tensor | None) -> list[int] | None:
    found: list[int] | None = n.get("axes") if "axes" in n.attributes else n.listed(1, axes)
    return found


def _squeeze(n: Call, x: Tensor, axes: Tensor | None = None) -> Tensor:
    given = _axes(n, axes)
    return x.squeeze() if given is None else x.squeeze(tuple(given))


def _unsqueeze(n: Call, x: Tensor, axes: Tensor | None = None) -> Tensor:
    given = _axes(n, axes) or []
    for axis in sorted(a % (x.ndim + len(given)) for a in given):
        x = x.unsqueeze(axis)
    return x


def _transpose(n: Call, x: Tensor) -> Tensor:
    return x.permute(n.get("perm", list(range(x.ndim - 1, -1, -1))))


def _expand(n: Call, x: Tensor, shape: Tensor) -> Tensor:
    wanted = n.listed(1, shape) or []
    # either side may be the longer one, and either extent 1
    return torch.broadcast_to(x, broadcast(x.shape, wanted))


def _tile(n: Call, x: Tensor, repeats: Tensor) -> Tensor:
    return x.repeat(n.listed(1, repeats) or [])


def _concat(n: Call, *x: Tensor) -> Tensor:
    if len(x) == 1:
        return copied(x[0])
    axis = n.get("axis") % x[0].ndim
    shape = [sum(t.shape[i] for t in x) if i == axis else size for i, size in enumerate(x[0].shape)]
    out = fresh(shape, x[0].dtype, x[0].device)
    return torch.cat(x, axis) if out is None else torch.cat(x, axis, out=out)


def _split(n: Call, x: Tensor, sizes: Tensor | None = None) -> tuple[Tensor, ...]:
    axis = n.get("axis", 0)
    given = n.get("split") if "split" in n.attributes else n.listed(1, sizes)
    if given is None:
        count = n.get("num_outputs", n.outputs)
        each = -(-x.shape[axis] // count)
        given = [min(each, max(x.shape[axis] - i * each, 0)) for i in range(count)]
    return tuple(copied(piece) for piece in torch.split(x, given, axis))


def _slice(
    n: Call,
    x: Tensor,
    starts: Tensor | None = None,
    ends: Tensor | None = None,
    axes: Tensor | None = None,
    steps: Tensor | None = None,
) -> Tensor:
    """Copy the stretch: a view would keep the whole of ``x`` in memory for as long as the stretch is needed."""
    if n.opset < 10:
        first, last, along, by = n.get("starts"), n.get("ends"), n.get("axes"), None
    else:
        first, last, along, by = (n.listed(i, t) for i, t in enumerate((starts, ends, axes, steps), start=1))
    along = list(range(len(first))) if along is None else along
    by = [1] * len(first) if by is None else by
    for start, end, axis, step in zip(first, last, along, by, strict=True):
        begin, stop, stride = slice(start, end, step).indices(x.shape[axis])
        index: list[slice] = [slice(None)] * (axis % x.ndim)
        if stride > 0:
            x = x[(*index, slice(begin, max(stop, begin), stride))]
            continue
        count = max(-(-(begin - stop) // -stride), 0)  # torch has no negative steps: take them forwards, then flip
        low = begin + (count - 1) * stride
        x = x[(*index, slice(low, begin + 1, -stride))] if count else x[(*index, slice(0, 0))]
        x = x.flip(axis)
    return copied(x)


_PAD_MODES = {"reflect": "reflect", "edge": "replicate", "wrap": "circular"}


def _pad(
    n: Call, x: Tensor, pads: Tensor | None = None, value: Tensor | None = None, axes: Tensor | None = None
) -> Tensor:
    if n.opset < 11:
        amounts, fill = n.get("pads", n.get("paddings")), n.get("value", 0.0)
    else:
        amounts, fill = n.listed(1, pads), 0.0 if value is None else n.numbers(2, value)
    fill = fill[0] if isinstance(fill, list) else fill
    along = n.listed(3, axes)
    chosen = list(range(x.ndim)) if along is None else [a % x.ndim for a in along]
    begin, end = [0] * x.ndim, [0] * x.ndim
    for i, axis in enumerate(chosen):
        begin[axis], end[axis] = amounts[i], amounts[len(chosen) + i]
    mode = n.get("mode", "constant")
    if mode == "constant":
        pairs = [side for pair in zip(reversed(begin), reversed(end), strict=True) for side in pair]
        return functional.pad(x, pairs, value=fill) if any(pairs) else x.clone()
    if mode not in _PAD_MODES:
        raise EngineError(f"Pad '{n.name}' has the mode '{mode}'; known are constant, edge, reflect, wrap")
    for axis in range(x.ndim):
        if begin[axis] or end[axis]:
            places = _source_places(x.shape[axis], begin[axis], end[axis], mode)
            x = x.index_select(axis, torch.tensor(places, device=x.device))
    return x if any(begin) or any(end) else x.clone()


def _source_places(size: int, begin: int, end: int, mode: str) -> list[int]:
    """Return, per position of a padded axis, the position that it repeats."""
    places = range(-begin, size + end)
    if mode == "edge":
        return [min(max(i, 0), size - 1) for i in places]
    if mode == "wrap":
        return [i % size for i in places]
    period = max(2 * size - 2, 1)
    return [min(i % period, period - i % period) if size > 1 else 0 for i in places]


def _depth_to_space(n: Call, x: Tensor) -> Tensor:
    size = n.get("blocksize")
    batch, channels, height, width = x.shape
    if n.get("mode", "DCR") == "DCR":
        y = x.reshape(batch, size, size, channels // size**2, height, width).permute(0, 3, 4, 1, 5, 2)
    else:
        y = x.reshape(batch, channels // size**2, size, size, height, width).permute(0, 1, 4, 2, 5, 3)
    return copied(y).reshape(batch, channels // size**2, height * size, width * size)


def _space_to_depth(n: Call, x: Tensor) -> Tensor:
    size = n.get("blocksize")
    batch, channels, height, width = x.shape
    y = x.reshape(batch, channels, height // size, size, width // size, size)
    y = y.permute(0, 3, 5, 1, 2, 4) if n.get("mode", "DCR") == "DCR" else y.permute(0, 1, 3, 5, 2, 4)
    return copied(y).reshape(batch, channels * size * size, height // size, width // size)


def copied(x: Tensor) -> Tensor:
    """Return a copy of ``x`` without holes."""
    return empty(x.shape, x.dtype, x.device).copy_(x)


def _trilu(n: Call, x: Tensor, k: Tensor | None = None) -> Tensor:
    offset = 0 if k is None else int((n.listed(1, k) or [0])[0])
    return x.triu(offset) if n.get("upper", 1) else x.tril(offset)


def _shape(n: Call, x: Tensor) -> Tensor:
    extents: Sequence[int] = list(x.shape)[slice(n.get("start", 0), n.get("end"))]
    return torch.tensor(extents, dtype=torch.int64, device=n.device)


def _size(n: Call, x: Tensor) -> Tensor:
    return torch.tensor(x.numel(), dtype=torch.int64, device=n.device)


def _constant_of_shape(n: Call, shape: Tensor) -> Tensor:
    value = n.get("value")
    dtype = torch.float64 if n.double else torch.float32
    fill = 0.0 if value is None else value.reshape(-1)[0].item()
    extents = n.listed(0, shape) or []
    return torch.full(extents, fill, dtype=dtype if value is None else value.dtype, device=n.device)


def _range(n: Call, start: Tensor, limit: Tensor, delta: Tensor) -> Tensor:
    first, last, step = (t.item() for t in (start, limit, delta))
    count = max(math.ceil((last - first) / step), 0)
    return start + torch.arange(count, device=start.device).to(start.dtype) * delta


def _eye_like(n: Call, x: Tensor) -> Tensor:
    dtype = n.type_of(n.get("dtype")) if "dtype" in n.attributes else x.dtype
    offset: int = n.get("k", 0)
    rows = torch.arange(x.shape[0], device=x.device)[:, None]
    return (rows + offset == torch.arange(x.shape[1], device=x.device)).to(dtype)


def constant(n: Call) -> Tensor:
    """Return the value of a Constant node."""
    kinds = {
        "value_float": TensorProto.FLOAT, "value_floats": TensorProto.FLOAT,
        "value_int": TensorProto.INT64, "value_ints": TensorProto.INT64,
    }  # fmt: skip
    for name, code in kinds.items():
        if name in n.attributes:
            return torch.tensor(n.get(name), dtype=n.type_of(code), device=n.device)
    value = n.get("value")
    if not isinstance(value, Tensor):
        raise EngineError(f"Constant '{n.name}' holds no tensor of numbers: {', '.join(n.attributes)}")
    return value.clone()


KERNELS: dict[str, Kernel] = {
    "Concat": _concat,
    "Constant": constant,
    "ConstantOfShape": _constant_of_shape,
    "DepthToSpace": _depth_to_space,
    "Expand": _expand,
    "EyeLike": _eye_like,
    "Flatten": _flatten,
    "Identity": lambda n, x: x,
    "Pad": _pad,
    "Range": _range,
    "Reshape": _reshape,
    "Shape": _shape,
    "Size": _size,
    "Slice": _slice,
    "SpaceToDepth": _space_to_depth,
    "Split": _split,
    "Squeeze": _squeeze,
    "Tile": _tile,
    "Transpose": _transpose,
    "Trilu": _trilu,
    "Unsqueeze": _unsqueeze,
}
