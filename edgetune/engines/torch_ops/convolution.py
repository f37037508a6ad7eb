"""Convolution and its transpose over one, two or three axes."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from edgetune.engines import heap
from edgetune.engines.torch_ops.arena import fresh
from edgetune.engines.torch_ops.base import Call, Kernel, pad_spatial, spatial_padding


def _conv(n: Call, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    kernel, spatial = list(weight.shape[2:]), weight.ndim - 2
    strides, dilations = n.get("strides", [1] * spatial), n.get("dilations", [1] * spatial)
    pads = spatial_padding(n, x.shape[2:], kernel, strides, dilations)
    begin, end = pads[:spatial], pads[spatial:]
    # What both sides have in common the convolution pads itself; only the rest needs a padded copy.
    common = [max(min(b, e), 0) for b, e in zip(begin, end, strict=True)]
    x = pad_spatial(x, _less(begin, common), _less(end, common))
    settings = (strides, common, dilations, False, [0] * spatial, n.get("group", 1))
    sides = zip(x.shape[2:], kernel, strides, dilations, common, strict=True)
    extents = [(size + 2 * pad - d * (k - 1) - 1) // s + 1 for size, k, s, d, pad in sides]
    return _in_pieces(x, weight, bias, settings, [len(x), len(weight), *extents])


def _in_pieces(x: Tensor, weight: Tensor, bias: Tensor | None, settings: Any, shape: Sequence[int]) -> Tensor:
    """Convolve a few samples at a time, so that what the library reorders stays small; the result has ``shape``."""
    out = fresh(shape, x.dtype, x.device) if x.dtype == weight.dtype else None
    samples = samples_at_once(x[:1].numel(), math.prod(shape[1:]), weight.numel(), x.dtype.itemsize)
    if out is None or samples >= len(x):
        return torch.convolution(x, weight, bias, *settings)
    for source, target in zip(torch.split(x, samples), torch.split(out, samples), strict=True):
        target.copy_(torch.convolution(source, weight, bias, *settings))
    return out


def samples_at_once(source: int, result: int, weight: int, element_bytes: int) -> int:
    """Return how many samples of ``source`` and ``result`` elements one call of a convolution should take.

    No temporary of a call should be larger than what the heap keeps (``engines.heap.KEPT_BLOCK_BYTES``). But every
    call reorders the weight once more: where that would be as much work as the samples, all go at once.
    """
    samples = max(heap.KEPT_BLOCK_BYTES // (2 * max(source, result, 1) * element_bytes), 1)
    return samples if samples * (source + result) >= weight else sys.maxsize


def _less(a: Sequence[int], b: Sequence[int]) -> list[int]:
    return [i - j for i, j in zip(a, b, strict=True)]


def _conv_transpose(n: Call, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    kernel, spatial = list(weight.shape[2:]), weight.ndim - 2
    strides, dilations = n.get("strides", [1] * spatial), n.get("dilations", [1] * spatial)
    rest, groups = list(n.get("output_padding", [0] * spatial)), n.get("group", 1)
    windows = [d * (k - 1) + 1 for k, d in zip(kernel, dilations, strict=True)]
    whole = [s * (i - 1) + k for s, i, k in zip(strides, x.shape[2:], windows, strict=True)]
    pads = _transposed_padding(n, x, strides, whole, rest)
    begin, end = pads[:spatial], pads[spatial:]
    fits = all(r < max(s, d) for r, s, d in zip(rest, strides, dilations, strict=True))
    if begin == end and fits and min(begin) >= 0:
        settings = (strides, begin, dilations, True, rest, groups)
        sides = zip(whole, begin, rest, strict=True)
        extents = [size - 2 * pad + more for size, pad, more in sides]
        return _in_pieces(x, weight, bias, settings, [len(x), weight.shape[1] * groups, *extents])
    zeros = [0] * spatial
    y = torch.convolution(x, weight, None, strides, zeros, dilations, True, zeros, groups)
    y = pad_spatial(y, [-b for b in begin], _less(rest, end))
    return y if bias is None else y + bias.reshape(1, -1, *[1] * spatial)


def _transposed_padding(
    n: Call, x: Tensor, strides: Sequence[int], whole: Sequence[int], rest: Sequence[int]
) -> list[int]:
    """Return pads [begin..., end...]: what is cut from ``whole``, the extents without any padding."""
    mode, spatial = n.get("auto_pad", "NOTSET"), len(strides)
    wanted = n.get("output_shape")
    if wanted is None and mode in ("SAME_UPPER", "SAME_LOWER"):
        wanted = [i * s for i, s in zip(x.shape[2:], strides, strict=True)]
    if wanted is None:
        return list(n.get("pads", [0] * (2 * spatial)))
    totals = [w + r - size for w, r, size in zip(whole, rest, wanted[-spatial:], strict=True)]
    small, large = [t // 2 for t in totals], [t - t // 2 for t in totals]
    # The standard: with SAME_UPPER the larger half is cut at the end, otherwise at the begin.
    return [*small, *large] if mode == "SAME_UPPER" else [*large, *small]


KERNELS: dict[str, Kernel] = {"Conv": _conv, "ConvTranspose": _conv_transpose}
