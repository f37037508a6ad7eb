"""The parent: one worker per contender, one step at a time in turn, results into one JSON file. Imports no runtime."""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tools.bench.targets import ORT_TRAINING, REFERENCE

ROOT = Path(__file__).resolve().parents[2]
_PAUSE_SECONDS = 0.02
_SLOW_SECONDS = 20.0


@dataclass(frozen=True)
class Cell:
    """One place of the grid. ``last`` is a number of layers or ``all``; ``side`` of the pictures in pixels."""

    model: str
    side: int
    last: str
    batch: int
    epsilon: float = 0.9

    @property
    def key(self) -> str:
        """The cell's name in the JSON file."""
        return f"{self.model}-{self.side}-last{self.last}-b{self.batch}-eps{self.epsilon:g}"


@dataclass(frozen=True)
class Effort:
    """How long one contender is timed: at least ``least`` rounds and ``seconds``, at most ``most`` rounds."""

    least: int = 3
    most: int = 11
    seconds: float = 6.0


class Worker:
    """A contender's process."""

    def __init__(self, cell: Path, name: str, python: str = sys.executable) -> None:
        self.name = name
        self._process = subprocess.Popen(
            [python, "-m", "tools.bench.worker", str(cell), name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        self.error: str | None = None
        self.error = self._answer().get("error")

    def ask(self, what: str, *given: object) -> dict[str, Any]:
        """Have the worker do ``what``; on failure the answer holds ``error``."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": what, "with": given}) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            return {"error": f"the process ended with status {self._process.wait()}"}
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def measure(
    cell: Cell, contenders: Sequence[str], effort: Effort, *, cache: Path, bundles: Path, ort_training: str | None
) -> dict[str, Any]:
    """Return what is found of ``cell``: by contender its figures, or why there are none."""
    names = list(dict.fromkeys((REFERENCE, *contenders)))
    with tempfile.TemporaryDirectory(prefix="edgetune-bench-") as scratch:
        folder = Path(scratch)
        codecs = list(dict.fromkeys(name.split("/", 1)[1] for name in names if "/" in name))
        if "pytorch-asi" in names and "asi" not in codecs:
            codecs.append("asi")
        told = {
            **asdict(cell), "codecs": codecs, "cache": str(cache.resolve()), "bundles": str(bundles.resolve()),
            "ort_training": ORT_TRAINING in names and ort_training is not None,
        }  # fmt: skip
        (folder / "cell.json").write_text(json.dumps(told))
        subprocess.run([sys.executable, "-m", "tools.bench.prepare", str(folder)], check=True, cwd=ROOT)
        told = json.loads((folder / "cell.json").read_text())
        load_before = os.getloadavg()[0]
        workers, failed = list[Worker](), dict[str, Any]()
        for name in names:
            if name == ORT_TRAINING and ort_training is None:
                failed[name] = {"error": "not run: --ort-training PYTHON was not given"}
                continue
            worker = Worker(folder, name, ort_training if name == ORT_TRAINING and ort_training else sys.executable)
            if worker.error is None:
                workers.append(worker)
            else:
                failed[name] = {"error": worker.error}
                worker.close()
        try:
            found = _timed(workers, effort)
            for worker in workers:
                if "error" not in found[worker.name]:
                    found[worker.name] |= _looked_at(worker, folder)
        finally:
            for worker in workers:
                worker.close()
        _compare(found, folder, told)
        load = [round(load_before, 1), round(os.getloadavg()[0], 1)]
        return {
            "cell": asdict(cell), "training": told["training"], "layers": told["layers"], "load": load,
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "contenders": {name: {"load": load, **figures} for name, figures in (found | failed).items()},
        }  # fmt: skip


def _timed(workers: Sequence[Worker], effort: Effort) -> dict[str, dict[str, Any]]:
    """Have everyone do a step in turn, again and again; return medians, and medians of ratios round by round."""
    steps: dict[str, list[dict[str, float]]] = {worker.name: [] for worker in workers}
    errors: dict[str, str] = {}
    rounds = 0
    while rounds == 0 or any(_wants_more(steps[w.name], effort) for w in workers if w.name not in errors):
        for worker in workers:
            done = rounds > 0 and worker.name != REFERENCE and not _wants_more(steps[worker.name], effort)
            if worker.name in errors or done:
                continue
            time.sleep(_PAUSE_SECONDS)
            made = worker.ask("step")
            if "error" in made:
                errors[worker.name] = made["error"]
            elif rounds or made["step"] > _SLOW_SECONDS:  # the first brings code and tables into memory
                steps[worker.name].append(made)
        rounds += 1
    found: dict[str, dict[str, Any]] = {}
    base = steps.get(REFERENCE, [])
    for worker in workers:
        own = steps[worker.name]
        if worker.name in errors:
            found[worker.name] = {"error": errors[worker.name]}
            continue
        seconds = {key: statistics.median(step[key] for step in own) for key in own[0]}
        ratios = [a["step"] / b["step"] for a, b in zip(own, base, strict=False)]
        used = [a["processor"] / b["processor"] for a, b in zip(own, base, strict=False)]
        found[worker.name] = {
            "seconds": seconds, "rounds": len(own), "ratio": statistics.median(ratios),
            "ratios": [round(ratio, 4) for ratio in ratios], "processor_ratio": statistics.median(used),
        }  # fmt: skip
    return found


def _wants_more(steps: Sequence[Mapping[str, float]], effort: Effort) -> bool:
    spent = sum(step["step"] for step in steps)
    if steps and steps[-1]["step"] > _SLOW_SECONDS:
        return False
    return len(steps) < effort.least or (len(steps) < effort.most and spent < effort.seconds)


def _looked_at(worker: Worker, folder: Path) -> dict[str, Any]:
    """Return what is found once: memory, gradients (into a file), the trunk, phases."""
    found: dict[str, Any] = {}
    asked: tuple[tuple[str, Callable[[], dict[str, Any]]], ...] = (
        ("peak", lambda: worker.ask("peak")),
        ("gradients", lambda: worker.ask("gradients", str(folder / _file(worker.name)))),
        ("saved", lambda: worker.ask("saved")),
        ("trunk", lambda: worker.ask("trunk")),
        ("trunk", lambda: worker.ask("trunk")),  # the first loads it
        ("phases", lambda: worker.ask("phases")),
        ("held", lambda: worker.ask("held")),
    )
    for what, ask in asked:
        answer = ask()
        if "error" in answer:
            found.setdefault("missing", {})[what] = answer["error"]
        elif what in ("gradients", "phases", "peak"):
            found[what] = answer
        else:
            found |= answer
    return found


def _compare(found: dict[str, dict[str, Any]], folder: Path, told: Mapping[str, Any]) -> None:
    """Add to each its gradient's error against ordinary PyTorch, and its seconds by phase."""
    exact = _read(folder / _file(REFERENCE))
    for name, figures in found.items():
        _add_phases(figures)
        file = folder / _file(name)
        if not exact or not file.exists():
            continue
        made = _read(file)
        wrong = {key: _norm([made[key] - value]) for key, value in exact.items() if key in made}
        layers = [wrong[key] / (_norm([exact[key]]) or 1.0) for key in told["layers"] if key in wrong]
        whole = [value for key, value in exact.items() if key in made]
        figures["error"] = {
            "total": _norm([np.array(list(wrong.values()))]) / (_norm(whole) or 1.0),
            "mean": float(np.mean(layers)) if layers else 0.0,
            "worst": max(layers, default=0.0),
            "tensors": len(wrong),
        }


def _add_phases(figures: dict[str, Any]) -> None:
    """Scale the phases of slower, watched steps to the median of the timed ones."""
    phases, seconds = figures.get("phases"), figures.get("seconds")
    if phases and seconds and "forward" not in seconds and sum(phases.values()) > 0:
        scale = seconds["train"] / sum(phases.values())
        seconds |= {phase: value * scale for phase, value in phases.items()}
    if seconds is not None and "trunk" in figures:
        seconds["trunk"] = figures.pop("trunk")


def _file(name: str) -> str:
    return f"gradients-{name.replace('/', '-').replace(':', '-')}.npz"


def _read(file: Path) -> dict[str, Any]:
    if not file.exists():
        return {}
    with np.load(file) as stored:
        return {name: stored[name].astype(np.float64) for name in stored.files}


def _norm(arrays: Sequence[Any]) -> float:
    return float(np.sqrt(sum(float(np.square(array).sum()) for array in arrays)))


def machine() -> str:
    """Return the processor and what runs on it."""
    cpu = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            cpu = line.partition(":")[2].strip()
            break
    from importlib.metadata import PackageNotFoundError, version

    import edgetune

    told = []
    for name in ("onnxruntime", "torch", "numpy"):
        try:
            told.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    cores, python = len(os.sched_getaffinity(0)), platform.python_version()
    return f"EdgeTune {edgetune.__version__}, {', '.join(told)}, Python {python}, {cores} cores of {cpu}"


class Store:
    """The JSON file. Written after every cell, through a file beside it."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.data: dict[str, Any] = {"machine": machine(), "cells": {}, "growth": {}}
        if file.exists():
            self.data |= json.loads(file.read_text())

    def missing(self, cell: Cell, contenders: Sequence[str]) -> list[str]:
        """Return those that have no figures yet."""
        known = self.data["cells"].get(cell.key, {}).get("contenders", {})
        return [name for name in contenders if "seconds" not in known.get(name, {})]

    def add(self, cell: Cell, found: dict[str, Any]) -> None:
        """Add what ``measure`` found. The reference that newcomers were compared with replaces an older one."""
        before = self.data["cells"].get(cell.key, {"contenders": {}})
        found["contenders"] = before["contenders"] | found["contenders"]
        self.data["cells"][cell.key] = found
        self.data["machine"] = machine()
        partial = self.file.with_suffix(".part")
        self.file.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(self.data, indent=1))
        partial.rename(self.file)
