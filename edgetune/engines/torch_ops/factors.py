"""Native kernels of the codec hosvd on small planes: its encoder, and weight gradients in the space of its factors.

With few positions, one product with the Kronecker product of the bases of h and w takes the place of many tiny ones.
Kernels are found by the function's name and signature, as in ``native.py``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

import torch
from onnx import FunctionProto
from torch import Tensor
from torch.nn import functional

from edgetune.codecs.base import Saved
from edgetune.codecs.energy import TINY
from edgetune.codecs.hosvd import MODES, Hosvd
from edgetune.codecs.log8 import Log8
from edgetune.codecs.subspace import EVEN, POLAR, ROUNDS, SHIFT
from edgetune.engines.torch_ops.arena import empty
from edgetune.engines.torch_ops.base import Call, Kernel
from edgetune.engines.torch_ops.matrix import product
from edgetune.engines.torch_ops.narrow import rounded

MOST_POSITIONS = 100  # of a plane; on larger ones h and w are cheaper one after the other

# Hosvd[_cut<letters>][_storagelog8]Encode_<shape of a sample>_g<groups>
_ENCODER = re.compile(
    r"Hosvd(_cut(?P<cut>[czhw]+))?(?P<narrow>_storagelog8)?Encode_(?P<shape>\d+x\d+x\d+)_g(?P<groups>\d+)"
)


def hosvd_encoder(function: FunctionProto) -> Kernel | None:
    """Return the kernel of the encoder of a convolution's input [b, c, h, w]; None if ``function`` is another one."""
    found = _ENCODER.fullmatch(function.name)
    if found is None:
        return None
    shape, groups = tuple(int(extent) for extent in found["shape"].split("x")), int(found["groups"])
    modes = Hosvd(found["cut"] or MODES).modes(Saved("", shape, groups))
    letters = [mode.letter for mode in modes if mode.letter != "b"]
    positions, channels = shape[1] * shape[2], shape[0] // groups
    outputs = 4 if found["narrow"] else 3
    if len(function.input) != 2 + len(letters) or len(function.output) != outputs or positions > MOST_POSITIONS:
        return None

    def encode(n: Call, x: Tensor, sketch: Tensor, *given: Tensor) -> tuple[Tensor, ...]:
        bases = dict(zip(letters, given, strict=True))
        height, width = (_basis(bases, letter, size, x) for letter, size in zip("hw", shape[1:], strict=True))
        y = x.reshape(-1, positions)
        y = product(y, torch.kron(height, width)) if "h" in bases or "w" in bases else y  # [b·c, r3·r4]
        y = y.view(-1, groups, channels, y.shape[-1])
        y = product(bases["c"].transpose(1, 2), y) if "c" in bases else y  # [b, g, r2, r3·r4]
        flat = y.reshape(len(y), -1)
        factor = _top_subspace(flat @ flat.t(), sketch)
        core = product(factor.t(), flat).view(-1, *y.shape[1:3], height.shape[1], width.shape[1])
        energy = (_square_norm(core) + TINY) / (_square_norm(x) + TINY)
        return factor, _contiguous(core.permute(1, 2, 3, 0, 4)), energy

    def log8(n: Call, x: Tensor, sketch: Tensor, *given: Tensor) -> tuple[Tensor, ...]:
        factor, core, energy = encode(n, x, sketch, *given)
        return factor, *rounded(core), energy * (1.0 - Log8.lost)

    return log8 if found["narrow"] else encode


def _contiguous(x: Tensor) -> Tensor:
    return empty(x.shape, x.dtype, x.device).copy_(x)


def _basis(bases: Mapping[str, Tensor], letter: str, size: int, like: Tensor) -> Tensor:
    """Return the basis [size, r] of a mode of positions; of one that stays whole, the identity."""
    if letter in bases:
        return bases[letter].reshape(size, -1)
    whole: Tensor = torch.eye(size, dtype=like.dtype, device=like.device)
    return whole


def _square_norm(x: Tensor) -> Tensor:
    """Return ‖x‖², the samples apart: one float32 sum over a whole activation would lose the fifth digit."""
    total: Tensor = torch.linalg.vector_norm(x.reshape(len(x), -1), dim=1).square().sum()
    return total


def _top_subspace(gram: Tensor, sketch: Tensor) -> Tensor:
    """Return what ``codecs.subspace.emit_top_subspace`` finds, by the same steps."""
    scaled = gram / gram.amax().clamp_min(TINY)
    units = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    half = 0.49 * (scaled / torch.linalg.matrix_norm(scaled).clamp_min(TINY) + SHIFT * units)
    y = sketch / torch.linalg.matrix_norm(sketch)
    for _ in range(ROUNDS):
        y = half @ _polar(y, POLAR[:EVEN])
    return _polar(y, POLAR)


def _polar(y: Tensor, steps: Sequence[tuple[float, float, float]]) -> Tensor:
    for a, b, c in steps:
        square = y.t() @ y
        y = torch.addmm(y, y, torch.addmm(square, square, square, beta=b, alpha=c), beta=a)
    return y


class FactorTaps:
    """The weight gradient of one 2-D convolution from core and factors, without expanding them to positions.

    dW[o,c,k,l] = Σ_b,y,x dY[b,o,y,x] · X[b,c,y·s+k·d-p,x·s+l·d-p], and X ≈ S ×U¹ ×U² ×U³ ×U⁴ (HOSVD paper, eq. 18):
    a tap takes other rows of U³ and U⁴, with zeros for the padding.
    """

    def __init__(
        self,
        extents: Sequence[int],
        kernel: Sequence[int],
        strides: Sequence[int],
        dilations: Sequence[int],
        pads: Sequence[int],
        groups: int,
    ) -> None:
        self._extents, self._kernel, self._strides = extents, kernel, strides
        self._dilations, self._pads, self._groups = dilations, pads, groups

    def serves(self, outputs: int, each: int) -> bool:
        """Tell whether this is the way for ``outputs`` channels from ``each`` inputs per group."""
        depthwise = each == 1 and outputs == self._groups
        return (
            len(self._extents) == 2 and math.prod(self._extents) <= MOST_POSITIONS and (self._groups == 1 or depthwise)
        )

    def gradient(self, dy: Tensor, factor: Tensor, core: Tensor, bases: Mapping[str, Tensor]) -> Tensor:
        """Return [o, c / groups, k, l] for ``dy`` [b, o, y, x], ``factor`` [b, r1] and ``core`` [g, r2, r3, r1, r4]."""
        samples, outputs, positions = len(dy), dy.shape[1], dy.shape[2] * dy.shape[3]
        rank, each = factor.shape[1], core.shape[1]
        # Z1[o, r1, y·x] = Σ_b U[b,r1] · dY[b,o,y,x]
        z1 = product(factor.t(), dy.reshape(samples, outputs, positions).permute(1, 0, 2))
        taps = self._taps(dy, bases)  # of [y·x, r3·r4] each
        inner = core.permute(0, 3, 2, 4, 1).reshape(self._groups, rank, -1, each)  # [g, r1, r3·r4, r2]
        if self._groups > 1:
            # every group has one output and one input: Z1ᵀ·S over r1 [o, y·x, r3·r4], whose sums with the taps are dW
            joint = product(z1.transpose(1, 2), inner.flatten(2))
            weights = torch.stack([tap.flatten() for tap in taps], 1)
            return product(joint.flatten(1), weights).view(outputs, 1, *self._kernel)
        made = empty([len(taps), outputs, each], dy.dtype, dy.device)
        for tap, target in zip(taps, made, strict=True):
            torch.mm(product(z1, tap).view(outputs, -1), inner.reshape(-1, each), out=target)
        if "c" in bases:
            made = product(made, bases["c"].reshape(-1, each).t())
        return _contiguous(made.permute(1, 2, 0)).view(outputs, -1, *self._kernel)

    def _taps(self, dy: Tensor, bases: Mapping[str, Tensor]) -> list[Tensor]:
        """Return, per tap, the rows of the bases of h and w that meet the outputs: [y·x, r3·r4]."""
        rows: list[list[Tensor]] = []
        for axis, letter in enumerate("hw"):
            basis = _basis(bases, letter, self._extents[axis], dy)
            padded = functional.pad(basis, [0, 0, self._pads[axis], self._pads[2 + axis]])
            step, last = self._strides[axis], (dy.shape[2 + axis] - 1) * self._strides[axis] + 1
            begins = [k * self._dilations[axis] for k in range(self._kernel[axis])]
            rows.append([padded[begin : begin + last : step] for begin in begins])
        return [torch.kron(high, wide) for high in rows[0] for wide in rows[1]]
