"""Small residual networks, their bundles (each exported once per test session) and data for them.

The bundles lie in a temporary directory of their own and are shared: no test may change one; make a copy with
:func:`copied`. Knows the public interface and torch.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import edgetune
from edgetune.bundle import MANIFEST, Array, Bundle, Manifest, write_manifest
from edgetune.planning.plan import Plan

ROOT = Path(__file__).resolve().parents[2]
CODECS = ("dense", "hosvd", "svd")
_PLANS: dict[tuple[str, int, float], Plan] = {}
_SHELF = tempfile.TemporaryDirectory(prefix="edgetune-tests-")  # removed when the interpreter ends


class _Block(nn.Module):
    def __init__(self, taken: int, given: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(taken, given, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(given)
        self.conv2 = nn.Conv2d(given, given, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(given)
        self.skip = nn.Conv2d(taken, given, 1, stride, bias=False) if taken != given or stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + self.skip(x))


class Residual(nn.Module):
    """A stem, two residual blocks, the second of which may shrink the image, average pooling and a linear head."""

    def __init__(self, channels: int, widths: tuple[int, int], stride: int, classes: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, widths[0], 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(widths[0])
        self.block1 = _Block(widths[0], widths[0], 1)
        self.block2 = _Block(widths[0], widths[1], stride)
        self.fc = nn.Linear(widths[1], classes)

    def forward(self, x: Tensor) -> Tensor:
        y = self.block2(self.block1(torch.relu(self.bn(self.stem(x)))))
        out: Tensor = self.fc(y.mean((2, 3)))
        return out


class Wide(nn.Module):
    """A perceptron whose weights are far larger than its activations: 16 MiB in the trained one."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.first = nn.Linear(256, 2048)
        self.second = nn.Linear(2048, 2048)
        self.head = nn.Linear(2048, classes)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.second(torch.relu(self.first(x.flatten(1)))))
        out: Tensor = self.head(y)
        return out


SMALL, LARGE = (1, 16, 16), (3, 64, 64)
CLASSES = 4


def network(size: str, seed: int = 0) -> nn.Module:
    """Return the network called ``small``, ``wide`` (input [b, 1, 16, 16]) or ``large`` ([b, 3, 64, 64])."""
    torch.manual_seed(seed)
    if size == "wide":
        return Wide(CLASSES).eval()
    model = Residual(1, (8, 16), 2, CLASSES) if size == "small" else Residual(3, (32, 64), 2, CLASSES)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                for tensor, low, high in ((module.running_mean, -0.2, 0.2), (module.running_var, 0.7, 1.4)):
                    assert tensor is not None
                    tensor.uniform_(low, high)
    return model.eval()


@functools.cache
def bundle_of(codec: str, size: str = "small", optimizer: str = "sgd", last: int = 3) -> Bundle:
    """Return the bundle of a network. Do not change its files."""
    shape = LARGE if size == "large" else SMALL
    target = Path(_SHELF.name) / f"{size}-{codec}-{optimizer}-{last}"
    return edgetune.export(
        network(size), torch.zeros(1, *shape), target, last=last, codec=codec, optimizer=optimizer,
        classes=[f"class{i}" for i in range(CLASSES)],
    )  # fmt: skip


def copied(bundle: Bundle, target: Path) -> Bundle:
    """Return a copy of ``bundle`` that a test may damage."""
    return Bundle.open(shutil.copytree(bundle.path, target))


def remade(bundle: Bundle, target: Path, **changed: Any) -> Bundle:
    """Return a valid copy of ``bundle`` whose manifest says something else."""
    copy = copied(bundle, target)
    (copy.path / MANIFEST).unlink()
    return write_manifest(copy.path, dataclasses.replace(copy.manifest, **changed))


def plain(manifest: Manifest) -> dict[str, Any]:
    """Return a manifest as JSON data."""
    data: dict[str, Any] = json.loads(manifest.to_json())
    return data


def samples(count: int, shape: tuple[int, ...] = SMALL, seed: int = 0) -> tuple[Array, Array]:
    """Return inputs [count, *shape] and targets [count]: smooth waves whose direction and length tell the class.

    Smooth, because the activations of photographs are nearly of low rank, and those of noise are not.
    """
    rng = np.random.default_rng(seed)
    y = rng.integers(0, CLASSES, count)
    height, width = np.mgrid[: shape[1], : shape[2]].astype(np.float32) / shape[1]
    angle, waves = y * np.pi / CLASSES, 1 + y % 2
    phase = rng.uniform(0, 2 * np.pi, (count, shape[0]))
    along = np.cos(angle)[:, None, None] * height + np.sin(angle)[:, None, None] * width
    x = np.sin(2 * np.pi * (waves[:, None, None] * along)[:, None] + phase[:, :, None, None])
    return (x + 0.02 * rng.standard_normal((count, *shape))).astype(np.float32), y.astype(np.int64)


def plan_of(bundle: Bundle, batch: int = 8, epsilon: float = 0.9) -> Plan:
    """Return a plan calibrated on one batch of :func:`samples`; the same one to the same question."""
    key = (bundle.digest, batch, epsilon)
    if key not in _PLANS:
        calibration = [samples(batch, bundle.manifest.inputs[0].shape)]
        _PLANS[key] = edgetune.plan(bundle, batch=batch, epsilon=epsilon, calibration=calibration)
    return _PLANS[key]


def same_bits(one: dict[str, Array], other: dict[str, Array]) -> bool:
    """Return whether two states hold the same tensors, bit for bit."""
    return one.keys() == other.keys() and all(
        one[k].dtype == other[k].dtype and one[k].shape == other[k].shape and one[k].tobytes() == other[k].tobytes()
        for k in one
    )


def in_fresh_process(script: Path, *arguments: str, python: str = sys.executable) -> Any:
    """Run a script of the tests in a process of its own; return what its last line of output holds as JSON."""
    done = subprocess.run([python, str(script), *arguments], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])
