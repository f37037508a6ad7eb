"""The wire format of Protocol Buffers, as far as ONNX files need it: the device has no onnx package.

A message is a row of fields, each a key (number and wire type) and a value. Two messages one after the other are their
merge: single fields of the second count, repeated ones are joined, messages inside are merged in the same way.
Numbers of fields are those of onnx.proto. Knows bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from edgetune.errors import BundleError

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
MODEL_GRAPH, MODEL_METADATA = 7, 14
GRAPH_NODE, GRAPH_INITIALIZER, GRAPH_INPUT, GRAPH_OUTPUT, GRAPH_VALUE_INFO = 1, 5, 11, 12, 13
NODE_INPUT, NODE_OUTPUT = 1, 2
TENSOR_DIMS, TENSOR_TYPE, TENSOR_NAME, TENSOR_RAW = 1, 2, 8, 9
VALUE_NAME, VALUE_TYPE = 1, 2
ENTRY_KEY, ENTRY_VALUE = 1, 2
ELEMENT_TYPES = {  # onnx.TensorProto.DataType
    "float32": 1, "uint8": 2, "int8": 3, "uint16": 4, "int16": 5, "int32": 6, "int64": 7, "bool": 9, "float16": 10,
    "float64": 11, "uint32": 12, "uint64": 13,
}  # fmt: skip
_NOT_ONNX = "a graph of the bundle is no ONNX file; copy or export the bundle again"
_SHORT = "a graph of the bundle ends too early; copy or export the bundle again"


def fields(message: bytes) -> Iterator[tuple[int, int, bytes, bytes]]:
    """Yield (number, wire type, content, the field as it stands) of every field of ``message``.

    Raises:
        BundleError: it is no such message, or ends too early.
    """
    place = 0
    while place < len(message):
        begin = place
        key, place = _varint(message, place)
        number, kind = key >> 3, key & 7
        if kind == VARINT:
            start = place
            _, place = _varint(message, place)
        elif kind == BYTES:
            length, place = _varint(message, place)
            start, place = place, place + length
        elif kind in (FIXED64, FIXED32):
            start, place = place, place + (8 if kind == FIXED64 else 4)
        else:
            raise BundleError(_NOT_ONNX)
        if place > len(message):
            raise BundleError(_SHORT)
        yield number, kind, message[start:place], message[begin:place]


def _varint(message: bytes, place: int) -> tuple[int, int]:
    """Return the number that stands at ``place``, seven bits a byte, and where the next field begins."""
    value = shift = 0
    while True:
        if place >= len(message) or shift > 63:
            raise BundleError(_SHORT)
        byte = message[place]
        value |= (byte & 0x7F) << shift
        place, shift = place + 1, shift + 7
        if byte < 0x80:
            return value, place


def as_varint(value: int) -> bytes:
    """Return ``value`` (not negative) as it stands in a message."""
    digits = bytearray()
    while value > 0x7F:
        digits.append(value & 0x7F | 0x80)
        value >>= 7
    digits.append(value)
    return bytes(digits)


def head(number: int, length: int) -> bytes:
    """Return what stands before the content of a field of ``length`` bytes."""
    return as_varint(number << 3 | BYTES) + as_varint(length)


def message(number: int, content: bytes) -> bytes:
    """Return a field that holds bytes: a text, or a message."""
    return head(number, len(content)) + content


def number(field: int, value: int) -> bytes:
    """Return a field that holds a number."""
    return as_varint(field << 3 | VARINT) + as_varint(value)


def text(content: bytes, field: int) -> str:
    """Return the text in ``field`` of a message, empty where there is none."""
    return next((value.decode() for number, _, value, _ in fields(content) if number == field), "")


class FieldPlace(NamedTuple):
    """One field of a file: its content is ``length`` bytes from ``offset`` on; ``value`` is a number's."""

    number: int
    offset: int
    length: int
    value: int


def fields_in(stream: BinaryIO, begin: int, end: int) -> Iterator[FieldPlace]:
    """Yield the fields of the message that lies in ``stream`` from ``begin`` to ``end``; no content is read.

    Raises:
        ValueError: it is no such message, or ends too early.
    """
    place = begin
    while place < end:
        stream.seek(place)
        key, value = _read_varint(stream), 0
        kind = key & 7
        if kind == VARINT:
            offset = stream.tell()
            value = _read_varint(stream)
            length = stream.tell() - offset
        elif kind == BYTES:
            length = _read_varint(stream)
            offset = stream.tell()
        elif kind in (FIXED64, FIXED32):
            offset, length = stream.tell(), 8 if kind == FIXED64 else 4
        else:
            raise ValueError(f"a field of the unknown kind {kind} at {place}")
        place = offset + length
        if place > end:
            raise ValueError(f"it ends within the field at {offset}")
        yield FieldPlace(key >> 3, offset, length, value)


def _read_varint(stream: BinaryIO) -> int:
    value = shift = 0
    while True:
        byte = stream.read(1)
        if not byte or shift > 63:
            raise ValueError("it ends too early")
        value |= (byte[0] & 0x7F) << shift
        shift += 7
        if byte[0] < 0x80:
            return value
