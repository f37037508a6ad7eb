"""How the loss of a batch follows from those of its pieces, read off a loss that the user gave.

Only what is known to keep the samples of a batch apart is followed; anything else is taken to mix them.
Knows the forward graph.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from edgetune.autodiff.graph import ForwardGraph, Node, prune

_ELEMENTWISE = frozenset({
    "Abs", "Add", "And", "Cast", "Clip", "Div", "Equal", "Erf", "Exp", "Greater", "GreaterOrEqual", "HardSigmoid",
    "Identity", "LeakyRelu", "Less", "LessOrEqual", "Log", "Max", "Min", "Mul", "Neg", "Not", "Or", "Pow", "Reciprocal",
    "Relu", "Sigmoid", "Sign", "Softplus", "Sqrt", "Sub", "Tanh", "Where",
})  # fmt: skip
_ALONG_AN_AXIS = frozenset({"Softmax", "LogSoftmax", "GatherElements", "ArgMax", "ArgMin", "OneHot"})
_SHAPES = frozenset({"Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity", "Cast"})
_SUMS = frozenset({"ReduceSum", "ReduceSumSquare", "ReduceL1"})
_LOSSES = frozenset({"NegativeLogLikelihoodLoss", "SoftmaxCrossEntropyLoss"})
_ALL = 2**31 - 1
_FIXED, _SAMPLES, _MEAN, _SUM, _MIXED = "fixed", "samples", "mean", "sum", "mixed"


def pieces_of_loss(graph: ForwardGraph) -> str:
    """Return ``mean`` or ``sum``, as ``LossSpec.pieces``, of a graph whose goal is the loss; empty if it is neither."""
    own = {id(node) for node in prune(graph.nodes, graph.outputs)}
    kinds = dict.fromkeys((*graph.outputs, *graph.targets), _SAMPLES)
    for node in prune(graph.nodes, [graph.goal]):
        if id(node) in own:
            continue
        given = [_kind(graph, kinds, name) for name in node.inputs if name]
        kinds |= dict.fromkeys(node.outputs, _made(graph, node, given))
    found = kinds.get(graph.goal, _MIXED)
    return found if found in (_MEAN, _SUM) else ""


def _kind(graph: ForwardGraph, kinds: Mapping[str, str], name: str) -> str:
    if name in kinds:
        return kinds[name]
    # A tensor from within the model is followed no further, even where it keeps the samples apart.
    return _FIXED if name in graph.constants or name in graph.parameters else _MIXED


def _made(graph: ForwardGraph, node: Node, given: Sequence[str]) -> str:
    """Return what ``node`` makes of inputs of the kinds ``given``."""
    if _MIXED in given:
        return _MIXED
    if _SAMPLES in given:
        return _of_samples(graph, node, given) if {_MEAN, _SUM}.isdisjoint(given) else _MIXED
    if {*given} <= {_FIXED}:
        return _FIXED
    return _of_totals(node, given)


def _of_samples(graph: ForwardGraph, node: Node, given: Sequence[str]) -> str:
    shapes = [
        graph.shapes[name] for name, kind in zip(filter(None, node.inputs), given, strict=True) if kind == _SAMPLES
    ]
    made = graph.shapes[node.outputs[0]]
    if not all(_leads(shape) for shape in shapes):
        return _MIXED
    if node.op in _LOSSES:
        return _of_loss(node, given)
    if node.op.startswith("Reduce") and not _leads(made):
        whole = all(extent == 1 for extent in made)  # a total of each class is no total of the loss
        return (_MEAN if node.op == "ReduceMean" else _SUM if node.op in _SUMS else _MIXED) if whole else _MIXED
    if not _leads(made):
        return _MIXED
    if node.op in _ELEMENTWISE:
        return _SAMPLES if all(len(shape) == len(made) and shape[0] == made[0] for shape in shapes) else _MIXED
    if node.op == "Slice":
        return _SAMPLES if _takes_all_samples(graph, node) else _MIXED
    if node.op in _ALONG_AN_AXIS:
        axis = int(node.attributes.get("axis", -1 if "Softmax" in node.op or node.op == "OneHot" else 0))
        return _SAMPLES if axis % len(shapes[0]) != 0 or (axis == -1 and len(made) > len(shapes[0])) else _MIXED
    return _SAMPLES if node.op in _SHAPES or node.op.startswith("Reduce") else _MIXED


def _takes_all_samples(graph: ForwardGraph, node: Node) -> bool:
    """Return whether a Slice leaves the batch as it is."""
    bounds = [graph.constants.get(name) for name in node.inputs[1:]]
    if len(bounds) < 3 or any(value is None for value in bounds):
        return False
    starts, ends, axes, *steps = ([int(v) for v in value.reshape(-1)] for value in bounds if value is not None)
    strides = steps[0] if steps else [1] * len(axes)
    first = [index for index, axis in enumerate(axes) if axis % len(graph.shapes[node.inputs[0]]) == 0]
    return all(starts[i] == 0 and ends[i] >= _ALL and strides[i] == 1 for i in first)


def _leads(shape: Sequence[int]) -> bool:
    """Return whether the batch, or a multiple of it, is the first extent and no other."""
    return bool(shape) and shape[0] <= 0 and all(extent > 0 for extent in shape[1:])


def _of_loss(node: Node, given: Sequence[str]) -> str:
    reduction = node.attributes.get("reduction", "mean")
    if reduction == "none":
        return _SAMPLES
    if reduction == "sum":
        return _SUM
    # A mean over what counts, and by weight: the pieces would have to be weighed in the same way.
    return _MEAN if len(given) == 2 and "ignore_index" not in node.attributes else _MIXED


def _of_totals(node: Node, given: Sequence[str]) -> str:
    totals = {kind for kind in given if kind != _FIXED}
    kind = totals.pop()
    if totals:
        return _MIXED
    if node.op in ("Mul", "Div"):
        return kind if [kind, _FIXED] == list(given) or (node.op == "Mul" and [_FIXED, kind] == list(given)) else _MIXED
    if node.op in ("Add", "Sub", "Sum"):
        return kind if _FIXED not in given or kind == _MEAN else _MIXED
    return kind if node.op in _SHAPES or node.op == "Neg" else _MIXED
