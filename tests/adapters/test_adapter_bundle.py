"""Bundles whose convolutions are computed from codes: exact gradients, the same steps as torch, fewer numbers."""

from __future__ import annotations

import copy
import functools
import itertools
import json
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import edgetune
from edgetune.adapters import Slicing, merge, parse, save_maps
from edgetune.adapters.torch import attach, detach
from edgetune.bundle import WEIGHTS, AdaptedWeightSpec, AdapterMapSpec, Array, Bundle, Manifest
from edgetune.errors import BundleError, ExportError, UsageError
from edgetune.export.capture import capture
from edgetune.export.source import Signature
from tests.adapters.small import IMAGES, LABELS, convolutional, odd_convolutions
from tests.export.small_models import assert_equal_gradients, drawn, torch_gradients

ENGINES = ("onnxruntime", "torch")
SMALL = "slice=4x4x3x3,code=8"
BASES = [(IMAGES, LABELS)]
_SHELF = tempfile.TemporaryDirectory(prefix="edgetune-tests-")  # removed when the interpreter ends
_NUMBERS = itertools.count()


class Signal(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Conv1d(2, 5, 3), nn.ReLU(), nn.Conv1d(5, 7, 3, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(28, 4)
        )


@functools.lru_cache
def captured(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> onnx.ModelProto:
    torch.manual_seed(0)
    return capture(make().eval(), [Signature(shape)]).model


def export(path: Path, adapter: str | None, make: Callable[[], nn.Module] = convolutional, **options: Any) -> Bundle:
    shape = (2, 8) if make is Signal else (1, 8, 8)
    model = onnx.ModelProto()
    model.CopyFrom(captured(make, shape))
    return edgetune.export(model, None, path, adapter=adapter, **{"last": "all", "codec": "dense", **options})


@functools.lru_cache
def bundle_of(adapter: str | None, make: Callable[[], nn.Module] = convolutional, **options: Any) -> Bundle:
    """Return a bundle that several tests share."""
    return export(Path(_SHELF.name) / str(next(_NUMBERS)), adapter, make, **options)


def session_of(bundle: Bundle, engine: str = "onnxruntime", **options: Any) -> edgetune.TrainingSession:
    plan = edgetune.plan(bundle, batch=3, epsilon=1.0, calibration=BASES)
    return edgetune.TrainingSession(bundle, plan, engine=engine, **options)


def disturb(session: edgetune.TrainingSession) -> None:
    """Move codes and map away from where they begin, so that no gradient is zero by chance."""
    rng, state = np.random.default_rng(1), session.state()
    for name in session.parameters():
        if name.endswith(".codes") or name.startswith("csg."):
            state[name] = (state[name] + 0.1 * rng.standard_normal(state[name].shape)).astype(np.float32)
    session.load_state(state)


def in_torch(name: str, model: nn.Module) -> str:
    """Return the name that torch's parametrisation gives a trained tensor of a bundle."""
    if name.startswith("csg."):
        return next(n for n, _ in model.named_parameters() if n.endswith("shared.value"))
    return name.replace(".weight.codes", ".parametrizations.weight.original")


def torch_twin(adapter: str, values: dict[str, Array], make: Callable[[], nn.Module]) -> nn.Module:
    """Return the model with the same adapter and the same values, in torch."""
    torch.manual_seed(0)
    model = make().eval()
    attach(model, parse(adapter))
    own = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in values.items():
            own[in_torch(name, model)].copy_(torch.from_numpy(value))
    return model


def compare(session: edgetune.TrainingSession, adapter: str, make: Callable[[], nn.Module], x: Array = IMAGES) -> None:
    twin = torch_twin(adapter, session.parameters(), make)

    def loss(wide: nn.Module) -> torch.Tensor:
        return nn.functional.cross_entropy(wide(torch.from_numpy(x).double()), torch.from_numpy(LABELS))

    expected = torch_gradients(twin, loss)
    _, found = session.gradients(x, LABELS)
    assert all(np.abs(gradient).max() > 0 for gradient in found.values())
    assert_equal_gradients(found, {name: expected[in_torch(name, twin)] for name in found})


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("adapter", "codec"),
    [
        (f"csg:{SMALL}", "dense"),
        (f"csg:{SMALL}", "hosvd"),
        (f"bcsg:{SMALL},residual=no", "hosvd"),
        ("csg:slice=4x5x2x3,code=3,kernels=any", "dense"),
    ],
)
def test_gradients_of_codes_and_map_are_those_of_torch(adapter: str, codec: str, engine: str) -> None:
    session = session_of(bundle_of(adapter, codec=codec), engine)
    disturb(session)
    compare(session, adapter, convolutional)


def test_gradients_are_right_for_grouped_shared_and_pointwise_filters() -> None:
    adapter = "csg:slice=4x4x3x3+4x4x1x1,code=8+3,freeze=yes"
    bundle = bundle_of(adapter, odd_convolutions)
    assert bundle.manifest.adapter is not None
    weights = {spec.weight: spec.map for spec in bundle.manifest.adapter.weights}
    threes, ones = "csg.4x4x3x3.map", "csg.4x4x1x1.map"
    # All but the first convolution: even the codes of the depthwise one are fewer, 24 for 108 weights.
    expected = {"grouped.weight": threes, "depthwise.weight": threes, "twice.weight": threes, "point.weight": ones}
    assert weights == expected | {"head.weight": threes}
    assert [layer.role for layer in bundle.manifest.layers if layer.name == "head"] == ["head"]
    session = session_of(bundle)
    disturb(session)
    compare(session, adapter, odd_convolutions)


def test_filters_of_one_dimension_have_slices_of_their_own() -> None:
    adapter = "csg:slice=2x4x3,code=2"
    x = drawn((3, 2, 8))
    bundle = bundle_of(adapter, Signal)
    session = edgetune.TrainingSession(bundle, edgetune.plan(bundle, batch=3, epsilon=1.0))
    disturb(session)
    compare(session, adapter, Signal, x)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_steps_are_those_of_torch(optimizer: str) -> None:
    adapter = f"csg:{SMALL}"
    session = session_of(bundle_of(adapter, optimizer=optimizer), hyper={"learning_rate": 0.01, "weight_decay": 0.01})
    disturb(session)
    twin = torch_twin(adapter, session.parameters(), convolutional)
    trained = [dict(twin.named_parameters())[in_torch(name, twin)] for name in session.parameters()]
    oracle: torch.optim.Optimizer = torch.optim.AdamW(trained, 0.01, weight_decay=0.01)
    if optimizer == "sgd":
        oracle = torch.optim.SGD(trained, 0.01, momentum=0.9, weight_decay=0.01)
    for _ in range(4):
        session.step(IMAGES, LABELS)
        oracle.zero_grad()
        nn.functional.cross_entropy(twin(torch.from_numpy(IMAGES)), torch.from_numpy(LABELS)).backward()  # type: ignore[no-untyped-call]
        oracle.step()
    for value, expected in zip(session.parameters().values(), trained, strict=True):
        np.testing.assert_allclose(value, expected.detach().numpy(), atol=1e-5)
    merged, wide = merge(session.bundle, session.parameters()), copy.deepcopy(twin)
    detach(wide)
    for name, parameter in wide.named_parameters():
        if name in merged:
            np.testing.assert_allclose(merged[name], parameter.detach().numpy(), atol=1e-5)


def test_a_residual_starts_as_the_model_itself_and_then_learns() -> None:
    plain, adapted = bundle_of(None), bundle_of(f"bcsg:{SMALL}")
    before, session = session_of(plain), session_of(adapted, hyper={"learning_rate": 0.05})
    np.testing.assert_array_equal(session.predict(IMAGES), before.predict(IMAGES))
    merged = merge(adapted, session.parameters())
    assert merged.keys() == before.parameters().keys()
    assert all(np.array_equal(merged[name], value) for name, value in before.parameters().items())
    losses = [session.step(IMAGES, LABELS) for _ in range(30)]
    assert losses[-1] < 0.5 * losses[0]
    assert not np.array_equal(merge(adapted, session.parameters())["2.weight"], merged["2.weight"])


def test_the_manifest_says_what_a_reader_needs() -> None:
    manifest = bundle_of(f"bcsg:{SMALL},seed=3").manifest
    shared = "csg.4x4x3x3.map"
    assert manifest.adapter is not None
    assert parse(manifest.adapter.settings) == parse(f"bcsg:{SMALL},seed=3")
    assert manifest.adapter.maps == (AdapterMapSpec(shared, (4, 4, 3, 3), 8, False, f"{shared}.bits"),)
    assert manifest.adapter.weights == (
        AdaptedWeightSpec("2.weight", (10, 6, 3, 3), "2.weight.codes", shared),
        AdaptedWeightSpec("5.weight", (7, 10, 3, 3), "5.weight.codes", shared),
    )
    layers = {layer.name: layer.weight for layer in manifest.layers}
    assert layers == {"0": "0.weight", "2": "2.weight.codes", "5": "5.weight.codes", "8": "8.weight"}
    assert {spec.name: spec.layer for spec in manifest.parameters}["5.weight.codes"] == "5"
    assert Manifest.from_json(manifest.to_json()) == manifest
    assert bundle_of(None).manifest.adapter is None


def test_a_binary_map_is_in_no_file_as_floats() -> None:
    bundle = bundle_of("bcsg:slice=4x4x3x3,code=16")
    floats = (bundle.path / WEIGHTS).read_bytes()
    scale = np.float32(1 / 12).tobytes()  # ±1/√144
    assert scale not in floats and scale * 2 not in b"".join(p.read_bytes() for p in bundle.path.glob("*.onnx"))
    assert "csg.4x4x3x3.map" not in {spec.name for spec in bundle.manifest.parameters}


def test_parameters_optimizer_and_gradients_shrink_in_the_plan() -> None:
    plain = bundle_of(None, optimizer="adamw")
    adapted = bundle_of(f"bcsg:{SMALL}", optimizer="adamw")
    ledgers = [edgetune.plan(bundle, batch=3, epsilon=1.0).ledger for bundle in (plain, adapted)]
    saved_bytes = 4 * sum(
        math.prod(shape) - Slicing(shape, (4, 4, 3, 3)).slices * 8 for shape in ((10, 6, 3, 3), (7, 10, 3, 3))
    )
    assert ledgers[0]["parameters"] - ledgers[1]["parameters"] == saved_bytes
    assert ledgers[0]["optimizer"] - ledgers[1]["optimizer"] == 2 * saved_bytes
    gradients = [
        sum(math.prod(map(int, t.shape)) for t in b.manifest.graphs["update"].tensors if t.name.startswith("gradient/"))
        for b in (plain, adapted)
    ]
    assert 4 * (gradients[0] - gradients[1]) == saved_bytes


def test_a_map_from_a_file_is_fixed_unless_it_is_said_otherwise(tmp_path: Path) -> None:
    shared = drawn((8, 144)) / 12
    save_maps(tmp_path / "map.safetensors", {(4, 4, 3, 3): shared})
    given = f"csg:{SMALL},map={tmp_path / 'map.safetensors'}"
    fixed, trained = bundle_of(given), bundle_of(f"{given},freeze=no")
    assert np.array_equal(trained.initial_parameters()["csg.4x4x3x3.map"], shared)
    assert "csg.4x4x3x3.map" not in fixed.initial_parameters()
    for bundle in (fixed, trained):
        session = session_of(bundle)
        disturb(session)
        merged = merge(bundle, session.parameters())
        twin = convolutional()
        twin.load_state_dict({name: torch.from_numpy(value) for name, value in merged.items()}, strict=False)
        np.testing.assert_allclose(session.predict(IMAGES), twin(torch.from_numpy(IMAGES)).detach().numpy(), atol=1e-5)


def test_what_cannot_be_adapted_is_refused_and_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no trained convolution can be generated from slices 16×16×5×5"):
        export(tmp_path / "b", "csg:slice=16x16x5x5")
    with pytest.raises(UsageError, match="no trained convolution"):  # the head is linear
        export(tmp_path / "b", f"csg:{SMALL}", last=0)
    with pytest.raises(UsageError, match="choose one of: bcsg, csg"):
        export(tmp_path / "b", "lora")
    assert list(tmp_path.iterdir()) == []


def test_a_name_that_the_model_has_already_is_refused(tmp_path: Path) -> None:
    model = onnx.ModelProto()
    model.CopyFrom(captured(convolutional, (1, 8, 8)))
    for node in model.graph.node:
        node.input[:] = ["2.weight.codes" if name == "0.bias" else name for name in node.input]
    for tensor in model.graph.initializer:
        tensor.name = "2.weight.codes" if tensor.name == "0.bias" else tensor.name
    with pytest.raises(ExportError, match=r"needs the name '2\.weight\.codes'"):
        edgetune.export(model, None, tmp_path / "b", last="all", codec="dense", adapter=f"csg:{SMALL}")


def test_merging_needs_every_trained_tensor_and_leaves_ordinary_bundles_as_they_are() -> None:
    bundle, plain = bundle_of(f"csg:{SMALL}"), bundle_of(None)
    values = plain.initial_parameters()
    assert merge(plain, values | {"step": np.array(1)}).keys() == values.keys()
    with pytest.raises(BundleError, match=r"'csg\.4x4x3x3\.map' is trained .* and missing here"):
        merge(bundle, values)


def test_a_manifest_without_the_field_has_no_adapter() -> None:
    manifest = bundle_of(None).manifest
    data = json.loads(manifest.to_json())
    assert data.pop("adapter") is None
    assert Manifest.from_json(json.dumps(data)) == manifest
