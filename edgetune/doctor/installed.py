"""Which runtimes this Python has, without loading them here: distributions, providers, kernels."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from edgetune.doctor.fatbin import Architectures, architectures
from edgetune.telemetry.cuda import Unavailable
from edgetune.telemetry.nvml import NvmlDevice, read_nvml

PROBE_SECONDS = 120.0
MODULE = "onnxruntime"
_CUDA_LIBRARY = "libonnxruntime_providers_cuda.so"


@dataclass(frozen=True)
class Probe:
    """What onnxruntime said of itself. ``failed``: by provider tried, the reason why it failed; empty: it runs.
    ``cuda_bytes``: free and total memory of the GPU beside the tiny graph; None: no CUDA, or it does not tell."""

    version: str
    providers: tuple[str, ...]
    failed: dict[str, str] = field(default_factory=dict)
    cuda_bytes: tuple[int, int] | None = None


@dataclass(frozen=True)
class Installed:
    """What is installed. ``distributions``: those that provide the module ``onnxruntime``, with their versions.

    ``probe``: None without any, a text where loading failed. ``kernels``: of the CUDA provider's library, ``library``;
    None: there is none, or its device code cannot be read. ``torch``, ``torch_cuda``: their versions, None if absent.
    ``nvml``: the devices that NVIDIA's management library lists, or why it lists none.
    """

    python: tuple[int, int, int]
    machine: str
    distributions: dict[str, str]
    probe: Probe | str | None
    library: str | None
    kernels: Architectures | None
    torch: str | None
    torch_cuda: str | None
    nvml: tuple[NvmlDevice, ...] | Unavailable = ()


def providing(module: str, distributions: Iterable[importlib.metadata.Distribution]) -> dict[str, str]:
    """Return name and version of each distribution that installs files of ``module``.

    Several may: they share the import name, and the one installed last overwrote the others' files.
    """
    found = {}
    for distribution in distributions:
        name = distribution.metadata["Name"] or ""
        tops = (distribution.read_text("top_level.txt") or "").split()
        if not name or (module not in tops and not name.lower().startswith((module, "ort"))):
            continue
        files = distribution.files or []
        if module in tops or any(file.parts[0] == module for file in files):
            found[name] = distribution.version
    return dict(sorted(found.items()))


def inspect_installed() -> Installed:
    """Look at this Python. Takes about as long as loading onnxruntime does."""
    distributions = providing(MODULE, importlib.metadata.distributions())
    folder = _folder(MODULE)
    library = None if folder is None else folder / "capi" / _CUDA_LIBRARY
    there = library is not None and library.is_file()
    torch = _torch()
    return Installed(
        sys.version_info[:3],
        platform.machine(),
        distributions,
        None if folder is None else _probe(),
        str(library) if there else None,
        architectures(library) if there and library is not None else None,
        *torch,
        nvml=read_nvml(),
    )


def _folder(module: str) -> Path | None:
    """Return where a package lies, without importing it."""
    spec = importlib.util.find_spec(module)
    places = None if spec is None else spec.submodule_search_locations
    return Path(next(iter(places))) if places else None


def _probe() -> Probe | str:
    here = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-m", "edgetune.doctor.probe"]
    environment = {**os.environ, "PYTHONPATH": path}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, env=environment, timeout=PROBE_SECONDS
        )
    except subprocess.TimeoutExpired:
        return f"loading it did not end within {PROBE_SECONDS:g} s"
    lines = done.stderr.strip().splitlines() or ["no word"]
    if done.returncode < 0:
        return f"loading it was ended by signal {-done.returncode} ({lines[-1]})"
    if done.returncode != 0:
        return lines[-1]
    found = json.loads(done.stdout.splitlines()[-1])
    cuda_bytes = None if found["cuda_bytes"] is None else (found["cuda_bytes"][0], found["cuda_bytes"][1])
    return Probe(found["version"], tuple(found["providers"]), found["failed"], cuda_bytes)


def _torch() -> tuple[str | None, str | None]:
    """Return the versions of torch and of the CUDA that it was built for, from its files: importing takes seconds."""
    folder = _folder("torch")
    if folder is None:
        return None, None
    try:
        version = importlib.metadata.version("torch")
        text = (folder / "version.py").read_text("utf-8")
    except (OSError, importlib.metadata.PackageNotFoundError):
        return "of an unknown version", None
    match = re.search(r"^cuda\b[^=\n]*= *['\"]([\d.]+)['\"]", text, re.MULTILINE)
    return version, None if match is None else match[1]
