"""What one operator of the torch engine is: a kernel, and the call that it gets. Knows torch and ONNX's element types.

A kernel maps a :class:`Call` and its input tensors (None where an optional input is left out) to one tensor, or to a
tuple with one per output. It never changes an input. Unless its operator is in ``ALIASING``, what it returns is memory
of its own; a test holds every kernel to that, because in-place execution and freed memory rest on it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from onnx import TensorProto, helper
from torch import Tensor

from edgetune.errors import EngineError, choices

Kernel = Callable[..., "Tensor | tuple[Tensor, ...]"]

_TYPES: dict[int, torch.dtype] = {
    TensorProto.BOOL: torch.bool,
    TensorProto.UINT8: torch.uint8,
    TensorProto.INT8: torch.int8,
    TensorProto.INT16: torch.int16,
    TensorProto.INT32: torch.int32,
    TensorProto.INT64: torch.int64,
    TensorProto.FLOAT16: torch.float16,
    TensorProto.FLOAT: torch.float32,
    TensorProto.DOUBLE: torch.float64,
}
ELEMENT_TYPES = frozenset(_TYPES)

# Operators whose result may lie in the memory of their first input.
ALIASING = frozenset(
    {"Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity", "Transpose", "Expand", "Cast", "CastLike", "Dropout"}
)


def torch_type(code: int, *, double: bool = False) -> torch.dtype:
    """Return torch's element type for an ONNX ``code``; with ``double``, float64 in the place of float32.

    Raises:
        EngineError: torch has none that its operators know.
    """
    if code not in _TYPES:
        names = choices(_type_name(known) for known in _TYPES)
        raise EngineError(f"the torch engine has no element type {_type_name(code)}; it has: {names}")
    return torch.float64 if double and code == TensorProto.FLOAT else _TYPES[code]


def _type_name(code: int) -> str:
    return str(helper.tensor_dtype_to_string(code)).removeprefix("TensorProto.")


@dataclass(frozen=True)
class Call:
    """One node, as its kernel sees it.

    Attributes:
        opset: version of the operator set that its graph imports; it decides what some operators mean.
        attributes: Python values; a tensor is a ``torch.Tensor``, a subgraph whatever its operator runs.
        outputs: how many outputs are wanted, up to the last one that has a name.
        host: per input, the value of a small constant as Python numbers; None for all that is known only at run time.
        double: float64 stands in the place of float32.
        device: where new tensors are made.
    """

    op: str
    name: str
    opset: int
    attributes: Mapping[str, Any]
    outputs: int
    host: tuple[Any, ...] = ()
    double: bool = False
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def get(self, name: str, default: Any = None) -> Any:
        """Return an attribute."""
        return self.attributes.get(name, default)

    def numbers(self, index: int, value: Tensor | None) -> Any:
        """Return input ``index`` as Python numbers (a list, or one number if it has no axis); None if left out."""
        if index < len(self.host) and self.host[index] is not None:
            return self.host[index]
        return None if value is None else value.tolist()

    def listed(self, index: int, value: Tensor | None) -> list[Any] | None:
        """Return input ``index`` as a flat list; None if left out."""
        found = self.numbers(index, value)
        return found if found is None or isinstance(found, list) else [found]

    def type_of(self, code: int) -> torch.dtype:
        """Return torch's element type for an ONNX ``code``."""
        return torch_type(code, double=self.double)


def same_padding(extents: Sequence[int], kernel: Sequence[int], strides: Sequence[int], *, upper: bool) -> list[int]:
    """Return pads [begin..., end...] of ``auto_pad`` SAME: the output has ceil(extent / stride) positions.

    ``kernel`` are the extents of the dilated windows; with ``upper`` an odd rest goes to the end.
    """
    totals = [max((-(-n // s) - 1) * s + k - n, 0) for n, k, s in zip(extents, kernel, strides, strict=True)]
    small, large = [t // 2 for t in totals], [t - t // 2 for t in totals]
    return [*small, *large] if upper else [*large, *small]


def spatial_padding(
    n: Call, extents: Sequence[int], kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int]
) -> list[int]:
    """Return pads [begin..., end...] of a convolution or pooling node over an input of ``extents``."""
    mode = n.get("auto_pad", "NOTSET")
    if mode == "NOTSET":
        return list(n.get("pads", [0] * (2 * len(kernel))))
    if mode == "VALID":
        return [0] * (2 * len(kernel))
    windows = [d * (k - 1) + 1 for k, d in zip(kernel, dilations, strict=True)]
    return same_padding(extents, windows, strides, upper=mode == "SAME_UPPER")


def pad_spatial(x: Tensor, begin: Sequence[int], end: Sequence[int], value: float = 0.0) -> Tensor:
    """Return ``x`` with its last axes padded; negative numbers cut. Where all are 0, ``x`` itself."""
    if not any(begin) and not any(end):
        return x
    pairs = [side for pair in zip(reversed(begin), reversed(end), strict=True) for side in pair]
    return torch.nn.functional.pad(x, pairs, value=value)


def broadcast(*shapes: Sequence[int]) -> list[int]:
    """Return the shape that ``shapes`` broadcast to; where they do not, torch's operator will say so."""
    rank = max(len(shape) for shape in shapes)
    padded = [[1] * (rank - len(shape)) + list(shape) for shape in shapes]
    return [next((extent for extent in column if extent != 1), 1) for column in zip(*padded, strict=True)]


def owned(result: Tensor, *inputs: Tensor | None) -> Tensor:
    """Return ``result``, copied if it lies in the memory of one of ``inputs``."""
    memory = result.untyped_storage().data_ptr()
    shared = any(x is not None and x.untyped_storage().data_ptr() == memory for x in inputs)
    return result.clone(memory_format=torch.contiguous_format) if shared else result
