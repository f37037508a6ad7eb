"""The laws of a runtime, held by onnxruntime; and which execution providers it chooses."""

from __future__ import annotations

import builtins
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from edgetune.bundle import Array, Bundle
from edgetune.engines.choice import make_runtime
from edgetune.engines.onnxruntime import OnnxRuntime, import_onnxruntime, providers
from edgetune.errors import EngineError, UsageError
from tests.engines.workshop import bundle_of


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return bundle_of("dense", optimizer="adamw")


@pytest.fixture(scope="module")
def runtime(bundle: Bundle) -> OnnxRuntime:
    return OnnxRuntime(bundle)


SHAPES = arrays.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5)


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_what_is_put_can_be_got(data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from([np.float32, np.float64, np.int64, np.uint8]))
    value = data.draw(arrays.arrays(dtype, SHAPES))
    if data.draw(st.booleans()):
        value = value.T  # not contiguous
    known = OnnxRuntime(bundle_of("dense"))
    handle = known.put(value)
    got = known.get(handle)
    assert got.shape == value.shape and got.dtype == value.dtype
    assert np.ascontiguousarray(got).tobytes() == np.ascontiguousarray(value).tobytes()


def test_a_result_stays_valid_when_its_handle_is_gone(bundle: Bundle, runtime: OnnxRuntime) -> None:
    feeds = {name: runtime.put(value) for name, value in update_feeds(bundle).items()}
    outputs = bundle.manifest.graphs["update"].outputs
    made = {name: runtime.get(handle) for name, handle in runtime.run("update", feeds, outputs).items()}
    kept = {name: np.array(value) for name, value in made.items()}
    for _ in range(3):
        runtime.run("update", feeds, outputs)
    for name, value in kept.items():
        assert np.array_equal(made[name], value)


def update_feeds(bundle: Bundle, seed: int = 0) -> dict[str, Array]:
    """Return values for every input of update.onnx, in memory that belongs to nobody else."""
    rng = np.random.default_rng(seed)
    feeds: dict[str, Array] = {k: np.array(v, np.float32) for k, v in bundle.manifest.optimizer.scalars.items()}
    for spec in bundle.manifest.parameters:
        for prefix in ("", "gradient/", *(f"{slot}/" for slot in bundle.manifest.optimizer.slots)):
            feeds[prefix + spec.name] = rng.uniform(0.1, 1, spec.shape).astype(np.float32)
    return feeds


def test_outputs_land_in_the_buffers_that_are_named_even_where_they_are_inputs(
    bundle: Bundle, runtime: OnnxRuntime
) -> None:
    spec = bundle.manifest.graphs["update"]
    apart = {name: runtime.put(value) for name, value in update_feeds(bundle).items()}
    expected = {k: np.array(runtime.get(v)) for k, v in runtime.run("update", apart, spec.outputs).items()}
    arrays_in = update_feeds(bundle)
    feeds = {name: runtime.put(value) for name, value in arrays_in.items()}
    assert set(spec.in_place) == set(spec.outputs) - {"gradient_norm"}
    made = runtime.run("update", feeds, spec.outputs, {new: feeds[old] for new, old in spec.in_place.items()})
    overwritten = {old: new for new, old in spec.in_place.items()}  # of several values the last stays
    for old, new in overwritten.items():
        # three views of one buffer: the array that was put, its handle, and the output
        for value in (runtime.get(made[new]), runtime.get(feeds[old]), arrays_in[old]):
            assert np.array_equal(value, expected[new])
    assert not np.array_equal(arrays_in["fc.weight"], update_feeds(bundle)["fc.weight"])


def test_without_buffers_the_inputs_stay_as_they_are(bundle: Bundle, runtime: OnnxRuntime) -> None:
    arrays_in = update_feeds(bundle)
    feeds = {name: runtime.put(value) for name, value in arrays_in.items()}
    runtime.run("update", feeds, bundle.manifest.graphs["update"].outputs)
    for name, value in update_feeds(bundle).items():
        assert np.array_equal(arrays_in[name], value)


def test_feeds_that_a_graph_does_not_read_are_ignored(bundle: Bundle, runtime: OnnxRuntime) -> None:
    feeds = {name: runtime.put(value) for name, value in update_feeds(bundle).items()}
    feeds["nothing of this graph"] = runtime.put(np.zeros(3, np.float32))
    made = runtime.run("update", feeds, ("gradient_norm",))
    squares = [np.sum(np.square(v, dtype=np.float64)) for k, v in update_feeds(bundle).items() if "gradient/" in k]
    assert float(runtime.get(made["gradient_norm"])) == pytest.approx(np.sqrt(np.sum(squares)), rel=1e-5)
    assert set(made) == {"gradient_norm"}


def test_a_missing_input_is_named(bundle: Bundle, runtime: OnnxRuntime) -> None:
    feeds = {name: runtime.put(value) for name, value in update_feeds(bundle).items()}
    del feeds["gradient/fc.weight"]
    with pytest.raises(EngineError, match=r"reads 'gradient/fc.weight', which was not given"):
        runtime.run("update", feeds, ("gradient_norm",))


def test_an_unknown_graph_is_named_with_those_that_there_are(runtime: OnnxRuntime) -> None:
    with pytest.raises(EngineError, match=r"no graph 'distill'; it has: .*predict, train, trunk, update"):
        runtime.load("distill")


def test_an_unknown_engine_is_a_usage_error(bundle: Bundle) -> None:
    with pytest.raises(UsageError, match="no engine 'tflite'; choose one of: auto, onnxruntime, torch"):
        make_runtime(bundle, "tflite")


def test_without_onnxruntime_the_message_says_which_one_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **options: Any) -> Any:
        if name == "onnxruntime":
            raise ImportError("No module named 'onnxruntime'")
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(EngineError, match=r"onnxruntime-gpu.*Jetson"):
        import_onnxruntime()


def test_without_cuda_there_is_the_cpu() -> None:
    assert providers(["AzureExecutionProvider", "CPUExecutionProvider"]) == ["CPUExecutionProvider"]


@pytest.mark.parametrize("available", [["CUDAExecutionProvider"], ["CPUExecutionProvider", "CUDAExecutionProvider"]])
def test_cuda_comes_first_and_keeps_its_memory_visible(available: Sequence[str]) -> None:
    (name, options), *rest = providers(available)
    assert name == "CUDAExecutionProvider" and rest == ["CPUExecutionProvider"]
    assert options == {"arena_extend_strategy": "kSameAsRequested", "cudnn_conv_use_max_workspace": "0"}


def test_a_limit_for_cuda_is_passed_on() -> None:
    (_, options), _ = providers(["CUDAExecutionProvider"], gpu_limit_bytes=123456789)
    assert options["gpu_mem_limit"] == "123456789"
    assert providers(["CPUExecutionProvider"], gpu_limit_bytes=1) == ["CPUExecutionProvider"]


@pytest.mark.parametrize("graph", ["train", "update", "predict", "calibrate"])
def test_no_buffer_is_planned_ahead_and_no_arena_keeps_what_it_got(runtime: OnnxRuntime, graph: str) -> None:
    ort, options = import_onnxruntime(), runtime._options(graph)
    assert not options.enable_mem_pattern and not options.enable_cpu_mem_arena and not options.enable_mem_reuse
    assert options.graph_optimization_level == ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    assert options.execution_order == ort.ExecutionOrder.PRIORITY_BASED
    assert options.execution_mode == ort.ExecutionMode.ORT_SEQUENTIAL
    assert runtime._options("trunk").graph_optimization_level == ort.GraphOptimizationLevel.ORT_ENABLE_ALL
