"""Findings on the board and what is installed for it: releases, Python, runtimes, kernels."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from edgetune.doctor.finding import ERROR, OK, WARNING, Finding
from edgetune.doctor.installed import Installed, Probe
from edgetune.telemetry.board import Board, read_board
from edgetune.telemetry.cuda import Unavailable
from edgetune.telemetry.files import text
from edgetune.telemetry.gpu import read_gpu
from edgetune.units import format_bytes

LEAST_PYTHON = (3, 10)
CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"
_WHEEL = "install the onnxruntime wheel that was built for this board's JetPack release (deploy/README.md)"
# Distributions that bring the same module for other devices.
_FLAVOURS = {
    "onnxruntime": "CPU",
    "onnxruntime-gpu": "CUDA and TensorRT",
    "onnxruntime-training": "training, ended at 1.19",
    "onnxruntime-directml": "DirectML, for Windows",
    "onnxruntime-openvino": "OpenVINO, for Intel",
    "onnxruntime-rocm": "ROCm, for AMD",
    "onnxruntime-migraphx": "MIGraphX, for AMD",
    "onnxruntime-qnn": "QNN, for Qualcomm",
    "ort-nightly": "nightly, CPU",
    "ort-nightly-gpu": "nightly, CUDA",
}


def software(root: Path, installed: Installed) -> Iterator[Finding]:
    """Yield what there is to say of board and software, read below ``root``."""
    board = read_board(root)
    yield from _board(board, root)
    yield from _gpu(root, installed)
    found = ".".join(map(str, installed.python))
    if installed.python[:2] < LEAST_PYTHON:
        least = ".".join(map(str, LEAST_PYTHON))
        yield Finding("python", ERROR, f"Python {found} on {installed.machine}", f"EdgeTune needs Python {least}")
    else:
        yield Finding("python", OK, f"Python {found} on {installed.machine}")
    yield from _runtime(
        board, installed, gpu=board is not None or text(root / "proc/driver/nvidia/version") is not None
    )
    if installed.torch is not None:
        built = "without CUDA" if installed.torch_cuda is None else f"for CUDA {installed.torch_cuda}"
        yield Finding("torch", OK, f"torch {installed.torch}, built {built} (a device does not need it)")


def _board(board: Board | None, root: Path) -> Iterator[Finding]:
    cuda = _cuda_toolkit(root)
    if board is None:
        yield Finding("board", OK, "no Jetson: an ordinary computer")
    else:
        known = "an unknown chip" if board.family is None else f"{board.family}, compute capability {board.capability}"
        model = board.model or "a board without a name"
        if board.chip is None:
            advice = "mount the host's /proc/device-tree into the container, or ignore this where there is no GPU"
            yield Finding("board", WARNING, "L4T is installed, but the device tree names no chip", advice)
        elif board.family is None:
            advice = "nothing is known of this chip; check that the runtime's GPU kernels are for it"
            yield Finding("board", WARNING, f"{model} ({board.chip}, {known})", advice)
        else:
            yield Finding("board", OK, f"{model} ({board.chip}: {known})")
        if board.l4t is None:
            advice = "in a container, mount the host's /etc/nv_tegra_release"
            yield Finding("release", WARNING, "no /etc/nv_tegra_release: the L4T release is not known", advice)
        else:
            jetpack = "an unknown JetPack" if board.jetpack is None else f"JetPack {board.jetpack}"
            yield Finding("release", OK, f"L4T {board.l4t} ({jetpack})")
    if cuda is not None:
        yield Finding("cuda", OK, f"CUDA toolkit {cuda}")
    elif board is not None:
        advice = "where the runtime does not bring CUDA along: sudo apt install nvidia-jetpack"
        yield Finding("cuda", WARNING, "no CUDA toolkit in /usr/local/cuda", advice)


def _gpu(root: Path, installed: Installed) -> Iterator[Finding]:
    """Yield what the GPU is doing: another program's load, or a clock that a power mode holds down, slow training."""
    if (gpu := read_gpu(root)) is not None:
        words = gpu.name if gpu.load is None else f"{gpu.name}, {gpu.load:.0%} busy"
        if gpu.now_hz is not None and gpu.max_hz is not None:
            words += f", at {gpu.now_hz / 1e6:.0f} of at most {gpu.max_hz / 1e6:.0f} MHz"
        yield Finding("gpu", OK, words)
    if isinstance(installed.nvml, Unavailable):
        return
    for device in installed.nvml:
        words = device.name or "a device without a name"
        if device.capability is not None:
            words += f", compute capability {device.capability}"
        if device.total_bytes is not None and device.used_bytes is not None:
            words += f", {format_bytes(device.used_bytes)} of {format_bytes(device.total_bytes)} used"
        yield Finding("gpu", OK, words if device.load is None else f"{words}, {device.load:.0%} busy")


def _cuda_toolkit(root: Path) -> str | None:
    found = text(root / "usr" / "local" / "cuda" / "version.json")
    try:
        return None if found is None else str(json.loads(found)["cuda"]["version"])
    except (ValueError, KeyError, TypeError):
        return "of an unknown version"


def _runtime(board: Board | None, installed: Installed, *, gpu: bool) -> Iterator[Finding]:
    names = list(installed.distributions)
    if not names and installed.probe is None:
        if installed.torch is not None:
            yield Finding("runtime", OK, "no onnxruntime; the torch engine can train")
        else:
            advice = _WHEEL if board is not None else "pip install onnxruntime (or onnxruntime-gpu with an NVIDIA GPU)"
            yield Finding("runtime", ERROR, "neither onnxruntime nor torch is installed", advice)
        return
    listed = ", ".join(
        f"{name} {version} ({_FLAVOURS.get(name.lower(), 'a build of its own')})"
        for name, version in installed.distributions.items()
    )
    if len(names) > 1:
        wanted = _WHEEL if gpu else "pip install onnxruntime"
        advice = f"they overwrote each other's files: pip uninstall -y {' '.join(names)}; then {wanted}"
        yield Finding("runtime", ERROR, f"{len(names)} distributions provide onnxruntime: {listed}", advice)
    if isinstance(installed.probe, str):
        advice = _WHEEL if board is not None else "reinstall it for this Python and this machine"
        yield Finding("runtime", ERROR, f"onnxruntime cannot be loaded: {installed.probe}", advice)
        return
    if installed.probe is None:
        advice = f"pip uninstall -y {' '.join(names)}, and install it again"
        yield Finding("runtime", ERROR, f"{listed} is listed, but there is no module onnxruntime", advice)
        return
    if len(names) == 1:
        yield Finding("runtime", OK, listed)
    elif not names:
        yield Finding("runtime", OK, f"onnxruntime {installed.probe.version}, of no distribution that pip knows")
    yield from _providers(board, installed, installed.probe, gpu=gpu)


def _providers(board: Board | None, installed: Installed, probe: Probe, *, gpu: bool) -> Iterator[Finding]:
    listed = ", ".join(name.removesuffix("ExecutionProvider") for name in probe.providers)
    if failed := probe.failed.get(CPU):
        yield Finding("providers", ERROR, f"a tiny graph fails on the CPU: {failed}", "reinstall onnxruntime")
    if CUDA in probe.providers:
        if failed := probe.failed.get(CUDA):
            advice = (
                "is CUDA with cuDNN of the version that this build wants installed, and may this user open the GPU's"
            )
            advice += " device (groups video and render)?"
            yield Finding("providers", ERROR, f"{listed}; a tiny graph fails on CUDA: {failed}", advice)
        else:
            words = f"{listed}; a tiny graph ran on CUDA"
            if probe.cuda_bytes is not None:
                words += f", beside which {format_bytes(probe.cuda_bytes[0])} of its memory are free"
            yield Finding("providers", OK, words)
        yield from _kernels(board, installed)
    elif gpu:
        advice = _WHEEL if board is not None else "pip uninstall -y onnxruntime; pip install onnxruntime-gpu"
        yield Finding(
            "providers", WARNING, f"{listed}: this build cannot use the GPU, training runs on the CPU", advice
        )
    else:
        yield Finding("providers", OK, f"{listed}; a tiny graph ran on the CPU")


def _kernels(board: Board | None, installed: Installed) -> Iterator[Finding]:
    if installed.kernels is None:
        yield Finding("kernels", OK, "which GPUs the runtime's kernels are for cannot be told from its files")
        return
    names = ", ".join(
        [f"sm_{found}" for found in sorted(installed.kernels.cubin)]
        + [f"PTX {found}" for found in sorted(installed.kernels.ptx)]
    )
    capability, build = None if board is None else board.capability, _WHEEL
    if board is None and not isinstance(installed.nvml, Unavailable):
        capability = next((device.capability for device in installed.nvml), None)
        build = "install a build of onnxruntime-gpu for this GPU"
    if capability is None:
        yield Finding("kernels", OK, f"the runtime has GPU kernels for {names}")
    elif installed.kernels.suits(capability, tegra=board is not None):
        yield Finding("kernels", OK, f"GPU kernels for {names}; this GPU is {capability}")
    elif installed.kernels.translates(capability):
        advice = f"the driver translates them at the first start, which takes minutes; better: {build}"
        yield Finding("kernels", WARNING, f"GPU kernels for {names}; none for this GPU, {capability}", advice)
    else:
        yield Finding("kernels", ERROR, f"GPU kernels for {names}; none for this GPU, {capability}", build)
