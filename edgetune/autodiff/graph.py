"""A canonical forward graph with static shapes: what rules see. Knows onnx; knows nothing of training.

Every tensor has one dynamic axis at most, and it is the batch; its extent is a multiple of the batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import onnx
from onnx import helper

from edgetune.codecs.base import Array

BATCH = "batch"


@dataclass(frozen=True)
class Node:
    """One operator: names of its inputs and outputs ("" where an optional one is absent) and its attributes."""

    op: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]

    @staticmethod
    def from_proto(proto: onnx.NodeProto) -> Node:
        """Return the node that ``proto`` describes, strings decoded."""
        attributes = {a.name: helper.get_attribute_value(a) for a in proto.attribute}
        decoded = {k: v.decode() if isinstance(v, bytes) else v for k, v in attributes.items()}
        return Node(proto.op_type, proto.name, tuple(proto.input), tuple(proto.output), decoded)

    def to_proto(self) -> onnx.NodeProto:
        """Return the node as a protocol buffer."""
        return helper.make_node(self.op, list(self.inputs), list(self.outputs), name=self.name, **self.attributes)

    def input(self, index: int) -> str:
        """Return the name of input ``index``, "" if it is absent."""
        return self.inputs[index] if index < len(self.inputs) else ""


@dataclass
class ForwardGraph:
    """A model as a list of nodes in execution order.

    Attributes:
        outputs: the one that the loss is computed from comes first; ``output_names`` are the model's names for them.
        constants: weights and other constants by name.
        shapes: per tensor its extents; the batch axis holds 0 (its true extent is the batch) or -k (k times the batch),
            constants their own.
        dtypes: ONNX element types.
        parameters: names of the constants that may be trained.
        targets: the inputs that only a traced loss reads.
        loss: the scalar that a traced loss makes; it is no output of the model.
    """

    nodes: list[Node]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    constants: dict[str, Array]
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, int] = field(default_factory=dict)
    parameters: frozenset[str] = frozenset()
    targets: tuple[str, ...] = ()
    loss: str | None = None
    output_names: tuple[str, ...] = ()

    @property
    def wanted(self) -> tuple[str, ...]:
        """All that the graph is for: the outputs, and the traced loss."""
        return self.outputs if self.loss is None else (*self.outputs, self.loss)

    @property
    def goal(self) -> str:
        """What gradients start from: the traced loss, or else the output that a loss is computed from."""
        return self.outputs[0] if self.loss is None else self.loss

    def consumers(self) -> dict[str, list[Node]]:
        """Return, per tensor, the nodes that read it, in order."""
        readers: dict[str, list[Node]] = {}
        for node in self.nodes:
            for name in dict.fromkeys(node.inputs):
                if name:
                    readers.setdefault(name, []).append(node)
        return readers

    def sample_shape(self, tensor: str) -> tuple[int, ...]:
        """Return the extents of ``tensor`` without its leading batch axis."""
        shape = self.shapes[tensor]
        if not shape or shape[0] != 0 or 0 in shape[1:]:
            raise ValueError(f"'{tensor}' has the shape {shape}, whose batch axis does not lead")
        return shape[1:]

    def per_sample(self, tensor: str) -> tuple[int, ...]:
        """Return extents s such that ``tensor`` reshaped to [batch, *s] holds the same elements in the same order.

        Where k times the batch leads (the windows of every image), k comes first; where the batch does not lead, the
        elements stand in one row, and a row is as many elements as a sample has.
        """
        shape = self.shapes[tensor]
        if shape and shape[0] <= 0 and all(extent > 0 for extent in shape[1:]):
            return shape[1:] if shape[0] == 0 else (-shape[0], *shape[1:])
        if all(extent > 0 for extent in shape):
            raise ValueError(f"'{tensor}' of shape {shape} has no batch axis")
        return (math.prod(-extent if extent < 0 else max(extent, 1) for extent in shape),)

    def reshape_target(self, tensor: str) -> list[int]:
        """Return what a Reshape to the shape of ``tensor`` takes: -1 for the axis that grows with the batch."""
        return [-1 if extent <= 0 else extent for extent in self.shapes[tensor]]


def prune(nodes: Iterable[Node], wanted: Iterable[str]) -> list[Node]:
    """Return, in order, the nodes that ``wanted`` tensors depend on."""
    needed, kept = set(wanted), []
    for node in reversed(list(nodes)):
        if needed.intersection(node.outputs):
            kept.append(node)
            needed.update(node.inputs)
    return kept[::-1]
