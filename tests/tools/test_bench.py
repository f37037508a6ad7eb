"""The bench: rivals' gradients against autograd, bytes against a count by hand, phases, fits, and two real workers."""

from __future__ import annotations

import functools
import json
import re
import tempfile
import xml.etree.ElementTree as ET
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tools import models
from tools.bench import growth, ours, plots, report, rivals, run, targets
from tools.bench.grid import PRESETS
from tools.bench.prepare import prepare
from tools.bench.pytorch import PyTorch
from tools.bench.tails import Tail, saved_bytes

WEIGHTS = ["grouped.weight", "depthwise.weight", "gate.weight", "dilated.weight", "strided.weight"]
TRAINED = [*WEIGHTS, "gate.bias", "strided.bias", "fc.weight", "fc.bias"]
_SHELF = tempfile.TemporaryDirectory(prefix="edgetune-tests-")


@functools.cache
def awkward() -> tuple[Tail, Tensor, dict[str, Tensor]]:
    """Return a tail of grouped, dilated, strided and padded convolutions, a batch, and autograd's own gradients."""
    model = models.awkward_convs().double()
    x = torch.randn(4, 3, 24, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    functional.cross_entropy(model(x), torch.arange(4)).backward()  # type: ignore[no-untyped-call]
    exact = {name: value.grad for name, value in model.named_parameters() if name in TRAINED and value.grad is not None}
    model.zero_grad()
    return Tail(model, x, TRAINED, "gate|depthwise|dilated"), x, exact


def gradients(codec: rivals.Codec | None, blocks: bool = False) -> dict[str, Tensor]:
    tail, x, _ = awkward()
    coded = {s.weight: s.call for s in tail.steps if s.weight is not None and s.weight in WEIGHTS}
    calls = rivals.replacements(codec, coded, rivals.Watch()) if codec else None
    assert calls is None or len(calls) == len(WEIGHTS)
    features = tail.trunk(x)
    scores = tail.forward_by_blocks(features) if blocks else tail.forward(features, calls)
    assert not features
    made = torch.autograd.grad(functional.cross_entropy(scores, torch.arange(4)), list(tail.parameters.values()))
    return dict(zip(tail.parameters, made, strict=True))


class Everything(rivals.Asi):
    """ASI with full ranks, whatever the layer."""

    def __init__(self) -> None:
        super().__init__(dict.fromkeys(WEIGHTS, (1000,) * 4))


@pytest.mark.parametrize("codec", [None, rivals.Hosvd(1.0), Everything()])
def test_rivals_that_lose_nothing_have_the_gradients_of_autograd(codec: rivals.Codec | None) -> None:
    exact = awkward()[2]
    for blocks in (False, True) if codec is None else (False,):
        made = gradients(codec, blocks)
        assert set(made) == set(exact) == set(TRAINED)
        for name, value in exact.items():
            torch.testing.assert_close(made[name], value, rtol=1e-7, atol=1e-9)


def test_the_published_method_keeps_the_energy_that_it_was_told_and_no_more_columns() -> None:
    x = torch.randn(6, 5, 4, 7, dtype=torch.float64) * torch.linspace(1, 3, 7, dtype=torch.float64) ** 3
    codec = rivals.Hosvd(0.8)
    kept = codec.encode("", x, rivals.Layer(False))
    for mode, factor in enumerate(kept[1:]):
        values = torch.linalg.svdvals(x.movedim(mode, 0).flatten(1)).square()
        shares = values.cumsum(0) / values.sum()
        rank = factor.shape[1]
        assert shares[rank - 1] >= 0.8 and (rank == 1 or shares[rank - 2] < 0.8)
    shown = codec.decode(kept, x.shape)
    assert 1 - (x - shown).norm() ** 2 / x.norm() ** 2 == pytest.approx(float(kept[0].norm() ** 2 / x.norm() ** 2))


def test_a_linear_layer_with_positions_has_its_gradient_from_the_factors() -> None:
    layer, x, dy = rivals.Layer(True), torch.randn(5, 6, 8).double(), torch.randn(5, 6, 3).double()
    kept = rivals.Hosvd(0.7).encode("", x, layer)
    shown = rivals.Hosvd(0.7).decode(kept, x.shape)
    made = rivals.Hosvd(0.7).weight_gradient(layer, kept, torch.Size((3, 8)), dy)
    torch.testing.assert_close(made, torch.einsum("bto,btc->oc", dy, shown))
    assert (shown - x).norm() > 0.1 * x.norm()


@pytest.mark.parametrize(("groups", "stride"), [(1, 1), (4, 1), (1, 2)])
def test_the_gradient_filter_is_exact_where_its_patches_are_constant(groups: int, stride: int) -> None:
    def constant(channels: int, extent: int, span: int) -> Tensor:
        small = torch.randn(3, channels, extent // span, extent // span, dtype=torch.float64)
        return small.repeat_interleave(span, 2).repeat_interleave(span, 3)

    layer = rivals.Layer(False, (stride, stride), groups=groups)
    x, dy = constant(4, 8, 2 * stride), constant(4, 8 // stride, 2)
    weight = torch.randn(4, 4 // groups, 1, 1, dtype=torch.float64)
    codec = rivals.GradientFilter(2)
    kept = codec.encode("", x, layer)
    assert kept[0].numel() * 4 * stride**2 == x.numel()
    torch.testing.assert_close(codec.decode(kept, x.shape), x)
    exact = layer.weight_gradient(x, weight.shape, dy)
    torch.testing.assert_close(codec.weight_gradient(layer, kept, weight.shape, dy), exact)
    wanted, made = layer.input_gradient(x.shape, weight, dy), codec.input_gradient(layer, x.shape, weight, dy)
    torch.testing.assert_close(made.sum((2, 3)), wanted.sum((2, 3)))
    if stride == 1:
        torch.testing.assert_close(made, wanted)


def test_saved_bytes_are_those_of_a_count_by_hand() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(100, 5))
    x, y = torch.randn(6, 2, 5, 5), torch.arange(6) % 5
    trained = [name for name, _ in model.named_parameters()]
    tail = Tail(model, x, trained)

    def loss() -> Tensor:
        return functional.cross_entropy(tail.forward(tail.trunk(x)), y)

    # x; the ReLU's result, which the convolution behind it reads; the linear layer's input; log-softmax; the loss keeps
    # the number of samples that count
    floats = 6 * 2 * 25 + 6 * 3 * 25 + 6 * 100 + 6 * 5
    assert saved_bytes(loss, [*model.parameters(), y]) - 4 * floats in (0, 4)


def test_phases_are_what_the_loss_needs_what_else_comes_before_it_and_the_rest() -> None:
    nodes: list[ours.Node] = [
        ("conv", ("x", "w"), ("y",)),
        ("pack", ("y",), ("mask",)),
        ("encode", ("x",), ("core",)),
        ("score", ("y",), ("loss", "dy")),
        ("decode", ("core", "dy", "mask"), ("gradient/w",)),
    ]
    seconds = {"conv": 1.0, "pack": 0.25, "encode": 0.5, "score": 2.0, "decode": 4.0}
    found = ours.by_phase(nodes, seconds, ["loss", "gradient/w"])
    assert found == {"forward": 3.0, "compress": 0.75, "backward": 4.0}


def test_an_exponent_is_found_with_what_is_left_of_it() -> None:
    x = [1.0, 2.0, 4.0, 8.0]
    exact = growth.fit(x, [3.0 * value**1.5 for value in x])
    assert exact.exponent == pytest.approx(1.5) and exact.scale == pytest.approx(3.0)
    assert exact.residual < 1e-12 and exact.points == 4
    rough = growth.fit(x, [3.0, 3.0 * np.e, 3.0, 3.0 * np.e])
    assert 0.2 < rough.residual < 0.5
    with pytest.raises(ValueError, match="different points"):
        growth.fit([2.0, 2.0], [1.0, 3.0])


@functools.cache
def cell() -> Path:
    """Return a prepared cell of the tiny model."""
    folder = Path(_SHELF.name) / "cell"
    folder.mkdir()
    told = {
        "model": "tiny", "side": 32, "last": "2", "batch": 8, "epsilon": 0.9, "codecs": ["hosvd", "asi"],
        "cache": str(folder / "cache"), "bundles": str(folder / "bundles"), "ort_training": False,
    }  # fmt: skip
    (folder / "cell.json").write_text(json.dumps(told))
    prepare(folder)
    return folder


def test_ours_and_pytorch_agree_in_a_cell_and_asi_captures_as_much_with_less(tmp_path: Path) -> None:
    told = json.loads((cell() / "cell.json").read_text())
    assert set(told["layers"]) == {"layer3.0.conv2.weight", "layer3.0.downsample.0.weight"}
    exact, hosvd, asi = PyTorch(cell(), "pytorch", 1), *(ours.Ours(cell(), "onnxruntime", c) for c in ("hosvd", "asi"))
    files = [str(tmp_path / f"{index}.npz") for index in range(3)]
    everyone: tuple[Any, ...] = (exact, hosvd, asi)
    found = [one.gradients(file) for one, file in zip(everyone, files, strict=True)]
    assert found[0]["loss"] == pytest.approx(found[1]["loss"], rel=1e-5)
    with np.load(files[0]) as wanted, np.load(files[1]) as made:
        assert set(wanted.files) == set(made.files) == set(told["trained"])
        for name in wanted.files:
            if name in told["layers"]:  # compressed
                assert 0.01 < np.linalg.norm(made[name] - wanted[name]) / np.linalg.norm(wanted[name]) < 0.7
            else:
                np.testing.assert_allclose(made[name], wanted[name], rtol=1e-3, atol=1e-6)
    for name, value in found[1]["energy"].items():
        assert found[2]["energy"][name] == pytest.approx(value, abs=0.1)
    assert 4 * hosvd.saved()["saved"] < exact.saved()["saved"]
    assert exact.held()["held"] == pytest.approx(exact.saved()["saved"], rel=0.1)
    phases, step = hosvd.phases(), exact.step()
    assert min(phases.values()) > 0
    assert sum(step[phase] for phase in report.PHASES) == pytest.approx(step["step"])


def test_two_workers_in_turn_and_what_is_made_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "REFERENCE", "onnxruntime/hosvd")
    names = ["onnxruntime/hosvd", "onnxruntime/asi"]
    workers = [run.Worker(cell(), name) for name in names]
    broken = run.Worker(cell(), "onnxruntime/none")
    try:
        assert [worker.error for worker in workers] == [None, None]
        assert broken.error is not None and "FileNotFoundError" in broken.error
        found = run._timed(workers, run.Effort(least=2, most=2, seconds=0.01))
        for worker in workers:
            found[worker.name] |= run._looked_at(worker, tmp_path)
            assert "error" in worker.ask("nonsense")
    finally:
        for worker in (*workers, broken):
            worker.close()
    told = json.loads((cell() / "cell.json").read_text())
    run._compare(found, tmp_path, told)
    hosvd, asi = (found[name] for name in names)
    assert hosvd["ratio"] == 1.0 and asi["rounds"] == 2 and asi["processor_ratio"] > 0
    assert hosvd["error"]["total"] == 0.0 < asi["error"]["mean"] < 1
    parts = ("forward", "compress", "backward")
    assert sum(hosvd["seconds"][p] for p in parts) == pytest.approx(hosvd["seconds"]["train"])
    assert hosvd["seconds"]["trunk"] > 0 < hosvd["peak"]["peak"] < hosvd["peak"]["process"]
    place = run.Cell("tiny", 32, "2", 8)
    entry = {
        "cell": vars(place), "training": told["training"], "date": "2026-11-21T12:00:00", "load": [1.0, 2.0],
        "contenders": {"pytorch": asi, **found, "pytorch-filter-r2": {"error": "out of \x3c luck"}},
    }  # fmt: skip
    store = run.Store(tmp_path / "bench.json")
    assert store.missing(place, names) == names
    store.add(place, entry)
    again = run.Store(tmp_path / "bench.json")
    assert again.missing(place, [*names, "pytorch-filter-r2"]) == ["pytorch-filter-r2"]
    report.write(again.data, tmp_path / "bench.md")
    page = (tmp_path / "bench.md").read_text()
    assert re.search(r"\| `onnxruntime/hosvd` \|( [^|]+ \|){16}\n", page) and "out of < luck" in page


def _entry(batch: int, ratio: float = 0.5) -> dict[str, Any]:
    def figures(scale: float, saved: float) -> dict[str, Any]:
        seconds = {"step": scale * batch, "processor": scale * batch, **dict.fromkeys(report.PHASES, 0.1)}
        made: dict[str, Any] = {"seconds": seconds, "ratio": scale, "ratios": [scale, scale], "processor_ratio": scale}
        return made | {"saved": saved * batch, "peak": {"peak": saved * batch, "process": 10**8}}

    others = {f"pytorch-{name}": figures(50.0, 80.0) for name in ("hosvd", "asi", "bf16")}
    ours_ = {f"{engine}/hosvd": figures(ratio, 2.0) for engine in targets.COMPRESSED}
    place: Mapping[str, Any] = vars(run.Cell("resnet18", 224, "4", batch))
    training = {"phases": ["1 × 1 of 8²"], "loss": 1.0, "accuracy": 0.5}
    contenders = {"pytorch": figures(1.0, 80.0), **others, **ours_}
    return {"cell": place, "training": training, "date": "2026-11-21", "load": [0.1], "contenders": contenders}


def test_targets_growth_and_plots_follow_from_the_figures() -> None:
    cells = {run.Cell("resnet18", 224, "4", batch).key: _entry(batch) for batch in (8, 16, 64)}
    lines = {line.what: line for line in targets.targets(cells)}
    step = lines["ResNet-18: step of torch/hosvd over ordinary PyTorch"]
    assert step.measured == 0.5 and step.met and step.verdict == "met"
    assert lines["ResNet-18: the published per-batch HOSVD over torch/hosvd"].measured == 100.0
    assert lines["ResNet-18: saved bytes of ordinary PyTorch over torch/hosvd"].measured == 40.0
    missing = lines["MobileNetV2: step of torch/hosvd over ordinary PyTorch"]
    assert missing.measured is None and missing.met is None
    (curve,) = [c for c in growth.curves(cells) if c.contender == "pytorch"]
    assert curve.axis == "batch" and curve.x == (8.0, 16.0, 64.0)
    assert curve.fits["seconds of a step"].exponent == pytest.approx(1.0)
    drawn = report.pictures(cells)
    assert {name.split("-")[0] for name in drawn} == {"resnet18", "growth"}
    for text in drawn.values():
        ET.fromstring(text)
    with pytest.raises(ValueError, match="no point"):
        plots.lines({}, "nothing", plots.Axis("x"), plots.Axis("y"))


def test_every_preset_names_cells_once() -> None:
    for make in PRESETS.values():
        jobs = [(cell.key, contenders) for cell, contenders in make()]
        assert len(set(jobs)) >= 2 and all("pytorch" in contenders for _, contenders in jobs)
