"""Operators that read or write at places given by a tensor."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from edgetune.engines.torch_ops.base import Call, Kernel

_REDUCTIONS = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}


def _gather(n: Call, x: Tensor, places: Tensor) -> Tensor:
    axis = n.get("axis", 0) % x.ndim
    size = x.shape[axis]
    flat = places.reshape(-1).long()
    chosen = x.index_select(axis, torch.where(flat < 0, flat + size, flat))
    return chosen.reshape([*x.shape[:axis], *places.shape, *x.shape[axis + 1 :]])


def _gather_elements(n: Call, x: Tensor, places: Tensor) -> Tensor:
    axis = n.get("axis", 0)
    return x.gather(axis, torch.remainder(places, x.shape[axis]).long())


def _gather_nd(n: Call, x: Tensor, places: Tensor) -> Tensor:
    shared = n.get("batch_dims", 0)
    depth = places.shape[-1]
    batch = math.prod(x.shape[:shared])
    rows = x.reshape(batch, *x.shape[shared:])
    flat = places.reshape(batch, -1, depth).long()
    index = [torch.arange(batch, device=x.device)[:, None]]
    index += [torch.remainder(flat[..., i], rows.shape[1 + i]) for i in range(depth)]
    return rows[tuple(index)].reshape([*places.shape[:-1], *x.shape[shared + depth :]])


def _scatter_elements(n: Call, x: Tensor, places: Tensor, updates: Tensor) -> Tensor:
    axis, reduction = n.get("axis", 0), n.get("reduction", "none")
    index = torch.remainder(places, x.shape[axis]).long()
    if reduction == "none":
        return x.scatter(axis, index, updates)
    if reduction == "add":
        return x.scatter_add(axis, index, updates)
    return x.scatter_reduce(axis, index, updates, _REDUCTIONS[reduction])


def _scatter_nd(n: Call, x: Tensor, places: Tensor, updates: Tensor) -> Tensor:
    depth, reduction = places.shape[-1], n.get("reduction", "none")
    extents = x.shape[:depth]
    flat = torch.zeros(places.shape[:-1], dtype=torch.int64, device=x.device)
    for i, size in enumerate(extents):
        flat = flat * size + torch.remainder(places[..., i], size).long()
    rows = x.clone(memory_format=torch.contiguous_format).reshape(math.prod(extents), -1)
    source = updates.reshape(flat.numel(), -1)
    index = flat.reshape(-1, 1).expand(-1, rows.shape[1])
    if reduction == "none":
        rows.scatter_(0, index, source)
    else:
        rows.scatter_reduce_(0, index, source, _REDUCTIONS[reduction])
    return rows.reshape(x.shape)


def _one_hot(n: Call, places: Tensor, depth: Tensor, values: Tensor) -> Tensor:
    count = int((n.listed(1, depth) or [0])[0])
    axis = n.get("axis", -1)
    axis = axis + places.ndim + 1 if axis < 0 else axis
    wrapped = torch.where(places < 0, places + count, places).unsqueeze(axis)
    classes = torch.arange(count, device=places.device).reshape([-1 if i == axis else 1 for i in range(wrapped.ndim)])
    return torch.where(wrapped == classes, values[1], values[0])


def _non_zero(n: Call, x: Tensor) -> Tensor:
    return torch.nonzero(x.reshape(1) if x.ndim == 0 else x).t().contiguous()


def _compress(n: Call, x: Tensor, condition: Tensor) -> Tensor:
    axis = n.get("axis")
    source = x.reshape(-1) if axis is None else x
    return source.index_select(axis or 0, torch.nonzero(condition).reshape(-1))


KERNELS: dict[str, Kernel] = {
    "Compress": _compress,
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "GatherND": _gather_nd,
    "NonZero": _non_zero,
    "OneHot": _one_hot,
    "Scatter": _scatter_elements,
    "ScatterElements": _scatter_elements,
    "ScatterND": _scatter_nd,
}
