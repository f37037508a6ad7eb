"""The promoted file: what onnx says of it, and that a stock runtime computes with it what the session does."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from safetensors.numpy import save_file
from torch import nn

import edgetune
from edgetune.agent.gate import onnxfile
from edgetune.bundle import WEIGHTS, Array, places_in
from edgetune.errors import BundleError, StateError, StorageError
from tests.agent.run_serving import main as serve
from tests.autodiff.parity import relative_error
from tests.engines.workshop import SMALL, bundle_of, in_fresh_process, network, plan_of, samples
from tests.export.small_models import Tokens, TwoByTwo, drawn, seeded, session_of, with_statistics

ROUNDING = 1e-6


def normed() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)
    )  # fmt: skip


class Inverted(nn.Module):
    """Inverted residuals with depthwise convolutions and ReLU6, as MobileNetV2 has them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU6())
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(8, 24, 1, bias=False), nn.BatchNorm2d(24), nn.ReLU6(),
                nn.Conv2d(24, 24, 3, 1, 1, groups=24, bias=False), nn.BatchNorm2d(24), nn.ReLU6(),
                nn.Conv2d(24, 8, 1, bias=False), nn.BatchNorm2d(8),
            )
            for _ in range(2)
        )  # fmt: skip
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        found: torch.Tensor = self.head(x.mean((2, 3)))
        return found


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], dict[str, Any]]] = {
    "residual": (lambda: network("small"), SMALL, {}),
    "mobilenet": (lambda: with_statistics(seeded(Inverted)), (3, 12, 12), {"last": 4, "codec": "dense"}),
    "transformer": (lambda: seeded(Tokens), (1, 8, 8), {"last": 2, "codec": "dense"}),
    "trained batch-norm": (
        lambda: with_statistics(seeded(normed)),
        (1, 6, 6),
        {"last": "all", "codec": "dense", "batch_norm": "trained"},
    ),
    "adapter": (lambda: network("small"), SMALL, {"last": 2, "codec": "dense", "adapter": "csg:slice=4x4x3x3,code=8"}),
}


def checkpoint_of(state: Mapping[str, Array], path: Path) -> Path:
    save_file({name: np.asarray(value, order="C") for name, value in state.items()}, path)
    return path


def outputs_of(path: Path, x: Array) -> list[Array]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    found: list[Array] = session.run(None, {session.get_inputs()[0].name: x})
    return found


@pytest.mark.parametrize("name", MODELS)
def test_a_promoted_model_computes_what_the_session_does(tmp_path: Path, name: str) -> None:
    make, shape, options = MODELS[name]
    model = make()
    if name == "residual":
        bundle = bundle_of("hosvd")  # the other tests' own, of the same model
    else:
        bundle = edgetune.export(model, torch.zeros(2, *shape), tmp_path / "b", **options)
    session = session_of(bundle, batch=4, hyper={"learning_rate": 0.05})
    x, y = drawn((4, *shape), 1), np.arange(4) % 3
    untrained = tmp_path / "untrained.onnx"
    onnxfile.write_model(untrained, onnxfile.skeleton_of(bundle), onnxfile.inference_places(bundle), {})
    with torch.inference_mode():
        exported = model(torch.from_numpy(x)).numpy()
    assert relative_error(outputs_of(untrained, x)[0], exported) <= 1e-5
    for _ in range(2):
        session.step(x, y)
    state = checkpoint_of(session.state(), tmp_path / "c.safetensors")
    trained = tmp_path / "trained.onnx"
    weights = onnxfile.inference_places(bundle, places_in(state))
    onnxfile.write_model(trained, onnxfile.skeleton_of(bundle), weights, {"version": "2"})
    onnx.checker.check_model(str(trained), full_check=True)
    expected = session.predict(x)
    found = outputs_of(trained, x)[0]
    assert relative_error(found, expected) <= ROUNDING
    assert relative_error(found, exported) > 1e-3  # it is the trained one
    assert {n.op_type for n in onnx.load(trained).graph.node}.isdisjoint({"Einsum", "Scan", "Choose"})


def test_what_onnx_reads_back_is_what_was_written(tmp_path: Path) -> None:
    """The writer, held against the onnx package: names, types, shapes, bits and the properties."""
    bundle = bundle_of("dense")
    places = onnxfile.inference_places(bundle)
    said = onnxfile.about(bundle) | {"version": "7", "score": "", "odd": "ε ∂ \n"}
    path = tmp_path / "m.onnx"
    digest = onnxfile.write_model(path, onnxfile.skeleton_of(bundle), places, said)
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
    read = onnx.load(path)
    assert {p.key: p.value for p in read.metadata_props} == said == onnxfile.open_model(path).metadata
    values = {t.name: numpy_helper.to_array(t) for t in read.graph.initializer}
    assert len(values) == len(read.graph.initializer) and set(places) <= set(values)
    again = onnxfile.open_model(path).weights
    assert set(again) == set(places)
    assert b"".join(onnxfile.open_model(path).skeleton.pieces()) == b"".join(onnxfile.skeleton_of(bundle).pieces())
    for name, place in places.items():
        assert (
            values[name].tobytes() == place.read().tobytes() == again[name].read().tobytes() == b"".join(place.pieces())
        )
        assert values[name].shape == place.shape == again[name].shape and values[name].dtype == place.dtype
    assert not any(t.external_data for t in read.graph.initializer)
    assert [v.name for v in read.graph.input] == [spec.name for spec in bundle.manifest.inputs]
    assert [v.name for v in read.graph.output] == [spec.name for spec in bundle.manifest.outputs]


def test_a_serving_process_needs_neither_this_package_nor_onnx(tmp_path: Path) -> None:
    bundle = bundle_of("dense")
    path = tmp_path / "m.onnx"
    onnxfile.write_model(path, onnxfile.skeleton_of(bundle), onnxfile.inference_places(bundle), onnxfile.about(bundle))
    x, _ = samples(3)
    np.save(tmp_path / "x.npy", x)
    told = in_fresh_process(Path(serve.__code__.co_filename), str(path), str(tmp_path / "x.npy"))
    session = edgetune.TrainingSession(bundle, plan_of(bundle))
    assert relative_error(np.array(told["output"]), session.predict(x)) <= ROUNDING
    assert told["metadata"]["classes"] == '["class0", "class1", "class2", "class3"]'
    assert not told["onnx"] and not told["edgetune"]


def test_several_inputs_and_outputs_keep_their_names(tmp_path: Path) -> None:
    model = seeded(TwoByTwo)
    inputs = [torch.randn(2, 1, 6, 6), torch.randn(2, 5)]
    bundle = edgetune.export(
        model, inputs, tmp_path / "b", train="classes", codec="dense", outputs=["classes", "score"]
    )
    path = tmp_path / "m.onnx"
    onnxfile.write_model(path, onnxfile.skeleton_of(bundle), onnxfile.inference_places(bundle), {})
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    assert names == [spec.name for spec in bundle.manifest.outputs] == list(bundle.manifest.inference.outputs)
    feeds = {spec.name: value.numpy() for spec, value in zip(bundle.manifest.inputs, inputs, strict=True)}
    with torch.inference_mode():
        expected = list(model(*inputs).values())
    for found, wanted in zip(session.run(None, feeds), expected, strict=True):
        assert relative_error(found, wanted.numpy()) <= 1e-5


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    bundle = bundle_of("dense")
    state = {name: value[:1] for name, value in bundle.initial_parameters().items()}
    other = places_in(checkpoint_of(state, tmp_path / "c.safetensors"))
    with pytest.raises(BundleError, match="should have the shape"):
        onnxfile.inference_places(bundle, other)
    with pytest.raises(BundleError, match="does not fit the bundle"):
        onnxfile.inference_places(bundle, {})


def test_a_file_that_is_too_large_is_refused_before_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = bundle_of("dense")
    monkeypatch.setattr(onnxfile, "MOST_BYTES", 1000)
    with pytest.raises(BundleError, match="an ONNX file can have 1000"):
        onnxfile.write_model(tmp_path / "m.onnx", onnxfile.skeleton_of(bundle), onnxfile.inference_places(bundle), {})
    assert not list(tmp_path.iterdir())


def test_a_disk_that_refuses_leaves_nothing_behind(tmp_path: Path) -> None:
    bundle = bundle_of("dense")
    with pytest.raises(StorageError, match="cannot write the model"):
        onnxfile.write_model(
            tmp_path / "absent" / "m.onnx", onnxfile.skeleton_of(bundle), onnxfile.inference_places(bundle), {}
        )


@pytest.mark.parametrize("cut", [1, 40, 2000])
def test_a_torn_file_is_told_apart(tmp_path: Path, cut: int) -> None:
    bundle = bundle_of("dense")
    path = tmp_path / "m.onnx"
    onnxfile.write_model(path, onnxfile.skeleton_of(bundle), onnxfile.inference_places(bundle), onnxfile.about(bundle))
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(StateError, match=r"m\.onnx cannot be read"):
        onnxfile.open_model(path)
    path.write_bytes(b"\xff" * 30)
    with pytest.raises(StateError, match=r"m\.onnx cannot be read"):
        onnxfile.open_model(path)


def test_a_file_of_weights_with_a_lying_header_is_refused(tmp_path: Path) -> None:
    whole = (bundle_of("dense").path / WEIGHTS).read_bytes()
    for damaged in (whole[:20], (2**60).to_bytes(8, "little") + whole[8:], whole[:8] + b"[" + whole[9:], b""):
        (tmp_path / "w").write_bytes(damaged)
        with pytest.raises(BundleError, match="not a readable file of tensors"):
            places_in(tmp_path / "w")
    (tmp_path / "w").write_bytes(whole[:-10])
    last = max(places_in(tmp_path / "w").values(), key=lambda place: place.offset)
    with pytest.raises(BundleError, match="ends too early"):
        last.read()
    with pytest.raises(BundleError, match="ends too early"):
        list(last.pieces())
