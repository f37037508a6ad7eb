"""Ways to capture a model, and what is refused on the way. The oracle is torch's autograd in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

import edgetune
from edgetune.errors import ExportError, UsageError
from edgetune.export.source import Signature
from tests.autodiff.parity import relative_error
from tests.export.small_models import (
    BATCH,
    LIMIT,
    Tokens,
    TwoByTwo,
    assert_equal_gradients,
    drawn,
    seeded,
    session_of,
    small,
    torch_gradients,
)

# -- ways to capture --------------------------------------------------------------------------------------------------


class Fickle(nn.Module):
    """Branches on a value of its data, which torch.export cannot follow."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 6)
        self.second = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.first(x))
        if float(x.detach().sum()) < -1.0:  # never, behind a ReLU
            x = -x
        result: torch.Tensor = self.second(x)
        return result


def test_what_torch_export_cannot_capture_is_traced_and_said(tmp_path: Path) -> None:
    model = seeded(Fickle)
    bundle = edgetune.export(model, torch.zeros(2, 5), tmp_path / "b", last="all", codec="dense")
    assert "tracing, because torch.export failed" in bundle.manifest.made_by
    x, y = drawn((BATCH, 5)), np.array([0, 2, 1])
    expected = torch_gradients(
        model, lambda m: nn.functional.cross_entropy(m(torch.from_numpy(x).double()), torch.from_numpy(y))
    )
    _, found = session_of(bundle).gradients(x, y)
    assert set(found) == set(expected)
    assert_equal_gradients(found, expected)


class Counting(nn.Module):
    """Divides by the size of the batch, as a number that an exporter may write down."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.first = nn.Linear(5, 3)
        self.how = how

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.how == "branch" and float(x.detach().sum()) > 1e9:  # torch.export cannot follow it
            x = -x
        result: torch.Tensor = self.first(x) / len(x)
        return result


@pytest.mark.parametrize("how", ["plain", "branch"])
def test_a_batch_size_that_was_written_down_is_refused(tmp_path: Path, how: str) -> None:
    with pytest.raises(ExportError, match="batch"):
        edgetune.export(seeded(lambda: Counting(how)), torch.zeros(2, 5), tmp_path / "b", last=0)
    assert list(tmp_path.iterdir()) == []


def test_an_exported_program_is_a_source(tmp_path: Path) -> None:
    model = seeded(small)
    batch = torch.export.Dim("batch")
    program = torch.export.export(model, (torch.zeros(2, 1, 6, 6),), dynamic_shapes=({0: batch},))
    torch.export.save(program, tmp_path / "model.pt2")
    bundle = edgetune.export(str(tmp_path / "model.pt2"), None, tmp_path / "b", last="all", codec="dense")
    x, y = drawn((BATCH, 1, 6, 6)), np.array([0, 1, 1])
    expected = torch_gradients(
        model, lambda m: nn.functional.cross_entropy(m(torch.from_numpy(x).double()), torch.from_numpy(y))
    )
    _, found = session_of(bundle).gradients(x, y)
    assert set(found) == set(expected)
    assert_equal_gradients(found, expected)
    (tmp_path / "bad.pt2").write_bytes(b"no archive")
    with pytest.raises(ExportError, match=r"bad.pt2.*exported program"):
        edgetune.export(str(tmp_path / "bad.pt2"), None, tmp_path / "c")


def test_a_dynamic_axis_besides_the_batch_is_refused(tmp_path: Path) -> None:
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", "time", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(drawn((4, 3)), "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    with pytest.raises(ExportError, match="'x' has an axis of unknown extent besides the batch"):
        edgetune.export(model, None, tmp_path / "b")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"last": 0, "freeze_head": True}, "nothing is trained"),
        ({"train": "nothing_of_that_name"}, r"matches no parameter.*windows\.weight"),
        ({"train": "("}, "no regular expression"),
        ({"last": "most"}, "--last most"),
        ({"outputs": ["logits"]}, "no output logits"),
        ({"batch_norm": "thawed"}, "frozen, trained"),
    ],
)
def test_choices_that_cannot_be_met(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        edgetune.export(seeded(Tokens), torch.zeros(2, 1, 8, 8), tmp_path / "b", **options)
    assert list(tmp_path.iterdir()) == []


def test_a_trained_tensor_that_the_loss_does_not_reach_is_no_parameter(tmp_path: Path) -> None:
    model = seeded(TwoByTwo)
    examples = [torch.zeros(2, 1, 6, 6), torch.zeros(2, 5)]
    with pytest.raises(UsageError, match="matches no parameter"):
        edgetune.export(model, examples, tmp_path / "b", train="score", outputs=["classes", "score"])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("3,224,224", Signature((3, 224, 224))),
        ("ids=16:int64", Signature((16,), "int64", "ids", True)),
        (":int64", Signature((), "int64")),
    ],
)
def test_signatures_as_text(text: str, expected: Signature) -> None:
    assert Signature.parse(text) == expected


@pytest.mark.parametrize("text", ["3,a", "x=0,2", "4:float99"])
def test_signatures_that_are_none(text: str) -> None:
    with pytest.raises(UsageError, match=text.partition("=")[0]):
        Signature.parse(text)


def test_a_gemm_of_a_transposed_input(tmp_path: Path) -> None:
    graph = helper.make_graph(
        [
            helper.make_node("Transpose", ["x"], ["t"], perm=[1, 0]),
            helper.make_node("Gemm", ["t", "w"], ["y"], transA=1),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(drawn((4, 3)), "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    bundle = edgetune.export(model, None, tmp_path / "b", last=0)
    x, y = drawn((BATCH, 4)), np.array([0, 2, 1])
    weight = torch.from_numpy(drawn((4, 3))).double().requires_grad_(True)
    loss = nn.functional.cross_entropy(torch.from_numpy(x).double() @ weight, torch.from_numpy(y))
    loss.backward()  # type: ignore[no-untyped-call]
    _, found = session_of(bundle).gradients(x, y)
    assert weight.grad is not None and relative_error(found["w"], weight.grad.numpy()) <= LIMIT


def test_external_onnx_tensors_may_be_called_like_an_output(tmp_path: Path) -> None:
    """An ONNX file from elsewhere: its own names, a fixed batch, a scalar among its initializers."""
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "w"], ["h"]),
            helper.make_node("Mul", ["h", "half"], ["logits"]),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, 3])],
        [numpy_helper.from_array(drawn((4, 3)), "w"), numpy_helper.from_array(np.array(0.5, np.float32), "half")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    onnx.checker.check_model(model)
    bundle = edgetune.export(model, None, tmp_path / "b", last=0, codec="dense")
    x = drawn((BATCH, 4))
    np.testing.assert_allclose(session_of(bundle).predict(x), 0.5 * (x @ drawn((4, 3))), rtol=1e-5, atol=1e-6)
    assert [spec.name for spec in bundle.manifest.outputs] == ["logits"]
