"""An ONNX model -> a canonical forward graph: constants folded, padding explicit, every shape known but the batch.

Cases, in the order in which they are treated:
    1. functions are inlined, all arithmetic on shapes is folded, Constant nodes become constants
    2. Identity and Dropout vanish
    3. auto_pad becomes explicit padding
    4. a product with a weight of two axes, with its bias, becomes Gemm (two axes) or Linear (more)
    5. constants written out once per sample are shared (see ``broadcast``)
    6. the guard of attention against rows that are masked whole vanishes where nothing is masked
    7. GELU and Swish become one node (see ``activations``)

What follows from parameters stays as nodes, because they may be trained; :func:`fold_frozen` folds the rest once it is
known which are. Batch-norm: see ``normalisation``. Knows onnx.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import onnx
from onnx import helper, inliner, numpy_helper
from onnx.reference import ReferenceEvaluator

from edgetune.autodiff.builder import OPSET, GraphBuilder
from edgetune.autodiff.graph import ForwardGraph, Node, prune
from edgetune.autodiff.lowering import emit_node
from edgetune.errors import ExportError
from edgetune.export.activations import with_whole_activations
from edgetune.export.broadcast import share_constants
from edgetune.export.capture import LOSS, Captured
from edgetune.export.probe import BATCH_SCOPE, fold_shapes
from edgetune.export.shapes import infer_shapes


def canonicalise(captured: Captured) -> ForwardGraph:
    """Return the canonical graph of a captured model (cases 1-7).

    Raises:
        ExportError: an input without a batch axis, an axis other than the batch whose extent is unknown, or samples
            that are not independent of each other.
    """
    own = {tensor.name for tensor in captured.model.graph.initializer}
    inlined = inliner.inline_local_functions(captured.model)
    model, parameters = fold_shapes(inlined, captured.parameters)
    constants = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    inputs = tuple(i.name for i in model.graph.input if i.name not in constants)
    outputs = [o.name for o in model.graph.output]
    if not inputs:
        raise ExportError("the model has no input")
    nodes = [Node.from_proto(proto) for proto in model.graph.node]
    nodes, renamed = _without_identities(_lift_constants(nodes, constants), set(outputs))
    shapes, dtypes = infer_shapes(model, constants)
    loss = LOSS if captured.targets else None
    graph = ForwardGraph(
        nodes,
        inputs,
        tuple(renamed.get(name, name) for name in outputs if name != loss),
        constants,
        shapes,
        dtypes,
        parameters,
        captured.targets,
        None if loss is None else renamed.get(loss, loss),
        tuple(name for name in outputs if name != loss),
    )
    _evaluate(graph, parameters)
    graph.nodes = prune(graph.nodes, graph.wanted)
    _refuse_mixed_samples(graph)
    share_constants(graph, lambda node, inputs: np.asarray(_results(node, inputs, graph)[0]))
    graph.nodes = [_without_invented_bias(graph, node, own) for node in graph.nodes]
    graph.nodes = [_explicit(graph, node) for node in _without_transposed_inputs(graph)]
    layered = _with_linear_layers(_with_short_casts(_without_guards(graph), graph), graph)
    graph.nodes = _name_nodes(with_whole_activations(layered, graph))
    graph.nodes = prune(graph.nodes, graph.wanted)
    _check_loss(graph)
    return graph


def fold_frozen(graph: ForwardGraph, trained: Collection[str]) -> None:
    """Evaluate everything that follows from constants alone, those in ``trained`` excepted."""
    _evaluate(graph, trained)
    graph.nodes = prune(graph.nodes, graph.wanted)


def _check_loss(graph: ForwardGraph) -> None:
    if graph.loss is None:
        return
    if graph.shapes[graph.loss]:
        raise ExportError(f"the loss has the shape {graph.shapes[graph.loss]}; expected one number (reduce it)")
    read = {name for node in graph.nodes for name in node.inputs}
    unread = [name for name in graph.targets if name not in read]
    if unread:
        raise ExportError("the loss does not read its targets")


def _refuse_mixed_samples(graph: ForwardGraph) -> None:
    """Raise ExportError where something computed from the samples has no batch axis any more: it mixes them.

    Only a loss may do that.
    """
    follows = set(graph.inputs)
    for node in prune(graph.nodes, graph.outputs):
        if not follows.intersection(node.inputs):
            continue
        follows.update(node.outputs)
        if _runs_over_batch(graph, node):
            raise ExportError(
                f"{node.op} '{node.outputs[0]}' works along the batch: it mixes the samples of a batch; samples must "
                "stay independent, because the device runs them in smaller pieces"
            )
        for name in node.outputs:
            if name and name in graph.shapes and all(extent > 0 for extent in graph.shapes[name]):
                raise ExportError(
                    f"{node.op} '{name}' mixes the samples of a batch (its result has no batch axis); samples must "
                    "stay independent, because the device runs them in smaller pieces"
                )


_ALONG_AN_AXIS = ("Softmax", "LogSoftmax", "Hardmax", "LpNormalization", "CumSum", "TopK")
_DEFAULT_AXIS = {"TopK": -1, "LpNormalization": -1, "Softmax": -1, "LogSoftmax": -1, "Hardmax": -1}


def _runs_over_batch(graph: ForwardGraph, node: Node) -> bool:
    """Tell whether ``node`` works along the batch axis of its first input, which its result still has."""
    if node.op not in _ALONG_AN_AXIS or node.inputs[0].startswith(BATCH_SCOPE):
        return False
    shape = graph.shapes[node.inputs[0]]
    axis = node.attributes.get("axis", _DEFAULT_AXIS.get(node.op, 0))
    if node.op == "CumSum":
        known = graph.constants.get(node.inputs[1])
        axis = 0 if known is None else int(known.item())
    return bool(shape) and shape[axis] <= 0


def _lift_constants(nodes: list[Node], constants: dict[str, Any]) -> list[Node]:
    rest = []
    for node in nodes:
        if node.op == "Constant":
            constants[node.outputs[0]] = _constant_value(node)
        else:
            rest.append(node)
    return rest


def _constant_value(node: Node) -> Any:
    (key, value), *_ = node.attributes.items()
    if isinstance(value, onnx.TensorProto):
        return numpy_helper.to_array(value)
    return np.array(value, np.float32 if key.startswith("value_float") else np.int64)


def _without_identities(nodes: list[Node], outputs: set[str]) -> tuple[list[Node], dict[str, str]]:
    """Drop Identity and Dropout (an exported model is in evaluation mode) and rename what read them.

    An output that was only a copy is thereby made by the node before; the second result tells which that is.
    """
    renamed: dict[str, str] = {}
    kept = []
    for node in nodes:
        inputs = tuple(renamed.get(name, name) for name in node.inputs)
        if node.op in ("Identity", "Dropout"):
            renamed[node.outputs[0]] = inputs[0]
        else:
            kept.append(dataclasses.replace(node, inputs=inputs))
    return kept, {name: renamed[name] for name in outputs if name in renamed}


def _results(node: Node, inputs: Mapping[str, Any], graph: ForwardGraph) -> list[Any]:
    """Return what ``node``, written out in standard operators, computes from constants."""
    g = GraphBuilder(taken={*node.inputs, *node.outputs})
    emit_node(g, node, graph)
    proto = helper.make_model(
        helper.make_graph(
            g.nodes,
            "constant",
            [_typed(name, value) for name, value in inputs.items()],
            [helper.make_tensor_value_info(name, graph.dtypes[name], None) for name in node.outputs],
            [numpy_helper.from_array(value, name) for name, value in g.constants.items()],
        ),
        opset_imports=[helper.make_opsetid("", OPSET)],
    )
    results: Any = ReferenceEvaluator(proto).run(None, dict(inputs))
    return list(results)


def _evaluate(graph: ForwardGraph, unknown: Collection[str]) -> None:
    """Evaluate the nodes that read constants alone, but for those in ``unknown``: what the folder left, weights."""
    rest = []
    for node in graph.nodes:
        inputs = [name for name in node.inputs if name]
        if node.op == "CastLike" and node.inputs[0] in graph.constants and node.inputs[0] not in unknown:
            kind = helper.tensor_dtype_to_np_dtype(graph.dtypes[node.outputs[0]])
            values = [graph.constants[node.inputs[0]].astype(kind)]
        elif inputs and all(name in graph.constants and name not in unknown for name in inputs):
            values = _results(node, {n: graph.constants[n] for n in inputs}, graph)
        else:
            rest.append(node)
            continue
        for name, value in zip(node.outputs, values, strict=True):
            graph.constants[name] = np.asarray(value)
            graph.shapes[name] = np.shape(value)
    graph.nodes = rest


def _without_invented_bias(graph: ForwardGraph, node: Node, own: set[str]) -> Node:
    """Drop a bias of zeros that the exporter computed for a layer without one, or it would be trained."""
    bias = node.input(2) if node.op == "Conv" else ""
    if bias in graph.constants and bias not in own and not graph.constants[bias].any():
        return dataclasses.replace(node, inputs=node.inputs[:2])
    return node


def _typed(name: str, value: Any) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)


def _explicit(graph: ForwardGraph, node: Node) -> Node:
    """Make padding explicit (case 3)."""
    auto = node.attributes.get("auto_pad", "NOTSET")
    if node.op == "ConvTranspose":
        return _explicit_transpose(graph, node)
    if node.op not in ("Conv", "MaxPool", "AveragePool") or auto == "NOTSET":
        attributes = {k: v for k, v in node.attributes.items() if k != "auto_pad"}
        return dataclasses.replace(node, attributes=attributes)
    kernel = list(node.attributes.get("kernel_shape") or graph.shapes[node.inputs[1]][2:])
    extents, outputs = graph.shapes[node.inputs[0]][2:], graph.shapes[node.outputs[0]][2:]
    begin, end = [], []
    for i, k in enumerate(kernel):
        stride = node.attributes.get("strides", [1] * len(kernel))[i]
        dilation = node.attributes.get("dilations", [1] * len(kernel))[i]
        total = max(0, (outputs[i] - 1) * stride + dilation * (k - 1) + 1 - extents[i]) if auto != "VALID" else 0
        small, large = total // 2, total - total // 2
        begin.append(large if auto == "SAME_LOWER" else small)
        end.append(small if auto == "SAME_LOWER" else large)
    attributes = {k: v for k, v in node.attributes.items() if k != "auto_pad"} | {"pads": [*begin, *end]}
    return dataclasses.replace(node, attributes=attributes)


def _explicit_transpose(graph: ForwardGraph, node: Node) -> Node:
    """Give a ConvTranspose its padding as numbers, by the formulas of the ONNX standard.

    total = stride·(extent - 1) + output padding + (k - 1)·dilation + 1 - output extent
    """
    attributes = dict(node.attributes)
    auto, wanted = attributes.pop("auto_pad", "NOTSET"), attributes.pop("output_shape", None)
    if auto == "VALID":
        attributes.pop("pads", None)
    if auto in ("NOTSET", "VALID") and wanted is None:
        return dataclasses.replace(node, attributes=attributes)
    extents, kernel = graph.shapes[node.inputs[0]][2:], graph.shapes[node.inputs[1]][2:]
    rank = len(extents)
    strides = attributes.get("strides", [1] * rank)
    dilations = attributes.get("dilations", [1] * rank)
    padding = list(attributes.get("output_padding", [0] * rank))
    begin, end = [], []
    for i, (extent, k) in enumerate(zip(extents, kernel, strict=True)):
        target = list(wanted)[-rank:][i] if wanted is not None else extent * strides[i]
        total = strides[i] * (extent - 1) + padding[i] + (k - 1) * dilations[i] + 1 - target
        if total < 0:  # the output is larger than what the taps reach
            padding[i], total = padding[i] - total, 0
        small, large = total // 2, total - total // 2
        begin.append(small if auto == "SAME_UPPER" else large)
        end.append(large if auto == "SAME_UPPER" else small)
    attributes |= {"pads": [*begin, *end], "output_padding": padding}
    return dataclasses.replace(node, attributes=attributes)


def _without_transposed_inputs(graph: ForwardGraph) -> list[Node]:
    """Transpose the input of a Gemm with ``transA`` in a node of its own: rules know linear layers of rows."""
    nodes = []
    for node in graph.nodes:
        if node.op == "Gemm" and node.attributes.get("transA", 0):
            rows = f"{node.outputs[0]}.rows"
            graph.shapes[rows] = graph.shapes[node.inputs[0]][::-1]
            graph.dtypes[rows] = graph.dtypes[node.inputs[0]]
            nodes.append(Node("Transpose", rows, node.inputs[:1], (rows,), {"perm": [1, 0]}))
            attributes = {key: value for key, value in node.attributes.items() if key != "transA"}
            node = dataclasses.replace(node, inputs=(rows, *node.inputs[1:]), attributes=attributes)
        nodes.append(node)
    return nodes


def _without_guards(graph: ForwardGraph) -> list[Node]:
    """Drop Where(IsNaN(p), 0, p) behind a softmax of plain products (case 6): its rows are never masked whole.

    The exporter puts it behind every attention, and it would cost three tensors of the attention's size.
    """
    producer = {name: node for node in graph.nodes for name in node.outputs}
    renamed: dict[str, str] = {}
    kept = []
    for node in graph.nodes:
        node = dataclasses.replace(node, inputs=tuple(renamed.get(name, name) for name in node.inputs))
        if node.op == "Where" and node.outputs[0] not in graph.wanted:
            test, p = producer.get(node.inputs[0]), producer.get(node.inputs[2])
            guards = test is not None and test.op == "IsNaN" and test.inputs[0] == node.inputs[2]
            before = producer.get(p.inputs[0]) if p is not None and p.op == "Softmax" else None
            if guards and before is not None and before.op in ("MatMul", "Mul", "Div"):
                renamed[node.outputs[0]] = node.inputs[2]
                continue
        kept.append(node)
    return kept


def _with_short_casts(nodes: list[Node], graph: ForwardGraph) -> list[Node]:
    """Cast truth values at once to the last type of a chain of casts: runtimes do so, and then another order holds."""
    producer = {name: node for node in nodes for name in node.outputs}
    kept = []
    for node in nodes:
        before = producer.get(node.inputs[0]) if node.op == "Cast" else None
        if before is not None and before.op == "Cast" and graph.dtypes[before.inputs[0]] == onnx.TensorProto.BOOL:
            node = dataclasses.replace(node, inputs=before.inputs)
        kept.append(node)
    return kept


@dataclasses.dataclass(frozen=True)
class _Product:
    """x·W with a weight W of two axes: [c, o], or [o, c] if ``transposed``."""

    weight: str
    transposed: bool


def _product(node: Node, graph: ForwardGraph, producer: Mapping[str, Node]) -> _Product | None:
    """Return the weight that a MatMul multiplies with, directly or transposed; None for other products."""
    if node.op != "MatMul" or len(graph.shapes[node.inputs[0]]) < 2 or len(graph.shapes[node.inputs[1]]) != 2:
        return None
    if node.inputs[1] in graph.constants:
        return _Product(node.inputs[1], False)
    before = producer.get(node.inputs[1])
    if before is not None and before.op == "Transpose" and before.inputs[0] in graph.constants:
        return _Product(before.inputs[0], True)
    return None


def _with_linear_layers(nodes: list[Node], graph: ForwardGraph) -> list[Node]:
    """Replace every MatMul with a weight, and the Add of its bias if nothing else reads it, by one node (case 4)."""
    graph.nodes = nodes
    readers = graph.consumers()
    producer = {name: node for node in nodes for name in node.outputs}
    fused: dict[tuple[str, ...], Node] = {}
    dropped: set[tuple[str, ...]] = set()
    for node in nodes:
        product = _product(node, graph, producer)
        if product is None:
            continue
        output, bias = node.outputs, ""
        after = readers.get(node.outputs[0], [])
        if len(after) == 1 and after[0].op == "Add" and node.outputs[0] not in graph.wanted:
            vectors = [n for n in after[0].inputs if n in graph.constants and len(graph.shapes[n]) == 1]
            if vectors and graph.shapes[after[0].outputs[0]] == graph.shapes[node.outputs[0]]:
                output, bias = after[0].outputs, vectors[0]
                dropped.add(node.outputs)
        inputs = (node.inputs[0], product.weight, *([bias] if bias else []))
        if len(graph.shapes[node.inputs[0]]) == 2:
            made = Node("Gemm", node.name, inputs, output, {"transB": 1} if product.transposed else {})
        else:
            attributes = {"transposed": int(product.transposed), "shape": graph.reshape_target(output[0])}
            made = Node("Linear", node.name, inputs, output, attributes)
        fused[output] = made
    return [fused.get(n.outputs, n) for n in nodes if n.outputs not in dropped]


def _name_nodes(nodes: list[Node]) -> list[Node]:
    """Name every node after its weight, or else after its output: unique, stable and readable."""
    return [dataclasses.replace(node, name=node.outputs[0]) for node in nodes]
