"""Names: a captured model's tensors get those that the model itself gives them. Knows onnx and torch (as types)."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

import onnx
from onnx import helper

from edgetune.errors import ExportError, choices

if TYPE_CHECKING:
    import torch

RESERVED = frozenset((
    "targets", "loss", "correct", "gradient_norm", "step", "learning_rate", "momentum", "weight_decay", "clip_norm",
    "beta1", "beta2", "epsilon",
))  # fmt: skip
"""What the graphs and the state of a bundle call tensors of their own: no tensor of a model may be called so."""


def own_names(whole: torch.nn.Module) -> dict[str, str]:
    """Return what the model calls the parameters and buffers of the wrapper; a shared one by the first of its names."""
    first: dict[int, str] = {}
    names: dict[str, str] = {}
    tensors = [*whole.named_parameters(remove_duplicate=False), *whole.named_buffers(remove_duplicate=False)]
    for name, tensor in tensors:
        names[name] = first.setdefault(id(tensor), name.removeprefix("model."))
    return names


def rename(proto: onnx.ModelProto, inputs: Sequence[str], outputs: Sequence[str], own_names: Mapping[str, str]) -> None:
    """Give inputs and outputs their own names, and parameters the names that the model calls them."""
    graph = proto.graph
    names = {old.name: new for old, new in zip(graph.input, inputs, strict=True)}
    kept: dict[str, onnx.TensorProto] = {}
    for tensor in graph.initializer:
        name = own_names.get(tensor.name, tensor.name)
        if name != tensor.name:
            names[tensor.name] = name
        kept.setdefault(name, tensor)  # tracing gives a shared weight once per name
    if len(kept) < len(graph.initializer):
        unique = list(kept.values())
        del graph.initializer[:]
        graph.initializer.extend(unique)
    taken = {name for node in graph.node for name in node.output} | {t.name for t in graph.initializer}
    for name in set(names.values()) & taken - set(names):
        names[name] = f"{name}.inner"
    _rename_values(graph, names)
    made = [value.name for value in graph.output]
    for value, emitted, wanted in zip(graph.output, made, outputs, strict=True):
        # A copy, because one tensor may be two outputs, or be called as another's name is.
        graph.node.append(helper.make_node("Identity", [emitted], [f"{wanted}.out"]))
        value.name = f"{wanted}.out"
    taken = {name for node in graph.node for name in node.output} | {value.name for value in graph.input}
    _rename_values(graph, {name: f"{name}.inner" for name in outputs if name in taken})
    _rename_values(graph, {f"{name}.out": name for name in outputs})


def _rename_values(graph: onnx.GraphProto, names: Mapping[str, str]) -> None:
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                _rename_values(attribute.g, names)
    for value in [*graph.input, *graph.output, *graph.initializer, *graph.value_info]:
        value.name = names.get(value.name, value.name)


def free(name: str, occupied: Collection[str]) -> str:
    """Return ``name``, or another where something else is called so."""
    return f"{name}.inner" if name in occupied else name


def refuse_reserved(inputs: Sequence[str]) -> None:
    """Raise ExportError if an input is called as a tensor of every bundle is."""
    taken = [name for name in inputs if name in RESERVED]
    if taken:
        raise ExportError(
            f"an input of the model is called {choices(taken)}, as a tensor of every bundle is; give it another name"
        )


def without_reserved(model: onnx.ModelProto) -> onnx.ModelProto:
    """Rename what inside an ONNX model is called as tensors of a bundle are; its outputs get those names in the end."""
    constants = {tensor.name for tensor in model.graph.initializer}
    refuse_reserved([value.name for value in model.graph.input if value.name not in constants])
    _rename_values(model.graph, {name: f"{name}.inner" for name in RESERVED})
    return model
