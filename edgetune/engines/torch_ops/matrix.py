"""Products of matrices."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from edgetune.engines.torch_ops.arena import empty
from edgetune.engines.torch_ops.base import Call, Kernel, broadcast


def _matmul(n: Call, a: Tensor, b: Tensor) -> Tensor:
    return product(a, b)


def product(a: Tensor, b: Tensor) -> Tensor:
    """Return the matrix product over the last two axes, those in front broadcast; no operand is repeated for it."""
    if a.ndim < 2 or b.ndim < 2 or a.dtype != b.dtype or not a.is_floating_point():
        return torch.matmul(a, b)
    ahead = broadcast(a.shape[:-2], b.shape[:-2])
    rows, inner, columns = a.shape[-2], a.shape[-1], b.shape[-1]
    out = empty([*ahead, rows, columns], a.dtype, a.device)
    if not out.numel() or not inner:
        return torch.matmul(a, b)
    if math.prod(b.shape[:-2]) == 1 and a.is_contiguous():  # one matrix for all rows
        torch.mm(a.reshape(-1, inner), b.reshape(inner, columns), out=out.view(-1, columns))
    else:
        _batched(a.expand(*ahead, rows, inner), b.expand(*ahead, inner, columns), out)
    return out


def _batched(a: Tensor, b: Tensor, out: Tensor) -> None:
    """Write the products of ``a`` and ``b``, whose axes in front agree, to ``out``."""
    if out.ndim == 2:
        torch.mm(a, b, out=out)
        return
    try:
        left, right = (x.view(-1, *x.shape[-2:]) for x in (a, b))
    except RuntimeError:  # what is repeated does not lie in front of all else: one index of the first axis at a time
        for parts in zip(a, b, out, strict=True):
            _batched(*parts)
        return
    torch.bmm(left, right, out=out.view(-1, *out.shape[-2:]))


def _gemm(n: Call, a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
    left = a.t() if n.get("transA", 0) else a
    right = b.t() if n.get("transB", 0) else b
    alpha: float = n.get("alpha", 1.0)
    beta: float = n.get("beta", 1.0)
    if c is None:
        result = torch.mm(left, right, out=empty([len(left), right.shape[1]], a.dtype, a.device))
        return result if alpha == 1.0 else result.mul_(alpha)
    if not a.dtype.is_floating_point:
        return (torch.mm(left, right) * alpha + c * beta).to(a.dtype)
    out = empty([len(left), right.shape[1]], a.dtype, a.device)
    return torch.addmm(c, left, right, beta=beta, alpha=alpha, out=out)


def _matmul_integer(
    n: Call, a: Tensor, b: Tensor, a_zero: Tensor | None = None, b_zero: Tensor | None = None
) -> Tensor:
    left, right = a.to(torch.int32), b.to(torch.int32)
    if a_zero is not None:
        left = left - (a_zero.to(torch.int32)[:, None] if a_zero.ndim == 1 else a_zero.to(torch.int32))
    if b_zero is not None:
        right = right - b_zero.to(torch.int32)
    if left.device.type == "cpu":
        return torch.matmul(left, right)
    # CUDA multiplies no integer matrices; float64 holds every sum of fewer than 2^37 products of bytes exactly.
    return torch.matmul(left.double(), right.double()).to(torch.int32)


def _einsum(n: Call, *x: Tensor) -> Tensor:
    return torch.einsum(n.get("equation"), *x)


KERNELS: dict[str, Kernel] = {
    "Einsum": lambda n, *x: _fresh(_einsum(n, *x), x),
    "Gemm": _gemm,
    "MatMul": _matmul,
    "MatMulInteger": _matmul_integer,
}


def _fresh(result: Tensor, inputs: tuple[Tensor, ...]) -> Tensor:
    # an equation that only permutes or takes a diagonal gives a view
    memory = result.untyped_storage().data_ptr()
    return result.clone() if any(x.untyped_storage().data_ptr() == memory for x in inputs) else result
