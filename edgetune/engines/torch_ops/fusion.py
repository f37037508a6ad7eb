"""Pairs of nodes that run as one where the first result is read by the second alone: no tensor in between.

Knows torch and onnx.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence

import torch
from onnx import AttributeProto, NodeProto, helper
from torch import Tensor

from edgetune.engines.torch_ops.arena import empty
from edgetune.engines.torch_ops.base import Call, Kernel, broadcast

DOMAIN = "edgetune.fused"
_PIECE_ELEMENTS = 1 << 18


def fuse(nodes: Sequence[NodeProto], wanted: Collection[str], numbers: Collection[str]) -> list[NodeProto]:
    """Return ``nodes``, those that follow each other directly fused: Cast, Mul as MulCast, and the product with one of
    ``numbers`` (inputs without axes) and Add or Sub as AddMul or SubMul. What is ``wanted`` is still made.
    """
    reads = Counter(_read(nodes))
    result: list[NodeProto] = []
    for node in nodes:
        first = result[-1] if result else None
        made = None
        if first is not None and reads[first.output[0]] == 1 and first.output[0] not in wanted:
            made = _fused(first, node, numbers)
        if made is not None:
            result.pop()
        result.append(node if made is None else made)
    return result


def _fused(first: NodeProto, second: NodeProto, numbers: Collection[str]) -> NodeProto | None:
    """Return one node in the place of two; None if there is none for them."""
    if first.domain or second.domain or len(second.input) != 2 or first.output[0] not in second.input:
        return None
    place = list(second.input).index(first.output[0])
    pair = (first.op_type, second.op_type)
    if pair == ("Cast", "Mul"):
        kind = "MulCast"
    elif pair in (("Mul", "Add"), ("Mul", "Sub")) and any(name in numbers for name in first.input):
        if pair[1] == "Sub" and place == 0:
            return None
        kind = f"{pair[1]}Mul"
    else:
        return None
    names = [second.input[1 - place], *first.input]
    made = helper.make_node(kind, names, second.output, second.name, domain=DOMAIN)
    made.attribute.extend(first.attribute)
    return made


def _read(nodes: Iterable[NodeProto]) -> Iterable[str]:
    """Yield every name that is read, in subgraphs too."""
    for node in nodes:
        yield from node.input
        for attribute in node.attribute:
            if attribute.type == AttributeProto.GRAPH:
                yield from _read(attribute.g.node)
                yield from (value.name for value in attribute.g.output)


def _mul_cast(n: Call, x: Tensor, mask: Tensor, *, over: bool = False) -> Tensor:
    """Return x · cast(mask); with ``over`` it may be written over ``x``. A mask is cast a few samples at a time."""
    dtype = n.type_of(n.get("to"))
    if mask.dtype != torch.bool or x.shape != mask.shape or x.dtype != dtype or not x.ndim:
        return torch.mul(x, mask.to(dtype))
    out = x if over and x.is_contiguous() else empty(x.shape, x.dtype, x.device)
    samples = len(x) if x.device.type != "cpu" else max(_PIECE_ELEMENTS * len(x) // max(x.numel(), 1), 1)
    pieces = (torch.split(t, samples) for t in (x, mask, out))
    for source, inside, target in zip(*pieces, strict=True):
        torch.mul(source, inside.to(dtype), out=target)
    return out


def _add_mul(sign: int, x: Tensor, a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """Write x ± a·b to ``out``, which may be one of them."""
    if a.ndim == 0:
        a, b = b, a
    if b.ndim == 0 and b.device.type == "cpu":
        return torch.add(x, a, alpha=sign * b.item(), out=out)
    return torch.addcmul(x, a, b, value=sign, out=out)


def _sum_with_product(sign: int) -> Kernel:
    def kernel(n: Call, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return _add_mul(sign, x, a, b, empty(broadcast(x.shape, a.shape, b.shape), x.dtype, x.device))

    return kernel


KERNELS: dict[str, Kernel] = {"AddMul": _sum_with_product(1), "MulCast": _mul_cast, "SubMul": _sum_with_product(-1)}
# Written over the first input.
IN_PLACE: dict[str, Kernel] = {"MulCast": lambda n, *x: _mul_cast(n, *x, over=True)}
# Written to a buffer that may be one of the inputs.
INTO: dict[str, Callable[..., Tensor]] = {
    "AddMul": lambda x, a, b, out: _add_mul(1, x, a, b, out),
    "SubMul": lambda x, a, b, out: _add_mul(-1, x, a, b, out),
}
