"""Reductions, searches along an axis, running sums."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from edgetune.engines.torch_ops.base import Call, Kernel

_Reduce = Callable[[Tensor, list[int]], Tensor]


def _reduction(reduce: _Reduce, before: Callable[[Tensor], Tensor] | None = None,
               after: Callable[[Tensor], Tensor] | None = None) -> Kernel:  # fmt: skip
    """Return the kernel of after(reduce(before(x))); ``reduce`` keeps the reduced axes with extent 1."""

    def kernel(n: Call, x: Tensor, axes: Tensor | None = None) -> Tensor:
        given = n.listed(1, axes) if "axes" not in n.attributes else n.get("axes")
        value = x if before is None else before(x)
        if given or not n.get("noop_with_empty_axes", 0):
            chosen = sorted(a % x.ndim for a in given) if given else list(range(x.ndim))
            value = reduce(value, chosen)
            if not n.get("keepdims", 1):
                value = value.reshape([size for i, size in enumerate(value.shape) if i not in chosen])
        if after is not None:
            value = after(value)
        return value.clone() if value is x else value.to(x.dtype)

    return kernel


def _sum(x: Tensor, axes: list[int]) -> Tensor:
    return x.sum(axes, keepdim=True, dtype=x.dtype) if axes else x.clone()


def _mean(x: Tensor, axes: list[int]) -> Tensor:
    if not axes:
        return x.clone()
    return x.mean(axes, keepdim=True) if x.dtype.is_floating_point else x.double().mean(axes, keepdim=True).trunc()


def _prod(x: Tensor, axes: list[int]) -> Tensor:
    for axis in axes:
        x = x.prod(axis, keepdim=True, dtype=x.dtype)
    return x if axes else x.clone()


def _extreme(name: str) -> _Reduce:
    def reduce(x: Tensor, axes: list[int]) -> Tensor:
        if not axes:
            return x.clone()
        if x.numel():
            result: Tensor = getattr(torch, name)(x, axes, keepdim=True)
            return result
        shape = [1 if i in axes else size for i, size in enumerate(x.shape)]
        return torch.full(shape, _least(x.dtype, -1 if name == "amax" else 1), dtype=x.dtype, device=x.device)

    return reduce


def _least(dtype: torch.dtype, sign: int) -> float:
    """Return the neutral element of max (``sign`` -1) or min (1)."""
    if dtype.is_floating_point:
        return sign * float("inf")
    if dtype == torch.bool:
        return sign > 0
    return torch.iinfo(dtype).max if sign > 0 else torch.iinfo(dtype).min


def _log_sum_exp(x: Tensor, axes: list[int]) -> Tensor:
    return torch.logsumexp(x, axes, keepdim=True) if axes else x.clone()


def _root(x: Tensor) -> Tensor:
    return x.sqrt() if x.dtype.is_floating_point else x.double().sqrt()


def _log(x: Tensor) -> Tensor:
    return x.log() if x.dtype.is_floating_point else x.double().log()


def _norm(order: int, exact: Kernel, after: Callable[[Tensor], Tensor] | None = None) -> Kernel:
    """Return a kernel that makes no temporary of the input's size; ``exact`` is the one for integers and no axes."""
    norm = _reduction(lambda x, axes: torch.linalg.vector_norm(x, order, axes, keepdim=True), None, after)

    def kernel(n: Call, x: Tensor, axes: Tensor | None = None) -> Tensor:
        idle = n.get("noop_with_empty_axes", 0) or x.ndim == 0
        return (norm if x.dtype.is_floating_point and not idle else exact)(n, x, axes)  # type: ignore[return-value]

    return kernel


def _search(largest: bool) -> Kernel:
    def kernel(n: Call, x: Tensor) -> Tensor:
        axis: int = n.get("axis", 0)
        find = torch.argmax if largest else torch.argmin
        if not n.get("select_last_index", 0):
            return find(x, axis, keepdim=bool(n.get("keepdims", 1)))
        found: Tensor = x.shape[axis] - 1 - find(x.flip(axis), axis, keepdim=bool(n.get("keepdims", 1)))
        return found

    return kernel


def _top_k(n: Call, x: Tensor, count: Tensor) -> tuple[Tensor, ...]:
    wanted = n.listed(1, count)
    assert wanted is not None
    # torch.topk may give any of several equal elements; the standard wants the lower index first.
    values, places = torch.sort(x, dim=n.get("axis", -1), descending=bool(n.get("largest", 1)), stable=True)
    axis = n.get("axis", -1)
    return tuple(t.narrow(axis, 0, int(wanted[0])).contiguous().clone() for t in (values, places))


def _running(function: str) -> Kernel:
    def kernel(n: Call, x: Tensor, axis: Tensor) -> Tensor:
        along = n.numbers(1, axis)
        along = along[0] if isinstance(along, list) else along
        source = x.flip(along) if n.get("reverse", 0) else x
        result: Tensor = getattr(torch, function)(source, along, dtype=x.dtype)
        if n.get("exclusive", 0):
            neutral = 0 if function == "cumsum" else 1
            first = torch.full_like(result.narrow(along, 0, 1), neutral)
            result = torch.cat([first, result.narrow(along, 0, x.shape[along] - 1)], along)
        return result.flip(along) if n.get("reverse", 0) else result

    return kernel


KERNELS: dict[str, Kernel] = {
    "ArgMax": _search(True),
    "ArgMin": _search(False),
    "CumSum": _running("cumsum"),
    "ReduceL1": _norm(1, _reduction(_sum, torch.abs)),
    "ReduceL2": _norm(2, _reduction(_sum, torch.square, _root)),
    "ReduceLogSum": _reduction(_sum, None, _log),
    "ReduceLogSumExp": _reduction(_log_sum_exp),
    "ReduceMax": _reduction(_extreme("amax")),
    "ReduceMean": _reduction(_mean),
    "ReduceMin": _reduction(_extreme("amin")),
    "ReduceProd": _reduction(_prod),
    "ReduceSum": _reduction(_sum),
    "ReduceSumSquare": _norm(2, _reduction(_sum, torch.square), torch.square_),
    "TopK": _top_k,
}
