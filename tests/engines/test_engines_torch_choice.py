"""Which engine is chosen, and why; and that nothing loads torch where onnxruntime is chosen."""

from __future__ import annotations

import builtins
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from edgetune.engines import choice
from edgetune.engines.choice import ENGINES, choose_engine, make_runtime
from edgetune.engines.onnxruntime import OnnxRuntime
from edgetune.engines.torch import TorchRuntime
from edgetune.errors import EngineError, UsageError
from tests.engines.workshop import ROOT, bundle_of

CPU, CUDA = ["CPUExecutionProvider"], ["CUDAExecutionProvider", "CPUExecutionProvider"]


def computer(
    patch: pytest.MonkeyPatch, *, providers: list[str] | None, torch: bool, device: bool, reaches: bool = False
) -> None:
    """Pretend to be another computer."""
    patch.setattr(choice, "_onnxruntime_providers", lambda: providers)
    patch.setattr(choice, "_is_installed", lambda package: torch)
    patch.setattr(choice, "has_nvidia_device", lambda: device)

    def ask_torch() -> bool:
        assert device and torch, "torch was asked although it cannot know more"
        return reaches

    patch.setattr(choice, "_torch_reaches_cuda", ask_torch)


@pytest.mark.parametrize(
    ("providers", "torch", "device", "reaches", "engine", "reason"),
    [
        (CPU, True, False, False, "onnxruntime", "no NVIDIA device"),
        (CPU, False, False, False, "onnxruntime", "no NVIDIA device"),
        (CUDA, True, True, True, "onnxruntime", "can use CUDA"),
        (CPU, True, True, True, "torch", "which the installed onnxruntime cannot"),
        (CPU, True, True, False, "onnxruntime", "neither it nor torch"),
        (CPU, False, True, False, "onnxruntime", "neither it nor torch"),
        (None, True, False, False, "torch", "onnxruntime cannot be imported"),
        (None, True, True, True, "torch", "onnxruntime cannot be imported"),
    ],
)
def test_auto_takes_onnxruntime_unless_only_torch_can_do_it(
    providers: list[str] | None, torch: bool, device: bool, reaches: bool, engine: str, reason: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    computer(monkeypatch, providers=providers, torch=torch, device=device, reaches=reaches)
    found = choose_engine("auto")
    assert found.name == engine and reason in found.reason


def test_without_any_engine_both_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    computer(monkeypatch, providers=None, torch=False, device=False)
    with pytest.raises(EngineError, match=r"no engine is installed: install onnxruntime \(.*\), or torch together"):
        choose_engine("auto")


@pytest.mark.parametrize("engine", ["onnxruntime", "torch"])
def test_an_engine_that_is_asked_for_is_taken(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    computer(monkeypatch, providers=None, torch=False, device=False)
    assert choose_engine(engine) == choice.Choice(engine, f"the engine {engine} was asked for")


def test_an_unknown_engine_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="no engine 'tflite'; choose one of: auto, onnxruntime, torch"):
        choose_engine("tflite")


def test_a_runtime_is_made_of_what_was_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = bundle_of("dense")
    assert isinstance(make_runtime(bundle, "onnxruntime"), OnnxRuntime)
    assert isinstance(make_runtime(bundle, "torch"), TorchRuntime)
    assert {make_runtime(bundle, name).name for name in ENGINES if name != "auto"} == {"onnxruntime", "torch"}


def test_torch_that_is_not_installed_is_an_engine_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "_is_installed", lambda package: False)
    with pytest.raises(EngineError, match="torch is not installed; install torch"):
        make_runtime(bundle_of("dense"), "torch")


def test_without_onnx_the_torch_engine_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **options: Any) -> Any:
        if name == "onnx" or name.startswith("onnx."):
            raise ImportError("No module named 'onnx'")
        return real(name, *args, **options)

    for name in [n for n in sys.modules if n.startswith("edgetune.engines.torch")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(EngineError, match=r"reads graphs with the package 'onnx'.*install onnx"):
        make_runtime(bundle_of("dense"), "torch")


@pytest.mark.parametrize(("node", "found"), [("nvidia0", True), ("nvhost-gpu", True), ("dxg", True), ("null", False)])
def test_a_device_is_known_by_its_node(tmp_path: Path, node: str, found: bool) -> None:
    (tmp_path / node).touch()
    assert choice.has_nvidia_device(tmp_path) == found


def test_choosing_onnxruntime_loads_neither_torch_nor_onnx() -> None:
    program = (
        "import sys\n"
        "from edgetune.engines import choice\n"
        "choice.has_nvidia_device = lambda: False\n"
        "from edgetune.bundle import Bundle\n"
        "runtime = choice.make_runtime(Bundle.open(sys.argv[1]), 'auto')\n"
        "assert runtime.name == 'onnxruntime'\n"
        "sys.exit(' '.join(name for name in ('torch', 'onnx') if name in sys.modules) or 0)\n"
    )
    line = [sys.executable, "-c", program, str(bundle_of("dense").path)]
    done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 0, done.stderr
