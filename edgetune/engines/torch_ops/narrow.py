"""One byte a number (codecs/log8.py), by torch: for kernels that stand in for functions of a codec so stored.

In pieces, so that the temporaries, of four bytes a number, stay small.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from edgetune.codecs.log8 import LEAST, NEGATIVE, STEPS, TABLE, TOP
from edgetune.engines.torch_ops.arena import empty

_PIECE_ELEMENTS = 1 << 18


def rounded(value: Tensor) -> tuple[Tensor, Tensor]:
    """Return the codes, uint8 of the shape of ``value``, and the largest magnitude [1]."""
    least, most = torch.aminmax(value)
    unit = torch.maximum(most, -least).clamp_min(LEAST).reshape(1)
    inverse = unit.reciprocal()
    codes = empty(value.shape, torch.uint8, value.device)
    for source, target in _pieces(value.reshape(-1), codes.view(-1)):
        level = (source * inverse).abs_().log_().mul_(STEPS / math.log(2.0)).add_(TOP).round_().clamp_(0, TOP)
        target.copy_(level).bitwise_or_((source < 0).to(torch.uint8).mul_(NEGATIVE))
    return codes, unit


def widened(codes: Tensor, unit: Tensor) -> Tensor:
    """Return the float32 that ``codes`` in units of ``unit`` [1] stand for."""
    table = torch.from_numpy(TABLE).to(codes.device) * unit
    wide = empty(codes.shape, torch.float32, codes.device)
    for source, target in _pieces(codes.reshape(-1), wide.view(-1)):
        torch.index_select(table, 0, source.int(), out=target)
    return wide


def _pieces(source: Tensor, target: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return stretches of both; on a device whose temporaries cost nothing but memory, all in one."""
    size = _PIECE_ELEMENTS if source.device.type == "cpu" else max(len(source), 1)
    return list(zip(torch.split(source, size), torch.split(target, size), strict=True))
