"""``edgetune plan`` with several codecs to choose from: uniform, per layer, by rate, the front and its picture."""

from __future__ import annotations

import json
import xml.etree.ElementTree
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import edgetune
from edgetune.api import calibrate_bundle
from edgetune.bundle import Bundle
from edgetune.commands import app
from edgetune.commands._front import drawn, svg
from edgetune.errors import BudgetError, StateError, UsageError
from edgetune.planning.per_layer import Front, FrontPoint
from edgetune.planning.plan import Plan
from edgetune.planning.spectra import Calibration

BATCH = 12


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("menu")
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(),
        nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4),
    ).eval()  # fmt: skip
    bundle = edgetune.export(model, torch.zeros(1, 1, 12, 12), root / "b", last=2, codec="hosvd+dct+int8+dense")
    rng = np.random.default_rng(0)
    smooth = [np.cumsum(rng.standard_normal((BATCH, 1, 12, 12)), 3).astype(np.float32) for _ in range(2)]
    found = calibrate_bundle(bundle, BATCH, [(x, rng.integers(0, 4, BATCH)) for x in smooth], errors=True)
    assert found is not None
    found.save(root / "c.safetensors")
    return root


def plan(place: Path, *options: object) -> str:
    line = ["plan", place / "b", "--batch", BATCH, "--calibration", place / "c.safetensors", *options]
    done = CliRunner().invoke(app, list(map(str, line)))
    if done.exception is not None:
        raise done.exception
    return done.stdout


def made(place: Path, *options: object) -> Plan:
    return Plan.from_json(plan(place, *options, "--json"))


def test_every_lossy_option_was_measured(place: Path) -> None:
    bundle, found = Bundle.open(place / "b"), Calibration.load(place / "c.safetensors")
    for spec in bundle.manifest.saved:
        for option in spec.options:
            if option.lossy:
                table = found.errors[spec.name][option.label]
                assert np.isfinite(table).all()
                assert (np.diff(table[:, 0]) > 0).all()
        if len(spec.shape) == 1:  # the head's input: smaller than what a codec would add
            continue
        full = found.errors[spec.name]["hosvd"][-1]
        assert full[0] == 1.0
        assert full[1] < 1e-4
        assert found.errors[spec.name]["int8"].shape == (1, 2)
        assert 0 < found.errors[spec.name]["int8"][0, 1] < 0.1


def test_per_layer_is_no_worse_than_any_codec(place: Path) -> None:
    budget, whole = "12KiB", ("--tail-micro-batch", BATCH, "--trained", 2)
    mixed = made(place, "--allocation", "per-layer", "--activation-budget", budget, *whole)
    assert mixed.saved_bytes <= 12 * 1024
    assert mixed.error is not None
    for codec in ("hosvd", "dct"):
        uniform = made(place, "--codec", codec, "--activation-budget", budget, *whole)
        assert uniform.saved_bytes <= 12 * 1024
        assert uniform.error is not None and mixed.error <= uniform.error
        labels = {row.codec for row in uniform.rows}
        assert labels <= {codec, "dense"}
    table = plan(place, "--allocation", "per-layer", "--activation-budget", budget)
    assert "chosen per layer" in table
    assert "proven to be at least" in table
    session = edgetune.TrainingSession(
        Bundle.open(place / "b"),
        edgetune.plan(
            Bundle.open(place / "b"), batch=BATCH, activation_budget=budget, allocation="per-layer",
            calibration=Calibration.load(place / "c.safetensors"),
        ),
    )  # fmt: skip
    assert np.isfinite(session.step(np.ones((BATCH, 1, 12, 12), np.float32), np.zeros(BATCH, np.int64)))


def test_a_rate(place: Path) -> None:
    found = made(place, "--codec", "dct", "--rate", 10)
    assert found.ranks["2"] == {"k": 8 * 144 // 10}
    assert found.epsilon is None
    assert "ranks by rate" in plan(place, "--codec", "dct", "--rate", 10)


def test_the_front(place: Path, tmp_path: Path) -> None:
    text = plan(place, "--front", "--plot", tmp_path / "front.svg")
    assert "least total gradient error by peak" in text
    assert "● per-layer" in text
    root = xml.etree.ElementTree.parse(tmp_path / "front.svg").getroot()
    assert root.tag.endswith("svg")
    found: Any = json.loads(plan(place, "--front", "--json"))
    errors = [point["error"] for point in found["mixed"]]
    assert errors == sorted(errors, reverse=True)
    assert {point["label"] for point in found["uniform"]} == {"hosvd", "dct", "int8", "dense"}


def test_what_cannot_be(place: Path) -> None:
    with pytest.raises(BudgetError, match="activation budget"):
        plan(place, "--allocation", "per-layer", "--activation-budget", 10)
    with pytest.raises(UsageError, match="choose one of: dct, dense, hosvd, int8"):
        plan(place, "--codec", "svd")
    with pytest.raises(UsageError, match="give --front"):
        plan(place, "--plot", "x.svg")
    with pytest.raises(UsageError, match="give samples"):
        edgetune.plan(Bundle.open(place / "b"), batch=BATCH, allocation="per-layer")
    without = Calibration.load(place / "c.safetensors")
    bare = Calibration(without.spectra, without.samples, without.batch, without.counts)
    with pytest.raises(StateError, match="no gradient errors"):
        edgetune.plan(Bundle.open(place / "b"), batch=BATCH, allocation="per-layer", calibration=bare)


def test_pictures_of_a_front() -> None:
    def point(label: str, peak_bytes: int, error: float) -> FrontPoint:
        return FrontPoint(label, None, peak_bytes, 0, error, {"a": "dct"})

    front = Front(
        (point("per-layer", 1 << 20, 1.0), point("per-layer", 2 << 20, 0.0)),
        (point("a<b&c", 1 << 20, 1.5), point("a<b&c", 3 << 20, 0.0)),
    )
    lines = drawn(front, 60, 10)
    assert all(len(line) <= 60 for line in lines)
    assert lines[0].strip().startswith("1.500 │o")  # the worst is above, the least peak on the left
    assert lines[9].rstrip().endswith("o")
    assert "o a<b&c" in lines[-1]
    root = xml.etree.ElementTree.fromstring(svg(front, "x < y & z"))
    texts = [element.text for element in root.iter() if element.tag.endswith("text")]
    assert "x < y & z" in texts and "a<b&c" in texts
    assert sum(element.tag.endswith("polyline") for element in root.iter()) == 2
    alone = Front((point("per-layer", 5, 0.0),), ())
    assert drawn(alone, 60, 5) and xml.etree.ElementTree.fromstring(svg(alone, "")) is not None


def test_knobs_are_pinned_shown_and_explained(place: Path) -> None:
    pins = ("--trained", 1, "--tail-micro-batch", 4, "--micro-batch", 2, "--cache", "3MiB")
    pinned = plan(place, "--codec", "dense", *pins)
    text = f"knobs: micro-batch 2; batch of {BATCH} trained in pieces of 4; 1 of 2 layers trained; feature cache 3.00 "
    assert text in pinned and "why:" not in pinned
    assert "replay" in pinned
    given_up = plan(place, "--codec", "dense", "--activation-budget", "20KiB")
    assert "why: the batch is trained in pieces of" in given_up
    assert "trained whole; 2 of 2 layers trained; feature cache none" in plan(place, "--codec", "dense")
    with pytest.raises(UsageError, match="--trained 3: expected 0 to 2"):
        plan(place, "--codec", "dense", "--trained", 3)
