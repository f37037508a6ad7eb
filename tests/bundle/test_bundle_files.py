"""The directory of a bundle: complete, unchanged, closed to the outside, and every weight in it once."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from safetensors import safe_open

from edgetune.bundle import MANIFEST, WEIGHTS, Bundle, GraphSpec, StageSpec, sha256_of, write_manifest
from edgetune.errors import BundleError
from tests.engines.workshop import CODECS, bundle_of, copied, network, remade

each_codec = pytest.mark.parametrize("codec", CODECS)


def change_manifest(bundle: Bundle, **changed: Any) -> None:
    data = json.loads((bundle.path / MANIFEST).read_text())
    (bundle.path / MANIFEST).write_text(json.dumps({**data, **changed}))


@pytest.fixture
def copy(tmp_path: Path) -> Bundle:
    """A bundle that a test may damage."""
    return copied(bundle_of("hosvd"), tmp_path / "bundle")


@each_codec
def test_the_manifest_lists_every_file_with_its_hash(codec: str) -> None:
    bundle = bundle_of(codec)
    there = {path.name for path in bundle.path.iterdir()} - {MANIFEST}
    assert set(bundle.manifest.files) == there
    for name, digest in bundle.manifest.files.items():
        assert digest == hashlib.sha256((bundle.path / name).read_bytes()).hexdigest() == sha256_of(bundle.path / name)
    named = {
        f for g in bundle.manifest.graphs.values() for f in (g.file, g.flat_file, *(stage.file for stage in g.stages))
    }
    assert there == named | {WEIGHTS, bundle.manifest.inference.file}


def test_a_directory_without_a_manifest_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"is not a bundle: it holds no manifest\.json; make one with"):
        Bundle.open(tmp_path)
    with pytest.raises(BundleError, match="is not a bundle"):
        Bundle.open(tmp_path / "nowhere")


@pytest.mark.parametrize("name", [WEIGHTS, "train.flat.onnx", "train.backward.onnx"])
def test_a_missing_file_is_named(copy: Bundle, name: str) -> None:
    (copy.path / name).unlink()
    for verify in (True, False):
        with pytest.raises(BundleError, match=f"lacks its file {name}"):
            Bundle.open(copy.path, verify=verify)


@pytest.mark.parametrize("name", [WEIGHTS, "train.forward.onnx", "update.onnx"])
@pytest.mark.parametrize("how", ["one bit", "cut", "longer"])
def test_a_changed_file_is_named(copy: Bundle, name: str, how: str) -> None:
    path = copy.path / name
    content = bytearray(path.read_bytes())
    if how == "one bit":
        content[len(content) // 2] ^= 1
    path.write_bytes(content[:-1] if how == "cut" else content + b"\0" if how == "longer" else content)
    with pytest.raises(BundleError, match=rf"{name} is not the file that was exported \(its SHA-256 differs\)"):
        Bundle.open(copy.path)
    Bundle.open(copy.path, verify=False)


@pytest.mark.parametrize("name", ["../x", "/etc/hostname", "sub/x", "..", ".", "", "./weights.safetensors"])
@pytest.mark.parametrize("verify", [True, False])
def test_a_name_that_leaves_the_directory_is_refused(copy: Bundle, name: str, verify: bool) -> None:
    outside = copy.path.parent / "x"
    outside.write_bytes(b"secret")
    files = {**copy.manifest.files, name: sha256_of(outside)}
    change_manifest(copy, files=files)
    with pytest.raises(BundleError, match=r"not a plain file name inside the bundle|lacks its file"):
        Bundle.open(copy.path, verify=verify)


@pytest.mark.parametrize("field", ["file", "flat_file", "stage"])
def test_a_graph_outside_of_the_listed_files_is_refused(copy: Bundle, field: str) -> None:
    train = copy.manifest.graphs["train"]
    assert train.stages
    changed: GraphSpec
    if field == "stage":
        stage: StageSpec = dataclasses.replace(train.stages[0], file="../evil.onnx")
        changed = dataclasses.replace(train, stages=(stage, *train.stages[1:]))
    else:
        changed = dataclasses.replace(train, **{field: "../evil.onnx"})  # type: ignore[arg-type]
    (copy.path / MANIFEST).unlink()
    write_manifest(copy.path, dataclasses.replace(copy.manifest, graphs={**copy.manifest.graphs, "train": changed}))
    with pytest.raises(BundleError, match="names a graph without a hash"):
        Bundle.open(copy.path)


def test_the_digest_is_the_identity_of_all_content(tmp_path: Path) -> None:
    bundle = bundle_of("hosvd")
    assert bundle.digest == hashlib.sha256((bundle.path / MANIFEST).read_bytes()).hexdigest()
    assert copied(bundle, tmp_path / "same").digest == bundle.digest
    assert bundle_of("svd").digest != bundle.digest
    renamed = remade(bundle, tmp_path / "renamed", model="another")
    assert renamed.digest != bundle.digest
    (renamed.path / WEIGHTS).write_bytes(b"other weights")
    # the manifest holds the hashes, so other content cannot keep the digest and still open
    assert write_manifest(renamed.path, renamed.manifest).digest != renamed.manifest.files[WEIGHTS]
    assert Bundle.open(renamed.path).digest != bundle.digest


def test_a_manifest_appears_only_when_it_is_complete(copy: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    (copy.path / MANIFEST).unlink()

    def lost(self: Path, target: Path) -> Path:
        raise OSError("power loss")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", lost)
        with pytest.raises(OSError, match="power loss"):
            write_manifest(copy.path, copy.manifest)
    with pytest.raises(BundleError, match="is not a bundle"):
        Bundle.open(copy.path)
    write_manifest(copy.path, copy.manifest)
    assert MANIFEST + ".tmp" not in Bundle.open(copy.path).manifest.files


# ---- weights ------------------------------------------------------------------------------------------------------


def stored_bytes(bundle: Bundle) -> dict[str, int]:
    with safe_open(bundle.path / WEIGHTS, framework="numpy") as stream:
        return {name: stream.get_tensor(name).nbytes for name in stream.keys()}  # noqa: SIM118 (not a mapping)


@pytest.mark.parametrize(("size", "last"), [("small", 3), ("wide", 1)])
@each_codec
def test_every_weight_is_stored_once(codec: str, size: str, last: int) -> None:
    bundle = bundle_of(codec, size, last=last)
    stored = stored_bytes(bundle)
    header = 128 * (len(stored) + 1)
    assert sum(stored.values()) <= (bundle.path / WEIGHTS).stat().st_size <= sum(stored.values()) + header
    constants: dict[str, int] = {}
    for file in bundle.path.glob("*.onnx"):
        for tensor in onnx.load_model(file, load_external_data=False).graph.initializer:
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                place = {entry.key: entry.value for entry in tensor.external_data}
                assert place["location"] == WEIGHTS and int(place["length"]) == stored[tensor.name]
                constants[tensor.name] = stored[tensor.name]
            else:
                assert len(tensor.SerializeToString()) < 512, f"{tensor.name} lies in {file.name}"
    # what is in the file is read by a graph, or trained
    trained = {spec.name: 4 * math.prod(spec.shape) for spec in bundle.manifest.parameters}
    assert constants.keys() | trained.keys() == stored.keys()
    # and it is no more than what the model has (folding adds one bias per convolution)
    model_bytes = sum(p.numel() * p.element_size() for p in network(size).parameters())
    assert 0.9 * model_bytes <= sum(stored.values()) <= 1.1 * model_bytes


def test_the_graphs_of_a_large_model_are_small() -> None:
    bundle = bundle_of("dense", "wide", last=1)
    assert (bundle.path / WEIGHTS).stat().st_size > 16 * 2**20
    assert sum(path.stat().st_size for path in bundle.path.glob("*.onnx")) < 200_000


@each_codec
def test_the_initial_parameters_are_copies_under_the_models_own_names(codec: str) -> None:
    bundle = bundle_of(codec)
    parameters = bundle.initial_parameters()
    own = dict(network("small").named_parameters())
    assert set(parameters) <= set(own) | {name.replace("weight", "bias") for name in own}
    for spec in bundle.manifest.parameters:
        assert parameters[spec.name].shape == spec.shape and parameters[spec.name].dtype == np.float32
    assert np.array_equal(parameters["fc.weight"], own["fc.weight"].detach().numpy())
    parameters["fc.weight"][:] = 0
    assert not np.array_equal(bundle.initial_parameters()["fc.weight"], parameters["fc.weight"])
