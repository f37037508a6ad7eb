"""Convolutions written as matrix products, held to torch: forward, gradient of the input, taps of the weight."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from edgetune.autodiff import convolution
from edgetune.autodiff.builder import IR_VERSION, OPSET, GraphBuilder
from edgetune.autodiff.convolution import Spread
from edgetune.autodiff.rules.conv import Geometry, form_of

RNG = np.random.default_rng(5)


def run(build: Callable[[GraphBuilder], str], **feeds: np.ndarray) -> np.ndarray:
    """Return what the graph makes whose nodes ``build`` emits; the batch is unknown to it."""
    g = GraphBuilder()
    made = build(g)
    inputs = [
        helper.make_tensor_value_info(n, TensorProto.FLOAT, ["b" if n in ("x", "dy") else v.shape[0], *v.shape[1:]])
        for n, v in feeds.items()
    ]
    output = helper.make_tensor_value_info(made, TensorProto.FLOAT, None)
    constants = [numpy_helper.from_array(value, name) for name, value in g.constants.items()]
    graph = helper.make_graph(g.nodes, "g", inputs, [output], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (result,) = session.run(None, feeds)
    return np.asarray(result)


def draw(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def relative(found: np.ndarray, expected: torch.Tensor) -> float:
    wanted = expected.detach().numpy()
    assert found.shape == wanted.shape
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


@pytest.mark.parametrize("size", [(7, 7), (4, 9), (14, 5), (6, 12)])
@pytest.mark.parametrize("pads", [(1, 1), (0, 0), (2, 1)])
@pytest.mark.parametrize("bias", [False, True])
def test_winograd_is_the_convolution_and_its_input_gradient(
    size: tuple[int, int], pads: tuple[int, int], bias: bool
) -> None:
    x, w, b = draw(3, 5, *size).astype(np.float64), draw(6, 5, 3, 3), draw(6)
    tx = torch.from_numpy(x).requires_grad_()
    y = torch.conv2d(tx, torch.from_numpy(w).double(), torch.from_numpy(b).double() if bias else None, padding=pads)
    dy = draw(*y.shape)
    gradients = torch.autograd.grad(y, [tx], torch.from_numpy(dy).double())
    result = (y.shape[2], y.shape[3])
    forward = Spread(size, result, (3, 3), pads, 6, 5)
    feeds = {"x": x.astype(np.float32), "w": w} | ({"own": b} if bias else {})
    found = run(lambda g: convolution.emit_winograd(g, "x", "w", "own" if bias else "", forward), **feeds)
    assert relative(found, y) < 2e-6
    back = Spread(result, size, (3, 3), (2 - pads[0], 2 - pads[1]), 6, 5, reverse=True)
    found = run(lambda g: convolution.emit_winograd(g, "x", "w", "", back), x=dy, w=w)
    assert relative(found, gradients[0]) < 2e-6


def test_winograd_of_many_channels_loses_little_more_than_the_plain_sum() -> None:
    x, w = np.maximum(draw(2, 256, 8, 8), 0), draw(128, 256, 3, 3)
    exact = torch.conv2d(torch.from_numpy(x).double(), torch.from_numpy(w).double(), padding=1)
    spread = Spread((8, 8), (8, 8), (3, 3), (1, 1), 128, 256)
    assert relative(run(lambda g: convolution.emit_winograd(g, "x", "w", "", spread), x=x, w=w), exact) < 3e-6


@pytest.mark.parametrize("size", [(7, 5), (4, 4, 3), (6,)])
@pytest.mark.parametrize("bias", [False, True])
def test_pointwise_is_the_convolution_and_its_input_gradient(size: tuple[int, ...], bias: bool) -> None:
    ones = (1,) * len(size)
    x, w, b = draw(3, 5, *size), draw(6, 5, *ones), draw(6)
    forward = Spread(size, size, ones, (0,) * len(size), 6, 5)
    expected = torch.einsum("bc...,oc->bo...", torch.from_numpy(x), torch.from_numpy(w).flatten(1))
    if bias:
        expected = expected + torch.from_numpy(b).reshape(-1, *ones)
    feeds = {"x": x, "w": w} | ({"own": b} if bias else {})
    found = run(lambda g: convolution.emit_pointwise(g, "x", "w", "own" if bias else "", forward), **feeds)
    assert relative(found, expected) < 1e-6
    dy = draw(3, 6, *size)
    back = Spread(size, size, ones, (0,) * len(size), 6, 5, reverse=True)
    expected = torch.einsum("bo...,oc->bc...", torch.from_numpy(dy), torch.from_numpy(w).flatten(1))
    assert relative(run(lambda g: convolution.emit_pointwise(g, "x", "w", "", back), x=dy, w=w), expected) < 1e-6


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("bias", [False, True])
def test_depthwise_is_the_convolution_and_its_gradients(stride: int, dilation: int, bias: bool) -> None:
    size, kernel, pads = (7, 8), (3, 5), (1, 2)
    x, w, b = draw(3, 4, *size), draw(4, 1, *kernel), draw(4)
    tx, tw = (torch.from_numpy(value).double().requires_grad_() for value in (x, w))
    offset = torch.from_numpy(b).double() if bias else None
    y = torch.conv2d(tx, tw, offset, stride=stride, dilation=dilation, padding=pads, groups=4)
    dy = draw(*y.shape)
    gradients = torch.autograd.grad(y, [tx, tw], torch.from_numpy(dy).double())
    result = tuple(y.shape[2:])
    connected = convolution.depthwise_map(size, result, kernel, (stride,) * 2, (dilation,) * 2, pads)
    feeds = {"x": x, "w": w} | ({"own": b} if bias else {})
    name = "own" if bias else ""
    found = run(lambda g: convolution.emit_depthwise(g, "x", "w", name, connected, result), **feeds)
    assert relative(found, y) < 1e-6
    turned = np.ascontiguousarray(connected.transpose(0, 2, 1))
    found = run(lambda g: convolution.emit_depthwise(g, "x", "w", "", turned, size), x=dy, w=w)
    assert relative(found, gradients[0]) < 1e-6
    found = run(lambda g: convolution.emit_depthwise_taps(g, "x", "dy", connected), x=x, dy=dy)
    assert relative(found, gradients[1].flatten(1)) < 1e-6


@pytest.mark.parametrize(
    ("change", "form"),
    [
        ({}, "winograd"),
        ({"in_channels": 64}, ""),
        ({"strides": (2, 2)}, ""),
        ({"dilations": (2, 2)}, ""),
        ({"input": (28, 28), "output": (28, 28)}, ""),
        ({"kernel": (5, 5)}, ""),
        ({"groups": 2}, ""),
        ({"groups": 512}, "depthwise"),
        ({"groups": 512, "input": (14, 14), "output": (14, 14)}, ""),
        ({"kernel": (1, 1), "pads_begin": (0, 0), "pads_end": (0, 0)}, "pointwise"),
        ({"kernel": (1, 1)}, ""),
    ],
)
def test_the_form_follows_the_geometry(change: dict[str, object], form: str) -> None:
    numbers: dict[str, object] = {
        "groups": 1, "strides": (1, 1), "dilations": (1, 1), "pads_begin": (1, 1), "pads_end": (1, 1),
        "kernel": (3, 3), "input": (7, 7), "output": (7, 7), "in_channels": 512, "out_channels": 512,
    }  # fmt: skip
    assert form_of(Geometry(**(numbers | change))) == form  # type: ignore[arg-type]
