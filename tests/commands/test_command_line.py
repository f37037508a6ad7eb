"""The command line as a user has it: real processes, their output, their exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgetune.commands import _digits
from edgetune.errors import BudgetError, BundleError, DataError, UnsupportedOperatorError, UsageError

ROOT = Path(__file__).parents[2]
FACTORY = """
import torch
from torch import nn

class Cosh(nn.Module):
    def forward(self, x):
        return torch.cosh(x)

def small():
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1), nn.ReLU6(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10),
    )

def strange():
    return nn.Sequential(nn.Conv2d(1, 4, 3), Cosh(), nn.Flatten(), nn.Linear(4 * 14 * 14, 10))

number = 7
"""


def edgetune(*arguments: object, at: Path = ROOT) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "edgetune", *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, check=False, cwd=at, timeout=300)


def found(*arguments: object) -> Any:
    done = edgetune(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("line")
    (root / "factory.py").write_text(FACTORY)
    done = edgetune(
        "export", f"{root}/factory.py:small", "-o", root / "small.edgetune", "--input", "1,16,16", "--last", 2,
        "--mean", 0.5, "--std", 0.5,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "trained: 5 tensors (4, 7, 11)" in done.stdout
    digits = _digits.load()
    _digits.write_stream(root / "data", digits.stream_images[:120], digits.stream_labels[:120])
    return root


def test_inspect_lists_the_trained_layers(place: Path) -> None:
    layers = found("inspect", place / "small.edgetune", "--batch", 8)["layers"]
    assert [(row["name"], row["role"], row["input_shape"]) for row in layers] == [
        ("4", "tail", [8, 8, 8, 8]),
        ("7", "tail", [8, 16, 8, 8]),
        ("11", "head", [8, 16]),
    ]
    assert [row["dense_bytes"] for row in layers] == [4 * 8 * 8 * 64, 4 * 8 * 16 * 64, 4 * 8 * 16]
    assert layers[0]["parameters"] == ["4.weight"] and layers[1]["parameters"] == ["7.weight", "7.bias"]
    assert "all of the tail" in edgetune("inspect", place / "small.edgetune").stdout


def test_names_are_printed_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "odd.py").write_text(FACTORY + "two = small")
    done = edgetune("export", tmp_path / "odd.py:two", "-o", tmp_path / "b", "--input", "1,16,16", "--last", 1)
    assert done.returncode == 0, done.stderr
    assert "odd.py:two:codec" in "".join(edgetune("inspect", tmp_path / "b").stdout.split())  # no picture of a 2


def test_inspect_shows_what_the_paper_counts(tmp_path: Path) -> None:
    source = f"{ROOT}/tools/models.py:resnet18"
    done = edgetune("export", source, "-o", tmp_path / "b", "--input", "3,224,224", "--last", 2)
    assert done.returncode == 0, done.stderr
    layers = found("inspect", tmp_path / "b", "--batch", 64)["layers"]
    assert sum(row["dense_bytes"] for row in layers if row["role"] == "tail") == 12.25 * 2**20


def test_plan_lets_the_budget_pick_epsilon(place: Path) -> None:
    bundle, data = place / "small.edgetune", place / "data"
    free = found("plan", bundle, "--batch", 32, "--data", data, "--epsilon", 1)
    # Half of what full ranks keep for the backward pass: the head, stored as it is, is the floor.
    limit_bytes = free["saved_bytes"] // 2
    tight = found("plan", bundle, "--batch", 32, "--data", data, "--activation-budget", limit_bytes)
    assert 0 < tight["epsilon"] < 1 and tight["saved_bytes"] <= limit_bytes
    assert tight["saved_bytes"] == sum(row["stored_bytes"] for row in tight["rows"])
    assert sum(tight["ledger"].values()) == tight["predicted_peak_bytes"]
    shown = edgetune("plan", bundle, "--batch", 32, "--data", data, "--activation-budget", limit_bytes).stdout
    assert "predicted peak of the" in shown and f"ε = {tight['epsilon']:.4f}" in shown


def test_an_infeasible_budget_names_the_least(place: Path) -> None:
    done = edgetune("plan", place / "small.edgetune", "--budget", "8MiB", "--data", place / "data")
    assert done.returncode == BudgetError.exit_code
    assert "the least is" in done.stderr and "Traceback" not in done.stderr


def test_run_then_status_and_report(place: Path, tmp_path: Path) -> None:
    state = tmp_path / "state"
    options = ["--data", place / "data", "--state", state, "--batch", 16, "--once", "--epsilon", 0.9]
    done = edgetune("run", place / "small.edgetune", *options)
    assert done.returncode == 0, done.stderr
    status, report = found("status", state), found("report", state)
    assert status["step"] == report["steps"] > 0 and status["samples"]["new"] == 0
    steps = [json.loads(line) for line in (state / "log.jsonl").read_text().splitlines()]
    step = next(record for record in steps if record["event"] == "step")
    assert {"loss", "epsilon", "ranks", "energy", "predicted_peak_bytes", "measured_peak_bytes", "seconds"} <= set(step)
    assert set(step["energy"]) == {"4", "7"} and all(0 < value <= 1.0001 for value in step["energy"].values())


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["export", "nothing", "-o", "x"], UsageError, "package.module:factory"),
        (["export", "factory.py:other", "-o", "x"], UsageError, "small"),
        (["export", "factory.py:number", "-o", "x"], UsageError, "no factory"),
        (["export", "factory.py:small", "-o", "x"], UsageError, "--input"),
        (["export", "factory.py:small", "-o", "x", "--input", "1,a"], UsageError, "3,224,224"),
        (["export", "factory.py:small", "-o", "x", "--input", "1,16,16", "--last", "9"], UsageError, "--last 9"),
        (
            ["export", "factory.py:small", "-o", "x", "--input", "1,16,16", "--codec", "zip"],
            UsageError,
            "hosvd, hosvd-exact",
        ),
        (
            ["export", "factory.py:strange", "-o", "x", "--input", "1,16,16", "--last", "1"],
            UnsupportedOperatorError,
            "Cosh",
        ),
        (["inspect", "nowhere"], BundleError, "edgetune export"),
        (["run", "small.edgetune", "--data", "nowhere", "--state", "s", "--once"], DataError, "nowhere"),
        (["plan", "small.edgetune", "--budget", "much"], UsageError, "512MiB"),
        (["plan", "small.edgetune", "--epsilon", "0.9"], UsageError, "--data"),
    ],
)
def test_errors_have_a_word_and_a_code(arguments: list[str], code: type[UsageError], words: str, place: Path) -> None:
    before = {path.name for path in place.iterdir()}
    done = _from(place, arguments)
    assert done.returncode == code.exit_code, done.stderr
    assert words in done.stderr and "Traceback" not in done.stderr
    assert {path.name for path in place.iterdir()} - {"__pycache__", "s"} == before - {"__pycache__", "s"}


def _from(place: Path, arguments: list[str]) -> subprocess.CompletedProcess[str]:
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from edgetune.commands import main; main()"
    line = [sys.executable, "-c", code, *arguments]
    return subprocess.run(line, capture_output=True, text=True, check=False, cwd=place, timeout=300)


def test_version() -> None:
    from edgetune.version import __version__

    assert edgetune("--version").stdout == f"edgetune {__version__}\n"


def test_the_model_of_the_demonstration_forgets_what_drifts() -> None:
    digits = _digits.load()
    drifted = _digits.drift(digits.test_images, np.random.default_rng(0))
    assert drifted.shape == digits.test_images.shape and (drifted != digits.test_images).mean() > 0.9
