"""``edgetune export --adapter`` and what ``edgetune inspect`` says of it."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest
from typer.testing import CliRunner

from edgetune.commands import app
from edgetune.errors import UsageError
from tests.adapters.small import convolutional
from tests.adapters.test_adapter_bundle import captured


def run(*arguments: object) -> str:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=True)
    if done.exception is not None:
        raise done.exception
    return done.stdout


def test_the_command_makes_an_adapted_bundle_and_says_what_it_did(tmp_path: Path) -> None:
    onnx.save(captured(convolutional, (1, 8, 8)), tmp_path / "model.onnx")
    options = ("--last", 2, "--codec", "dense", "--adapter")
    said = run("export", tmp_path / "model.onnx", "-o", tmp_path / "b", *options, "csg:slice=4x4x3x3,code=8")
    assert "2 convolutions, 1,170 weights from 96 codes and 1,152 of the shared map" in said
    found = json.loads(run("inspect", tmp_path / "b", "--json"))
    assert found["adapter"] == "csg:slice=4x4x3x3,code=8,map=learned,freeze=no,residual=yes,kernels=same,seed=0"
    assert found["layers"][0]["parameters"] == ["2.weight.codes"]
    assert "adapter csg:slice=4x4x3x3" in " ".join(run("inspect", tmp_path / "b").split())
    said = run("export", tmp_path / "model.onnx", "-o", tmp_path / "b", *options, "bcsg:slice=4x4x3x3,code=8")
    assert said.rstrip().endswith("1,170 weights from 96 codes")
    with pytest.raises(UsageError, match="choose one of: bcsg, csg"):
        run("export", tmp_path / "model.onnx", "-o", tmp_path / "b", *options, "lora")
