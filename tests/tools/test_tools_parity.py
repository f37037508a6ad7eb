"""The parity command: what it prints and returns, and how it finds batches away from kinks."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn

from edgetune.export.source import Signature
from tools import gradients, parity
from tools.gradients import Comparison, Row, Settings, Subject
from tools.kinks import Kinks, near_kinks


def distances(model: nn.Module, x: Tensor) -> list[Tensor]:
    kinks = Kinks()
    with kinks:
        model(x.clone().requires_grad_())
    return kinks.distances


def test_every_piecewise_function_tells_its_distance() -> None:
    x = torch.tensor([[[[1.0, -2.0], [3.5, 3.0]]]])
    assert torch.equal(distances(nn.ReLU(), x)[0], x)
    assert torch.equal(distances(nn.LeakyReLU(0.1), x)[0], x)
    assert torch.equal(distances(nn.PReLU(), x)[0], x)
    assert [float(d.min()) for d in distances(nn.ReLU6(), x)] == [-2.0, -8.0]
    assert [float(d.min()) for d in distances(nn.Hardswish(), x)] == [1.0, -5.0]
    assert float(distances(nn.MaxPool2d(2), x)[0]) == 0.5
    assert float(distances(nn.MaxPool2d(3, 2, 1), x)[0]) == 0.5
    assert float(distances(nn.MaxPool3d(2), x.expand(1, 1, 2, 2, 2).contiguous())[0]) == 0.0
    assert distances(nn.MaxPool2d(2), torch.zeros(1, 1, 2, 2))[0].isinf().all()
    with torch.no_grad():
        assert not distances(nn.GELU(), x)


def test_what_needs_no_gradient_has_no_kinks() -> None:
    with Kinks() as kinks:
        nn.ReLU()(torch.zeros(3))
    assert not kinks.distances


def test_values_within_rounding_of_a_kink_are_counted() -> None:
    exact = [torch.tensor([1e-7, 0.5, -3e-7], dtype=torch.float64), torch.tensor([torch.inf])]
    rounded = [torch.tensor([3e-7, 0.5, -3e-7]), torch.tensor([torch.inf])]
    assert near_kinks(exact, rounded) == 2
    assert near_kinks([exact[0] + 1], [rounded[0] + 1]) == 0


def test_a_batch_away_from_kinks_is_chosen() -> None:
    class OneSeedNearAKink(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(x * self.scale)

    class Drawn(Subject):
        def draw(self, batch: int, seed: int) -> list[np.ndarray]:
            x = np.full((batch, 3), 0.25, np.float32)
            x[0, 0] = 0.0 if seed < 2 else 0.3
            return [x]

    subject = Drawn("drawn", OneSeedNearAKink, (Signature((3,)),))
    sample = gradients.choose_sample(subject, OneSeedNearAKink(), ["scale"], Settings())
    assert sample.near_kinks == 0
    assert sample.inputs[0][0, 0] == np.float32(0.3)


def test_the_worst_line_is_marked_and_a_nan_is_the_worst() -> None:
    rows = (Row("a", (2, 3), 1e-6, 1e-7), Row("b", (), 2e-6, 1e-7))
    made = Comparison("onnxruntime", "dense", 0.0, 0, rows)
    assert made.holds(1e-5)
    assert not made.holds(1e-6)
    marked = [line for line in parity.table(made, 1e-5).splitlines() if "<- worst" in line]
    assert len(marked) == 1
    assert marked[0].startswith("b ")
    broken = dataclasses.replace(made, near_kinks=3, rows=(Row("c", (1,), float("nan"), 0.0), *rows))
    assert broken.worst.name == "c"
    assert not broken.holds(1e30)
    assert "ABOVE" in parity.table(broken, 1.0)
    assert "3 values lie within rounding of a kink" in parity.table(broken, 1.0)


def test_one_command_compares_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["tools/models.py:digits_resnet", "--input", "1,12,12", "--last", "2", "--engine", "onnxruntime"]
    assert parity.main([*command, "--tolerance", "0", "--json"]) == 1
    made = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in made["rows"]][-2:] == ["fc.weight", "fc.bias"]
    assert all(0 < row["error"] < 1e-5 for row in made["rows"])
    assert made["codec"] == "hosvd"


def test_what_cannot_be_compared_is_an_error_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert parity.main(["tools/models.py:absent", "--input", "1,12,12"]) == 2
    assert "no factory 'absent'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parity.main([])


def test_a_model_that_torch_cannot_differentiate_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "model.onnx"
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4])
    node = helper.make_node("Identity", ["x"], ["y"])
    onnx.save(helper.make_model(helper.make_graph([node], "g", [value], [])), file)
    assert parity.main([str(file)]) == 2
    assert "is no torch module" in capsys.readouterr().err


def test_a_wrong_gradient_is_noticed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    exact = gradients.torch_gradients

    def wrong(*arguments: object) -> object:
        loss, found, kinks = exact(*arguments)  # type: ignore[arg-type]
        return loss, {name: value * 1.001 for name, value in found.items()}, kinks

    monkeypatch.setattr(gradients, "torch_gradients", wrong)
    assert parity.main(["tools/models.py:digits_resnet", "--input", "1,12,12", "--last", "1"]) == 1
    assert "ABOVE" in capsys.readouterr().out


def test_the_zoo_goes_on_after_a_failure_and_writes_its_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = next(subject for subject in parity.zoo_subjects() if subject.name == "mcunet")

    def broken() -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(3, 3))  # does not take the declared input

    subjects = [dataclasses.replace(good, name="broken", make=broken), good]
    monkeypatch.setattr(parity, "zoo_subjects", lambda: subjects)
    page = tmp_path / "parity.md"
    command = ["--zoo", "--last", "2", "--codec", "dense", "--engine", "onnxruntime", "--markdown", str(page)]
    assert parity.main(command) == 1
    text = page.read_text()
    assert "| broken | 2 | 0 of 2 | **fails** |" in text
    assert "| mcunet | 2 | 4 of 50 |" in text
    assert "- broken, 2: " in text
    assert "**" not in next(line for line in text.splitlines() if "mcunet" in line)


def test_a_gradient_that_is_zero_by_construction_is_held_against_the_largest() -> None:
    exact, rounded = np.full(4, 1e-17), np.full(4, 1e-9, np.float32)
    zero = gradients._row("bias", np.full(4, 2e-9, np.float32), rounded, exact, 1.0)
    assert zero.error == pytest.approx(4e-9, rel=1e-3)
    wrong = gradients._row("bias", np.full(4, 0.1, np.float32), rounded, exact, 1.0)
    assert wrong.error == pytest.approx(0.2, rel=1e-3)
    ordinary = gradients._row("weight", np.full(4, 1.1e-6), np.full(4, 1e-6), np.full(4, 1e-6), 1.0)
    assert ordinary.error == pytest.approx(0.1)
