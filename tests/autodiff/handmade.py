"""Small ONNX models made by hand: one layer under test, a ReLU, a classifier."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from edgetune.bundle import Array

CLASSES = 4


def model_of(
    nodes: Sequence[onnx.NodeProto], shape: Sequence[int], constants: dict[str, Array], outputs: int = CLASSES
) -> onnx.ModelProto:
    """Return the model with input x [batch, *shape] and output y [batch, outputs]."""
    graph = helper.make_graph(
        list(nodes),
        "handmade",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", *shape])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", outputs])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


@dataclass(frozen=True)
class ConvCase:
    """One convolution: input [b, *shape], ``out`` channels; ``pads`` are top, left, bottom, right."""

    shape: tuple[int, int, int]
    out: int
    kernel: tuple[int, int] = (3, 3)
    groups: int = 1
    strides: tuple[int, int] = (1, 1)
    dilations: tuple[int, int] = (1, 1)
    pads: tuple[int, int, int, int] = (1, 1, 1, 1)
    bias: bool = False
    extra: dict[str, Any] = field(default_factory=dict, hash=False)

    def output(self) -> tuple[int, int]:
        """Return the output's height and width."""
        padded = (self.shape[1] + self.pads[0] + self.pads[2], self.shape[2] + self.pads[1] + self.pads[3])
        zipped = zip(padded, self.kernel, self.strides, self.dilations, strict=True)
        height, width = ((n - d * (k - 1) - 1) // s + 1 for n, k, s, d in zipped)
        return height, width

    def attributes(self) -> dict[str, Any]:
        """Return the attributes of the Conv node."""
        return {
            "kernel_shape": list(self.kernel), "group": self.groups, "strides": list(self.strides),
            "dilations": list(self.dilations), "pads": list(self.pads), **self.extra,
        }  # fmt: skip

    def model(self) -> onnx.ModelProto:
        """Return x -> Conv (conv.weight, maybe conv.bias) -> Relu -> Flatten -> Gemm (head.weight, head.bias) -> y."""
        rng = np.random.default_rng(7)
        height, width = self.output()
        features = self.out * height * width
        constants = {
            "conv.weight": rng.standard_normal((self.out, self.shape[0] // self.groups, *self.kernel)) * 0.3,
            "head.weight": rng.standard_normal((CLASSES, features)) / math.sqrt(features),
            "head.bias": rng.standard_normal(CLASSES) * 0.1,
        }
        if self.bias:
            constants["conv.bias"] = rng.standard_normal(self.out) * 0.1
        inputs = ["x", "conv.weight", *(["conv.bias"] if self.bias else [])]
        nodes = [
            helper.make_node("Conv", inputs, ["a"], **self.attributes()),
            helper.make_node("Relu", ["a"], ["r"]),
            helper.make_node("Flatten", ["r"], ["f"]),
            helper.make_node("Gemm", ["f", "head.weight", "head.bias"], ["y"], transB=1),
        ]
        return model_of(nodes, self.shape, {name: value.astype(np.float32) for name, value in constants.items()})


# Each is an error of published code of the method, or the case beside one.
CONVS = {
    "plain": ConvCase((6, 7, 8), 5),
    "bias": ConvCase((6, 7, 8), 5, bias=True),
    "grouped": ConvCase((6, 7, 8), 4, groups=2),
    "depthwise": ConvCase((6, 7, 8), 6, groups=6),
    "depthwise_twofold": ConvCase((3, 7, 8), 6, groups=3),
    "dilation_2_2": ConvCase((6, 9, 10), 5, dilations=(2, 2), pads=(2, 2, 2, 2)),
    "dilation_2_1": ConvCase((6, 9, 8), 5, dilations=(2, 1)),
    "stride_2_1": ConvCase((6, 8, 7), 5, strides=(2, 1)),
    "stride_equals_dilation": ConvCase((6, 9, 9), 5, strides=(2, 2), dilations=(2, 2)),
    "stride_with_leftover_rows": ConvCase((6, 10, 9), 5, strides=(3, 2), pads=(0, 0, 0, 0)),
    "asymmetric_padding": ConvCase((6, 7, 8), 5, pads=(2, 0, 1, 3)),
    "pointwise": ConvCase((6, 7, 8), 5, kernel=(1, 1), pads=(0, 0, 0, 0)),
    "pointwise_stride_2": ConvCase((6, 7, 8), 5, kernel=(1, 1), strides=(2, 2), pads=(0, 0, 0, 0)),
    "kernel_3_2": ConvCase((6, 7, 8), 5, kernel=(3, 2), pads=(1, 0, 1, 1)),
    "one_row": ConvCase((6, 1, 9), 5, kernel=(1, 3), pads=(0, 1, 0, 1)),
    "one_position": ConvCase((6, 1, 1), 5, kernel=(1, 1), pads=(0, 0, 0, 0)),
    "everything_at_once": ConvCase(
        (8, 11, 9), 4, (3, 2), groups=2, strides=(2, 1), dilations=(1, 2), pads=(0, 2, 1, 1), bias=True
    ),
}


def linear_model(shape: Sequence[int], out: int = 5, op: str = "MatMul") -> onnx.ModelProto:
    """Return x -> MatMul or Gemm (linear.weight) -> Relu -> Flatten -> Gemm (head.weight) -> y."""
    rng = np.random.default_rng(7)
    features = math.prod(shape[:-1]) * out
    weight = rng.standard_normal((out, shape[-1]) if op == "Gemm" else (shape[-1], out))
    constants = {"linear.weight": weight, "head.weight": rng.standard_normal((features, CLASSES)) / math.sqrt(features)}
    attributes: dict[str, Any] = {"transB": 1} if op == "Gemm" else {}
    nodes = [
        helper.make_node(op, ["x", "linear.weight"], ["a"], **attributes),
        helper.make_node("Relu", ["a"], ["r"]),
        helper.make_node("Flatten", ["r"], ["f"]),
        helper.make_node("Gemm", ["f", "head.weight"], ["y"]),
    ]
    return model_of(nodes, shape, {name: value.astype(np.float32) for name, value in constants.items()})
