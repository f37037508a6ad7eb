"""``edgetune export`` with models of several inputs, losses of one's own, and the target for onnxruntime-training."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from edgetune.errors import UsageError
from tests.commands.test_command_line import _from

FACTORY = """
import torch
from torch import nn

class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.image = nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU())
        self.side = nn.Linear(5, 4)
        self.classes = nn.Linear(4, 3)
        self.score = nn.Linear(4, 1)

    def forward(self, image, side):
        x = self.image(image).mean((2, 3)) + self.side(side)
        return {"score": self.score(x), "classes": self.classes(x)}

class Joint(nn.Module):
    def forward(self, outputs, targets):
        return nn.functional.cross_entropy(outputs["classes"], targets) + outputs["score"].square().mean()

def plain():
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
"""
TWO = ["--input", "image=1,6,6", "--input", "side=5"]


def edgetune(*arguments: object, at: Path) -> subprocess.CompletedProcess[str]:
    return _from(at, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("export")
    (root / "factory.py").write_text(FACTORY)
    return root


def test_inputs_outputs_a_loss_of_ones_own_and_trained_batch_norm(place: Path) -> None:
    done = edgetune(
        "export", "factory.py:Two", "-o", "two", *TWO, "--output-name", "classes", "--output-name", "score",
        "--loss", "factory.py:Joint", "--target-shape", ":int64", "--last", "all", "--batch-norm", "trained", at=place,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "captured by torch.export" in done.stdout
    found = json.loads(edgetune("inspect", "two", "--json", at=place).stdout)
    assert found["inputs"] == {"image": [1, 6, 6], "side": [5]}
    assert found["outputs"] == {"classes": [3], "score": [1]}
    assert found["targets"] == {"shape": [], "dtype": "int64"} and found["loss"] == {"kind": "traced"}
    assert set(found["buffers"]) == {"image.1.running_mean", "image.1.running_var"}
    assert {"image.1.weight", "score.bias", "side.weight"} <= set(found["parameters"])
    refused = edgetune("run", "two", "--data", place, "--state", "s", "--once", at=place)
    assert refused.returncode != 0 and "one input per sample" in refused.stderr


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([*TWO, "--loss", "factory.py:Joint", "--output-name", "classes"], "--target-shape"),
        (TWO, "--output-name"),
        ([*TWO, "--output-name", "logits"], "classes, score"),
        ([*TWO, "--output-name", "classes", "--train", "nothing"], "matches no parameter"),
        (["--input", "image=1,6,6:float99"], "float32, int32, int64"),
        ([*TWO, "--output-name", "classes", "--batch-norm", "warm"], "frozen, trained"),
        ([*TWO, "--output-name", "classes", "--loss", "hinge"], "binary_cross_entropy, cross_entropy, dice, mse"),
        ([*TWO, "--output-name", "classes", "--target", "tflite"], "onnxruntime, ort-training"),
        ([*TWO, "--output-name", "classes", "--last", "1", "--target", "ort-training"], "--calibrate"),
    ],
)
def test_what_cannot_be_is_said_and_leaves_nothing(place: Path, options: list[str], words: str) -> None:
    before = {path.name for path in place.iterdir()}
    done = edgetune("export", "factory.py:Two", "-o", "none", *options, at=place)
    assert done.returncode == UsageError.exit_code and words in done.stderr, done.stderr
    assert {path.name for path in place.iterdir()} - before <= {"__pycache__"}


def test_artifacts_for_onnxruntime_training(place: Path) -> None:
    done = edgetune(
        "export", "factory.py:plain", "-o", "artifacts", "--input", "1,6,6", "--last", "1", "--codec", "dense",
        "--optimizer", "adamw", "--target", "ort-training", "--batch", "8", at=place,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "edgetune.learning_rate" in done.stdout and "up to 8 samples" in done.stdout
    written = {path.name for path in (place / "artifacts").iterdir()}
    assert written == {"training_model.onnx", "eval_model.onnx", "optimizer_model.onnx", "checkpoint"}
