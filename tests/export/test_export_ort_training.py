"""The artifacts for onnxruntime-training: what can be seen without it, and what its own training API makes of them."""

from __future__ import annotations

import dataclasses
import platform
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, numpy_helper

import edgetune
from edgetune.bundle import Array, Bundle
from edgetune.errors import ExportError, UsageError
from edgetune.export.ort_training import FILES, write_ort_training
from edgetune.planning.plan import Plan
from tests.autodiff.parity import Bundles, relative_error, sample_away_from_kinks, worst_error
from tests.engines.workshop import bundle_of, in_fresh_process, plan_of, remade, samples
from tools import models

SCRIPT = Path(__file__).with_name("run_ort_training.py")
PACKAGES = ("onnxruntime-training==1.19.2", "onnx<1.17")  # newer ones of onnx write a version that it does not read
BATCH = 8
STEPS = [(BATCH, 0), (BATCH, 1), (5, 2), (BATCH, 3), (3, 4)]  # samples and seed; the shorter ones are last batches
# far from the defaults, so that a form of AdamW that places decay or epsilon elsewhere differs
ADAMW = {"learning_rate": 0.01, "beta1": 0.8, "beta2": 0.99, "epsilon": 1e-3, "weight_decay": 0.3}
PLAIN_SGD = {"learning_rate": 0.05, "momentum": 0.0}
TOLERANCE = 1e-5


class FixedSketch(edgetune.TrainingSession):
    """A session whose every step uses the sketch of the first, cut to the batch: as the artifacts do."""

    def _run_time_inputs(self, samples: int, piece: int = 0) -> dict[str, Any]:
        step, self._state.step = self._state.step, 0
        feeds = super()._run_time_inputs(BATCH, piece)
        self._state.step = step
        for name in (mode.input for saved in self._manifest.saved for mode in saved.modes if mode.source == "sketch"):
            feeds[name] = self._runtime.put(np.ascontiguousarray(self._runtime.get(feeds[name])[:samples, :samples]))
        return feeds


# -- without the training build ---------------------------------------------------------------------------------------


def write(bundle: Bundle, plan: Plan, root: Path, **options: Any) -> Path:
    write_ort_training(bundle, plan, root / "artifacts", **options)
    return root / "artifacts"


def feeds_of(session: onnxruntime.InferenceSession, bundle: Bundle, x: Array, y: Array) -> dict[str, Array]:
    known = {"x": x, "targets": y, **bundle.initial_parameters()}
    shapes = {value.name: value.shape for value in session.get_inputs()}
    return {name: known.get(name, np.zeros([1 if isinstance(n, str) else n for n in shapes[name]], np.float32))
            for name in shapes}  # fmt: skip


@pytest.mark.parametrize("codec", ["dense", "hosvd"])
def test_the_eval_model_gives_loss_and_logits_and_computes_nothing_twice(codec: str, tmp_path: Path) -> None:
    bundle = bundle_of(codec, optimizer="adamw")
    plan = plan_of(bundle)
    root = write(bundle, plan, tmp_path)
    x, y = samples(5)
    session = onnxruntime.InferenceSession(root / "eval_model.onnx", providers=["CPUExecutionProvider"])
    loss, logits = session.run(None, feeds_of(session, bundle, x, y))
    ours = edgetune.TrainingSession(bundle, plan, verify=False)
    assert relative_error(logits, ours.predict(x)) < 1e-6
    assert float(loss) == pytest.approx(ours.gradients(x, y)[0], rel=1e-6)
    types = [node.op_type for node in onnx.load(root / "eval_model.onnx").graph.node]
    assert types.count("Conv") == 6 and types.count("Gemm") == 1


def test_models_are_flat_and_have_the_inputs_that_the_training_api_gives_by_place(tmp_path: Path) -> None:
    bundle = bundle_of("hosvd", optimizer="adamw")
    root = write(bundle, plan_of(bundle), tmp_path)
    assert {path.name for path in root.iterdir()} == set(FILES) - {"frozen_weights.bin"}
    names = {}
    for file in ("training_model.onnx", "eval_model.onnx", "optimizer_model.onnx"):
        model = onnx.load(root / file, load_external_data=False)
        onnx.checker.check_model(model)
        assert not model.functions and model.ir_version <= 10
        assert all(t.data_location == TensorProto.DEFAULT for t in model.graph.initializer)
        assert {o.domain: o.version for o in model.opset_import} == {"": 18, "com.microsoft": 1}
        names[file] = [value.name for value in model.graph.input], [value.name for value in model.graph.output]
    trained = [spec.name for spec in bundle.manifest.parameters]
    inputs, outputs = names["training_model.onnx"]
    end = len(inputs) - len(trained) - 1
    assert inputs[:2] == ["x", "targets"] and inputs[2 : 2 + len(trained)] == trained
    assert inputs[end:] == [f"{name}_grad.accumulation.buffer" for name in trained] + ["lazy_reset_grad"]
    assert outputs == ["loss", *(f"{name}_grad.accumulation.out" for name in trained)]
    assert names["eval_model.onnx"] == (inputs[:end], ["loss", "output"])


def test_an_independent_reader_finds_every_tensor_in_the_checkpoint(tmp_path: Path) -> None:
    reader = pytest.importorskip("onnxruntime.tools.ort_format_model.ort_flatbuffers_py.fbs.Checkpoint")
    bundle = bundle_of("hosvd", optimizer="adamw")
    plan = plan_of(bundle)
    raw = (write(bundle, plan, tmp_path) / "checkpoint").read_bytes()
    assert raw[4:8] == b"ODTC"
    found = reader.Checkpoint.GetRootAs(raw, 0)
    state = found.ModuleState()
    assert found.Version() == 2 and not state.IsNominalState()

    def read(tensor: Any) -> tuple[str, Array]:
        data = tensor.RawDataAsNumpy()
        assert tensor.DataType() == TensorProto.FLOAT and data.ctypes.data % 4 == 0
        return tensor.Name().decode(), data.view(np.float32).reshape(tensor.DimsAsNumpy())

    trained = dict(read(state.RequiresGradParams(i)) for i in range(state.RequiresGradParamsLength()))
    frozen = dict(read(state.FrozenParams(i)) for i in range(state.FrozenParamsLength()))
    expected = bundle.initial_parameters()
    assert trained.keys() == expected.keys()
    assert all(np.array_equal(trained[name], value) for name, value in expected.items())
    for saved in bundle.manifest.saved:
        for mode in saved.modes:
            rank, value = plan.ranks[saved.name][mode.letter], frozen.pop(mode.input)
            if mode.size is None:
                assert value.shape == (BATCH, rank) and np.linalg.matrix_rank(value) == rank
            else:
                assert plan.calibration is not None
                basis = plan.calibration.spectra[saved.name][mode.letter].basis
                assert basis is not None and np.array_equal(value, basis[:, :, :rank])
    assert not frozen


@pytest.mark.parametrize(
    ("optimizer", "hyper", "says"),
    [
        ("sgd", {}, "momentum.*adamw"),
        ("sgd", {"momentum": 0.0, "weight_decay": 0.1}, "weight_decay.*adamw"),
        ("adamw", {"clip_norm": 1.0}, "clip_norm is 1.0"),
        ("adamw", {"nesterov": 1.0}, "knows no nesterov; it has: beta1"),
    ],
)
def test_what_the_training_api_cannot_do_is_refused_and_nothing_is_written(
    optimizer: str, hyper: dict[str, float], says: str, tmp_path: Path
) -> None:
    bundle = bundle_of("dense", optimizer=optimizer)
    with pytest.raises(UsageError, match=says):
        write(bundle, plan_of(bundle), tmp_path, hyper=hyper)
    assert not list(tmp_path.iterdir())


def test_a_plan_for_another_bundle_or_without_bases_is_refused(tmp_path: Path) -> None:
    bundle = bundle_of("hosvd", optimizer="adamw")
    with pytest.raises(ExportError, match="for codec 'dense'"):
        write(bundle, plan_of(bundle_of("dense", optimizer="adamw")), tmp_path)
    with pytest.raises(ExportError, match=r"no basis.*calibration data"):
        write(bundle, dataclasses.replace(plan_of(bundle), calibration=None), tmp_path)
    assert not list(tmp_path.iterdir())


def test_state_that_the_training_api_would_lose_is_refused(tmp_path: Path) -> None:
    bundle = bundle_of("dense", optimizer="adamw")
    plan = plan_of(bundle)
    train = bundle.manifest.graphs["train"]
    tensors = tuple(dataclasses.replace(use, kind="state") if use.name == "fc.bias" else use for use in train.tensors)
    graphs = {**bundle.manifest.graphs, "train": dataclasses.replace(train, tensors=tensors)}
    with pytest.raises(ExportError, match=r"reads 'fc\.bias' of the kind 'state'"):
        write(remade(bundle, tmp_path / "copy", graphs=graphs), plan, tmp_path / "there")
    assert not (tmp_path / "there").exists()


def test_only_artifacts_are_replaced(tmp_path: Path) -> None:
    bundle = bundle_of("dense", optimizer="adamw")
    plan = plan_of(bundle)
    root = write(bundle, plan, tmp_path)
    (root / "checkpoint").write_bytes(b"old")
    write(bundle, plan, tmp_path)
    assert (root / "checkpoint").stat().st_size > 1000
    (root / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"holds more than .* \(notes\.txt\)"):
        write(bundle, plan, tmp_path)
    assert (root / "notes.txt").read_text() == "mine"
    with pytest.raises(UsageError, match="is a file"):
        write_ort_training(bundle, plan, root / "notes.txt")


# -- with it ----------------------------------------------------------------------------------------------------------

Run = Callable[..., Mapping[str, Array]]


@pytest.fixture(scope="module")
def training_build(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Return a function that runs the script in an environment of its own with onnxruntime-training."""
    if sys.version_info >= (3, 13) or (sys.platform, platform.machine()) != ("linux", "x86_64"):
        pytest.skip("onnxruntime-training 1.19 exists for Linux on x86-64 and Python up to 3.12")
    root = tmp_path_factory.mktemp("training-build")
    python = str(root / "venv" / "bin" / "python")
    try:
        venv = [sys.executable, "-m", "venv", str(root / "venv")]
        subprocess.run(venv, check=True, capture_output=True, timeout=60)
        install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--only-binary=:all:"]
        subprocess.run([*install, "--retries=1", *PACKAGES], check=True, capture_output=True, timeout=180)
    except subprocess.TimeoutExpired as error:
        pytest.skip(f"an environment with onnxruntime-training could not be made in {error.timeout} s")
    except subprocess.CalledProcessError as error:
        reason = error.stderr.decode(errors="replace").strip().splitlines()
        pytest.skip(f"an environment with onnxruntime-training cannot be made: {reason[-1] if reason else error}")

    def run(command: str, source: Path, data: list[tuple[Array, Array]], *names: str) -> Mapping[str, Array]:
        pairs = {f"{letter}{i}": value for i, pair in enumerate(data) for letter, value in zip("xy", pair, strict=True)}
        np.savez(root / "data.npz", allow_pickle=False, **pairs)
        given = (str(source), str(root / "data.npz"), str(root / "result.npz"))
        in_fresh_process(SCRIPT, command, *given, *names, python=python)
        return dict(np.load(root / "result.npz"))

    return run


def under(seen: Mapping[str, Array], prefix: str) -> dict[str, Array]:
    return {name.removeprefix(prefix): value for name, value in seen.items() if name.startswith(prefix)}


@pytest.mark.parametrize(
    ("codec", "epsilon", "optimizer", "hyper", "embed_bytes"),
    [
        ("dense", 0.9, "adamw", ADAMW, 1 << 30),
        ("dense", 0.9, "sgd", PLAIN_SGD, 0),
        ("hosvd", 1.0, "adamw", ADAMW, 1 << 30),
        ("hosvd", 0.9, "adamw", ADAMW, 1 << 30),
        ("svd", 0.9, "sgd", PLAIN_SGD, 1 << 30),
    ],
)
def test_five_steps_of_the_training_api_are_five_of_ours(
    codec: str, epsilon: float, optimizer: str, hyper: dict[str, float], embed_bytes: int, training_build: Run,
    tmp_path: Path,
) -> None:  # fmt: skip
    bundle = bundle_of(codec, optimizer=optimizer)
    plan = plan_of(bundle, BATCH, epsilon)
    root = write(bundle, plan, tmp_path, hyper=hyper, embed_bytes=embed_bytes)
    assert (root / "frozen_weights.bin").exists() == (embed_bytes == 0)
    data = [samples(count, seed=seed) for count, seed in STEPS]
    seen = training_build("train", root, data)

    ours = FixedSketch(bundle, plan, hyper=hyper, verify=False)
    initial = {**under(seen, "initial/trained/")}
    assert worst_error(initial, bundle.initial_parameters()) == 0
    loss, gradients = ours.gradients(*data[0])
    assert loss == pytest.approx(seen["losses"][0], rel=TOLERANCE)
    assert worst_error(under(seen, "gradient/"), gradients) < TOLERANCE
    losses = [ours.step(x, y) for x, y in data]
    assert seen["losses"] == pytest.approx(losses, rel=TOLERANCE)
    trained = ours.parameters()
    assert worst_error(trained, initial) > 1e-2  # five steps went somewhere
    assert worst_error(under(seen, "final/trained/"), trained) < TOLERANCE

    _, gradients = ours.gradients(*data[0])
    assert worst_error(under(seen, "doubled/"), {name: 2 * value for name, value in gradients.items()}) < 1e-4
    logits = ours.predict(data[0][0])
    assert relative_error(seen["eval.logits"], logits) < TOLERANCE
    assert relative_error(seen["inference.logits"], logits) < TOLERANCE
    assert float(seen["eval.loss"]) == pytest.approx(ours.gradients(*data[0])[0], rel=TOLERANCE)
    assert list(seen["inputs"]) == ["x", "targets"] and list(seen["inference.inputs"]) == ["x"]
    # what the training API saved is what it had, frozen bases included
    assert int(seen["batch"]) == BATCH
    assert worst_error(under(seen, "again/trained/"), under(seen, "final/trained/")) == 0
    frozen = under(seen, "initial/frozen/")
    assert set(frozen) == {mode.input for saved in bundle.manifest.saved for mode in saved.modes}
    if frozen:
        assert worst_error(under(seen, "again/frozen/"), frozen) == 0


def test_with_full_ranks_the_sketch_does_not_matter(training_build: Run, tmp_path: Path) -> None:
    bundle = bundle_of("hosvd", optimizer="sgd")
    plan = plan_of(bundle, BATCH, 1.0)
    data = [samples(count, seed=seed) for count, seed in STEPS]
    seen = training_build("train", write(bundle, plan, tmp_path, hyper=PLAIN_SGD, seed=7), data)
    ours = edgetune.TrainingSession(bundle, plan, hyper=PLAIN_SGD, verify=False)  # a new sketch in every step
    assert seen["losses"] == pytest.approx([ours.step(x, y) for x, y in data], rel=TOLERANCE)
    assert worst_error(under(seen, "final/trained/"), ours.parameters()) < TOLERANCE


def forward_model(root: Path, bundle: Bundle) -> Path:
    """Write the forward pass alone, parameters as initializers: what users give to Microsoft's generate_artifacts."""
    model = onnx.load(root / "eval_model.onnx")
    for values in (model.graph.input, model.graph.output):
        kept = [value for value in values if value.name in (bundle.manifest.inputs[0].name, "output")]
        del values[:]
        values.extend(kept)
    for name, value in bundle.initial_parameters().items():
        model.graph.initializer.append(numpy_helper.from_array(value, name))
    needed: set[str] = {"output"}
    nodes: list[onnx.NodeProto] = []
    for node in reversed(model.graph.node):
        if needed.intersection(node.output):
            needed.update(node.input)
            nodes.insert(0, onnx.NodeProto.FromString(node.SerializeToString()))
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    onnx.save(model, root / "forward.onnx")
    return root / "forward.onnx"


def test_the_gradient_graph_of_the_training_build_agrees_with_ours(
    training_build: Run, bundles: Bundles, tmp_path: Path
) -> None:
    shape = models.model_input_shape("digits_resnet")
    bundle = bundles.model("digits_resnet", shape, codec="dense", optimizer="adamw", last=6)
    names = [spec.name for spec in bundle.manifest.parameters]
    sample = sample_away_from_kinks(models.digits_resnet(), names, shape, BATCH, len(bundle.manifest.classes))
    plan = edgetune.plan(bundle, batch=BATCH)
    forward = forward_model(write(bundle, plan, tmp_path), bundle)
    seen = training_build("gradients", forward, [(sample.x, sample.y)], *names)
    loss, gradients = edgetune.TrainingSession(bundle, plan, verify=False).gradients(sample.x, sample.y)
    assert loss == pytest.approx(float(seen["loss"]), rel=TOLERANCE)
    assert worst_error(gradients, under(seen, "gradient/")) < TOLERANCE


def test_the_codecs_that_the_refusal_of_another_names_are_taken(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)).eval()

    def write(spelled: str) -> None:
        bundle = edgetune.export(
            model, torch.zeros(1, 8), tmp_path / "bundle", last=1, codec=spelled, optimizer="adamw"
        )
        write_ort_training(bundle, edgetune.plan(bundle, batch=4, epsilon=1.0), tmp_path / "artifacts")

    taken = set[str]()
    for codec in ("asi", "int8", "hosvd+dense"):
        with pytest.raises(ExportError, match="export with --codec") as refused:
            write(codec)
        named = str(refused.value).partition("--codec ")[2].replace(" or ", ", ").split(", ")
        assert len(named) > 2
        for name in set(named) - taken:
            write(name)
        taken.update(named)
