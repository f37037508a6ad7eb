"""Random changes of pictures that are trained: a function of seed, pass and content, and of nothing else.

Each sample is changed in another way in every pass, and in the same way whenever that pass is made again. The random
numbers are a hash (BLAKE2b) and not a library's generator, whose stream may differ from version to version. Knows
pixels; nothing of files.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
from PIL import Image

from edgetune.bundle import Array

LEAST_SCALE = 0.8
"""A crop has at least this share of the height and of the width, and their ratio."""
LEAST_FACTOR, MOST_FACTOR = 0.8, 1.25
"""Of brightness, contrast and saturation; the one is the other's inverse."""
_LUMA = np.array([0.299, 0.587, 0.114], np.float32).reshape(3, 1, 1)  # ITU-R BT.601


def augment(pixels: Array, kinds: Collection[str], seed: int, epoch: int, content: str) -> Array:
    """Return ``pixels`` changed at random, of the same shape, float32.

    Args:
        pixels: [channels, height, width] in [0, 1]. kinds: any of ``crop`` (a part, resized bilinearly to the whole),
            ``flip`` (left to right, every second time) and ``colour`` (brightness, contrast, and saturation of three
            channels; then clipped to [0, 1]).
        content: the sample's hash.
    """
    dice = _dice(f"{seed}:{epoch}:{content}")
    value = pixels.astype(np.float32)
    if "crop" in kinds:
        value = _cropped(value, *dice[:3])
    if "flip" in kinds and dice[3] < 0.5:
        value = value[:, :, ::-1]
    if "colour" in kinds:
        value = _coloured(value, *dice[4:7])
    return np.ascontiguousarray(value)


@dataclass(frozen=True)
class Augmentation:
    """What is done to the samples of one run: its ``kinds`` and ``seed``, as of :func:`augment`."""

    kinds: tuple[str, ...]
    seed: int

    def of(self, epoch: int, content: str) -> Callable[[Array], Array]:
        """Return the change of one sample in one pass."""
        return lambda pixels: augment(pixels, self.kinds, self.seed, epoch, content)


def _dice(text: str) -> list[float]:
    """Return eight numbers in [0, 1) that depend on ``text``."""
    digest = blake2b(text.encode(), digest_size=64, person=b"augment").digest()
    return [int.from_bytes(digest[i : i + 8], "big") / 2**64 for i in range(0, 64, 8)]


def _cropped(value: Array, size: float, down: float, right: float) -> Array:
    _, height, width = value.shape
    scale = LEAST_SCALE + (1 - LEAST_SCALE) * size
    top, left = down * (1 - scale) * height, right * (1 - scale) * width
    box = (left, top, left + scale * width, top + scale * height)
    rows = [Image.fromarray(one).resize((width, height), Image.Resampling.BILINEAR, box=box) for one in value]
    return np.stack([np.asarray(row) for row in rows])


def _coloured(value: Array, brightness: float, contrast: float, saturation: float) -> Array:
    value = value * _factor(brightness)
    mean = np.mean(value)
    value = (value - mean) * _factor(contrast) + mean
    if len(value) == 3:
        grey = np.sum(value * _LUMA, axis=0, keepdims=True)
        value = (value - grey) * _factor(saturation) + grey
    clipped: Array = np.clip(value, 0, 1).astype(np.float32)
    return clipped


def _factor(dice: float) -> np.float32:
    return np.float32(LEAST_FACTOR * (MOST_FACTOR / LEAST_FACTOR) ** dice)
