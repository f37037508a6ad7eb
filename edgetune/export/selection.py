"""Which tensors are trained. Knows the canonical graph."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from edgetune.autodiff.graph import ForwardGraph, prune
from edgetune.errors import ExportError, UsageError, choices
from edgetune.export.normalisation import norm_parameters

WEIGHT_OPS = {"Conv": "Conv", "ConvTranspose": "ConvTranspose", "Gemm": "Linear", "Linear": "Linear"}
ALL = "all"


@dataclass(frozen=True)
class WeightLayer:
    """A convolution or linear layer with a weight of its own. ``bias`` names its bias, if it has one."""

    name: str
    node: str
    op: str
    weight: str
    bias: str | None

    @property
    def tensors(self) -> tuple[str, ...]:
        """The names of weight and bias."""
        return (self.weight,) if self.bias is None else (self.weight, self.bias)


@dataclass(frozen=True)
class Selection:
    """What is trained.

    Attributes:
        layers: the weight layers whose weight is trained, in execution order.
        head: the weight layer nearest to the output, trained or not; None in a model without any.
        parameters: names of all trained tensors.
    """

    layers: tuple[WeightLayer, ...]
    head: WeightLayer | None
    parameters: tuple[str, ...]


def weight_layers(graph: ForwardGraph) -> list[WeightLayer]:
    """Return all weight layers that the loss depends on, in execution order; each is named after its weight."""
    found: list[WeightLayer] = []
    for node in prune(graph.nodes, [graph.goal]):
        if node.op not in WEIGHT_OPS or node.input(1) not in graph.parameters:
            continue
        weight = node.inputs[1]
        name = weight.removesuffix(".weight") if weight.endswith(".weight") else weight
        if name in {layer.name for layer in found}:
            name = f"{name}@{node.name}"  # a weight that two layers share
        bias = node.input(2) if node.input(2) in graph.parameters else None
        found.append(WeightLayer(name, node.name, WEIGHT_OPS[node.op], weight, bias))
    return found


def choose_trained(
    graph: ForwardGraph,
    last: int | str = 4,
    pattern: str | None = None,
    *,
    freeze_head: bool = False,
    train_norms: bool = False,
) -> Selection:
    """Return what is trained.

    Args:
        last: this many weight layers before the head, and the head; ``all``: every parameter of the model.
        pattern: instead, the parameters whose names this regular expression is found in.
        freeze_head: leave the head as it is.
        train_norms: train γ and β of the batch-norms behind the first trained tensor, too; without it, ``all`` leaves
            those of batch-norm frozen, as their statistics are.

    Raises:
        UsageError: the model has fewer layers, nothing matches, or nothing is left to train.
        ExportError: there is nothing to train in the model.
    """
    layers = weight_layers(graph)
    used = [n for n in _in_order(graph) if n in graph.parameters]
    norms = {n for node in graph.nodes if node.op == "BatchNormalization" for n in node.inputs[1:3]}
    if not layers and pattern is None:
        raise ExportError(
            "the model has no convolution or linear layer with a weight of its own: nothing can be trained"
        )
    if pattern is not None:
        chosen = _matching(pattern, used)
    elif last == ALL:
        chosen = [name for name in used if name not in norms]
    else:
        *body, head = layers
        if not isinstance(last, int) or not 0 <= last <= len(body):
            raise UsageError(
                f"--last {last}: expected '{ALL}' or a number up to {len(body)}: the model has {len(body)} convolution "
                "and linear layers before its head"
            )
        chosen = [name for layer in [*body[len(body) - last :], head] for name in layer.tensors]
    if freeze_head and layers:
        chosen = [name for name in chosen if name not in layers[-1].tensors]
    if not chosen:
        raise UsageError("nothing is trained: the head is frozen, and no other layer was chosen (--last, --train)")
    if train_norms:
        chosen += norm_parameters(graph, chosen)
    parameters = tuple(name for name in used if name in set(chosen))
    trained = tuple(layer for layer in layers if layer.weight in parameters)
    return Selection(trained, layers[-1] if layers else None, parameters)


def _in_order(graph: ForwardGraph) -> list[str]:
    """Return the names that the loss depends on, in the order in which they are first read."""
    return list(dict.fromkeys(name for node in prune(graph.nodes, [graph.goal]) for name in node.inputs))


def _matching(pattern: str, names: Sequence[str]) -> list[str]:
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise UsageError(f"--train '{pattern}' is no regular expression: {error}") from None
    found = [name for name in names if expression.search(name)]
    if not found:
        raise UsageError(f"--train '{pattern}' matches no parameter; the model has: {choices(names)}")
    return found


def replace_head(graph: ForwardGraph, classes: int, seed: int = 0) -> None:
    """Give the classifier ``classes`` outputs and fresh weights, uniform in ±1/√fan-in (He et al. 2015, as torch).

    Raises:
        UsageError: fewer than two classes.
        ExportError: something behind the classifier depends on the number of outputs.
    """
    if classes < 2:
        raise UsageError(f"--new-head {classes}: a classifier has two classes at least")
    layers = weight_layers(graph)
    if not layers:
        raise ExportError("the model has no convolution or linear layer with a weight of its own: it has no head")
    head = layers[-1]
    node = next(n for n in graph.nodes if n.name == head.node)
    readers = [n for n in graph.nodes if set(head.tensors) & set(n.inputs)]
    if len(readers) > 1:
        raise ExportError(
            f"the classifier shares its weight with {readers[0].op} '{readers[0].name}'; it cannot be replaced"
        )
    weight = graph.constants[head.weight]
    out_first = node.op == "Conv" or bool(node.attributes.get("transB", 0) or node.attributes.get("transposed", 0))
    shape = (classes, *weight.shape[1:]) if out_first else (weight.shape[0], classes)
    fan_in = int(np.prod(weight.shape[1:])) if out_first else weight.shape[0]
    old = weight.shape[0] if out_first else weight.shape[1]
    rng = np.random.default_rng(seed)
    bound = 1.0 / np.sqrt(fan_in)
    graph.constants[head.weight] = rng.uniform(-bound, bound, shape).astype(np.float32)
    graph.shapes[head.weight] = shape
    if head.bias:
        graph.constants[head.bias] = np.zeros(classes, np.float32)
        graph.shapes[head.bias] = (classes,)
    axis = 1 if node.op == "Conv" else len(graph.shapes[node.outputs[0]]) - 1
    follows = {node.outputs[0]}
    for position, later in enumerate(graph.nodes):
        if later is not node and not follows.intersection(later.inputs):
            continue
        follows.update(later.outputs)
        if later.op == "Linear":
            changed = [*later.attributes["shape"][:-1], classes]
            graph.nodes[position] = replace(later, attributes={**later.attributes, "shape": changed})
        if later.op == "Reshape" and later.input(1) in graph.constants:
            target = graph.constants[later.inputs[1]]
            graph.constants[later.inputs[1]] = np.where(target == old, classes, target)
        for name in later.outputs:
            extents = graph.shapes[name]
            if extents.count(old) == 1:
                axis = extents.index(old)
            elif later.op in ("Reshape", "Transpose", "Flatten") or axis >= len(extents) or extents[axis] != old:
                raise ExportError(
                    f"the classifier's outputs are mixed by {later.op} '{later.name}'; its head cannot be replaced"
                )
            graph.shapes[name] = (*extents[:axis], classes, *extents[axis + 1 :])
        held = [graph.constants[i] for i in later.inputs if i in graph.constants]
        if later is not node and later.op != "Resize" and any(v.dtype.kind == "f" and old in v.shape for v in held):
            raise ExportError(
                f"{later.op} '{later.name}' holds constants for {old} classes; its head cannot be replaced"
            )
