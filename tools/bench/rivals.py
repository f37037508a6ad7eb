"""How the rivals keep the input of a trained layer, written as their papers have it. Knows torch alone.

A codec encodes the input of a layer in the forward pass, and makes the weight's gradient from what it kept. Letters: b
batch, c channels, h and w positions, o output channels; a linear layer's input is [b, ..., c].
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn import grad as gradients

CONV, LINEAR = torch.ops.aten.conv2d.default, torch.ops.aten.linear.default


@dataclass(frozen=True)
class Layer:
    """What a trained layer does: a convolution with these settings, or (``linear``) a product."""

    linear: bool
    stride: tuple[int, ...] = (1, 1)
    padding: tuple[int, ...] = (0, 0)
    dilation: tuple[int, ...] = (1, 1)
    groups: int = 1

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.linear:
            return functional.linear(x, weight, bias)
        return functional.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)

    def input_gradient(self, shape: torch.Size, weight: Tensor, dy: Tensor) -> Tensor:
        if self.linear:
            return dy @ weight
        make: Any = gradients.conv2d_input
        dx: Tensor = make(shape, weight, dy, self.stride, self.padding, self.dilation, self.groups)
        return dx

    def weight_gradient(self, x: Tensor, shape: torch.Size, dy: Tensor) -> Tensor:
        if self.linear:
            return dy.flatten(0, -2).T @ x.flatten(0, -2)
        make: Any = gradients.conv2d_weight
        dw: Tensor = make(x, shape, dy, self.stride, self.padding, self.dilation, self.groups)
        return dw


class Codec(Protocol):
    """What a rival makes of a layer's input."""

    def encode(self, key: str, x: Tensor, layer: Layer) -> tuple[Tensor, ...]:
        """Return what is kept of the input ``x`` of the layer ``key``."""

    def decode(self, kept: tuple[Tensor, ...], shape: torch.Size) -> Tensor:
        """Return the input, of ``shape``, as far as it is known."""

    def weight_gradient(self, layer: Layer, kept: tuple[Tensor, ...], shape: torch.Size, dy: Tensor) -> Tensor:
        """Return the gradient of a weight of ``shape``."""

    def input_gradient(self, layer: Layer, x: torch.Size, weight: Tensor, dy: Tensor) -> Tensor:
        """Return the gradient of an input of the shape ``x``."""


@dataclass
class Watch:
    """Seconds spent in encoders; where ``looking``, also captured energies and the shapes of what was kept."""

    seconds: float = 0.0
    looking: bool = False
    energies: dict[str, float] = field(default_factory=dict)
    shapes: dict[str, list[list[int]]] = field(default_factory=dict)


def replacements(codec: Codec, weights: Mapping[str, Any], watch: Watch) -> dict[str, Callable[..., Any]]:
    """Return what takes the place of the operators of ``weights`` (the operator by the weight's name)."""
    return {name: _Coded(name, call, codec, watch) for name, call in weights.items() if call in (CONV, LINEAR)}


class _Coded:
    def __init__(self, key: str, call: Any, codec: Codec, watch: Watch) -> None:
        self.key, self.linear, self.codec, self.watch = key, call is LINEAR, codec, watch

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None, *settings: Any) -> Any:
        given: list[Any] = [(v, v) if isinstance(v, int) else tuple(v) for v in settings[:3]]
        layer = Layer(self.linear, *given, *settings[3:])
        return _Keeping.apply(x, weight, bias, layer, self)  # type: ignore[no-untyped-call]


class _Keeping(torch.autograd.Function):
    """A layer that keeps its input through a codec."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, layer: Layer, site: _Coded) -> Tensor:
        y = layer.apply(x, weight, bias)
        begin = time.perf_counter()
        kept = site.codec.encode(site.key, x, layer)
        watch = site.watch
        watch.seconds += time.perf_counter() - begin
        if watch.looking:
            shown = site.codec.decode(kept, x.shape)
            watch.energies[site.key] = 1.0 - float((x - shown).square().sum() / x.square().sum())
            watch.shapes[site.key] = [list(tensor.shape) for tensor in kept]
        ctx.save_for_backward(weight, *kept)
        ctx.layer, ctx.codec, ctx.shape = layer, site.codec, x.shape
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        weight, *kept = ctx.saved_tensors
        layer, codec = ctx.layer, ctx.codec
        dx = codec.input_gradient(layer, ctx.shape, weight, dy) if ctx.needs_input_grad[0] else None
        dw = codec.weight_gradient(layer, tuple(kept), weight.shape, dy)
        db = None
        if ctx.needs_input_grad[2]:
            db = dy.flatten(0, -2).sum(0) if layer.linear else dy.sum((0, 2, 3))
        return dx, dw, db, None, None


class _Exact:
    """The gradient of the input is the ordinary one: no error travels."""

    def input_gradient(self, layer: Layer, x: torch.Size, weight: Tensor, dy: Tensor) -> Tensor:
        return layer.input_gradient(x, weight, dy)


class _Tucker(_Exact):
    """A core and a factor [extent, rank] of every mode; the weight's gradient from these (HOSVD paper, eq. 18-24)."""

    def decode(self, kept: tuple[Tensor, ...], shape: torch.Size) -> Tensor:
        core, *factors = kept
        for mode, factor in enumerate(factors):
            core = _times(core, factor, mode)
        return core

    def weight_gradient(self, layer: Layer, kept: tuple[Tensor, ...], shape: torch.Size, dy: Tensor) -> Tensor:
        core, *factors = kept
        if layer.linear:
            for mode, factor in enumerate(factors[:-1]):
                dy = _times(dy, factor.T, mode)
            return layer.weight_gradient(core, shape, dy) @ factors[-1].T
        if layer.groups > 1:  # not in the paper; the factors of the channels do not fall apart into groups
            whole = torch.Size(factor.shape[0] for factor in factors)
            return layer.weight_gradient(self.decode(kept, whole), shape, dy)
        batch, channels, *positions = factors
        for mode, factor in enumerate(positions, start=2):
            core = _times(core, factor, mode)
        narrow = torch.Size((shape[0], core.shape[1], *shape[2:]))
        taps = layer.weight_gradient(core, narrow, _times(dy, batch.T, 0))
        return _times(taps, channels, 1)


class Hosvd(_Tucker):
    """The published method: in every step the singular vectors of every unfolding of every input (eq. 6-8).

    Of each mode as many as hold ``epsilon`` of the energy; the core is the input projected on them.
    """

    def __init__(self, epsilon: float) -> None:
        self.epsilon = epsilon

    def encode(self, key: str, x: Tensor, layer: Layer) -> tuple[Tensor, ...]:
        core, factors = x, []
        for mode in range(x.ndim):
            vectors, values, _ = torch.linalg.svd(_unfolded(x, mode), full_matrices=False)
            energy = values.square().cumsum(0)
            rank = int((energy < self.epsilon * energy[-1]).sum()) + 1
            factors.append(vectors[:, : min(rank, vectors.shape[1])].contiguous())
            core = _times(core, factors[-1].T, mode)
        return (core.contiguous(), *factors)


class Asi(_Tucker):
    """One step of subspace iteration per mode, from the factor of the step before ("ASI").

    ``ranks``: by layer, of every mode.
    """

    def __init__(self, ranks: Mapping[str, tuple[int, ...]]) -> None:
        self._ranks, self._before = dict(ranks), dict[tuple[str, int], Tensor]()

    def encode(self, key: str, x: Tensor, layer: Layer) -> tuple[Tensor, ...]:
        core, factors = x, []
        for mode, rank in enumerate(self._ranks[key]):
            unfolding = _unfolded(x, mode)
            before = self._before.get((key, mode))
            if before is None or before.shape != (x.shape[mode], min(rank, x.shape[mode])):
                generator = torch.Generator().manual_seed(mode)
                before = torch.randn(x.shape[mode], min(rank, x.shape[mode]), generator=generator, dtype=x.dtype)
            factor, _ = torch.linalg.qr(unfolding @ (unfolding.T @ before))
            self._before[key, mode] = factor
            factors.append(factor)
            core = _times(core, factor.T, mode)
        return (core.contiguous(), *factors)


class GradientFilter:
    """Yang, Li, Marculescu, "Efficient On-device Training via Gradient Filtering", 2023: of every patch of ``size`` x
    ``size`` output positions the sum of the gradient, and of the patch of the input under it the mean.

    Within a patch both count as constant, so all taps of a kernel have the same gradient, and dX is made from the sums
    of the kernels over their taps: its error does travel. For convolutions alone.
    """

    def __init__(self, size: int) -> None:
        self.size = size

    def encode(self, key: str, x: Tensor, layer: Layer) -> tuple[Tensor, ...]:
        spans = [self.size * stride for stride in layer.stride]
        return (functional.avg_pool2d(x, spans, ceil_mode=True, count_include_pad=False),)

    def decode(self, kept: tuple[Tensor, ...], shape: torch.Size) -> Tensor:
        spans = [-(-extent // patches) for extent, patches in zip(shape[2:], kept[0].shape[2:], strict=True)]
        return _repeated(kept[0], spans, shape)

    def weight_gradient(self, layer: Layer, kept: tuple[Tensor, ...], shape: torch.Size, dy: Tensor) -> Tensor:
        sums = self._sums(dy)
        means = kept[0]
        if means.shape[2:] != sums.shape[2:]:  # a convolution without padding has fewer positions behind it
            means = functional.adaptive_avg_pool2d(means, (sums.shape[2], sums.shape[3]))
        point = Layer(False, groups=layer.groups)
        return point.weight_gradient(means, torch.Size((*shape[:2], 1, 1)), sums).expand(shape).contiguous()

    def input_gradient(self, layer: Layer, x: torch.Size, weight: Tensor, dy: Tensor) -> Tensor:
        sums, point = self._sums(dy), Layer(False, groups=layer.groups)
        narrow = torch.Size((*x[:2], *sums.shape[2:]))
        patches = point.input_gradient(narrow, weight.sum((2, 3), keepdim=True), sums)
        spans = [-(-extent // count) for extent, count in zip(x[2:], sums.shape[2:], strict=True)]
        return _repeated(patches, spans, x) / (spans[0] * spans[1])

    def _sums(self, dy: Tensor) -> Tensor:
        return functional.avg_pool2d(dy, self.size, ceil_mode=True, divisor_override=1)


def _repeated(x: Tensor, spans: list[int], shape: torch.Size) -> Tensor:
    """Return every position of ``x`` as often as ``spans`` says along h and w, cut to ``shape``."""
    b, c, h, w = x.shape
    wide = x[:, :, :, None, :, None].expand(b, c, h, spans[0], w, spans[1]).reshape(b, c, h * spans[0], w * spans[1])
    return wide[:, :, : shape[2], : shape[3]]


def _unfolded(x: Tensor, mode: int) -> Tensor:
    return x.movedim(mode, 0).flatten(1)


def _times(x: Tensor, matrix: Tensor, mode: int) -> Tensor:
    """Return the product of ``x`` with ``matrix`` [new, old] along ``mode``."""
    product: Tensor = torch.tensordot(x, matrix, ([mode], [1]))
    return product.movedim(-1, mode)
