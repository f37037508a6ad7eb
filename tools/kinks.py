"""Where a model's function has kinks, and how far from them a batch keeps. Knows torch alone.

Where the argument of a ReLU lies within rounding of zero, or the two largest elements of a pooling window are equal but
for rounding, two correct implementations may take different branches, and their gradients then differ by whole
elements, not by rounding. No reference settles such a case, in float64 or float32. So one looks at the arguments, in
both precisions, and compares gradients on batches that keep away from all kinks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

_aten = torch.ops.aten
_ZERO = {_aten.relu, _aten.relu_, _aten.leaky_relu, _aten.leaky_relu_, _aten._prelu_kernel, _aten.abs}
_GATES = {_aten.hardswish, _aten.hardswish_, _aten.hardsigmoid, _aten.hardsigmoid_}
_CLAMPS = {_aten.hardtanh, _aten.hardtanh_, _aten.clamp, _aten.clamp_}
_POOLS = {_aten.max_pool2d_with_indices, _aten.max_pool3d_with_indices}


class Kinks(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records, for every piecewise operator that a gradient passes, its arguments' distances from the kinks.

    ``distances`` holds one tensor per operator and kink, in the order in which they ran.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.distances: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        operator, x = func.overloadpacket, args[0] if args else None
        if isinstance(x, Tensor) and x.requires_grad and x.is_floating_point():
            arguments = [*args[1:], *(kwargs or {}).values()]
            x = x.detach().clone()
            if operator in _ZERO:
                self.distances.append(x)
            elif operator in _GATES:
                self.distances.extend([x + 3, x - 3])
            elif operator in _CLAMPS:
                bounds = [b for b in (arguments or [-1.0, 1.0]) if isinstance(b, int | float)]
                self.distances.extend(x - b for b in bounds)
            elif operator in _POOLS:
                self.distances.append(_lead_in_windows(x, *args[1:]))
            elif operator is _aten.amax:
                self.distances.append(_lead(x, [axis % x.ndim for axis in args[1]]))
        return func(*args, **(kwargs or {}))


def _lead_in_windows(
    x: Tensor, kernel: Sequence[int], stride: Sequence[int] = (), padding: Sequence[int] = (0,), *_: Any
) -> Tensor:
    axes = len(kernel)
    pads = list(padding) if len(padding) == axes else list(padding) * axes
    x = functional.pad(x, [extent for pad in reversed(pads) for extent in (pad, pad)], value=-math.inf)
    for axis, (size, step) in enumerate(zip(kernel, stride or kernel, strict=True)):
        x = x.unfold(2 + axis, size, step)
    return _lead(x, list(range(x.ndim - axes, x.ndim)))


def _lead(x: Tensor, axes: Sequence[int]) -> Tensor:
    """Return by how much the largest element over ``axes`` exceeds the next; infinite where the largest is 0.

    Behind a ReLU equal zeros are common, and harmless: none of them passes a gradient on.
    """
    rows = x.permute([*(i for i in range(x.ndim) if i not in axes), *axes]).flatten(x.ndim - len(axes))
    if rows.shape[-1] == 1:
        return torch.full(rows.shape[:-1], math.inf)
    first, second = rows.topk(2, dim=-1).values.unbind(-1)
    return torch.where(first == 0, math.inf, first - second)


def near_kinks(exact: Sequence[Tensor], rounded: Sequence[Tensor]) -> int:
    """Return how many values are no farther from a kink than twice the largest rounding error seen at that place.

    Args:
        exact: the distances in float64.
        rounded: the same in float32.
    """
    assert len(exact) == len(rounded)
    count = 0
    for precise, rough in zip(exact, rounded, strict=True):
        finite = precise.isfinite() & rough.isfinite()
        if finite.any():
            rounding = (precise - rough)[finite].abs().max()
            count += int((precise[finite].abs() <= 2 * rounding).sum())
    return count
