"""Convolution and its transpose over one, two or three axes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from edgetune.engines.torch_ops.base import Call, Kernel, pad_spatial, spatial_padding


def _conv(n: Call, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    kernel, spatial = list(weight.shape[2:]), weight.ndim - 2
    strides, dilations = n.get("strides", [1] * spatial), n.get("dilations", [1] * spatial)
    pads = spatial_padding(n, x.shape[2:], kernel, strides, dilations)
    begin, end = pads[:spatial], pads[spatial:]
    # What both sides have in common the convolution pads itself; only the rest needs a padded copy.
    common = [max(min(b, e), 0) for b, e in zip(begin, end, strict=True)]
    x = pad_spatial(x, _less(begin, common), _less(end, common))
    return torch.convolution(x, weight, bias, strides, common, dilations, False, [0] * spatial, n.get("group", 1))


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
        return torch.convolution(x, weight, bias, strides, begin, dilations, True, rest, groups)
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
