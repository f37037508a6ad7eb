"""Which engine runs a bundle, and why. Knows what is installed; imports an engine only when it is chosen."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from edgetune.bundle import Bundle
from edgetune.engines.runtime import Runtime
from edgetune.errors import EngineError, UsageError, choices

ENGINES = ("auto", "onnxruntime", "torch")

# What the kernel driver of an NVIDIA device makes: on a computer, on a Jetson, inside WSL.
_DEVICE_NODES = ("nvidia0", "nvidiactl", "nvhost-gpu", "nvgpu", "dxg")


@dataclass(frozen=True)
class Choice:
    """The engine ``name``, and a sentence that says why."""

    name: str
    reason: str


def choose_engine(engine: str = "auto") -> Choice:
    """Return the engine to use; ``auto`` takes onnxruntime, unless only torch can run, or only torch reaches CUDA.

    torch is imported only where an NVIDIA device is present that the installed onnxruntime cannot use.

    Raises:
        UsageError: there is no engine of that name.
        EngineError: ``auto``, and no engine is installed.
    """
    if engine not in ENGINES:
        raise UsageError(f"there is no engine '{engine}'; choose one of: {choices(ENGINES)}")
    if engine != "auto":
        return Choice(engine, f"the engine {engine} was asked for")
    providers, has_torch = _onnxruntime_providers(), _is_installed("torch") and _is_installed("onnx")
    if providers is None and not has_torch:
        raise EngineError(
            "no engine is installed: install onnxruntime ('onnxruntime' for a CPU, 'onnxruntime-gpu' for a CUDA "
            "workstation, on a Jetson NVIDIA's wheel for its JetPack), or torch together with onnx"
        )
    if providers is None:
        return Choice("torch", "onnxruntime cannot be imported here, and torch is installed")
    if "CUDAExecutionProvider" in providers:
        return Choice("onnxruntime", "onnxruntime is installed and can use CUDA")
    if not has_nvidia_device():
        return Choice("onnxruntime", "onnxruntime is installed, and there is no NVIDIA device that torch could use")
    if has_torch and _torch_reaches_cuda():
        return Choice("torch", "torch can use the CUDA device, which the installed onnxruntime cannot")
    return Choice("onnxruntime", "onnxruntime is installed; neither it nor torch can use the NVIDIA device here")


def describe_engine(engine: str = "auto") -> str:
    """Return which engine runs, and why, for people; raises as :func:`choose_engine`."""
    choice = choose_engine(engine)
    return f"engine {choice.name}: {choice.reason}"


def packs(engine: str = "auto") -> bool:
    """Tell whether ``engine`` can keep the tensors of a run in one block of the size that is planned for
    (``planning.packing``); raises as :func:`choose_engine`."""
    if choose_engine(engine).name != "onnxruntime":
        return False
    return "CUDAExecutionProvider" not in (_onnxruntime_providers() or ())


def make_runtime(bundle: Bundle, engine: str = "auto") -> Runtime:
    """Return the runtime called ``engine``.

    Raises:
        UsageError: there is none of that name.
        EngineError: its packages are not installed.
    """
    if choose_engine(engine).name == "torch":
        if not _is_installed("torch"):
            raise EngineError(
                "torch is not installed; install torch (and onnx, by which the engine reads graphs), or run with "
                "--engine onnxruntime"
            )
        from edgetune.engines.torch import TorchRuntime

        return TorchRuntime(bundle)
    from edgetune.engines.onnxruntime import OnnxRuntime

    return OnnxRuntime(bundle)


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ValueError:  # a module without a specification stands in sys.modules
        return False


def _onnxruntime_providers() -> Sequence[str] | None:
    """Return the execution providers of the installed onnxruntime; None if it cannot be imported."""
    from edgetune.engines.onnxruntime import import_onnxruntime

    try:
        found: Sequence[str] = import_onnxruntime().get_available_providers()
    except EngineError:
        return None
    return found


def has_nvidia_device(devices: Path = Path("/dev")) -> bool:
    """Tell whether the kernel has a driver of an NVIDIA device loaded."""
    return any((devices / name).exists() for name in _DEVICE_NODES)


def _torch_reaches_cuda() -> bool:
    from edgetune.engines.torch import cuda_is_available

    try:
        return cuda_is_available()
    except ImportError:
        return False
