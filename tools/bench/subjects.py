"""What the contenders train: five models and pictures of digits before photographs.

No download. A picture is a random crop of one of scikit-learn's two photographs, with a digit of the font that Pillow
ships drawn over it. The models learned to name digit and photograph (the U-Net: to find the digit's pixels) for some
hundred steps, most of them on smaller pictures and the last on pictures of the full size, of which the statistics of
their batch-norms are: no state of the art, but activations with the decaying spectra of a trained network. Knows torch,
Pillow and scikit-learn.
"""

from __future__ import annotations

import functools
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from edgetune.bundle import Array
from edgetune.commands import _digits
from tools import codec_subjects, models
from tools.codec_subjects import MEAN, STD

GLYPHS = "0123456789"
_ADAPT_BATCH, _ADAPT_BATCHES = 16, 8
_TRAINING_SEED = 10_000


@dataclass(frozen=True)
class Phase:
    """A part of a model's training with AdamW: one cycle that reaches ``rate``, on pictures of ``side`` pixels."""

    side: int
    steps: int
    batch: int = 32
    rate: float = 1e-3

    def __str__(self) -> str:
        return f"{self.steps} × {self.batch} of {self.side}²"


@dataclass(frozen=True)
class Subject:
    """A model and how it was trained.

    Attributes:
        side: of the pictures that contenders see.
        phases: of its training, one after the other.
        segments: whether every pixel has a class (0: photograph; 1: a digit below 5; 2: another), or the picture.
        blocks: a regular expression: the modules that activation checkpointing recomputes one at a time.
    """

    name: str
    make: Callable[[], nn.Module]
    side: int
    phases: tuple[Phase, ...]
    blocks: str
    segments: bool = False

    def draw(self, count: int, seed: int, side: int | None = None) -> tuple[Array, Array]:
        """Return ``count`` pictures [b, 3, side, side] and their targets, [b] or [b, side, side], int64."""
        x, which, mask = pictures(count, side or self.side, seed)
        if not self.segments:
            return x, which
        kind = np.where(which % len(GLYPHS) < 5, 1, 2).astype(np.int64)
        return x, mask * kind[:, None, None]

    def model(self, cache: Path) -> nn.Module:
        """Return the trained model in evaluation mode; train it first if ``cache`` does not hold its weights."""
        from safetensors.torch import load_file

        file = self._file(cache)
        model = _seeded(self.make)
        if not file.exists():
            self._train(model, file)
        model.load_state_dict(load_file(file))
        return model.eval()

    def _train(self, model: nn.Module, file: Path) -> None:
        from safetensors.torch import save_file

        begin, drawn = time.perf_counter(), _TRAINING_SEED
        loss = torch.tensor(torch.nan)
        model.train()
        for phase in self.phases:
            optimizer = torch.optim.AdamW(model.parameters(), lr=phase.rate)
            schedule = torch.optim.lr_scheduler.OneCycleLR(
                optimizer, max_lr=phase.rate, total_steps=phase.steps, pct_start=0.1
            )
            for step in range(phase.steps):
                x, y = (torch.from_numpy(array) for array in self.draw(phase.batch, drawn, phase.side))
                drawn += 1
                optimizer.zero_grad()
                loss = functional.cross_entropy(scores_of(model(x)), y)
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()
                if step % 20 == 19:
                    told = f"{self.name}: {phase}, step {step + 1}, loss {loss:.3f}"
                    print(f"{told}, {time.perf_counter() - begin:.0f} s", file=sys.stderr, flush=True)
        self._measure_norms(model)
        accuracy = self.accuracy(model.eval())
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(".part")
        state = {name: value.detach().clone().contiguous() for name, value in model.state_dict().items()}
        save_file(state, partial, {"accuracy": f"{accuracy:.4f}", "loss": f"{loss.item():.4f}"})
        partial.rename(file)
        print(f"{self.name}: {accuracy:.1%} right, {time.perf_counter() - begin:.0f} s", file=sys.stderr, flush=True)

    def _measure_norms(self, model: nn.Module) -> None:
        """Set the statistics of every batch-norm to those of full-size pictures."""
        norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        if not norms:
            return
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the mean over all batches
        with torch.no_grad():
            for index in range(_ADAPT_BATCHES):
                model(torch.from_numpy(self.draw(_ADAPT_BATCH, 20_000 + index)[0]))

    def accuracy(self, model: nn.Module) -> float:
        """Return the share of right answers (pixels) on full-size pictures that the model has not seen."""
        right = []
        with torch.inference_mode():
            for index in range(4):
                x, y = (torch.from_numpy(array) for array in self.draw(32, 30_000 + index))
                right.append(float((scores_of(model(x)).argmax(1) == y).float().mean()))
        return float(np.mean(right))

    def training(self, cache: Path) -> dict[str, Any]:
        """Return what is known of the training whose weights are in ``cache``."""
        with self._file(cache).open("rb") as stream:
            head = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        told = {key: float(value) for key, value in head["__metadata__"].items()}
        return {"phases": [str(phase) for phase in self.phases], **told}

    def _file(self, cache: Path) -> Path:
        phases = "-".join(f"{phase.steps}x{phase.batch}x{phase.side}x{phase.rate:g}" for phase in self.phases)
        return cache / f"{self.name}-{phases}.safetensors"


def scores_of(output: Any) -> torch.Tensor:
    """Return a model's first output: transformers wrap theirs."""
    found: torch.Tensor = output if isinstance(output, torch.Tensor) else output[0]
    return found


def pictures(count: int, side: int, seed: int) -> tuple[Array, Array, Array]:
    """Return ``count`` pictures [b, 3, side, side], normalised as ImageNet is, the digit, plus ten for the second
    photograph [b], and where it lies [b, side, side] (int64, 0 or 1)."""
    from PIL import Image, ImageDraw

    rng = np.random.default_rng(seed)
    photographs = [Image.fromarray(image) for image in _photographs()]
    x, which = np.empty((count, 3, side, side), np.float32), np.empty(count, np.int64)
    masks = np.empty((count, side, side), np.int64)
    for i in range(count):
        source, digit = int(rng.integers(len(photographs))), int(rng.integers(len(GLYPHS)))
        which[i] = source * len(GLYPHS) + digit
        extent = int(rng.integers(160, 400))
        left, top = (int(rng.integers(full - extent + 1)) for full in photographs[source].size)
        box = (left, top, left + extent, top + extent)
        picture = photographs[source].resize((side, side), Image.Resampling.BILINEAR, box)
        font = _font(round(side * float(rng.uniform(0.7, 0.95))))
        mask = Image.new("L", (side, side))
        across, down = (side * float(v) for v in rng.uniform(0.45, 0.55, 2))
        ImageDraw.Draw(mask).text((across, down), GLYPHS[digit], fill=255, font=font, anchor="mm")
        mask = mask.rotate(float(rng.uniform(-12, 12)), Image.Resampling.BILINEAR)
        paint = rng.integers(0, 80, 3) if rng.random() < 0.5 else rng.integers(176, 256, 3)
        picture.paste(Image.new("RGB", (side, side), tuple(int(v) for v in paint)), mask=mask)
        values = np.asarray(picture, np.float32) / 255.0 * float(rng.uniform(0.6, 1.0))
        x[i] = ((values - MEAN) / STD).transpose(2, 0, 1)
        masks[i] = np.asarray(mask) > 127
    return x, which, masks


@functools.cache
def _font(size: int) -> Any:
    from PIL import ImageFont

    return ImageFont.load_default(size)


@functools.cache
def _photographs() -> tuple[Array, ...]:
    from sklearn.datasets import load_sample_images

    return tuple(load_sample_images().images)


def vit_tiny() -> Any:
    """Return a vision transformer of the width of ViT-Ti (192, three heads, patches of 16) and six layers, not 12."""
    return codec_subjects.vit(side=224, patch=16, layers=6, classes=1000)


def unet() -> nn.Module:
    """Return a U-Net of two levels, 16, 32 and 64 channels wide, for three classes."""
    return codec_subjects.unet(classes=3)


def tiny() -> nn.Module:
    """Return a residual network of 8 and 16 channels for the tests of this tool."""
    widths, blocks = (8, 16, 16), (1, 1, 1)
    return _digits.residual_network(channels=3, widths=widths, blocks=blocks, classes=36, small_input=True, seed=0)


def _seeded(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make()


def _resnet18() -> nn.Module:
    return models.plain_norms(models.resnet18())


def _mobilenet_v2() -> nn.Module:
    return models.plain_norms(models.mobilenet_v2())


def _mcunet() -> nn.Module:
    return models.plain_norms(models.mcunet())


SUBJECTS = {
    subject.name: subject
    for subject in (
        Subject("resnet18", _resnet18, 224, (Phase(96, 300), Phase(224, 80, 16)), r"layer\d\.\d"),
        Subject("mobilenet_v2", _mobilenet_v2, 224, (Phase(96, 800, 32, 3e-3), Phase(224, 100, 16)), r"features\.\d+"),
        Subject(
            "mcunet",
            _mcunet,
            160,
            (Phase(80, 600, 32, 3e-3), Phase(160, 60, 16, 3e-4), Phase(160, 120, 16)),
            r"blocks\.\d+",
        ),
        Subject("vit", vit_tiny, 224, (Phase(224, 150, 16, 5e-4),), r"vit\.layers\.\d+"),
        Subject(
            "unet", unet, 128, (Phase(64, 400), Phase(128, 60, 16, 3e-4)), r"down\d|bottom|up\d|merge\d", segments=True
        ),
        Subject("tiny", tiny, 32, (Phase(32, 4, 8),), r"layer\d\.\d"),
    )
}
