"""A model for a runtime, cut out of an ONNX file without the package onnx: some of its nodes, under other names.

Choosing nodes means copying most fields of the file as they are and leaving some out, so no more than the wire format
and the numbers of a few fields is needed (``wire``). Knows bytes.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from edgetune.engines import wire
from edgetune.errors import BundleError


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
    for number, kind, value, whole in wire.fields(model):
        if number != wire.MODEL_GRAPH or kind != wire.BYTES:
            pieces.append(whole)
            continue
        inside, index = [], -1
        for number, _, content, piece in wire.fields(value):
            if number == wire.GRAPH_NODE:
                index += 1
                if index in kept:
                    inside.append(wire.message(wire.GRAPH_NODE, _rename(content, renamed, absent)))
            elif number == wire.GRAPH_INITIALIZER:
                if wire.text(content, wire.TENSOR_NAME) in constants:
                    inside.append(piece)
            elif number not in (wire.GRAPH_INPUT, wire.GRAPH_OUTPUT, wire.GRAPH_VALUE_INFO):
                inside.append(piece)
        inside += [wire.message(wire.GRAPH_INPUT, _port(port)) for port in inputs]
        inside += [wire.message(wire.GRAPH_OUTPUT, _port(port)) for port in outputs]
        pieces.append(wire.message(wire.MODEL_GRAPH, b"".join(inside)))
    return b"".join(pieces)


def _rename(node: bytes, renamed: Mapping[str, str], absent: Collection[str]) -> bytes:
    pieces = []
    for number, _, content, whole in wire.fields(node):
        if number in (wire.NODE_INPUT, wire.NODE_OUTPUT):
            name = content.decode()
            if number == wire.NODE_INPUT and name in absent:
                continue
            pieces.append(wire.message(number, renamed.get(name, name).encode()))
        else:
            pieces.append(whole)
    return b"".join(pieces)


def _port(port: Port) -> bytes:
    """Return a ValueInfoProto: name, and type (tensor: element type, shape: extents by value or by name)."""
    if port.dtype not in wire.ELEMENT_TYPES:
        raise BundleError(f"'{port.name}' is of the type {port.dtype}, which no graph of a bundle has; export it again")
    extents = (wire.number(1, int(e)) if e.isdigit() else wire.message(2, e.encode()) for e in port.shape)
    shape = b"".join(wire.message(1, extent) for extent in extents)
    tensor = wire.number(1, wire.ELEMENT_TYPES[port.dtype]) + wire.message(2, shape)
    return wire.message(wire.VALUE_NAME, port.name.encode()) + wire.message(wire.VALUE_TYPE, wire.message(1, tensor))
