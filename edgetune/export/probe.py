"""Folds all arithmetic on shapes, whatever the batch. Knows onnx and onnxscript's constant folder.

The batch is set to a conspicuous number, the graph folded, and the same with another number. A constant that is equal
in both does not depend on the batch; one that grows in proportion is rewritten so that it follows the batch again.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper, shape_inference

from edgetune.autodiff.graph import BATCH
from edgetune.codecs.base import Array
from edgetune.errors import ExportError

PROBE_BATCHES = (10007, 1009)  # primes; no extent of a model is the first; b - 1 is told from b by their ratio
_PROBE = PROBE_BATCHES[0]
_ROUNDS = 8
BATCH_SCOPE = "batch."
"""What the names of tensors begin with that are made of nothing but the batch."""
_UNFOLDED = ("Shape", "Size", "SplitToSequence")  # what the folder replaces as soon as it knows a shape
_NEVER_FOLDED = ("ConstantOfShape", "Expand", "Range", "Tile")  # where the batch would be written out as elements
_SHAPE_INPUT = {"Reshape": 1, "Expand": 1, "Resize": 3}  # which input may hold the batch of a model that fixes it
_FLOATS = (TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16)
# Inputs that are settings, not weights: of these operators everything but the data.
_SETTINGS = frozenset(("Resize", "Upsample", "Pad", "Clip", "Range", "OneHot", "ConstantOfShape", "Dropout"))


def fold_shapes(model: onnx.ModelProto, parameters: Collection[str] | None) -> tuple[onnx.ModelProto, frozenset[str]]:
    """Return ``model`` with everything folded that follows from shapes and constants alone, the batch dynamic.

    Nothing that follows from a parameter is folded, because it may be trained.

    Args:
        parameters: names of the initializers that may be trained; None: every float initializer with an axis that is
            not a setting of an operator.

    Returns:
        a new model (``model`` is left without its parameters), and the names of its parameters.

    Raises:
        ExportError: an input has no axes or one of unknown extent besides the batch, or the model computes with its
            batch size in a way that is not known.
    """
    if parameters is None:
        parameters = _likely_parameters(model)
    # Their values decide nothing here, and are most of the model: shapes stand in for them until the end.
    hidden = [tensor for tensor in model.graph.initializer if tensor.name in set(parameters)]
    known = frozenset(tensor.name for tensor in hidden)
    stand_ins = [helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims) for tensor in hidden]
    _remove(model.graph.initializer, known)
    _remove(model.graph.input, known)
    first, second = (_folded(_with_probe_batch(model, probe), probe, stand_ins) for probe in PROBE_BATCHES)
    _restore(first, second)
    _remove(first.graph.input, known)
    first.graph.initializer.extend(hidden)
    return first, known


def _remove(values: Any, names: Collection[str]) -> None:
    """Remove the members of a repeated field that are called one of ``names``."""
    kept = [value for value in values if value.name not in names]
    del values[:]
    values.extend(kept)


def _likely_parameters(model: onnx.ModelProto) -> set[str]:
    settings = {n for node in model.graph.node if node.op_type in _SETTINGS for n in node.input[1:]}
    settings |= {n for node in model.graph.node if node.op_type == "BatchNormalization" for n in node.input[3:]}
    tensors = model.graph.initializer
    return {t.name for t in tensors if t.data_type in _FLOATS and t.dims and t.name not in settings}


def _with_probe_batch(model: onnx.ModelProto, batch: int) -> onnx.ModelProto:
    """Give the leading axis of every input a conspicuous extent, so that all arithmetic on shapes can be folded."""
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
        made = {n.output[0]: n.attribute[0].t for n in probe.graph.node if _holds_tensor(n)} if fixed else {}
        for node in probe.graph.node if fixed else ():
            place = _SHAPE_INPUT.get(node.op_type, len(node.input))
            target = (constants | made).get(node.input[place]) if place < len(node.input) else None
            if target is not None and numpy_helper.to_array(target).reshape(-1)[0] == fixed:
                extents = numpy_helper.to_array(target).copy()
                extents[0] = batch
                target.CopyFrom(numpy_helper.from_array(extents, target.name))
    for value in probe.graph.output:
        value.type.tensor_type.ClearField("shape")
    return probe


def _holds_tensor(node: onnx.NodeProto) -> bool:
    return bool(node.op_type == "Constant" and node.attribute[0].name == "value")


def _folded(model: onnx.ModelProto, batch: int, stand_ins: Sequence[onnx.ValueInfoProto]) -> onnx.ModelProto:
    from onnxscript import ir, optimizer

    def should_fold(node: Any) -> bool | None:
        if node.op_type not in _NEVER_FOLDED:
            return None
        extents = [value.const_value.numpy() for value in node.inputs if value is not None and value.const_value]
        whole = [array for array in extents if array.dtype == np.int64]
        # The folder keeps ConstantOfShape by default, and with it the padding that torch's older exporter computes.
        return not any(((array > 0) & (array % batch == 0)).any() for array in whole)

    model.graph.input.extend(stand_ins)
    result = _with_plain_casts(model)
    for _ in range(_ROUNDS):
        folded = ir.serde.deserialize_model(result)
        optimizer.fold_constants(folded, input_size_limit=1 << 30, output_size_limit=1 << 30, should_fold=should_fold)
        optimizer.remove_unused_nodes(folded)  # what is left of a split into a sequence has no shape
        result = ir.serde.serialize_model(folded)
        if not any(node.op_type in _UNFOLDED for node in result.graph.node):
            break
        # The folder lost a shape on its way; what ONNX infers from the folded graph takes it further.
        result = shape_inference.infer_shapes(result, data_prop=True)
    return result


def _with_plain_casts(model: onnx.ModelProto) -> onnx.ModelProto:
    """Replace CastLike by Cast: the folder takes no element type from an activation, and stops there."""
    inferred = shape_inference.infer_shapes(model, data_prop=True)
    kinds = {v.name: v.type.tensor_type.elem_type for v in [*inferred.graph.input, *inferred.graph.value_info]}
    kinds |= {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "CastLike" and kinds.get(node.input[1]):
            node.CopyFrom(
                helper.make_node("Cast", node.input[:1], node.output, name=node.name, to=kinds[node.input[1]])
            )
    return model


class _Batch:
    """Tensors that have the batch axis and nothing else, made from the model's first input when first asked for."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        constants = {tensor.name for tensor in graph.initializer}
        self._input = next(value for value in graph.input if value.name not in constants)
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self._made: dict[str, str] = {}
        self._count = 0

    def constant(self, value: Array) -> str:
        name = f"{BATCH_SCOPE}const.{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(value, name))
        return name

    def node(self, op: str, inputs: Sequence[str], **attributes: Any) -> str:
        name = f"{BATCH_SCOPE}{op.lower()}.{self._count}"
        self._count += 1
        self.nodes.append(helper.make_node(op, inputs, [name], name=name, **attributes))
        return name

    def filled(self, value: float) -> str:
        """Return the name of float32 [batch], every element ``value``. Where, so that NaN does not get through."""
        if f"{value}" not in self._made:
            kind = self._input.type.tensor_type
            rank, x = len(kind.shape.dim), self._input.name
            if rank > 1:
                bounds = (np.zeros(rank - 1), np.ones(rank - 1), np.arange(1, rank))
                x = self.node("Slice", [x, *(self.constant(b.astype(np.int64)) for b in bounds)])
            row = self.node("Reshape", [x, self.constant(np.array([-1], np.int64))])
            if kind.elem_type != TensorProto.FLOAT:
                row = self.node("Cast", [row], to=TensorProto.FLOAT)
            choice = [self.constant(np.array([False])), row, self.constant(np.array([value], np.float32))]
            self._made[f"{value}"] = self.node("Where", choice)
        return self._made[f"{value}"]

    def along(self, value: float, axis: int, rank: int) -> str:
        """Return :meth:`filled` with ``rank`` axes, the batch at ``axis``."""
        row = self.filled(value)
        return self.node("Reshape", [row, self.constant(np.array([-1 if i == axis else 1 for i in range(rank)]))])

    def count(self, factor: float, kind: int) -> str:
        """Return ``factor`` times the batch, a number of the element type ``kind``."""
        total = self.node("ReduceSum", [self.filled(factor)], keepdims=0)
        return total if kind == TensorProto.FLOAT else self.node("Cast", [total], to=kind)


def _restore(model: onnx.ModelProto, other: onnx.ModelProto) -> None:
    """Make the batch dynamic again in ``model``; ``other`` is the same with the other probe."""
    inferred = shape_inference.infer_shapes(model, data_prop=True)
    values = [*inferred.graph.input, *inferred.graph.value_info, *inferred.graph.output]
    kinds = {v.name: v.type.tensor_type for v in values}
    kinds |= {t.name: helper.make_tensor_type_proto(t.data_type, t.dims).tensor_type for t in model.graph.initializer}
    scaled = _scaled_constants(model, other)
    fixed = {name: numpy_helper.to_array(tensor) for name, tensor in _all_constants(model).items() if not tensor.dims}
    batch = _Batch(model.graph)
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        found = [(i, name) for i, name in enumerate(node.input) if name in scaled]
        if node.op_type == "Constant" and node.output[0] in scaled:
            continue
        for index, name in found:
            if node.op_type == "Range" and (
                index != 1 or fixed.get(node.input[0]) != 0 or fixed.get(node.input[2]) != 1
            ):
                raise _unknown(node)
            node = _follow_batch(node, index, scaled[name], kinds, batch)
        nodes.extend([*batch.nodes, node])
        batch.nodes.clear()
    kept = [tensor for tensor in model.graph.initializer if tensor.name not in scaled]
    del model.graph.initializer[:]
    model.graph.initializer.extend([*kept, *batch.constants])
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    del model.graph.value_info[:]
    for value in model.graph.input:
        dims = value.type.tensor_type.shape.dim
        if dims and dims[0].dim_value == _PROBE:
            dims[0].Clear()
            dims[0].dim_param = BATCH


def _scaled_constants(model: onnx.ModelProto, other: onnx.ModelProto) -> dict[str, Array]:
    """Return the constants that differ between the two probes: each element a number, or a multiple of the batch."""
    known, second = _all_constants(model), _all_constants(other)
    scaled: dict[str, Array] = {}
    for name, tensor in known.items():
        if name not in second:
            continue
        value, changed = numpy_helper.to_array(tensor), numpy_helper.to_array(second[name])
        if np.array_equal(value, changed, equal_nan=value.dtype.kind == "f"):
            continue
        wide, expected = value.astype(np.float64), changed.astype(np.float64)
        grows = np.isclose(wide / PROBE_BATCHES[0], expected / PROBE_BATCHES[1], rtol=2e-7) & (wide != 0)
        if not np.all(grows | (wide == expected)):
            raise ExportError(f"the model computes with its batch size (in '{name}'); samples must stay independent")
        scaled[name] = value
    return scaled


def _all_constants(model: onnx.ModelProto) -> dict[str, onnx.TensorProto]:
    found = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            found[node.output[0]] = node.attribute[0].t
        elif node.op_type == "Constant" and node.attribute[0].name in ("value_int", "value_ints"):
            value = np.array(helper.get_attribute_value(node.attribute[0]), np.int64)
            found[node.output[0]] = numpy_helper.from_array(value, node.output[0])
    return found


def _follow_batch(
    node: onnx.NodeProto, index: int, value: Array, kinds: dict[str, Any], batch: _Batch
) -> onnx.NodeProto:
    """Return ``node`` such that its input ``index``, the constant ``value`` at the probe, follows the batch."""
    scaled = (value != 0) & (value % _PROBE == 0) if value.dtype.kind == "i" else np.ones(value.shape, bool)
    op = node.op_type
    if op == "Reshape":
        made = [d.dim_value for d in kinds[node.output[0]].shape.dim]
        value = np.where(value == -1, made, value) if len(made) == len(value) else value
        scaled = (value > 0) & (value % _PROBE == 0)
    if op == "Reshape" and np.count_nonzero(scaled | (value == -1)) == 1:
        inputs = [node.input[0], batch.constant(np.where(scaled, -1, value))]
        return helper.make_node(op, inputs, node.output, name=node.name)
    if op == "Range":
        ones = batch.node("Cast", [batch.filled(1.0)], to=TensorProto.INT64)
        return helper.make_node(
            "CumSum", [ones, batch.constant(np.array(0, np.int64))], node.output, name=node.name, exclusive=1
        )
    if op == "Resize" and index == 3 and np.array_equal(np.flatnonzero(scaled), [0]):
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute} | {
            "axes": list(range(2, len(value)))
        }
        inputs = [node.input[0], *node.input[1:3], batch.constant(value[2:])]
        return helper.make_node(op, inputs, node.output, name=node.name, **attributes)
    if op in ("Expand", "ConstantOfShape") and np.all(value[scaled] == _PROBE):
        return _expansion(node, value, scaled, kinds, batch)
    if op not in ("Reshape", "Expand", "ConstantOfShape", "Slice", "Pad", "Tile") and value.size == 1:
        kind = helper.np_dtype_to_tensor_dtype(value.dtype)
        count = batch.count(float(value.reshape(())) / _PROBE, kind)
        if value.ndim:
            count = batch.node("Reshape", [count, batch.constant(np.array(value.shape, np.int64))])
        changed = onnx.NodeProto()
        changed.CopyFrom(node)
        changed.input[index] = count
        return changed
    raise _unknown(node)


def _unknown(node: onnx.NodeProto) -> ExportError:
    return ExportError(
        f"the model computes with its batch size ({node.op_type} '{node.output[0]}'); samples must stay independent"
    )


def _expansion(
    node: onnx.NodeProto, target: Array, scaled: Array, kinds: dict[str, Any], batch: _Batch
) -> onnx.NodeProto:
    """Return Expand or ConstantOfShape to a shape with the batch as broadcasting arithmetic."""
    if node.op_type == "ConstantOfShape":
        filling = numpy_helper.to_array(node.attribute[0].t) if node.attribute else np.zeros(1, np.float32)
        x, shape, kind = batch.constant(filling), (1,), helper.np_dtype_to_tensor_dtype(filling.dtype)
    else:
        x, kind = node.input[0], kinds[node.input[0]].elem_type
        shape = tuple(d.dim_value for d in kinds[node.input[0]].shape.dim)
    rank = len(target)
    own = (1,) * (rank - len(shape)) + shape
    axes = [int(i) for i in np.flatnonzero(scaled) if own[i] % _PROBE]
    static = np.where(scaled, 1, target)
    if any(wanted not in (1, have) for wanted, have in zip(static, own, strict=True)) or len(shape) != rank:
        x = batch.node("Expand", [x, batch.constant(static)])
    if not axes:
        return helper.make_node("Identity", [x], node.output, name=node.name)
    if len(axes) > 1:
        raise ExportError(f"'{node.output[0]}' has the batch on several axes; samples must stay independent")
    if kind == TensorProto.FLOAT:
        return helper.make_node("Add", [x, batch.along(0.0, axes[0], rank)], node.output, name=node.name)
    # A sum with 0, and for truth values a conjunction with true, changes nothing but the shape.
    neutral = batch.node("Cast", [batch.along(float(kind == TensorProto.BOOL), axes[0], rank)], to=kind)
    op = "And" if kind == TensorProto.BOOL else "Add"
    return helper.make_node(op, [x, neutral], node.output, name=node.name)
