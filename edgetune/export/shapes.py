"""The shape and the element type of every tensor of a model whose batch is dynamic. Knows onnx."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import helper, shape_inference

from edgetune.autodiff.graph import BATCH
from edgetune.errors import ExportError

_PROBES = (2, 3)  # batches at which shapes are inferred; what scales with them is the batch


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
        if sum(extent <= 0 for extent in shapes[name]) > 1:
            raise ExportError(f"'{name}' has the batch on several axes; samples must stay independent")
    dtypes = {name: kind for name, (_, kind) in seen[0].items()}
    return shapes, dtypes | {name: helper.np_dtype_to_tensor_dtype(value.dtype) for name, value in constants.items()}


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
