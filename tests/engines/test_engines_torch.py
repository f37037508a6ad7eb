"""The laws of a runtime, held by the torch engine: values, buffers, memory, precision, and what it refuses."""

from __future__ import annotations

import functools
import re
import shutil
import weakref
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from edgetune.autodiff.builder import GraphBuilder
from edgetune.bundle import MANIFEST, WEIGHTS, Array, Bundle, write_manifest
from edgetune.codecs.subspace import emit_top_subspace, top_subspace
from edgetune.engines.onnxruntime import OnnxRuntime
from edgetune.engines.torch import TorchRuntime
from edgetune.engines.torch_ops.native import native_kernel
from edgetune.engines.torch_ops.program import Program, Setting
from edgetune.errors import BundleError, EngineError
from edgetune.planning.memory import FIXED_KINDS, timeline
from edgetune.planning.sizes import rank_symbol
from tests.engines.workshop import CODECS, bundle_of, copied, plan_of, samples

SHAPES = arrays.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5)


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return bundle_of("dense", optimizer="adamw")


@pytest.fixture(scope="module")
def runtime(bundle: Bundle) -> TorchRuntime:
    return TorchRuntime(bundle, device="cpu")


# ---- values and buffers -------------------------------------------------------------------------------------------


@functools.cache
def plain() -> TorchRuntime:
    return TorchRuntime(bundle_of("dense"), device="cpu")


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_what_is_put_can_be_got(data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from([np.float32, np.float64, np.int64, np.uint8]))
    value = data.draw(arrays.arrays(dtype, SHAPES))
    if data.draw(st.booleans()):
        value = value.T  # not contiguous
    if data.draw(st.booleans()):
        value.flags.writeable = False
    got = plain().get(plain().put(value))
    assert got.shape == value.shape and got.dtype == value.dtype
    assert np.ascontiguousarray(got).tobytes() == np.ascontiguousarray(value).tobytes()


def update_feeds(bundle: Bundle) -> dict[str, Array]:
    """Return values for every input of update.onnx, in memory that belongs to nobody else."""
    rng = np.random.default_rng(0)
    feeds: dict[str, Array] = {k: np.array(v, np.float32) for k, v in bundle.manifest.optimizer.scalars.items()}
    for spec in bundle.manifest.parameters:
        for prefix in ("", "gradient/", *(f"{slot}/" for slot in bundle.manifest.optimizer.slots)):
            feeds[prefix + spec.name] = rng.uniform(0.1, 1, spec.shape).astype(np.float32)
    return feeds


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_outputs_land_in_the_buffers_that_are_named_even_where_they_are_inputs(optimizer: str) -> None:
    bundle = bundle_of("dense", optimizer=optimizer)
    runtime, spec = TorchRuntime(bundle, device="cpu"), bundle.manifest.graphs["update"]
    apart = {name: runtime.put(value) for name, value in update_feeds(bundle).items()}
    expected = {k: np.array(runtime.get(v)) for k, v in runtime.run("update", apart, spec.outputs).items()}
    for name, value in update_feeds(bundle).items():
        assert np.array_equal(runtime.get(apart[name]), value), "without buffers the inputs stay as they are"
    arrays_in = update_feeds(bundle)
    feeds = {name: runtime.put(value) for name, value in arrays_in.items()}
    made = runtime.run("update", feeds, spec.outputs, {new: feeds[old] for new, old in spec.in_place.items()})
    overwritten = {old: new for new, old in spec.in_place.items()}  # a buffer may serve twice: its last value stays
    for old, new in overwritten.items():
        for value in (runtime.get(made[new]), runtime.get(feeds[old]), arrays_in[old]):
            assert np.array_equal(value, expected[new])
    assert not np.array_equal(arrays_in["fc.weight"], update_feeds(bundle)["fc.weight"])


def test_what_is_returned_lies_in_no_memory_of_the_feeds_or_of_another_output() -> None:
    nodes = [
        helper.make_node("Reshape", ["x", "shape"], ["a"]),
        helper.make_node("Identity", ["a"], ["b"]),
        helper.make_node("Add", ["x", "x"], ["sum"]),
        helper.make_node("Transpose", ["sum"], ["c"], perm=[1, 0]),
        helper.make_node("Identity", ["sum"], ["d"]),
        helper.make_node("Identity", ["constant"], ["e"]),
        helper.make_node("Expand", ["x", "large"], ["f"]),
    ]
    constants = {"shape": torch.tensor([6]), "constant": torch.ones(4), "large": torch.tensor([5, 2, 3])}
    program = Program(nodes, ["x"], list("abcdef"), constants, setting())
    x = torch.arange(6.0).reshape(2, 3)
    made = program.run({"x": x}, list("abcdef"))
    owned = [x, constants["constant"], *made.values()]
    assert len({value.untyped_storage().data_ptr() for value in owned}) == len(owned)
    assert all(v.untyped_storage().nbytes() == v.numel() * v.element_size() for v in made.values())
    assert torch.equal(made["c"], (x + x).t()) and made["f"].shape == (5, 2, 3)


def test_an_operator_in_place_spares_what_is_still_read_or_wanted() -> None:
    nodes = [
        helper.make_node("Neg", ["x"], ["a"]),
        helper.make_node("Relu", ["x"], ["from feed"]),
        helper.make_node("Relu", ["a"], ["read later"]),
        helper.make_node("Add", ["a", "read later"], ["b"]),
        helper.make_node("Reshape", ["b", "shape"], ["view"]),
        helper.make_node("Tanh", ["b"], ["beside a view"]),
        helper.make_node("Exp", ["view"], ["c"]),
        helper.make_node("Sigmoid", ["c"], ["over c"]),
    ]
    names = ["from feed", "read later", "beside a view", "over c"]
    program = Program(nodes, ["x"], [*names, "a", "c"], {"shape": torch.tensor([4])}, setting())
    x = torch.tensor([-2.0, -1.0, 1.0, 2.0])
    for wanted in (names, [*names, "a", "c"]):
        made = program.run({"x": x}, wanted)
        b = -x + torch.relu(-x)
        assert torch.equal(x, torch.tensor([-2.0, -1.0, 1.0, 2.0]))
        assert torch.equal(made["from feed"], torch.relu(x)) and torch.equal(made["read later"], torch.relu(-x))
        torch.testing.assert_close(made["beside a view"], torch.tanh(b))
        torch.testing.assert_close(made["over c"], torch.sigmoid(torch.exp(b)))
        if "c" in wanted:
            assert torch.equal(made["a"], -x)
            torch.testing.assert_close(made["c"], torch.exp(b))


# ---- memory -------------------------------------------------------------------------------------------------------


class Allocations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of all memory that operators make while the mode is on, and that still exists."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live_bytes, self.peak_bytes, self._known = 0, 0, set[int]()
        self._before = set[int]()

    def ignore(self, tensors: Iterable[Tensor]) -> None:
        """Do not count the memory of ``tensors``."""
        self._before |= {t.untyped_storage().data_ptr() for t in tensors}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        for value in made if isinstance(made, tuple | list) else [made]:
            if isinstance(value, Tensor):
                self._count(value)
        return made

    def _count(self, value: Tensor) -> None:
        storage = value.untyped_storage()
        place, size = storage.data_ptr(), storage.nbytes()
        if place in self._known or place in self._before or not size:
            return
        self._known.add(place)
        self.live_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        weakref.finalize(storage, self._free, place, size)

    def _free(self, place: int, size: int) -> None:
        self._known.discard(place)
        self.live_bytes -= size


def train_feeds(runtime: TorchRuntime, bundle: Bundle, batch: int) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Return the inputs of train.onnx for a batch, and the values of the manifest's symbols."""
    manifest, plan = bundle.manifest, plan_of(bundle, batch)
    x, y = samples(batch, manifest.inputs[0].shape)
    feeds = runtime.run("trunk", {manifest.inputs[0].name: runtime.put(x)}, manifest.graphs["trunk"].outputs)
    feeds |= {"targets": runtime.put(y)}
    feeds |= {name: runtime.put(value) for name, value in bundle.initial_parameters().items()}
    symbols, rng = {"batch": batch}, np.random.default_rng(1)
    for saved in manifest.saved:
        for mode in saved.modes:
            rank = symbols[rank_symbol(saved.name, mode.letter)] = plan.ranks[saved.name][mode.letter]
            shape = (batch, rank) if mode.size is None else (mode.groups, mode.size, rank)
            feeds[mode.input] = runtime.put(np.linalg.qr(rng.standard_normal(shape))[0].astype(np.float32))
    return feeds, symbols


@pytest.mark.parametrize("codec", CODECS)
def test_no_more_is_alive_than_the_manifest_says(codec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle, batch = bundle_of(codec), 8
    spec = bundle.manifest.graphs["train"]
    runtime = TorchRuntime(bundle, device="cpu", native=False)  # so that its steps are the nodes of the manifest
    feeds, symbols = train_feeds(runtime, bundle, batch)
    runtime.load("train")
    allowed = timeline(spec, symbols, without=(*FIXED_KINDS, "feature", "target"))
    counted = Allocations()
    counted.ignore([*feeds.values(), *(value for p in runtime._programs["train"] for value in p._constants.values())])
    live: list[int] = []
    execute = Program._execute
    depth = 0

    def counting(self: Program, *arguments: Any) -> None:
        nonlocal depth
        depth += 1
        execute(self, *arguments)
        depth -= 1
        if not depth:  # not inside of a Scan
            live.append(counted.live_bytes)

    monkeypatch.setattr(Program, "_execute", counting)
    kept: dict[str, Tensor] = {}
    with counted:
        for index, stage in enumerate(spec.run_stages()):
            kept |= runtime.run("train", feeds | kept, stage.outputs, stage=index)
    assert len(live) == len(allowed) == len(spec.nodes)
    # Python's numbers and the shapes of a Scan are a few bytes that no table lists.
    over = [which for which in zip(spec.nodes, live, allowed, strict=True) if which[1] > which[2] + 64]
    assert over == []
    assert counted.peak_bytes <= 1.1 * max(allowed)
    assert max(live) > 0.4 * max(allowed), "almost nothing was counted"
    kept.clear()
    assert counted.live_bytes == 0, "what is neither returned nor held is free again"


def test_the_count_of_living_bytes_sees_what_is_kept() -> None:
    with Allocations() as counted:
        kept = torch.ones(1000)
        assert counted.live_bytes == 4000
        view = kept[:10]
        del kept
        assert counted.live_bytes == 4000
        del view
        assert counted.live_bytes == 0 and counted.peak_bytes == 4000


# ---- precision ----------------------------------------------------------------------------------------------------


def test_double_precision_agrees_with_single_and_is_finer() -> None:
    bundle = bundle_of("dense")
    results = {}
    for double in (False, True):
        runtime = TorchRuntime(bundle, device="cpu", double=double)
        feeds, _ = train_feeds(runtime, bundle, 8)
        for index, stage in enumerate(bundle.manifest.graphs["train"].run_stages()):
            feeds |= runtime.run("train", feeds, stage.outputs, stage=index)
        results[double] = {k: runtime.get(v) for k, v in feeds.items() if k.startswith(("gradient/", "loss"))}
    for name, exact in results[True].items():
        assert exact.dtype == np.float64 and results[False][name].dtype == np.float32
        assert np.abs(exact - results[False][name]).max() < 1e-5 * max(np.abs(exact).max(), 1.0)
        assert not np.array_equal(exact, exact.astype(np.float32)), "computed in single precision"


# ---- native kernels -----------------------------------------------------------------------------------------------


def setting() -> Setting:
    return Setting(18, lambda t: torch.from_numpy(np.array(numpy_helper.to_array(t))), torch.device("cpu"))


@pytest.mark.parametrize("codec", [*CODECS, "hosvd:cut=c"])
def test_a_native_kernel_equals_the_body_that_it_stands_for(codec: str) -> None:
    bundle = bundle_of(codec)
    model = onnx.load_model(str(bundle.path / "train.onnx"), load_external_data=False)
    native = {f.name: native_kernel(f) for f in model.functions}
    names = [name for name in native if name.startswith("SignPack") or ("ConvWeightGrad" in name and "_k3x3_" in name)]
    names += [name for name in native if re.match(r"Hosvd(?!_exact).*Encode_\d+x8x8_", name)]
    assert len(names) >= 3 + codec.startswith("hosvd:") and all(native[name] for name in names)
    results = []
    for allowed in (False, True):
        runtime = TorchRuntime(bundle, device="cpu", native=allowed)
        feeds, _ = train_feeds(runtime, bundle, 8)
        for index, stage in enumerate(bundle.manifest.graphs["train"].run_stages()):
            feeds |= runtime.run("train", feeds, stage.outputs, stage=index)
        results.append({k: v for k, v in feeds.items() if k.startswith("gradient/")})
    for name, expected in results[0].items():
        assert (results[1][name] - expected).abs().max() <= 3e-6 * expected.abs().max() + 1e-9


@pytest.mark.parametrize(
    "changed",
    [
        "ConvWeightGrad_g1_i8x8_k3x3_s1x1_d1x1_p1x1x1x1_w16x16_dense_more",
        "ConvWeightGrad_g1_i8x8_k3x3_s1x1_d1x1_p1x1x1x1_w16x16_other",
        "ConvWeightGrad_g1_i8x8_k3x3_s1x1_d1x1_p1x1x1x1_w16x16_svd",
        "ConvWeightGrad_g1_i8x8_k3x3_s1x1_d1x1_p1x1x1x1_w16x16_hosvd_z_h_w",
        "ConvWeightGrad_g1_i8x8_k1x1_s1x1_d1x1_p0x0x0x0_w16x16_dense",
        "SomethingElse",
    ],
)
def test_a_function_of_another_signature_has_no_native_kernel(changed: str) -> None:
    function = helper.make_function("edgetune", changed, ["in0", "in1"], ["y"], [], [helper.make_opsetid("", 18)])
    assert native_kernel(function) is None
    function.name = "ConvWeightGrad_g1_i8x8_k3x3_s1x1_d1x1_p1x1x1x1_w16x16_dense"
    assert native_kernel(function) is not None


@pytest.mark.parametrize(("batch", "rank"), [(1, 1), (6, 6), (16, 5)])
def test_the_basis_of_the_batch_is_the_one_that_the_codecs_oracle_finds(batch: int, rank: int) -> None:
    g, rng = GraphBuilder(), np.random.default_rng(batch)
    name = emit_top_subspace(g, "gram", "sketch")
    constants = {key: torch.from_numpy(value) for key, value in g.constants.items()}
    program = Program(g.nodes, ["gram", "sketch"], [name], constants, setting())
    x = rng.standard_normal((batch, 40)) * np.geomspace(1, 1e-3, batch)[:, None]
    gram, sketch = (x @ x.T).astype(np.float32), rng.standard_normal((batch, rank)).astype(np.float32)
    found = program.run({"gram": torch.from_numpy(gram), "sketch": torch.from_numpy(sketch)}, [name])[name].numpy()
    expected = top_subspace(gram, sketch)
    assert np.abs(found.T @ found - np.eye(rank)).max() < 1e-5
    assert np.abs(found @ found.T - expected @ expected.T).max() < 1e-4


# ---- what is refused ----------------------------------------------------------------------------------------------


def with_graph(bundle: Bundle, target: Path, graph: str, change: Callable[[onnx.ModelProto], None]) -> Bundle:
    """Return a valid copy of ``bundle`` with one graph changed."""
    copy = copied(bundle, target / "changed")
    path = copy.path / copy.manifest.graphs[graph].file
    model = onnx.load_model(str(path), load_external_data=False)
    change(model)
    onnx.save_model(model, str(path))
    (copy.path / MANIFEST).unlink()
    return write_manifest(copy.path, copy.manifest)


def test_an_unknown_operator_is_named_with_its_node_at_load(bundle: Bundle, tmp_path: Path) -> None:
    def change(model: onnx.ModelProto) -> None:
        model.graph.node[0].op_type, model.graph.node[0].name = "Det", "the first one"

    other = TorchRuntime(with_graph(bundle, tmp_path, "predict", change), device="cpu")
    with pytest.raises(EngineError, match=r"operator Det \(node 'the first one'\).*Known operators: Abs, .*Xor"):
        other.verify_order("predict", {})


def test_an_unknown_element_type_is_named(bundle: Bundle, tmp_path: Path) -> None:
    def change(model: onnx.ModelProto) -> None:
        tensor = helper.make_tensor("strange", TensorProto.BFLOAT16, [1], [1.0])
        model.graph.initializer.append(tensor)

    other = TorchRuntime(with_graph(bundle, tmp_path, "predict", change), device="cpu")
    with pytest.raises(EngineError, match=r"no element type BFLOAT16; it has: .*FLOAT"):
        other.load("predict")


@pytest.mark.parametrize("location", ["../secret.bin", "/etc/hostname", "unlisted.bin"])
def test_weights_outside_the_bundle_are_not_read(bundle: Bundle, tmp_path: Path, location: str) -> None:
    (tmp_path / "secret.bin").write_bytes(bytes(1 << 20))

    def change(model: onnx.ModelProto) -> None:
        external = next(t for t in model.graph.initializer if t.data_location == TensorProto.EXTERNAL)
        next(entry for entry in external.external_data if entry.key == "location").value = location

    other = TorchRuntime(with_graph(bundle, tmp_path, "trunk", change), device="cpu")
    with pytest.raises(BundleError, match="which is no file of the bundle"):
        other.load("trunk")


@pytest.mark.parametrize(("key", "value"), [("offset", str(1 << 40)), ("offset", "-8"), ("length", "4")])
def test_weights_beyond_their_file_are_not_read(bundle: Bundle, tmp_path: Path, key: str, value: str) -> None:
    def change(model: onnx.ModelProto) -> None:
        external = next(t for t in model.graph.initializer if t.data_location == TensorProto.EXTERNAL)
        next(entry for entry in external.external_data if entry.key == key).value = value

    other = TorchRuntime(with_graph(bundle, tmp_path, "trunk", change), device="cpu")
    with pytest.raises(BundleError, match=f"does not fit into {WEIGHTS}"):
        other.load("trunk")


def test_weights_are_mapped_and_the_file_is_never_written_to(bundle: Bundle, tmp_path: Path) -> None:
    copy = Bundle.open(shutil.copytree(bundle.path, tmp_path / "bundle"))
    runtime = TorchRuntime(copy, device="cpu")
    runtime.load("trunk")
    before = (copy.path / WEIGHTS).read_bytes()
    (mapped, *_) = runtime._weights._known.values()
    assert isinstance(runtime._weights._files[WEIGHTS], np.memmap)
    with torch.inference_mode():
        mapped.fill_(7.0)
    assert (copy.path / WEIGHTS).read_bytes() == before


def test_a_missing_input_is_named(bundle: Bundle, runtime: TorchRuntime) -> None:
    feeds = {name: runtime.put(value) for name, value in update_feeds(bundle).items()}
    del feeds["gradient/fc.weight"]
    with pytest.raises(EngineError, match=r"reads 'gradient/fc.weight', which was not given"):
        runtime.run("update", feeds, ("gradient_norm",))


def test_an_output_that_a_graph_does_not_make_is_named(bundle: Bundle, runtime: TorchRuntime) -> None:
    feeds = {name: runtime.put(value) for name, value in update_feeds(bundle).items()}
    with pytest.raises(EngineError, match=r"makes no 'nothing'; it makes: .*gradient_norm"):
        runtime.run("update", feeds, ("nothing",))


def test_a_node_that_fails_is_named(bundle: Bundle, runtime: TorchRuntime) -> None:
    feeds = {name: runtime.put(value) for name, value in update_feeds(bundle).items()}
    feeds["gradient/fc.weight"] = runtime.put(np.ones((3, 3), np.float32))
    with pytest.raises(EngineError, match=r"graph 'update': torch failed at node '.*fc.weight.*' \(\w+, inputs of"):
        runtime.run("update", feeds, ("new/fc.weight",))


def test_an_unknown_graph_is_named_with_those_that_there_are(runtime: TorchRuntime) -> None:
    with pytest.raises(EngineError, match=r"no graph 'distill'; it has: .*predict, train, trunk, update"):
        runtime.load("distill")


def test_a_device_that_is_not_there_is_refused(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(EngineError, match="torch sees no CUDA device"):
        TorchRuntime(bundle, device="cuda")
    with pytest.raises(EngineError, match="no device 'tpu'; choose one of: cpu, cuda"):
        TorchRuntime(bundle, device="tpu")


@pytest.mark.parametrize("threads", [1, 2])
def test_the_number_of_threads_is_as_told(bundle: Bundle, threads: int) -> None:
    before = torch.get_num_threads()
    try:
        TorchRuntime(bundle, device="cpu", threads=threads)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")
@pytest.mark.parametrize("codec", CODECS)
def test_cuda_agrees_with_the_cpu(codec: str) -> None:
    bundle, results = bundle_of(codec), []
    for device in ("cpu", "cuda"):
        runtime = TorchRuntime(bundle, device=device)
        feeds, _ = train_feeds(runtime, bundle, 8)
        for index, stage in enumerate(bundle.manifest.graphs["train"].run_stages()):
            feeds |= runtime.run("train", feeds, stage.outputs, stage=index)
        results.append({k: runtime.get(v) for k, v in feeds.items() if k.startswith(("gradient/", "loss"))})
    for name, expected in results[0].items():
        assert np.abs(results[1][name] - expected).max() <= 1e-5 * max(np.abs(expected).max(), 1e-3)


def test_both_engines_have_the_same_protocol() -> None:
    public = [name for name in dir(OnnxRuntime) if not name.startswith("_")]
    assert all(hasattr(TorchRuntime, name) for name in public)
