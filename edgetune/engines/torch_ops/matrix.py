"""Products of matrices."""

from __future__ import annotations

import torch
from torch import Tensor

from edgetune.engines.torch_ops.base import Call, Kernel


def _matmul(n: Call, a: Tensor, b: Tensor) -> Tensor:
    return torch.matmul(a, b)


def _gemm(n: Call, a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
    left = a.t() if n.get("transA", 0) else a
    right = b.t() if n.get("transB", 0) else b
    alpha: float = n.get("alpha", 1.0)
    beta: float = n.get("beta", 1.0)
    if c is None:
        product = torch.mm(left, right)
        return product if alpha == 1.0 else product.mul_(alpha)
    if not a.dtype.is_floating_point:
        return (torch.mm(left, right) * alpha + c * beta).to(a.dtype)
    return torch.addmm(c, left, right, beta=beta, alpha=alpha)


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
