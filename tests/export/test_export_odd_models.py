"""Models that once went wrong: orders of layers, names, element types, samples that are mixed, ONNX from elsewhere."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import nn

import edgetune
from edgetune.bundle import Array
from edgetune.errors import ExportError
from tests.export.small_models import (
    BATCH,
    Traced,
    assert_equal_gradients,
    drawn,
    seeded,
    session_of,
    torch_gradients,
    with_statistics,
)


class Calls(nn.Module):
    """A forward function over named parts."""

    def __init__(self, function: Callable[..., Any], **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self.function(self, *inputs)


def check(model: nn.Module, x: Array, tmp_path: Path, **options: Any) -> edgetune.TrainingSession:
    """Hold predictions and gradients of one step to torch; take the step; return the session."""
    bundle = edgetune.export(model, torch.from_numpy(x[:2]), tmp_path / "b", codec="dense", **options)
    session, y = session_of(bundle), np.array([0, 2, 1])
    wide = torch.from_numpy(x).double()
    expected = torch_gradients(model, lambda m: nn.functional.cross_entropy(m(wide), torch.from_numpy(y)))
    _, found = session.gradients(x, y)
    logits = copy.deepcopy(model).double()(wide).detach().numpy()
    np.testing.assert_allclose(session.predict(x), logits, rtol=1e-4, atol=1e-5)
    assert_equal_gradients(found, {name.removesuffix(".inner"): value for name, value in expected.items()})
    session.step(x, y)
    return session


def pre_activated() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(16, 3)
    )


def test_batch_norm_behind_an_activation(tmp_path: Path) -> None:
    check(with_statistics(seeded(pre_activated)), drawn((BATCH, 1, 6, 6)), tmp_path, last=1)


def test_a_trained_bias_of_a_frozen_convolution_is_not_folded_away(tmp_path: Path) -> None:
    model = with_statistics(
        seeded(lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 3)))
    )
    session = check(model, drawn((BATCH, 1, 6, 6)), tmp_path, train=r"^0\.bias")
    assert set(session.parameters()) == {"0.bias"}


def test_chunks_of_one_tensor(tmp_path: Path) -> None:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        q, k, v = m.qkv(x).chunk(3, -1)
        mixed: torch.Tensor = m.head((torch.softmax(q @ k.transpose(1, 2), -1) @ v).mean(1))
        return mixed

    model = seeded(lambda: Calls(forward, qkv=nn.Linear(4, 12), head=nn.Linear(4, 3)))
    check(model, drawn((BATCH, 5, 4)), tmp_path, last="all")


def test_parameters_without_axes_and_with_names_that_a_bundle_uses(tmp_path: Path) -> None:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = m.layer(x) / m.temperature * m.step + m.loss
        return result

    parts = {name: nn.Parameter(torch.tensor([1.5, 0.5, -1.0])) for name in ("step", "loss")}
    model = seeded(lambda: Calls(forward, layer=nn.Linear(5, 3), temperature=nn.Parameter(torch.tensor(1.3)), **parts))
    bundle = edgetune.export(model, torch.zeros(2, 5), tmp_path / "b", last="all", codec="dense")
    x, y = drawn((BATCH, 5)), np.array([0, 2, 1])
    expected = torch_gradients(
        model, lambda m: nn.functional.cross_entropy(m(torch.from_numpy(x).double()), torch.from_numpy(y))
    )
    session = session_of(bundle)
    _, found = session.gradients(x, y)
    assert_equal_gradients({name.removesuffix(".inner"): value for name, value in found.items()}, expected)
    assert found["temperature"].shape == () == session.parameters()["temperature"].shape
    session.step(x, y)
    resumed = session_of(bundle)
    resumed.load_state(session.state())
    np.testing.assert_array_equal(resumed.predict(x), session.predict(x))


def test_the_model_stays_in_the_mode_that_it_was_in(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.Dropout(), nn.Linear(4, 3)).train()
    model[1].eval()
    edgetune.export(model, torch.zeros(2, 5), tmp_path / "b", last=0)
    assert model.training and model[0].training and not model[1].training


REFUSED: dict[str, tuple[Callable[[Any, torch.Tensor], Any], dict[str, Any], str]] = {
    "softmax over the batch": (lambda m, x: m.layer(torch.softmax(x, 0)), {}, "works along the batch"),
    "sum over the batch so far": (lambda m, x: m.layer(torch.cumsum(x, 0)), {}, "works along the batch"),
    "an output without the batch": (lambda m, x: (m.layer(x), m.layer.bias * 2), {"outputs": ["output", "output.1"]},
                                    r"'output\.1' has the shape.*expected \[batch"),
    "the batch behind": (lambda m, x: m.layer(x).t(), {}, r"'output' has the shape.*expected \[batch"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(tmp_path: Path, name: str) -> None:
    forward, options, message = REFUSED[name]
    with pytest.raises(ExportError, match=message):
        edgetune.export(Calls(forward, layer=nn.Linear(5, 3)), torch.zeros(2, 5), tmp_path / "b", last=0, **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda z, y: ((z - y) ** 2).sum() / len(z), r"x\.shape\[0\] instead of len"),
        (lambda z, y: ((z - y) ** 2).mean() + z.std(0).mean(), "computes with its batch size"),
        (lambda z, y: (z @ z.t()).mean() + y.mean(), "has the batch on several axes"),
    ],
    ids=["len", "one less than the batch", "all pairs"],
)
def test_losses_that_know_the_batch(tmp_path: Path, function: Any, message: str) -> None:
    """Each of them once gave a wrong number without a word, or no message that a user could follow."""
    with pytest.raises(ExportError, match=message):
        edgetune.export(
            nn.Linear(5, 3), torch.zeros(2, 5), tmp_path / "b", last=0, loss=Traced(function),
            example_target=torch.zeros(2, 3),
        )  # fmt: skip


def test_truth_values_cast_twice(tmp_path: Path) -> None:
    def loss(z: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        wanted = nn.functional.one_hot(y, 3).to(z.dtype)
        return nn.functional.binary_cross_entropy_with_logits(z, wanted)

    model = nn.Linear(5, 3)
    bundle = edgetune.export(
        model, torch.zeros(2, 5), tmp_path / "b", last=0, codec="dense", loss=Traced(loss),
        example_target=torch.zeros(2, dtype=torch.int64),
    )  # fmt: skip
    x, y = drawn((BATCH, 5)), np.array([0, 2, 1])
    _, found = session_of(bundle).gradients(x, y)
    expected = torch_gradients(model, lambda m: loss(m(torch.from_numpy(x).double()), torch.from_numpy(y)))
    assert_equal_gradients(found, expected)


def test_other_floats_are_not_trained(tmp_path: Path) -> None:
    scale = nn.Parameter(torch.ones(3).double())
    model = Calls(lambda m, x: m.layer(x) * m.scale.to(x.dtype), layer=nn.Linear(5, 3), scale=scale)
    with pytest.raises(ExportError, match=r"'scale' is float64.*float32"):
        edgetune.export(model, torch.zeros(2, 5), tmp_path / "b", last="all")


def test_a_shared_batch_norm_is_not_trained(tmp_path: Path) -> None:
    model = Calls(lambda m, x: m.head(m.norm(x) + m.norm(x * x)), norm=nn.BatchNorm1d(5), head=nn.Linear(5, 3))
    with pytest.raises(ExportError, match=r"shares its statistics 'norm\.running_mean'"):
        edgetune.export(model, torch.zeros(2, 5), tmp_path / "b", train="norm", batch_norm="trained")


@pytest.mark.parametrize("tokens", [4, 5])
def test_a_new_head_where_another_axis_is_as_long(tmp_path: Path, tokens: int) -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 4), nn.Tanh())
    bundle = edgetune.export(model, torch.zeros(2, tokens, 5), tmp_path / "b", last=0, new_head=7, loss="mse")
    assert bundle.manifest.outputs[0].shape == (tokens, 7)
    session_of(bundle).step(drawn((BATCH, tokens, 5)), drawn((BATCH, tokens, 7)))


def test_a_new_head_before_a_resize(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 1), nn.Upsample(scale_factor=2, mode="bilinear"))
    bundle = edgetune.export(model, torch.zeros(2, 1, 4, 4), tmp_path / "b", last=0, new_head=5)
    assert bundle.manifest.outputs[0].shape == (5, 8, 8)


# -- ONNX from elsewhere ----------------------------------------------------------------------------------------------


def file_of(
    nodes: list[onnx.NodeProto], shape: list[Any], weights: dict[str, Array], opset: int, functions: Any = ()
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    opsets = [helper.make_opsetid("", opset), *([helper.make_opsetid("own", 1)] if functions else [])]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8, functions=list(functions))


CONV = helper.make_node("Conv", ["x", "w"], ["c"])
CONV_WEIGHT = {"w": drawn((4, 2, 3, 3))}
TRANSPOSED_WEIGHT = {"w": drawn((2, 3, 3, 3))}
TANH = helper.make_function(
    "own", "Act", ["a"], ["o"], [helper.make_node("Tanh", ["a"], ["o"])], [helper.make_opsetid("", 13)]
)


def transposed(**attributes: Any) -> list[onnx.NodeProto]:
    return [helper.make_node("ConvTranspose", ["x", "w"], ["y"], strides=[2, 2], **attributes)]


FILES: dict[str, tuple[list[onnx.NodeProto], dict[str, Array], int, Any]] = {
    "gelu": ([CONV, helper.make_node("Gelu", ["c"], ["y"])], CONV_WEIGHT, 20, ()),
    "gelu by tanh": ([CONV, helper.make_node("Gelu", ["c"], ["y"], approximate="tanh")], CONV_WEIGHT, 20, ()),
    "group norm 18": (
        [CONV, helper.make_node("GroupNormalization", ["c", "s", "b"], ["y"], num_groups=2)],
        {**CONV_WEIGHT, "s": drawn((2,), 1), "b": drawn((2,), 2)}, 18, (),
    ),
    "group norm 21": (
        [CONV, helper.make_node("GroupNormalization", ["c", "s", "b"], ["y"], num_groups=2)],
        {**CONV_WEIGHT, "s": drawn((4,), 1), "b": drawn((4,), 2)}, 21, (),
    ),
    "function of another opset": ([CONV, helper.make_node("Act", ["c"], ["y"], domain="own")], CONV_WEIGHT, 13, [TANH]),
    "same upper": (transposed(auto_pad="SAME_UPPER"), TRANSPOSED_WEIGHT, 18, ()),
    "same lower": (transposed(auto_pad="SAME_LOWER"), TRANSPOSED_WEIGHT, 18, ()),
    "output shape": (transposed(output_shape=[9, 10]), TRANSPOSED_WEIGHT, 18, ()),
    "larger than the taps reach": (transposed(output_shape=[12, 12]), TRANSPOSED_WEIGHT, 18, ()),
    "reserved names": (
        [helper.make_node("Conv", ["x", "loss"], ["targets"]), helper.make_node("Tanh", ["targets"], ["y"])],
        {"loss": CONV_WEIGHT["w"]}, 18, (),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_files_from_elsewhere(tmp_path: Path, name: str) -> None:
    """Predictions are the standard's; the gradient is that of the runtime's own predictions, along a direction."""
    import onnxruntime

    nodes, weights, opset, functions = FILES[name]
    model = file_of(nodes, ["batch", 2, 5, 5], weights, opset, functions)
    x = drawn((BATCH, 2, 5, 5))
    original = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (expected,) = original.run(None, {"x": x})
    session = session_of(edgetune.export(model, None, tmp_path / "b", last="all", codec="dense", loss="mse"))
    np.testing.assert_allclose(session.predict(x), expected, rtol=1e-4, atol=1e-5)
    y = drawn(expected.shape, 7)
    _, found = session.gradients(x, y)
    state, direction = session.state(), {n: drawn(g.shape, 3) * 1e-2 for n, g in found.items()}
    losses = []
    for sign in (1.0, -1.0):
        session.load_state(state | {n: state[n] + np.float32(sign) * d for n, d in direction.items()})
        losses.append(float(np.mean((session.predict(x).astype(np.float64) - y) ** 2)))
    slope = sum(float(np.sum(g.astype(np.float64) * direction[n])) for n, g in found.items())
    assert (losses[0] - losses[1]) / 2 == pytest.approx(slope, rel=2e-2, abs=1e-6)


@pytest.mark.parametrize("written", ["constant node", "initializer"])
def test_shapes_of_a_file_with_a_fixed_batch(tmp_path: Path, written: str) -> None:
    shapes = {"flat": np.array([1, 36]), "larger": np.array([1, 4, 6, 6])}
    lifted = [
        helper.make_node("Constant", [], [n], value=numpy_helper.from_array(v))
        for n, v in (shapes if written == "constant node" else {}).items()
    ]
    resize = helper.make_node("Resize", ["c", "", "", "larger"], ["r"], mode="linear")
    nodes = [
        *lifted,
        CONV,
        resize,
        helper.make_node("MaxPool", ["r"], ["p"], kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Reshape", ["p", "flat"], ["f"]),
        helper.make_node("MatMul", ["f", "fw"], ["y"]),
    ]
    weights = {**CONV_WEIGHT, "fw": drawn((36, 3)), **({} if lifted else shapes)}
    model = file_of(nodes, [1, 2, 5, 5], weights, 18)
    x = drawn((BATCH, 2, 5, 5))
    reference: Any = ReferenceEvaluator(model)
    expected = np.concatenate([reference.run(None, {"x": x[i : i + 1]})[0] for i in range(BATCH)])
    session = session_of(edgetune.export(model, None, tmp_path / "b", last="all", codec="dense"))
    np.testing.assert_allclose(session.predict(x), expected, rtol=1e-4, atol=1e-5)


def test_an_input_that_is_called_as_the_targets_are(tmp_path: Path) -> None:
    model = file_of([CONV, helper.make_node("Tanh", ["c"], ["y"])], ["batch", 2, 5, 5], CONV_WEIGHT, 18)
    model.graph.input[0].name = model.graph.node[0].input[0] = "targets"
    with pytest.raises(ExportError, match="an input of the model is called targets"):
        edgetune.export(model, None, tmp_path / "b", last=0, loss="mse")
