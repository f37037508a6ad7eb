"""What is in a bundle: predictions, cuts, sizes, files; and what happens where none can be made."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, inliner

import edgetune
from edgetune.bundle import Array, Bundle
from edgetune.errors import BundleError, EdgeTuneError, ExportError, UnsupportedOperatorError, UsageError
from edgetune.planning.sizes import evaluate
from tests.autodiff.handmade import CLASSES, CONVS, ConvCase, model_of
from tests.autodiff.parity import Bundles, batch_of, relative_error, worst_error
from tools import models

MIB = 1 << 20
SMALL = {
    "resnet18": (3, 64, 64),
    "mobilenet_v2": (3, 64, 64),
    "awkward_convs": (3, 24, 20),
    "digits_resnet": (1, 12, 12),
}


def session_of(bundle: Bundle, batch: int) -> Any:
    return edgetune.TrainingSession(bundle, edgetune.plan(bundle, batch=batch, epsilon=1.0))


def small(bundles: Bundles, codec: str = "hosvd", **options: Any) -> Bundle:
    return bundles.onnx("grouped", CONVS["grouped"].model, **{"last": 1, "codec": codec, **options})


# -- what it computes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SMALL)
def test_predictions_are_those_of_torch_with_its_batch_norms_folded(bundles: Bundles, name: str) -> None:
    bundle = bundles.model(name, SMALL[name], last=2, codec="dense")
    x, _ = batch_of(SMALL[name], 5, 10, seed=0)
    with torch.inference_mode():
        expected = getattr(models, name)()(torch.from_numpy(x)).numpy()
    assert relative_error(session_of(bundle, 5).predict(x), expected) <= 1e-4
    # No batch-norm is left, and the trunk holds none as scale and shift either.
    for graph in bundle.manifest.graphs.values():
        ops = [n.op_type for n in onnx.load(bundle.path / graph.flat_file, load_external_data=False).graph.node]
        assert "BatchNormalization" not in ops
    trunk = onnx.load(bundle.path / "trunk.onnx", load_external_data=False)
    scaled = {"Mul"} if name != "awkward_convs" else set()  # its gate multiplies, and so does HardSwish
    assert not scaled & {n.op_type for n in trunk.graph.node}


def test_a_residual_block_cut_in_its_middle_hands_over_two_tensors(bundles: Bundles) -> None:
    manifest = bundles.model("resnet18", (3, 64, 64), last=4, codec="dense").manifest
    assert [spec.shape for spec in manifest.features] == [(512, 2, 2), (256, 4, 4)]
    assert [layer.name for layer in manifest.layers] == [
        "layer4.0.conv2", "layer4.0.downsample.0", "layer4.1.conv1", "layer4.1.conv2", "fc",
    ]  # fmt: skip
    assert [layer.role for layer in manifest.layers] == ["tail"] * 4 + ["head"]
    assert len(bundles.model("resnet18", (3, 64, 64), last=3, codec="dense").manifest.features) == 2


@pytest.mark.parametrize(
    ("name", "last", "mebibytes"),
    [("resnet18", 2, 12.25), ("mobilenet_v2", 2, 15.31), ("resnet18", 4, 30.63), ("mobilenet_v2", 4, 28.71)],
)
def test_dense_bytes_are_the_papers_figures(bundles: Bundles, name: str, last: int, mebibytes: float) -> None:
    manifest = bundles.model(name, (3, 224, 224), last=last, codec="dense").manifest
    counted = sum(layer.dense_bytes(64) for layer in manifest.layers if layer.role == "tail")
    assert counted / MIB == pytest.approx(mebibytes, abs=0.0051)


# -- where it comes from ----------------------------------------------------------------------------------------------


def test_a_file_of_opset_17_with_a_fixed_batch(bundles: Bundles, tmp_path: Path) -> None:
    model, file = models.awkward_convs(), tmp_path / "model.onnx"
    sample = torch.zeros(3, 3, 24, 20)
    torch.onnx.export(model, (sample,), file, opset_version=17, dynamo=False)
    saved = onnx.load(file)
    assert saved.opset_import[0].version == 17
    assert saved.graph.input[0].type.tensor_type.shape.dim[0].dim_value == 3
    bundle = edgetune.export(str(file), None, tmp_path / "bundle", last=6, codec="dense")
    x, y = batch_of((3, 24, 20), 5, 10, seed=0)
    with torch.inference_mode():
        expected = model(torch.from_numpy(x)).numpy()
    assert relative_error(session_of(bundle, 5).predict(x), expected) <= 1e-4
    dense = bundles.model("awkward_convs", (3, 24, 20), last=6, codec="dense")
    _, gradients = session_of(dense, 5).gradients(x, y)
    _, found = session_of(bundle, 5).gradients(x, y)
    # torch folds batch-norm into the convolutions of such a file, whose weights are then others: the head's is not.
    assert relative_error(found["fc.weight"], gradients["fc.weight"]) <= 1e-5


@pytest.mark.parametrize("mode", ["SAME_UPPER", "SAME_LOWER", "VALID"])
@pytest.mark.parametrize("stride", [1, 2])
def test_auto_pad_becomes_explicit(tmp_path: Path, mode: str, stride: int) -> None:
    rng = np.random.default_rng(0)
    constants = {
        "w": rng.standard_normal((4, 3, 3, 2)).astype(np.float32),
        "h": rng.standard_normal((4, CLASSES)).astype(np.float32),
    }
    pool: dict[str, Any] = {"kernel_shape": [2, 3], "strides": [stride, 1], "auto_pad": mode}
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"], auto_pad=mode, strides=[stride, stride], kernel_shape=[3, 2]),
        helper.make_node("MaxPool", ["a"], ["m"], **pool),
        helper.make_node("AveragePool", ["m"], ["p"], **pool),
        helper.make_node("GlobalAveragePool", ["p"], ["q"]),
        helper.make_node("Flatten", ["q"], ["f"]),
        helper.make_node("MatMul", ["f", "h"], ["y"]),
    ]
    model = model_of(nodes, (3, 12, 13), constants)
    bundle = edgetune.export(model, None, tmp_path / "bundle", last=1, codec="dense")
    x, y = batch_of((3, 12, 13), 4, CLASSES, seed=0)
    original = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    session = session_of(bundle, 4)
    assert relative_error(session.predict(x), np.asarray(original.run(None, {"x": x})[0])) <= 1e-5
    # The loss falls as the gradient says: a finite difference along the gradient, in float32 and so only roughly.
    loss, gradients = session.gradients(x, y)
    state = session.state()
    size = 1e-2 / float(np.linalg.norm(gradients["w"]))
    session.load_state({**state, "w": state["w"] - size * gradients["w"]})
    lower, _ = session.gradients(x, y)
    session.load_state({**state, "w": state["w"] + size * gradients["w"]})
    higher, _ = session.gradients(x, y)
    slope = (higher - lower) / (2 * size)
    assert slope == pytest.approx(float(np.square(gradients["w"]).sum()), rel=2e-2)
    assert lower < loss < higher


def test_a_new_head_has_its_own_classes_and_the_rest_is_kept(bundles: Bundles) -> None:
    names = ("apple", "pear", "plum")
    bundle = bundles.model("resnet18", (3, 64, 64), last=1, codec="dense", new_head=3, classes=names)
    old = bundles.model("resnet18", (3, 64, 64), last=1, codec="dense")
    assert bundle.manifest.classes == names and bundle.manifest.outputs[0].shape == (3,)
    values, before = bundle.initial_parameters(), old.initial_parameters()
    assert values["fc.weight"].shape == (3, 512) and values["fc.bias"].shape == (3,)
    assert np.array_equal(values["layer4.1.conv2.weight"], before["layer4.1.conv2.weight"])
    assert 0 < np.abs(values["fc.weight"]).max() <= 1 / np.sqrt(512)
    x, y = batch_of((3, 64, 64), 2, 3, seed=0)
    session = session_of(bundle, 2)
    assert session.predict(x).shape == (2, 3)
    assert session.gradients(x, y)[1]["fc.weight"].shape == (3, 512)


def test_a_frozen_head_gets_no_gradient_and_the_others_the_same(bundles: Bundles) -> None:
    frozen = bundles.model("resnet18", (3, 64, 64), last=1, codec="dense", freeze_head=True)
    both = bundles.model("resnet18", (3, 64, 64), last=1, codec="dense")
    x, y = batch_of((3, 64, 64), 2, 1000, seed=0)
    _, found = session_of(frozen, 2).gradients(x, y)
    _, expected = session_of(both, 2).gradients(x, y)
    assert set(found) == {"layer4.1.conv2.weight"} == set(expected) - {"fc.weight", "fc.bias"}
    assert worst_error(found, {name: expected[name] for name in found}) <= 1e-6
    assert [layer.role for layer in frozen.manifest.layers] == ["tail"]


# -- the files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", ["dense", "hosvd", "svd"])
def test_versions_and_domains(bundles: Bundles, codec: str) -> None:
    bundle = bundles.model("awkward_convs", (3, 24, 20), last=6, codec=codec)
    files = sorted(path.name for path in bundle.path.glob("*.onnx"))
    assert {"train.onnx", "train.flat.onnx", "update.onnx", "predict.onnx"} <= set(files)
    assert ("calibrate.onnx" in files) == (codec != "dense")
    assert set(files) | {"weights.safetensors"} == set(bundle.manifest.files)
    for file in files:
        if file != "infer.onnx":  # checked with the weights in it, without which it is none
            onnx.checker.check_model(str(bundle.path / file), full_check=True)
        model = onnx.load(bundle.path / file, load_external_data=False)
        assert model.ir_version <= 9
        assert {o.domain: o.version for o in model.opset_import}[""] == 18
        domains = {o.domain for o in model.opset_import} | {n.domain for n in model.graph.node}
        domains |= {f.domain for f in model.functions}
        if file == "train.onnx":
            assert domains == {"", "edgetune"} and model.functions
            for function in model.functions:
                assert {n.domain for n in function.node} == {""}
        else:
            assert domains == {""} and not model.functions


def test_the_readable_graph_inlined_is_the_flat_one(bundles: Bundles) -> None:
    bundle = bundles.model("awkward_convs", (3, 24, 20), last=6, codec="hosvd")
    readable = onnx.load(bundle.path / "train.onnx")
    inlined = inliner.inline_local_functions(readable)
    flat = onnx.load(bundle.path / "train.flat.onnx")
    assert len(readable.graph.node) < len(flat.graph.node) / 2
    feeds = train_feeds(bundle, batch=3, ranks=2)
    found, expected = (run_plain(model, feeds) for model in (inlined, flat))
    assert found.keys() == expected.keys() >= {"loss", "correct"}
    assert float(found["loss"]) == float(expected["loss"])
    assert all(np.allclose(found[name], expected[name], rtol=1e-5, atol=1e-7) for name in expected)


def train_feeds(bundle: Bundle, batch: int, ranks: int) -> dict[str, Array]:
    """Return random inputs of the train graph: every rank ``ranks``, or the extent of its mode where that is less."""
    rng, manifest = np.random.default_rng(0), bundle.manifest
    feeds: dict[str, Array] = {
        f.name: rng.standard_normal((batch, *f.shape)).astype(np.float32) for f in manifest.features
    }
    feeds |= bundle.initial_parameters()
    feeds |= {"targets": rng.integers(0, len(manifest.classes), batch)}
    for saved in manifest.saved:
        for mode in saved.modes:
            if mode.size is None:
                feeds[mode.input] = rng.standard_normal((batch, min(ranks, batch))).astype(np.float32)
            else:
                q = np.linalg.qr(rng.standard_normal((mode.groups, mode.size, mode.size)))[0]
                feeds[mode.input] = np.ascontiguousarray(q[:, :, :ranks], np.float32)
    return feeds


def run_plain(model: onnx.ModelProto, feeds: dict[str, Array]) -> dict[str, Array]:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [o.name for o in session.get_outputs()]
    taken = {i.name: feeds[i.name] for i in session.get_inputs()}
    return dict(zip(names, session.run(names, taken), strict=True))


@pytest.mark.parametrize("codec", ["dense", "hosvd", "svd"])
@pytest.mark.parametrize(("batch", "ranks"), [(3, 2), (5, 4)])
def test_symbolic_sizes_are_the_real_ones(bundles: Bundles, codec: str, batch: int, ranks: int) -> None:
    bundle = bundles.model("awkward_convs", (3, 24, 20), last=6, codec=codec)
    spec = bundle.manifest.graphs["train"]
    model = onnx.load(bundle.path / spec.flat_file)
    assert [node.name for node in model.graph.node] == list(spec.nodes)
    known = {o.name for o in model.graph.output}
    for node in model.graph.node:
        model.graph.output.extend(helper.make_empty_tensor_value_info(n) for n in node.output if n and n not in known)
    feeds = train_feeds(bundle, batch, ranks)
    found = run_plain(model, feeds) | {i.name: feeds[i.name] for i in model.graph.input}
    symbols = {"batch": batch}
    for saved in bundle.manifest.saved:
        symbols |= {mode.rank: int(feeds[mode.input].shape[-1]) for mode in saved.modes}
    uses = {use.name: use for use in spec.tensors if use.kind != "constant"}
    assert set(found) == set(uses)
    for name, value in found.items():
        assert tuple(evaluate(extent, symbols) for extent in uses[name].shape) == value.shape, name
        assert str(value.dtype) == uses[name].dtype, name


def test_every_saved_tensor_is_listed_and_a_mask_takes_one_bit_per_element(bundles: Bundles) -> None:
    bundle = bundles.model("resnet18", (3, 64, 64), last=4, codec="hosvd")
    uses = {use.name: use for use in bundle.manifest.graphs["train"].tensors}
    stored = {name for saved in bundle.manifest.saved for name in saved.options[0].stored}
    assert stored <= set(uses)
    masks = [use for use in uses.values() if use.kind == "saved" and use.dtype == "uint8"]
    # The ReLU behind layer4.0's sum, the one inside layer4.1 and the last one, each 512 x 2 x 2 elements: 256 bytes.
    assert len(masks) == 3
    for mask in masks:
        assert evaluate("*".join(mask.shape), {"batch": 1}) == 512 * 2 * 2 // 8
    # Nothing else is kept: every float that crosses to the backward pass is a factor, a core, or the head's input.
    floats = {use.name for use in uses.values() if use.kind == "saved" and use.dtype == "float32"}
    assert floats <= stored


# -- where none can be made -------------------------------------------------------------------------------------------


def test_a_tampered_file_is_refused(bundles: Bundles, tmp_path: Path) -> None:
    bundle = small(bundles)
    for file in bundle.manifest.files:
        copied = tmp_path / file
        shutil.copytree(bundle.path, copied)
        assert Bundle.open(copied).manifest == bundle.manifest
        content = bytearray((copied / file).read_bytes())
        content[len(content) // 2] ^= 1
        (copied / file).write_bytes(content)
        with pytest.raises(BundleError, match="SHA-256"):
            Bundle.open(copied)
        (copied / file).unlink()
        with pytest.raises(BundleError, match="lacks its file"):
            Bundle.open(copied)


def divided_by_batch_size(_: ConvCase) -> onnx.ModelProto:
    constants: dict[str, Array] = {"w": np.ones((3, CLASSES), np.float32), "zero": np.array([0], np.int64)}
    nodes = [
        helper.make_node("Shape", ["x"], ["s"]),
        helper.make_node("Gather", ["s", "zero"], ["n"]),
        helper.make_node("Cast", ["n"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("Div", ["x", "f"], ["d"]),
        helper.make_node("MatMul", ["d", "w"], ["y"]),
    ]
    return model_of(nodes, (3,), constants)


def unknown_operator(case: ConvCase) -> onnx.ModelProto:
    model = case.model()
    (relu,) = [n for n in model.graph.node if n.op_type == "Relu"]
    relu.op_type = "Acosh"
    return model


Failure = tuple[Callable[[ConvCase], onnx.ModelProto], dict[str, Any], type[EdgeTuneError], str]
FAILURES: dict[str, Failure] = {
    "codec": (ConvCase.model, {"codec": "zip"}, UsageError, r"'zip'.*dense, .*hosvd, .*svd"),
    "loss": (ConvCase.model, {"loss": "hinge"}, UsageError, r"'hinge'.*cross_entropy"),
    "optimizer": (ConvCase.model, {"optimizer": "lion"}, UsageError, r"'lion'.*adamw, sgd"),
    "last": (ConvCase.model, {"last": 2}, UsageError, r"--last 2.*1 convolution"),
    "smoothing": (ConvCase.model, {"label_smoothing": 1.0}, UsageError, r"out of range"),
    "nothing trained": (ConvCase.model, {"last": 0, "freeze_head": True}, UsageError, r"nothing is trained"),
    "class names": (ConvCase.model, {"classes": ("a", "b")}, UsageError, r"2 class names.*4 outputs"),
    "head of one": (ConvCase.model, {"new_head": 1}, UsageError, r"two classes"),
    "batch size": (divided_by_batch_size, {"last": 0}, ExportError, r"batch"),
    "operator": (unknown_operator, {}, UnsupportedOperatorError, r"Acosh.*Relu.*Sigmoid"),
}


# A size that the model turns into a float is not noticed: the probe's batch stays in the graph as a constant.
@pytest.mark.parametrize("name", list(FAILURES))
def test_a_failed_export_says_why_and_leaves_nothing_behind(tmp_path: Path, name: str) -> None:
    make, options, kind, message = FAILURES[name]
    with pytest.raises(kind, match=message):
        edgetune.export(make(CONVS["plain"]), None, tmp_path / "bundle", **{"last": 1, **options})
    assert list(tmp_path.iterdir()) == []


def test_a_mean_over_the_batch_is_refused_where_it_is_trained_through(tmp_path: Path) -> None:
    constants: dict[str, Array] = {
        "v": np.ones((3, 3), np.float32), "w": np.ones((3, CLASSES), np.float32), "axes": np.array([0]),
    }  # fmt: skip
    nodes = [
        helper.make_node("MatMul", ["x", "v"], ["a"]),
        helper.make_node("ReduceMean", ["a", "axes"], ["m"], keepdims=1),
        helper.make_node("Sub", ["a", "m"], ["d"]),
        helper.make_node("MatMul", ["d", "w"], ["y"]),
    ]
    with pytest.raises(EdgeTuneError, match="batch"):
        edgetune.export(model_of(nodes, (3,), constants), None, tmp_path / "bundle", last=1, codec="dense")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_export_keeps_the_bundle_that_was_there(bundles: Bundles, tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    shutil.copytree(small(bundles).path, target)
    before = Bundle.open(target).digest
    with pytest.raises(UnsupportedOperatorError):
        edgetune.export(unknown_operator(CONVS["plain"]), None, target, last=1)
    assert Bundle.open(target).digest == before
    assert list(tmp_path.iterdir()) == [target]
    edgetune.export(CONVS["plain"].model(), None, target, last=1)
    assert Bundle.open(target).digest != before


def test_a_directory_that_is_no_bundle_is_not_overwritten(tmp_path: Path) -> None:
    precious = tmp_path / "notes.txt"
    precious.write_text("mine")
    with pytest.raises(UsageError, match="is not a bundle"):
        edgetune.export(CONVS["plain"].model(), None, tmp_path)
    assert list(tmp_path.iterdir()) == [precious]
