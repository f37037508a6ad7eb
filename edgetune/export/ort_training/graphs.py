"""Several flat graphs as one: joined, equal nodes merged where asked, cut down to what the wanted outputs need.

Knows onnx protos and nothing of what they compute.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import onnx
from onnx import helper

from edgetune.autodiff.builder import IR_VERSION, OPSET
from edgetune.export.symbolic import reads

MICROSOFT = "com.microsoft"


class Joined:
    """Nodes and initializers of several graphs in one name space.

    A graph's input takes what an earlier graph made under that name. All other names are kept where they are free, and
    changed where they are not. Equal initializers (the same data, or the same place in the same file) become one.
    """

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, onnx.TensorProto] = {}
        self._taken: set[str] = set()
        self._constants: dict[bytes, str] = {}
        self._made: dict[object, Sequence[str]] = {}

    def fresh(self, name: str) -> str:
        """Return ``name``, or a variant of it that no value has yet, and take it."""
        found, number = name, 1
        while found in self._taken:
            number += 1
            found = f"{name}.{number}"
        self._taken.add(found)
        return found

    def reserve(self, names: Iterable[str]) -> None:
        """Take ``names``: values that come from outside under exactly these names."""
        self._taken.update(names)

    def add(
        self, graph: onnx.GraphProto, given: Mapping[str, str] | None = None, *, merge_equal: bool = False
    ) -> dict[str, str]:
        """Append a graph; return where each of its outputs is now.

        Args:
            given: for inputs of the graph, the value to read instead of the one of the same name.
            merge_equal: leave out nodes that compute what a node here computes already. Never for a graph that
                computes something twice on purpose, to hold it for a shorter time.
        """
        names = {value.name: value.name for value in graph.input} | dict(given or {})
        for tensor in graph.initializer:
            names[tensor.name] = self._constant(tensor)
        for node in graph.node:
            copy = renamed(node, names)
            key = _identity(copy)
            known = self._made.get(key, ())
            if merge_equal and len(known) >= len(node.output):
                names.update(zip(node.output, known, strict=False))
                continue
            copy.output[:] = [self.fresh(name) if name else "" for name in node.output]
            copy.name = copy.output[0]
            names.update(zip(node.output, copy.output, strict=True))
            self.nodes.append(copy)
            self._made[key] = list(copy.output)
        return {value.name: names[value.name] for value in graph.output}

    def op(self, op_type: str, inputs: Sequence[str], output: str, domain: str = "", **attributes: Any) -> str:
        """Append one node; return the name of its output, ``output`` where that is free."""
        made = self.fresh(output)
        self.nodes.append(helper.make_node(op_type, list(inputs), [made], name=made, domain=domain, **attributes))
        return made

    def expose(self, wanted: Mapping[str, str]) -> None:
        """Give values the names by which they are known outside: ``wanted`` maps reserved names to present ones."""
        made = {name for node in self.nodes for name in node.output}
        names: dict[str, str] = {}
        copies = []
        for final, present in wanted.items():
            if present in made and present not in names:
                names[present] = final
            else:  # an input, or known by another name already
                copies.append(helper.make_node("Identity", [present], [final], name=final))
        self.nodes = [renamed(node, names) for node in self.nodes + copies]
        for node in self.nodes:
            node.output[:] = [names.get(name, name) for name in node.output]

    def constant(self, tensor: onnx.TensorProto) -> str:
        """Add an initializer; return its name."""
        return self._constant(tensor)

    def _constant(self, tensor: onnx.TensorProto) -> str:
        anonymous = onnx.TensorProto()
        anonymous.CopyFrom(tensor)
        anonymous.name = ""
        key = anonymous.SerializeToString(deterministic=True)
        if key not in self._constants:
            anonymous.name = self.fresh(tensor.name)
            self.initializers[anonymous.name] = anonymous
            self._constants[key] = anonymous.name
        return self._constants[key]

    def keep_only(self, wanted: Iterable[str]) -> None:
        """Drop every node and initializer that ``wanted`` values do not depend on."""
        needed = set(wanted)
        kept = []
        for node in reversed(self.nodes):
            if needed.intersection(node.output):
                needed.update(reads(node))
                kept.append(node)
        self.nodes = kept[::-1]
        self.initializers = {name: tensor for name, tensor in self.initializers.items() if name in needed}

    def model(
        self, name: str, inputs: Sequence[onnx.ValueInfoProto], outputs: Sequence[onnx.ValueInfoProto]
    ) -> onnx.ModelProto:
        """Return everything as a model."""
        graph = helper.make_graph(self.nodes, name, inputs, outputs, list(self.initializers.values()))
        return make_model(graph)


def make_model(graph: onnx.GraphProto) -> onnx.ModelProto:
    """Return ``graph`` as a model of the opset and IR version that onnxruntime-training 1.19 reads."""
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(MICROSOFT, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="edgetune")


def renamed(node: onnx.NodeProto, names: Mapping[str, str]) -> onnx.NodeProto:
    """Return a copy of ``node`` that reads by the new names, inside its subgraphs too."""
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    copy.input[:] = [names.get(name, name) for name in node.input]
    for attribute in copy.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            body = attribute.g
            own = {value.name for value in [*body.input, *body.initializer]}
            own |= {name for inner in body.node for name in inner.output}
            visible = {old: new for old, new in names.items() if old not in own}
            changed = [renamed(inner, visible) for inner in body.node]
            del body.node[:]
            body.node.extend(changed)
    return copy


def _identity(node: onnx.NodeProto) -> object:
    """Return what two nodes have in common exactly if they compute the same."""
    attributes = sorted(a.SerializeToString(deterministic=True) for a in node.attribute)
    return node.domain, node.op_type, tuple(node.input), tuple(attributes)
