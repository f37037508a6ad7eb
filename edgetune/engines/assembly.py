"""A model for a runtime, cut out of an ONNX file without the package onnx: some of its nodes, under other names.

An ONNX file is a message of Protocol Buffers: fields, each a key (number and wire type) and a value. Choosing nodes
means copying most fields as they are and leaving some out, so no more than the wire format and the numbers of a few
fields (onnx.proto) is needed. Knows bytes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from edgetune.errors import BundleError

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_MODEL_GRAPH = 7
_GRAPH_NODE, _GRAPH_INITIALIZER, _GRAPH_INPUT, _GRAPH_OUTPUT, _GRAPH_VALUE_INFO = 1, 5, 11, 12, 13
_NODE_INPUT, _NODE_OUTPUT = 1, 2
_TENSOR_NAME, _VALUE_NAME, _VALUE_TYPE = 8, 1, 2
_ELEMENT_TYPES = {  # onnx.TensorProto.DataType
    "float32": 1, "uint8": 2, "int8": 3, "uint16": 4, "int16": 5, "int32": 6, "int64": 7, "bool": 9, "float16": 10,
    "float64": 11, "uint32": 12, "uint64": 13,
}  # fmt: skip


@dataclass(frozen=True)
class Port:
    """An input or output of a model: its name, numpy element type, and extents (an integer or the name of a symbol)."""

    name: str
    dtype: str
    shape: tuple[str, ...]


def assemble(
    model: bytes,
    nodes: Collection[int],
    renamed: Mapping[str, str],
    inputs: Sequence[Port],
    outputs: Sequence[Port],
    constants: Collection[str],
    absent: Collection[str] = (),
) -> bytes:
    """Return the model that consists of the nodes with these indices, in their order.

    Args:
        model: an ONNX file whose nodes have no subgraph that reads a tensor which is renamed.
        renamed: new names for what nodes read and make.
        constants: names of the initializers to keep.
        absent: tensors that are not there any more: whatever reads them (a Sum) does so no longer.

    Raises:
        BundleError: ``model`` is not an ONNX file.
    """
    kept = frozenset(nodes)
    pieces = []
    for number, kind, value, whole in _fields(model):
        if number != _MODEL_GRAPH or kind != _BYTES:
            pieces.append(whole)
            continue
        inside, index = [], -1
        for number, _, content, piece in _fields(value):
            if number == _GRAPH_NODE:
                index += 1
                if index in kept:
                    inside.append(_message(_GRAPH_NODE, _rename(content, renamed, absent)))
            elif number == _GRAPH_INITIALIZER:
                if _text(content, _TENSOR_NAME) in constants:
                    inside.append(piece)
            elif number not in (_GRAPH_INPUT, _GRAPH_OUTPUT, _GRAPH_VALUE_INFO):
                inside.append(piece)
        inside += [_message(_GRAPH_INPUT, _port(port)) for port in inputs]
        inside += [_message(_GRAPH_OUTPUT, _port(port)) for port in outputs]
        pieces.append(_message(_MODEL_GRAPH, b"".join(inside)))
    return b"".join(pieces)


def _fields(message: bytes) -> Iterator[tuple[int, int, bytes, bytes]]:
    """Yield (number, wire type, content, the field as it stands) of every field of ``message``."""
    place = 0
    while place < len(message):
        begin = place
        key, place = _varint(message, place)
        number, kind = key >> 3, key & 7
        if kind == _VARINT:
            start = place
            _, place = _varint(message, place)
        elif kind == _BYTES:
            length, place = _varint(message, place)
            start, place = place, place + length
        elif kind in (_FIXED64, _FIXED32):
            start, place = place, place + (8 if kind == _FIXED64 else 4)
        else:
            raise BundleError("a graph of the bundle is no ONNX file; copy or export the bundle again")
        if place > len(message):
            raise BundleError("a graph of the bundle ends too early; copy or export the bundle again")
        yield number, kind, message[start:place], message[begin:place]


def _varint(message: bytes, place: int) -> tuple[int, int]:
    """Return the number that stands at ``place``, seven bits a byte, and where the next field begins."""
    value = shift = 0
    while True:
        if place >= len(message) or shift > 63:
            raise BundleError("a graph of the bundle ends too early; copy or export the bundle again")
        byte = message[place]
        value |= (byte & 0x7F) << shift
        place, shift = place + 1, shift + 7
        if byte < 0x80:
            return value, place


def _as_varint(value: int) -> bytes:
    digits = bytearray()
    while value > 0x7F:
        digits.append(value & 0x7F | 0x80)
        value >>= 7
    digits.append(value)
    return bytes(digits)


def _message(number: int, content: bytes) -> bytes:
    return _as_varint(number << 3 | _BYTES) + _as_varint(len(content)) + content


def _number(number: int, value: int) -> bytes:
    return _as_varint(number << 3 | _VARINT) + _as_varint(value)


def _text(message: bytes, field: int) -> str:
    return next((content.decode() for number, _, content, _ in _fields(message) if number == field), "")


def _rename(node: bytes, renamed: Mapping[str, str], absent: Collection[str]) -> bytes:
    pieces = []
    for number, _, content, whole in _fields(node):
        if number in (_NODE_INPUT, _NODE_OUTPUT):
            name = content.decode()
            if number == _NODE_INPUT and name in absent:
                continue
            pieces.append(_message(number, renamed.get(name, name).encode()))
        else:
            pieces.append(whole)
    return b"".join(pieces)


def _port(port: Port) -> bytes:
    """Return a ValueInfoProto: name, and type (tensor: element type, shape: extents by value or by name)."""
    if port.dtype not in _ELEMENT_TYPES:
        raise BundleError(f"'{port.name}' is of the type {port.dtype}, which no graph of a bundle has; export it again")
    extents = (_number(1, int(e)) if e.isdigit() else _message(2, e.encode()) for e in port.shape)
    shape = b"".join(_message(1, extent) for extent in extents)
    tensor = _number(1, _ELEMENT_TYPES[port.dtype]) + _message(2, shape)
    return _message(_VALUE_NAME, port.name.encode()) + _message(_VALUE_TYPE, _message(1, tensor))
