"""Everything that wants a CUDA device, in one command of less than eight minutes: speed, memory, gradients.

    python tools/gpu_check.py --json gpu.json --markdown gpu.md
    python tools/gpu_check.py --device cpu                        the same code at a small size, without a device

1. Train steps of both engines, where they reach the device, against ordinary PyTorch fine-tuning of the same layers:
   medians of whole steps, every contender in a process of its own, in two rounds (A B C A B C) that show how far they
   agree; a ratio is the median over the rounds.
2. The allocator's peak in a step, above what stands between steps, against what the plan predicts.
3. Gradients against torch's in float64, for some models of tools/zoo.

The exit code is 0 where everything ran and held, 1 where something failed (it is in the report), 2 without a device.
**It has not been run on a CUDA device yet**, only with ``--device cpu``.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
WORKER = Path(__file__).with_name("gpu_check_worker.py")
PACKAGES = ("torch", "onnxruntime", "onnxruntime-gpu", "onnx", "onnxscript", "numpy", "transformers")
CODECS = ("dense", "hosvd")
EPSILON = 0.9
ROUNDS = 2
MIB = 2**20
NO_DEVICE = 2


@dataclass(frozen=True)
class Case:
    """A model of tools/models.py, samples of ``shape``, how many of them in a step."""

    model: str
    shape: tuple[int, ...]
    batch: int
    last: int = 4


@dataclass(frozen=True)
class Scope:
    """What is checked on one kind of device: cases, models of the zoo, seconds of steps per process."""

    cases: tuple[Case, ...]
    parity: tuple[str, ...]
    seconds: float


SCOPES = {
    "cuda": Scope(
        (Case("resnet18", (3, 224, 224), 64), Case("mobilenet_v2", (3, 224, 224), 64)),
        ("mcunet", "mobilenet_v2", "unet2d", "vit", "mixed_norms"),
        2.0,
    ),
    "cpu": Scope((Case("digits_resnet", (1, 16, 16), 8),), ("two_by_two",), 0.05),
}


def engines_on(device: str) -> dict[str, str]:
    """Return by engine why it cannot be checked on ``device``; an empty text where it can."""
    found = {"torch": "", "onnxruntime": ""}
    try:
        import onnxruntime
    except ImportError as error:
        found["onnxruntime"] = f"it cannot be imported ({error})"
    else:
        available = onnxruntime.get_available_providers()
        if device == "cuda" and "CUDAExecutionProvider" not in available:
            found["onnxruntime"] = f"this build has no CUDAExecutionProvider, only {', '.join(available)}"
    return found


def environment(device: str) -> dict[str, Any]:
    """Return the versions of everything that may matter."""
    import torch

    from edgetune.version import __version__

    found: dict[str, Any] = {
        "edgetune": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
    }
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "device": properties.name,
            "device_bytes": properties.total_memory,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
            "driver": _driver(),
        }
    return found


def _driver() -> str:
    """Return the version of the kernel driver, as far as it tells."""
    for path in (Path("/proc/driver/nvidia/version"), Path("/etc/nv_tegra_release")):
        if path.is_file():
            return path.read_text("utf-8", errors="replace").splitlines()[0]
    return "unknown"


def prepare(case: Case, folder: Path) -> None:
    """Write to ``folder`` what the workers of ``case`` read: a batch, and per codec a bundle, a plan, a calibration."""
    import numpy as np

    import edgetune
    from edgetune.export.capture import capture
    from edgetune.export.source import Signature
    from tools import models
    from tools.zoo import draw_smooth

    rng = np.random.default_rng(0)
    x = draw_smooth(rng, (case.batch, *case.shape))
    captured = capture(getattr(models, case.model)(), [Signature(case.shape)]).model
    (folder / "subject.json").write_text(json.dumps(dataclasses.asdict(case)), "utf-8")
    for codec in CODECS:
        model = type(captured)()
        model.CopyFrom(captured)
        bundle = edgetune.export(model, None, folder / codec, last=case.last, codec=codec)
        y = np.arange(case.batch, dtype=np.int64) % len(bundle.manifest.classes)
        np.savez(folder / "batch.npz", x=x, y=y)
        plan = edgetune.plan(bundle, batch=case.batch, epsilon=EPSILON, calibration=[(x, y)])
        (folder / f"{codec}.json").write_text(plan.to_json(), "utf-8")
        if plan.calibration is not None:
            plan.calibration.save(folder / f"{codec}.safetensors")


def run_worker(folder: Path, contender: str, device: str, seconds: float, limit_seconds: float) -> dict[str, Any]:
    """Return what a worker measured, or ``{"failure": why}``."""
    command = [sys.executable, str(WORKER), str(folder), contender, device, str(seconds)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=limit_seconds, cwd=ROOT)
    except subprocess.TimeoutExpired:
        return {"failure": f"not done within {limit_seconds:.0f} s"}
    if done.returncode != 0:
        return {"failure": (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]}
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def combined(rounds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return one entry of a contender's rounds: the first failure, or the figures of the last round with the medians of
    each round's seconds."""
    for found in rounds:
        if "failure" in found:
            return dict(found)
    return {**rounds[-1], "seconds": [statistics.median(found["seconds"]) for found in rounds]}


def ratio(found: Mapping[str, Any], base: Mapping[str, Any]) -> float | None:
    """Return the median over the rounds of the seconds of ``found`` over those of ``base``; None if one failed."""
    if "failure" in found or "failure" in base:
        return None
    return float(statistics.median(a / b for a, b in zip(found["seconds"], base["seconds"], strict=True)))


def measure_case(case: Case, engines: Sequence[str], device: str, seconds: float, deadline: float) -> dict[str, Any]:
    """Return the entries of all contenders of ``case`` by name."""
    contenders = ["pytorch", *(f"{engine}/{codec}" for engine in engines for codec in CODECS)]
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in contenders}
    with tempfile.TemporaryDirectory(prefix="edgetune-gpu-") as scratch:
        prepare(case, Path(scratch))
        for _ in range(ROUNDS):
            for name, rounds in found.items():
                left = deadline - time.monotonic()
                late = {"failure": "not run: the time for the whole check was over"}
                rounds.append(run_worker(Path(scratch), name, device, seconds, left) if left > 1 else late)
    entries = {name: combined(rounds) for name, rounds in found.items()}
    for entry in entries.values():
        entry["ratio"] = ratio(entry, entries["pytorch"])
    return entries


def check_parity(names: Sequence[str], engines: Sequence[str], deadline: float) -> list[dict[str, Any]]:
    """Return per model of the zoo and codec the worst gradient error of every engine, and whether all hold."""
    from edgetune.export.capture import capture
    from tools.gradients import Settings
    from tools.parity import TOLERANCE, run_zoo_model, zoo_subjects

    subjects = {subject.name: subject for subject in zoo_subjects()}
    found: list[dict[str, Any]] = []
    for name in names:
        if time.monotonic() > deadline:
            found.append({"model": name, "holds": False, "cells": {"all": "not run: the time was over"}})
            continue
        if name not in subjects:
            found.append({"model": name, "holds": False, "cells": {"all": "not there: install transformers"}})
            continue
        subject = subjects[name]
        model = subject.make()
        row = run_zoo_model(subject, model, capture(model, subject.inputs), Settings(), engines, CODECS)
        cells = {f"{engine}/{codec}": cell for (engine, codec), cell in row.cells.items()}
        found.append({"model": name, "holds": row.holds(TOLERANCE), "cells": cells, "torch_error": row.torch_error})
    return found


def check(device: str, scope: Scope, limit_seconds: float) -> dict[str, Any]:
    """Return the whole report. Gradients come last, so a slow device loses those, and says so."""
    begin = time.monotonic()
    deadline = begin + limit_seconds
    reasons = engines_on(device)
    engines = [engine for engine, reason in reasons.items() if not reason]
    report: dict[str, Any] = {
        "device": device,
        "environment": environment(device),
        "left_out": {engine: reason for engine, reason in reasons.items() if reason},
        "cases": [],
    }
    for case in scope.cases:
        entries = measure_case(case, engines, device, scope.seconds, deadline)
        report["cases"].append({**dataclasses.asdict(case), "contenders": entries})
    report["parity"] = check_parity(scope.parity, engines, deadline)
    report["seconds"] = time.monotonic() - begin
    return report


def failures(report: Mapping[str, Any]) -> list[str]:
    """Return one sentence for everything that did not run or did not hold."""
    problems = [
        f"{case['model']}, {name}: {entry['failure']}"
        for case in report["cases"]
        for name, entry in case["contenders"].items()
        if "failure" in entry
    ]
    problems += [
        f"{case['model']}, {name}: its gradient is not finite"
        for case in report["cases"]
        for name, entry in case["contenders"].items()
        if not math.isfinite(entry.get("gradient_norm", 0.0))
    ]
    return problems + [f"gradients of {row['model']}: {row['cells']}" for row in report["parity"] if not row["holds"]]


def markdown(report: Mapping[str, Any]) -> str:
    """Return the report as a page."""
    versions = ", ".join(f"{name} {value}" for name, value in report["environment"].items())
    lines = [f"# Check on {report['device']}", "", f"{versions}. {report['seconds']:.0f} s in all.", ""]
    lines += [f"Engine {engine} left out: {reason}." for engine, reason in report["left_out"].items()]
    for case in report["cases"]:
        shape = "×".join(map(str, (case["batch"], *case["shape"])))
        lines += ["", f"## {case['model']}, last {case['last']}, {shape}", ""]
        lines += [
            "| contender | s per step (rounds) | × PyTorch | trunk, train, update, s | peak of a step, MiB |"
            " predicted, MiB | reserved, MiB | saved, MiB |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for name, entry in case["contenders"].items():
            lines.append(f"| {name} | " + " | ".join(_cells(entry)) + " |")
    lines += ["", "## Gradients: worst relative error against torch in float64", "", "| model | errors | holds |"]
    lines += ["|---|---|---|"]
    for row in report["parity"]:
        cells = ", ".join(f"{k} {v:.1e}" if isinstance(v, float) else f"{k} {v}" for k, v in row["cells"].items())
        lines.append(f"| {row['model']} | {cells} | {'yes' if row['holds'] else '**no**'} |")
    if problems := failures(report):
        lines += ["", "## Failures", "", *(f"- {problem}" for problem in problems)]
    return "\n".join(lines) + "\n"


def _cells(entry: Mapping[str, Any]) -> list[str]:
    if "failure" in entry:
        return ["**fails**", *["—"] * 6]

    def mib(key: str) -> str:
        value = entry.get(key)
        return "—" if value is None else f"{value / MIB:.2f}"

    phases = entry.get("phases")
    return [
        ", ".join(f"{seconds:.4f}" for seconds in entry["seconds"]),
        "—" if entry["ratio"] is None else f"{entry['ratio']:.2f}",
        ", ".join(f"{phases[name]:.4f}" for name in ("trunk", "train", "update")) if phases else "—",
        *(mib(key) for key in ("step_bytes", "predicted_bytes", "reserved_bytes", "saved_bytes")),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the check; see the top of this file for the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=sorted(SCOPES), default="cuda")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--markdown", type=Path, help="write the page to this file instead of printing it")
    parser.add_argument("--limit-seconds", type=float, default=460.0, help="for all of it; what is late is left out")
    args = parser.parse_args(arguments)
    if args.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # both engines take a CUDA device where they see one
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    try:
        import torch
    except ImportError as error:
        print(f"gpu_check needs torch ({error})", file=sys.stderr)
        return NO_DEVICE
    if args.device == "cuda" and not torch.cuda.is_available():
        print(
            f"torch {torch.__version__} sees no CUDA device here; run this on a machine with one and a build of torch "
            "for CUDA, or give --device cpu to try the check itself",
            file=sys.stderr,
        )
        return NO_DEVICE
    report = check(args.device, SCOPES[args.device], args.limit_seconds)
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n", "utf-8")
    page = markdown(report)
    if args.markdown:
        args.markdown.write_text(page, "utf-8")
    else:
        print(page)
    return 1 if failures(report) else 0


if __name__ == "__main__":
    sys.exit(main())
