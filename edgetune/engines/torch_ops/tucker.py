"""Native kernels of the Tucker encoders whose factors come from the batch itself: torch has eigh and QR, ONNX has not.

A kernel is found by the function's name and signature, as in ``native.py``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from onnx import FunctionProto
from torch import Tensor

from edgetune.codecs.base import Saved
from edgetune.codecs.batch_tucker import cut_axes
from edgetune.codecs.energy import TINY
from edgetune.codecs.subspace import DEPENDENT
from edgetune.engines.torch_ops.base import Call, Kernel

# <Codec>Encode_<shape of a sample>_<order>[_from_<shape of the tensor>]
_ENCODER = re.compile(
    r"(?P<codec>Hosvd_exact|Asi)Encode_(?P<shape>\d+(?:x\d+)*)_(?:(?P<last>last)|g(?P<groups>\d+))(?:_from_[\dxk]+)?"
)


def stored_modes(shape: Sequence[int], groups: int, *, channels_last: bool = False) -> dict[str, int]:
    """Return the axis of every mode that has a stored factor, b first, for a sample of ``shape``."""
    return cut_axes(Saved("", tuple(shape), groups, channels_last))


def tucker_encoder(function: FunctionProto) -> Kernel | None:
    """Return the kernel of an encoder of the codecs hosvd-exact and asi; None if ``function`` is none of them."""
    found = _ENCODER.fullmatch(function.name)
    if found is None:
        return None
    shape, groups = [int(extent) for extent in found["shape"].split("x")], int(found["groups"] or 1)
    if len(shape) > 4:
        return None
    axes = stored_modes(shape, groups, channels_last=found["last"] is not None)
    exact = found["codec"] == "Hosvd_exact"
    if len(function.input) != 1 + len(axes) or len(function.output) != (2 if exact else 2 + len(axes)) + len(axes):
        return None
    rows = found["last"] is not None or len(shape) == 1
    factor_of = _leading_vectors if exact else _iterated

    def encode(n: Call, x: Tensor, *given: Tensor) -> tuple[Tensor, ...]:
        x = x.reshape(-1, *shape)
        factors = {
            letter: factor_of(x.movedim(axis, 0).flatten(1), start)
            for (letter, axis), start in zip(axes.items(), given, strict=True)
        }
        core = x
        # The batch last: by then the rest is small.
        for letter, axis in reversed(axes.items()):
            core = torch.tensordot(core, factors[letter], dims=([axis], [0])).movedim(-1, axis)
        if not rows:
            core = core.reshape(len(core), groups, -1, *core.shape[2:])
        core = core.movedim(0, -2).contiguous()
        energy = (_square_norm(core) + TINY) / (_square_norm(x) + TINY)
        first, *others = factors.values()
        pairs = () if exact else tuple(zip(factors.values(), given, strict=True))
        carried = tuple(torch.where(factor.isnan(), before, factor) for factor, before in pairs)
        return (first, core, *others, energy, *carried)

    return encode


def _square_norm(x: Tensor) -> Tensor:
    """Return the sum of squares, one axis after the other, as the body does."""
    norm = x.square()
    for _ in range(x.ndim):
        norm = norm.sum(-1)
    return norm


def _leading_vectors(unfolding: Tensor, sketch: Tensor) -> Tensor:
    """Return the left singular vectors of ``unfolding`` [n, N] for as many columns as ``sketch`` has."""
    gram = unfolding @ unfolding.t()
    gram = gram / gram.abs().amax().clamp_min(TINY)
    if not bool(gram.isfinite().all()):  # eigh would raise; the energy tells
        return torch.full_like(sketch, torch.nan)
    vectors: Tensor = torch.linalg.eigh(gram)[1]
    return vectors.flip(1)[:, : sketch.shape[1]].contiguous()


def _iterated(unfolding: Tensor, before: Tensor) -> Tensor:
    """Return an orthonormal basis of A·Aᵀ·U: one step of subspace iteration."""
    return _orthonormal(_unit(unfolding @ (unfolding.t() @ before)), _unit(before))


def _unit(matrix: Tensor) -> Tensor:
    scaled = matrix / matrix.abs().amax(0).clamp_min(TINY)
    return scaled / scaled.square().sum(0).sqrt().clamp_min(TINY)


def _orthonormal(matrix: Tensor, spare: Tensor) -> Tensor:
    """Return the basis that Gram-Schmidt finds: Q, with R's diagonal positive.

    Columns that depend on those before them give way to those of ``spare``: then Q is found again.
    """
    q, r = torch.linalg.qr(matrix)
    diagonal = r.diagonal()
    dependent = diagonal.abs() <= DEPENDENT
    if bool(dependent.any()):
        q, r = torch.linalg.qr(torch.where(dependent, spare, matrix))
        diagonal = r.diagonal()
    return torch.mul(q, torch.where(diagonal < 0, -1.0, 1.0).to(q.dtype))
