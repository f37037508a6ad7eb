"""What the tests of the whole device side share: folders of real images, and agents in processes of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from edgetune.agent import checkpoint
from edgetune.agent.ledger import Ledger
from edgetune.bundle import Array, Bundle
from edgetune.telemetry import runlog
from tests.engines.workshop import ROOT, in_fresh_process, samples

SCRIPT = Path(__file__).with_name("run_real.py")


def make_images(root: Path, bundle: Bundle, count: int) -> Path:
    """Write ``count`` PNG files into one sub-folder per class and return ``root``."""
    shape = bundle.manifest.inputs[0].shape
    x, y = samples(count, shape)
    pixels = np.clip((x + 1) * 127.5, 0, 255).astype(np.uint8)
    for index, (image, label) in enumerate(zip(pixels, y, strict=True)):
        folder = root / bundle.manifest.classes[label]
        folder.mkdir(parents=True, exist_ok=True)
        picture = Image.fromarray(image[0] if shape[0] == 1 else image.transpose(1, 2, 0))
        picture.save(folder / f"{index:04d}.png")
    return root


def settings(bundle: Bundle, data: Path, state: Path, **changed: Any) -> str:
    """Return the argument of run_real.py."""
    config = {"data": data, "state": state, "batch": 8, "once": True, "quiet": True, "settle_seconds": 0.0, **changed}
    return json.dumps({"bundle": bundle.path, "config": config}, default=str)


def run(bundle: Bundle, data: Path, state: Path, *, python: str = sys.executable, **changed: Any) -> dict[str, Any]:
    """Run the agent to its end and return what it says of itself."""
    result: dict[str, Any] = in_fresh_process(SCRIPT, settings(bundle, data, state, **changed), python=python)
    return result


def start(bundle: Bundle, data: Path, state: Path, **changed: Any) -> subprocess.Popen[bytes]:
    """Start the agent and return its process."""
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), settings(bundle, data, state, **changed)], cwd=ROOT, stdout=subprocess.DEVNULL
    )


def last_step(state: Path) -> int:
    """Return the number of the last step that the run log holds so far."""
    found = runlog.steps(state / "log.jsonl")
    return int(found[-1]["step"]) if found else 0


def final_state(state: Path) -> dict[str, Array]:
    """Return the tensors of the newest checkpoint."""
    found = checkpoint.load_newest(state, lambda path: None)
    assert found is not None
    return dict(found.tensors)


def trained(state: Path) -> list[tuple[str, str, int | None, int]]:
    """Return what the ledger says of every sample."""
    ledger = Ledger(state / "ledger.sqlite")
    try:
        return [(s.path, s.status, s.step, s.passes) for s in ledger.samples()]
    finally:
        ledger.close()
