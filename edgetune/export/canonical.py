"""An ONNX model -> a canonical forward graph: constants folded, padding explicit, every shape known but the batch.

Cases, in the order in which they are treated:
    1. functions are inlined, constants and all arithmetic on shapes folded, Constant nodes become constants
    2. Identity and Dropout vanish
    3. auto_pad becomes explicit padding
    4. MatMul + Add of a bias becomes Gemm (two axes)
    5. batch-norm is folded (``fold_batch_norm``), once it is known which layers are trained

Knows onnx and onnxscript's constant folder.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any

import numpy as np
import onnx
from onnx import helper, inliner, numpy_helper, shape_inference
from onnx.reference import ReferenceEvaluator

from edgetune.autodiff.builder import OPSET
from edgetune.autodiff.graph import BATCH, ForwardGraph, Node, prune
from edgetune.errors import ExportError

PROBE_BATCHES = (10007, 10009)  # primes that no extent of a model has
_PROBES = (2, 3)  # batches at which shapes are inferred; what scales with them is the batch


def canonicalise(model: onnx.ModelProto) -> ForwardGraph:
    """Return the canonical graph of ``model`` (cases 1-4).

    Raises:
        ExportError: more than one input or output, an input without a batch axis, or an axis other than the batch
            whose extent is unknown.
    """
    own = {tensor.name for tensor in model.graph.initializer}
    inlined = inliner.inline_local_functions(model)
    model, other = (_fold_constants(_with_probe_batch(inlined, probe), probe) for probe in PROBE_BATCHES)
    _refuse_batch_arithmetic(model, other)
    _restore_batch(model)
    constants = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    inputs = tuple(i.name for i in model.graph.input if i.name not in constants)
    outputs = [o.name for o in model.graph.output]
    if len(inputs) != 1 or len(outputs) != 1:
        raise ExportError(
            f"expected one input and one output; the model has inputs {list(inputs)} and outputs {outputs}"
        )
    nodes = [Node.from_proto(proto) for proto in model.graph.node]
    nodes, output = _without_identities(_lift_constants(nodes, constants), outputs[0])
    shapes, dtypes = infer_shapes(model, constants)
    graph = ForwardGraph(nodes, inputs, output, constants, shapes, dtypes)
    _evaluate_constants(graph)
    _refuse_mixed_samples(graph)
    graph.nodes = [_without_invented_bias(graph, node, own) for node in graph.nodes]
    graph.nodes = [_explicit(graph, node) for node in graph.nodes]
    graph.nodes = _name_nodes(_fuse_bias(graph))
    graph.nodes = prune(graph.nodes, [graph.output])
    return graph


def _with_probe_batch(model: onnx.ModelProto, batch: int) -> onnx.ModelProto:
    """Give the leading axis of every input a conspicuous extent, so that all arithmetic on shapes can be folded.

    Raises:
        ExportError: an input has no axes, or another axis of unknown extent.
    """
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    del probe.graph.value_info[:]
    constants = {t.name: t for t in probe.graph.initializer}
    for value in probe.graph.input:
        if value.name in constants:
            continue
        dims = value.type.tensor_type.shape.dim
        if not dims or any(not d.dim_value for d in dims[1:]):
            raise ExportError(
                f"input '{value.name}' has an axis of unknown extent besides the batch; fix it before export"
            )
        fixed = dims[0].dim_value
        dims[0].Clear()
        dims[0].dim_value = batch
        for node in probe.graph.node if fixed else ():
            target = constants.get(node.input[1]) if node.op_type == "Reshape" else None
            if target is not None and numpy_helper.to_array(target).reshape(-1)[0] == fixed:
                extents = numpy_helper.to_array(target).copy()
                extents[0] = batch
                target.CopyFrom(numpy_helper.from_array(extents, target.name))
    for value in probe.graph.output:
        value.type.tensor_type.ClearField("shape")
    return probe


def _fold_constants(model: onnx.ModelProto, batch: int) -> onnx.ModelProto:
    from onnxscript import ir, optimizer

    def should_fold(node: Any) -> bool | None:
        # The folder keeps ConstantOfShape by default, and with it the padding that torch's older exporter computes.
        if node.op_type != "ConstantOfShape":
            return None
        extents = node.inputs[0].const_value.numpy()
        return None if ((extents > 0) & (extents % batch == 0)).any() else True

    folded = ir.serde.deserialize_model(model)
    optimizer.fold_constants(folded, input_size_limit=1 << 30, output_size_limit=1 << 30, should_fold=should_fold)
    result: onnx.ModelProto = ir.serde.serialize_model(folded)
    return result


def _refuse_batch_arithmetic(model: onnx.ModelProto, other: onnx.ModelProto) -> None:
    """Raise ExportError where a constant other than a shape follows from the batch size: folded, it would be wrong."""
    known, second = _all_constants(model), _all_constants(other)
    for name, tensor in known.items():
        if tensor.data_type == onnx.TensorProto.INT64 or name not in second:
            continue
        if not np.array_equal(numpy_helper.to_array(tensor), numpy_helper.to_array(second[name]), equal_nan=True):
            raise ExportError(f"the model computes with its batch size (in '{name}'); samples must stay independent")


def _all_constants(model: onnx.ModelProto) -> dict[str, onnx.TensorProto]:
    found = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            found[node.output[0]] = node.attribute[0].t
    return found


def _refuse_mixed_samples(graph: ForwardGraph) -> None:
    """Raise ExportError where something computed from the samples has no batch axis any more: it mixes them."""
    for node in graph.nodes:
        for name in node.outputs:
            if name and name in graph.shapes and all(extent > 0 for extent in graph.shapes[name]):
                raise ExportError(
                    f"{node.op} '{name}' mixes the samples of a batch (its result has no batch axis); samples must "
                    "stay independent, because the device runs them in smaller pieces"
                )


def _restore_batch(model: onnx.ModelProto) -> None:
    """Undo :func:`_with_probe_batch`: name the batch axis again and let Reshape infer what the batch scales."""
    for value in model.graph.input:
        dims = value.type.tensor_type.shape.dim
        if dims and dims[0].dim_value == PROBE_BATCHES[0]:
            dims[0].Clear()
            dims[0].dim_param = BATCH
    targets = {n.input[1]: n for n in model.graph.node if n.op_type == "Reshape"}
    for node in model.graph.node:
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            _infer_batch(node.attribute[0].t, node.output[0] in targets)
    for tensor in model.graph.initializer:
        _infer_batch(tensor, tensor.name in targets)


def _infer_batch(tensor: onnx.TensorProto, is_target: bool) -> None:
    if tensor.data_type != onnx.TensorProto.INT64:
        return
    extents = numpy_helper.to_array(tensor)
    scaled = (extents != 0) & (extents % PROBE_BATCHES[0] == 0)
    if not scaled.any():
        return
    if not is_target or np.count_nonzero(scaled | (extents == -1)) > 1:
        raise ExportError(f"the model computes with its batch size (in '{tensor.name}'); samples must stay independent")
    tensor.CopyFrom(numpy_helper.from_array(np.where(scaled, -1, extents), tensor.name))


def infer_shapes(
    model: onnx.ModelProto, constants: dict[str, Any]
) -> tuple[dict[str, tuple[int, ...]], dict[str, int]]:
    """Return shapes and element types of all tensors: 0 stands for the batch, -k for k times the batch.

    Raises:
        ExportError: an extent is unknown, or grows with the batch otherwise than in proportion.
    """
    seen = [_shapes_at(model, batch) for batch in _PROBES]
    shapes: dict[str, tuple[int, ...]] = {name: tuple(np.shape(value)) for name, value in constants.items()}
    for name, (first, _) in seen[0].items():
        second = seen[1].get(name, (None, 0))[0]
        if first is None or second is None or len(first) != len(second):
            raise ExportError(f"the shape of '{name}' depends on the data; such models cannot be split")
        shapes[name] = tuple(_extent(name, a, b) for a, b in zip(first, second, strict=True))
    return shapes, {name: kind for name, (_, kind) in seen[0].items()}


def _extent(name: str, first: int, second: int) -> int:
    if first == second:
        return first
    scale, rest = divmod(first, _PROBES[0])
    if rest or second != scale * _PROBES[1]:
        raise ExportError(f"'{name}' has an axis that grows with the batch, but not in proportion to it")
    return 0 if scale == 1 else -scale


def _shapes_at(model: onnx.ModelProto, batch: int) -> dict[str, tuple[tuple[int, ...] | None, int]]:
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    del probe.graph.value_info[:]
    for value in [*probe.graph.input, *probe.graph.output]:
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param == BATCH:
                dim.Clear()
                dim.dim_value = batch
    for value in probe.graph.output:
        value.type.tensor_type.ClearField("shape")
    try:
        inferred = shape_inference.infer_shapes(probe, strict_mode=True, data_prop=True)
    except Exception as error:
        raise ExportError(f"shapes cannot be inferred: {error}") from error
    found: dict[str, tuple[tuple[int, ...] | None, int]] = {}
    for value in [*inferred.graph.input, *inferred.graph.value_info, *inferred.graph.output]:
        tensor = value.type.tensor_type
        known = tensor.HasField("shape") and all(d.HasField("dim_value") for d in tensor.shape.dim)
        found[value.name] = (tuple(d.dim_value for d in tensor.shape.dim) if known else None, tensor.elem_type)
    return found


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


def _without_identities(nodes: list[Node], output: str) -> tuple[list[Node], str]:
    """Drop Identity and Dropout (an exported model is in evaluation mode) and rename what read them."""
    renamed: dict[str, str] = {}
    kept = []
    for node in nodes:
        inputs = tuple(renamed.get(name, name) for name in node.inputs)
        if node.op in ("Identity", "Dropout"):
            renamed[node.outputs[0]] = inputs[0]
        else:
            kept.append(dataclasses.replace(node, inputs=inputs))
    return kept, renamed.get(output, output)


def _evaluate_constants(graph: ForwardGraph) -> None:
    """Evaluate what the folder left: CastLike of constants, and what follows from it."""
    rest = []
    for node in graph.nodes:
        inputs = [name for name in node.inputs if name]
        if node.op == "CastLike" and node.inputs[0] in graph.constants:
            kind = helper.tensor_dtype_to_np_dtype(graph.dtypes[node.outputs[0]])
            values = [graph.constants[node.inputs[0]].astype(kind)]
        elif inputs and all(name in graph.constants for name in inputs):
            proto = helper.make_model(
                helper.make_graph([node.to_proto()], "constant", [_typed(n, graph) for n in inputs], [
                    helper.make_tensor_value_info(n, graph.dtypes[n], None) for n in node.outputs
                ]),
                opset_imports=[helper.make_opsetid("", OPSET)],
            )  # fmt: skip
            results: Any = ReferenceEvaluator(proto).run(None, {n: graph.constants[n] for n in inputs})
            values = list(results)
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


def _typed(name: str, graph: ForwardGraph) -> onnx.ValueInfoProto:
    value = graph.constants[name]
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)


def _explicit(graph: ForwardGraph, node: Node) -> Node:
    """Make padding explicit (case 3)."""
    auto = node.attributes.get("auto_pad", "NOTSET")
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


def _fuse_bias(graph: ForwardGraph) -> list[Node]:
    """MatMul of two axes followed by nothing but the Add of a constant vector is Gemm (case 4)."""
    readers, fused, dropped = graph.consumers(), {}, set()
    for node in graph.nodes:
        after = readers.get(node.outputs[0], [])
        if node.op != "MatMul" or len(after) != 1 or after[0].op != "Add" or len(graph.shapes[node.outputs[0]]) != 2:
            continue
        bias = [name for name in after[0].inputs if name in graph.constants and len(graph.shapes[name]) == 1]
        if bias and node.inputs[1] in graph.constants and node.outputs[0] != graph.output:
            inputs = (*node.inputs, bias[0])
            fused[after[0].name, after[0].outputs] = Node("Gemm", node.name, inputs, after[0].outputs, {})
            dropped.add(node.outputs)
    return [fused.get((n.name, n.outputs), n) for n in graph.nodes if n.outputs not in dropped]


def _name_nodes(nodes: list[Node]) -> list[Node]:
    """Name every node after its weight, or else after its output: unique, stable and readable."""
    return [dataclasses.replace(node, name=node.outputs[0]) for node in nodes]


def fold_batch_norm(graph: ForwardGraph, trained: Collection[str]) -> None:
    """Replace every BatchNormalization by what it computes with frozen statistics (case 5).

    With s = γ/√(σ² + ε) and t = β - μ·s: behind a frozen convolution it is folded into weight and bias. Behind a
    trained one (node names in ``trained``) it becomes a scale and a shift, so that the trained tensor is the model's
    own weight, and its gradient the one that the model's own framework computes.
    """
    readers = graph.consumers()
    producer = {name: node for node in graph.nodes for name in node.outputs}
    result: list[Node] = []
    for node in graph.nodes:
        if node.op != "BatchNormalization":
            result.append(node)
            continue
        gamma, beta, mean, variance = (graph.constants[name].astype(np.float64) for name in node.inputs[1:5])
        scale = gamma / np.sqrt(variance + float(node.attributes.get("epsilon", 1e-5)))
        shift = beta - mean * scale
        before = producer.get(node.inputs[0])
        foldable = before is not None and before.op == "Conv" and before.name not in trained
        if before is not None and foldable and len(readers[node.inputs[0]]) == 1:
            folded = _folded_convolution(graph, before, node.outputs[0], scale, shift)
            result = [folded if n is before else n for n in result]
            producer[node.outputs[0]] = folded
        else:
            result.extend(_scale_and_shift(graph, node, scale, shift))
    graph.nodes = result


def _add_constant(graph: ForwardGraph, name: str, value: Any) -> str:
    graph.constants[name] = value.astype(np.float32)
    graph.shapes[name] = value.shape
    return name


def _folded_convolution(graph: ForwardGraph, conv: Node, output: str, scale: Any, shift: Any) -> Node:
    weight = graph.constants[conv.inputs[1]].astype(np.float64)
    bias = graph.constants[conv.inputs[2]].astype(np.float64) if conv.input(2) else np.zeros_like(scale)
    column = scale.reshape(-1, *[1] * (weight.ndim - 1))
    inputs = (
        conv.inputs[0],
        _add_constant(graph, f"{conv.inputs[1]}.folded.{output}", weight * column),
        _add_constant(graph, f"{conv.inputs[1]}.folded_bias.{output}", bias * scale + shift),
    )
    return Node("Conv", output, inputs, (output,), conv.attributes)


def _scale_and_shift(graph: ForwardGraph, node: Node, scale: Any, shift: Any) -> list[Node]:
    extents = (-1, *[1] * (len(graph.shapes[node.outputs[0]]) - 2))
    scaled = f"{node.outputs[0]}.scaled"
    graph.shapes[scaled] = graph.shapes[node.outputs[0]]
    graph.dtypes[scaled] = graph.dtypes.get(node.outputs[0], onnx.TensorProto.FLOAT)
    s = _add_constant(graph, f"{node.outputs[0]}.scale", scale.reshape(extents))
    t = _add_constant(graph, f"{node.outputs[0]}.shift", shift.reshape(extents))
    return [
        Node("Mul", scaled, (node.inputs[0], s), (scaled,), {}),
        Node("Add", node.outputs[0], (scaled, t), node.outputs[:1], {}),
    ]


__all__ = ["canonicalise", "fold_batch_norm", "infer_shapes"]
