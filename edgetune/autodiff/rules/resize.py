"""Reverse rule of Resize: interpolation is linear, axis by axis, so dX is a product with a transposed matrix per axis.

    Y = M₁ ⊗ M₂ ⊗ .. X  over the resized axes,   dX = M₁ᵀ ⊗ M₂ᵀ ⊗ .. dY

Each M follows the definition in the ONNX standard. Where that leaves room (single-precision coordinates, the order of
clamping), it is what onnxruntime computes; a test holds the matrices to its forward pass.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from edgetune.autodiff.graph import ForwardGraph, Node
from edgetune.autodiff.rule import Context, Rule, nothing
from edgetune.autodiff.rules.axes import integers, multiply_along, refuse_batch
from edgetune.codecs.base import Array
from edgetune.errors import UnsupportedOperatorError

_F = np.float32


def _coordinates(mode: str, size: int, result: int, scale: float, roi: tuple[float, float]) -> Array:
    """Return where each of ``result`` elements lies in the input, float32 as in onnxruntime."""
    i, s = np.arange(result, dtype=np.float32), _F(scale)
    if mode == "asymmetric":
        return np.asarray(i / s)
    if mode == "align_corners":
        return np.asarray(i * _F(size - 1) / _F(result - 1) if result > 1 else i * 0)
    if mode == "tf_crop_and_resize":
        start, end = _F(roi[0]), _F(roi[1])
        if result == 1:
            return np.asarray([0.5 * (start + end) * _F(size - 1)], np.float32)
        return np.asarray(start * _F(size - 1) + i * (end - start) * _F(size - 1) / _F(result - 1))
    if mode == "pytorch_half_pixel" and result == 1:
        return np.asarray(i * 0)
    return np.asarray((i + _F(0.5)) / s - _F(0.5))


def _nearest(x: Array, size: int, mode: str) -> Array:
    rounded = {
        "floor": np.floor(x),
        "ceil": np.ceil(x),
        "round_prefer_floor": np.ceil(x - _F(0.5)),
        "round_prefer_ceil": np.floor(x + _F(0.5)),
    }[mode]
    matrix = np.zeros((len(x), size))
    matrix[np.arange(len(x)), np.clip(rounded, 0, size - 1).astype(int)] = 1.0
    return matrix


def _linear(x: Array, size: int) -> Array:
    inside = np.clip(x, 0, size - 1)
    below = np.minimum(np.floor(inside).astype(int), size - 1)
    share = inside - below
    matrix = np.zeros((len(x), size))
    rows = np.arange(len(x))
    matrix[rows, below] += 1.0 - share
    matrix[rows, np.minimum(below + 1, size - 1)] += share
    return matrix


def _cubic(x: Array, size: int, a: float, exclude_outside: bool) -> Array:
    # Keys, 1981: the kernel with the free parameter a
    first = np.floor(x).astype(int)
    t = (x - first).astype(np.float64)
    weights = np.stack([
        ((a * (t + 1) - 5 * a) * (t + 1) + 8 * a) * (t + 1) - 4 * a,
        ((a + 2) * t - (a + 3)) * t * t + 1,
        ((a + 2) * (1 - t) - (a + 3)) * (1 - t) * (1 - t) + 1,
        ((a * (2 - t) - 5 * a) * (2 - t) + 8 * a) * (2 - t) - 4 * a,
    ])  # fmt: skip
    places = np.stack([first - 1, first, first + 1, first + 2])
    if exclude_outside:
        weights = np.where((places >= 0) & (places < size), weights, 0.0)
        weights = weights / weights.sum(axis=0)
    matrix = np.zeros((len(x), size))
    for place, weight in zip(np.clip(places, 0, size - 1), weights, strict=True):
        np.add.at(matrix, (np.arange(len(x)), place), weight)
    return matrix


def interpolation_matrices(graph: ForwardGraph, node: Node) -> dict[int, Array]:
    """Return, per resized axis, the float32 matrix [output extent, input extent] of a Resize node.

    Raises:
        UnsupportedOperatorError: it resizes the batch, filters (``antialias``), or its scales depend on the data.
    """
    shape, result = graph.shapes[node.inputs[0]], graph.shapes[node.outputs[0]]
    attributes = node.attributes
    mode = str(attributes.get("mode", "nearest"))
    transformation = str(attributes.get("coordinate_transformation_mode", "half_pixel"))
    if attributes.get("antialias", 0):
        raise UnsupportedOperatorError(f"Resize '{node.name}': antialias has no backward rule; set antialias=False")
    axes = [axis % len(shape) for axis in attributes.get("axes", range(len(shape)))]
    roi, scales = _given(graph, node, 1), _given(graph, node, 2)
    matrices = {}
    for k, axis in enumerate(axes):
        scale = float(scales[k]) if scales else result[axis] / shape[axis] if shape[axis] > 0 else 1.0
        crop = (roi[k], roi[len(axes) + k]) if roi and transformation == "tf_crop_and_resize" else (0.0, 1.0)
        if result[axis] == shape[axis] and scale == 1.0 and crop == (0.0, 1.0):
            continue
        refuse_batch(node, shape, axis, "resizes")
        x = _coordinates(transformation, shape[axis], result[axis], scale, crop)
        if mode == "nearest":
            matrix = _nearest(x, shape[axis], str(attributes.get("nearest_mode", "round_prefer_floor")))
        elif mode == "linear":
            matrix = _linear(x, shape[axis])
        else:
            excluded = bool(attributes.get("exclude_outside", 0))
            matrix = _cubic(x, shape[axis], float(attributes.get("cubic_coeff_a", -0.75)), excluded)
        if transformation == "tf_crop_and_resize":
            matrix[(x < 0) | (x > shape[axis] - 1)] = 0.0  # these take the extrapolation value
        matrices[axis] = matrix.astype(np.float32)
    return matrices


def _given(graph: ForwardGraph, node: Node, index: int) -> list[float]:
    name = node.input(index)
    if name and name not in graph.constants:
        integers(graph, node, index)  # raises: it depends on the data
    return [float(v) for v in graph.constants[name].reshape(-1)] if name else []


def _resize(ctx: Context, node: Node, wrt: frozenset[int], dy: str) -> Mapping[int, str]:
    shape: Sequence[int] = list(ctx.graph.shapes[node.outputs[0]])
    matrices = interpolation_matrices(ctx.graph, node)
    # The axis that shrinks most goes first: the rest has less to do.
    for axis in sorted(matrices, key=lambda axis: math.log(matrices[axis].shape[1] / matrices[axis].shape[0])):
        dy = multiply_along(ctx.g, dy, shape, axis, np.ascontiguousarray(matrices[axis].T))
        shape = [*shape[:axis], matrices[axis].shape[1], *shape[axis + 1 :]]
    return {0: dy}


RULES = {"Resize": Rule(nothing, _resize, "nothing")}
