"""Normalisations and the softmax family."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from edgetune.engines.torch_ops.base import Call, Kernel

_CHUNK_ELEMENTS = 1 << 20


def _batch_norm(
    n: Call, x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, var: Tensor
) -> Tensor | tuple[Tensor, ...]:
    epsilon = n.get("epsilon", 1e-5)
    if not n.get("training_mode", 0):
        same = {x.dtype} == {t.dtype for t in (scale, bias, mean, var)}
        if same and x.ndim > 1:
            return functional.batch_norm(x, mean, var, scale, bias, False, 0.0, epsilon)
        return _normalise(x, mean, var, scale, bias, epsilon)
    axes, momentum = [i for i in range(x.ndim) if i != 1], n.get("momentum", 0.9)
    batch_var, batch_mean = torch.var_mean(x, axes, correction=0)
    y = _normalise(x, batch_mean, batch_var, scale, bias, epsilon)
    return y, mean * momentum + batch_mean * (1 - momentum), var * momentum + batch_var * (1 - momentum)


def _normalise(x: Tensor, mean: Tensor, var: Tensor, scale: Tensor, bias: Tensor, epsilon: float) -> Tensor:
    shape = [1, -1, *[1] * (x.ndim - 2)]
    factor = scale / torch.sqrt(var + epsilon)
    return ((x - mean.reshape(shape)) * factor.reshape(shape) + bias.reshape(shape)).to(x.dtype)


def _instance_norm(n: Call, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    return functional.group_norm(x, x.shape[1], scale, bias, n.get("epsilon", 1e-5))


def _group_norm(n: Call, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    groups = n.get("num_groups")
    if scale.shape[0] != x.shape[1]:  # one per group before opset 21, one per channel since
        each = x.shape[1] // groups
        scale, bias = scale.repeat_interleave(each), bias.repeat_interleave(each)
    return functional.group_norm(x, groups, scale, bias, n.get("epsilon", 1e-5))


def _layer_norm(n: Call, x: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor | tuple[Tensor, ...]:
    axis, epsilon = n.get("axis", -1) % x.ndim, n.get("epsilon", 1e-5)
    shape = list(x.shape[axis:])
    fits = list(scale.shape) == shape and (bias is None or list(bias.shape) == shape)
    y, mean, inverse = torch.native_layer_norm(x, shape, scale if fits else None, bias if fits else None, epsilon)
    if not fits:
        y = y * scale
        y = y if bias is None else y + bias
    return y if n.outputs == 1 else (y, mean, inverse)


def _lp_normalization(n: Call, x: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm(x, n.get("p", 2), n.get("axis", -1), keepdim=True)
    return torch.where(norm == 0, torch.zeros_like(x), x / norm)


def _mean_variance_normalization(n: Call, x: Tensor) -> Tensor:
    axes = n.get("axes", [0, 2, 3])
    var, mean = torch.var_mean(x, axes, correction=0, keepdim=True)
    return (x - mean) / (torch.sqrt(var) + 1e-9)


def _lrn(n: Call, x: Tensor) -> Tensor:
    size: int = n.get("size")
    alpha: float = n.get("alpha", 1e-4)
    squares = x.square().unsqueeze(1)
    before = (size - 1) // 2
    squares = functional.pad(squares, [0, 0] * (x.ndim - 2) + [before, size - 1 - before])
    total = torch.zeros_like(x)
    for place in range(size):
        total += squares[:, 0].narrow(1, place, x.shape[1])
    scale: Tensor = (total * (alpha / size) + n.get("bias", 1.0)).pow(n.get("beta", 0.75))
    return x / scale


def _along(n: Call, x: Tensor, function: str) -> Tensor:
    apply = getattr(torch, function)
    if n.opset >= 13:
        result: Tensor = apply(x, n.get("axis", -1))
        return result
    axis = n.get("axis", 1) % max(x.ndim, 1)  # before opset 13: over all axes from this one on
    flat: Tensor = apply(x.reshape(math.prod(x.shape[:axis]), -1), 1)
    return flat.reshape(x.shape)


def _hardmax(n: Call, x: Tensor) -> Tensor:
    axis: int = n.get("axis", -1 if n.opset >= 13 else 1) % x.ndim
    flat = x if n.opset >= 13 else x.reshape(math.prod(x.shape[:axis]), -1)
    along = axis if n.opset >= 13 else 1
    best = flat.argmax(along, keepdim=True)
    return torch.zeros_like(flat).scatter_(along, best, 1.0).reshape(x.shape)


def _along_(n: Call, x: Tensor, function: str) -> Tensor:
    """Write the result over ``x``, a few rows at a time, so that no second tensor of its size exists."""
    axis = n.get("axis", -1) % x.ndim
    if n.opset < 13 or axis == 0 or x.numel() <= _CHUNK_ELEMENTS:
        return x.copy_(_along(n, x, function))
    rows = x.flatten(0, axis - 1) if axis > 1 else x
    for piece in torch.split(rows, max(_CHUNK_ELEMENTS * len(rows) // x.numel(), 1)):
        piece.copy_(getattr(torch, function)(piece, 1))
    return x


KERNELS: dict[str, Kernel] = {
    "BatchNormalization": _batch_norm,
    "GroupNormalization": _group_norm,
    "Hardmax": _hardmax,
    "InstanceNormalization": _instance_norm,
    "LRN": _lrn,
    "LayerNormalization": _layer_norm,
    "LogSoftmax": lambda n, x: _along(n, x, "log_softmax"),
    "LpNormalization": _lp_normalization,
    "MeanVarianceNormalization": _mean_variance_normalization,
    "Softmax": lambda n, x: _along(n, x, "softmax"),
}
IN_PLACE: dict[str, Kernel] = {
    "LogSoftmax": lambda n, x: _along_(n, x, "log_softmax"),
    "Softmax": lambda n, x: _along_(n, x, "softmax"),
}
