"""Out of memory in the words of every runtime, and for real: an engine under a limit that it cannot keep."""

from __future__ import annotations

import resource
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from edgetune.agent.ceiling import ceiling
from edgetune.engines.exhaustion import is_exhaustion, telling_exhaustion
from edgetune.engines.session import TrainingSession
from edgetune.errors import EngineError, MemoryExhaustedError
from edgetune.planning.plan import make_plan
from tests.engines.workshop import ROOT, bundle_of, same_bits, samples

WORDS = {
    "onnxruntime's arena": "Non-zero status code returned while running Conv node. Name:'Conv_3' Status Message: "
    "/onnxruntime_src/onnxruntime/core/framework/bfc_arena.cc:376 void* onnxruntime::BFCArena::AllocateRawInternal("
    "size_t, bool, onnxruntime::Stream*, bool, onnxruntime::WaitNotificationFn) Failed to allocate memory for "
    "requested buffer of size 2830172160",
    "gpu_mem_limit": "bfc_arena.cc:149 onnxruntime::BFCArena::Extend Available memory of 1024 is smaller than "
    "requested bytes of 4096",
    "the C++ library": "Non-zero status code returned while running Conv node. Status Message: std::bad_alloc",
    "CUDA": "CUDA failure 2: out of memory ; GPU=0 ; hostname=jetson ; expr=cudaMalloc((void**)&p, size);",
    "cuBLAS": "CUBLAS failure 3: CUBLAS_STATUS_ALLOC_FAILED ; GPU=0 ; hostname=egg ; expr=cublasCreate(&handle);",
    "cuDNN 8": "CUDNN failure 4: CUDNN_STATUS_ALLOC_FAILED ; GPU=0 ; expr=cudnnCreate(&handle)",
    "cuDNN 9": "CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    "NvMap": "NvMapMemAllocInternalTagged: 1075072515 error 12\nNvMapMemHandleAlloc: error 0",
    "torch, CUDA": "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 7.44 GiB",
    "torch, Jetson": 'NVML_SUCCESS == r INTERNAL ASSERT FAILED at "../c10/cuda/CUDACachingAllocator.cpp":830, please '
    "report a bug to PyTorch.",
    "torch, CPU": "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried "
    "to allocate 2097152 bytes. Error code 12 (Cannot allocate memory)",
    "the system": "[Errno 12] Cannot allocate memory",
}


@pytest.mark.parametrize("words", WORDS.values(), ids=list(WORDS))
def test_every_runtimes_words_are_known(words: str) -> None:
    assert is_exhaustion(RuntimeError(words))
    passed_on = EngineError("something failed")
    passed_on.__cause__ = RuntimeError(words)
    with pytest.raises(MemoryExhaustedError, match="memory ran out in a step") as caught, telling_exhaustion("a step"):
        raise passed_on
    assert caught.value.exit_code == 11


def test_other_failures_keep_their_names() -> None:
    for error in (ValueError("out of range"), RuntimeError("CUDNN_STATUS_EXECUTION_FAILED"), OSError(28, "no space")):
        assert not is_exhaustion(error)
        with pytest.raises(type(error)), telling_exhaustion("a step"):
            raise error
    assert is_exhaustion(MemoryError()) and not is_exhaustion(None)


@pytest.mark.parametrize("engine", ["onnxruntime", "torch"])
def test_an_engine_under_a_hard_stop_says_so_and_works_again(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgetune.agent.ceiling.SLACK_BYTES", 8 << 20)
    bundle = bundle_of("dense")
    plan = make_plan(bundle.manifest, batch=2048, calibration=None, epsilon=1.0, runtime_bytes=0, micro_batch=256)
    x, y = samples(2048, bundle.manifest.inputs[0].shape)
    one, other = (TrainingSession(bundle, plan, engine=engine, verify=False) for _ in range(2))
    features = one.features(x)
    before = resource.getrlimit(resource.RLIMIT_DATA)
    with pytest.raises(MemoryExhaustedError, match="graph 'train'"), ceiling(0):
        one.step_features(features, y)
    assert resource.getrlimit(resource.RLIMIT_DATA) == before
    assert one.whole, "the update had not begun"
    with ceiling(plan.predicted_peak_bytes):
        one.step_features(features, y)
    other.step_features(features, y)
    assert same_bits(one.state(), other.state())


def test_an_update_that_is_broken_off_leaves_a_state_that_is_not_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = bundle_of("hosvd")
    plan = make_plan(bundle.manifest, batch=8, calibration=None, epsilon=1.0, runtime_bytes=0)
    session = TrainingSession(bundle, plan, verify=False)
    x, y = samples(8, bundle.manifest.inputs[0].shape)
    session.step(x, y)
    stored = session.state()
    with monkeypatch.context() as patch:
        patch.setattr(session, "_update", lambda gradients: np.empty(1 << 62))
        with pytest.raises((MemoryError, ValueError)):
            session.step(x, y)
    assert not session.whole
    session.load_state(stored)
    assert session.whole and same_bits(session.state(), stored)


def test_a_plan_limits_what_cuda_may_take(monkeypatch: pytest.MonkeyPatch) -> None:
    """No device here: what onnxruntime is told for the graphs that it loads, and torch at once."""
    from edgetune.engines.onnxruntime import OnnxRuntime
    from edgetune.engines.torch import TorchRuntime

    bundle, told = bundle_of("hosvd"), list[object]()
    runtime = OnnxRuntime(bundle)
    monkeypatch.setattr(runtime._ort, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    runtime.limit(5 << 20)
    assert runtime._providers[0][1]["gpu_mem_limit"] == str(5 << 20)
    runtime.limit(None)
    assert "gpu_mem_limit" not in runtime._providers[0][1]
    torch_runtime = TorchRuntime(bundle)
    monkeypatch.setattr(torch_runtime, "_device", torch.device("cuda"))
    total = SimpleNamespace(total_memory=1 << 30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: total)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda part, device: told.append(part))
    for limit in (1 << 28, None, 1 << 40):
        torch_runtime.limit(limit)
    assert told == [0.25, 1.0, 1.0]


def test_a_session_passes_its_plans_limit_on(monkeypatch: pytest.MonkeyPatch) -> None:
    from edgetune.engines.onnxruntime import OnnxRuntime

    told: list[int | None] = []
    monkeypatch.setattr(OnnxRuntime, "limit", lambda self, device_bytes: told.append(device_bytes))
    manifest = bundle_of("hosvd").manifest
    plan = make_plan(manifest, batch=8, calibration=None, budget_bytes=1 << 30, runtime_bytes=1 << 20)
    TrainingSession(bundle_of("hosvd"), plan, engine="onnxruntime", verify=False)
    assert told == [(1 << 30) - (1 << 20)]


def test_the_hard_stop_does_not_end_the_process_in_numpys_own_library() -> None:
    """OpenBLAS takes its buffers at the first product, and calls exit() if it gets none."""
    program = (
        "import numpy as np; from edgetune.agent.ceiling import ceiling; a = np.ones((1200, 1200))\n"
        "with ceiling(0): print(int((a @ a)[0, 0]))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert (done.returncode, done.stdout) == (0, "1200\n"), done.stderr
