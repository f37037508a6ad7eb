"""Two streams of tasks for a network that is pretrained on letters: digits by twos, and letters in new guises.

Knows scikit-learn's digits and the fonts that packages carry; nothing of what is trained on them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageFilter

from edgetune.bundle import Array
from edgetune.commands import _digits
from tools import accuracy_tasks

if TYPE_CHECKING:
    from torch import nn

SIDE = 16
LETTERS = tuple("ACEFHJKLMN")
SCENARIOS = ("class-incremental", "domain-incremental")


@dataclass(frozen=True)
class Part:
    """One task: images uint8 [n, side, side] and labels int64 [n], to train on and, others, to judge by."""

    name: str
    train: tuple[Array, Array]
    test: tuple[Array, Array]


def stream(scenario: str, seed: int, train: int, test: int) -> list[Part]:
    """Return five tasks of ``train`` images to train on each and ``test`` to judge by (fewer where there are fewer)."""
    return (_digits_by_twos if scenario == SCENARIOS[0] else _letters_in_guises)(seed, train, test)


def _digits_by_twos(seed: int, train: int, test: int) -> list[Part]:
    """Return scikit-learn's digits: 0 and 1, then 2 and 3, and so on; an image is in one part only."""
    digits = _digits.load(seed)
    images = np.concatenate([digits.pretrain_images, digits.stream_images])
    labels = np.concatenate([digits.pretrain_labels, digits.stream_labels])

    def some(images: Array, labels: Array, pair: tuple[int, int], count: int) -> tuple[Array, Array]:
        chosen = np.flatnonzero(np.isin(labels, pair))[:count]
        return images[chosen], labels[chosen]

    return [
        Part(
            f"{a} {a + 1}",
            some(images, labels, (a, a + 1), train),
            some(digits.test_images, digits.test_labels, (a, a + 1), test),
        )
        for a in range(0, 10, 2)
    ]


def _letters_in_guises(seed: int, train: int, test: int) -> list[Part]:
    """Return ten letters in fonts that the network has not seen: upright, turned, inverted, blurred, pale and noisy."""
    rng = np.random.default_rng((seed, 3))

    def turned(image: Image.Image) -> Image.Image:
        return image.rotate(float(rng.uniform(30, 60)), Image.Resampling.BILINEAR)

    def noisy(image: Image.Image) -> Image.Image:
        pale = 60 + 0.4 * np.asarray(image, np.float64) + rng.normal(0, 20, (image.height, image.width))
        return Image.fromarray(np.clip(np.round(pale), 0, 255).astype(np.uint8))

    guises: dict[str, Callable[[Image.Image], Image.Image]] = {
        "upright": lambda image: image,
        "turned": turned,
        "inverted": lambda image: Image.fromarray(255 - np.asarray(image)),
        "blurred": lambda image: image.filter(ImageFilter.GaussianBlur(1.6)),
        "pale, noisy": noisy,
    }
    fonts = accuracy_tasks.found()[1]
    return [
        Part(name, *(_letters(rng, fonts, count, guise) for count in (train, test))) for name, guise in guises.items()
    ]


def _letters(
    rng: np.random.Generator,
    fonts: list[accuracy_tasks.Font],
    count: int,
    guise: Callable[[Image.Image], Image.Image] = lambda image: image,
) -> tuple[Array, Array]:
    """Return ``count`` letters, each as often as any other or once more, each drawn anew."""
    labels = rng.permutation(np.arange(count) % len(LETTERS))
    pairs = np.stack([rng.integers(0, len(fonts), count), labels], axis=1)
    drawn = accuracy_tasks.rendered(rng, fonts, pairs, SIDE, LETTERS)
    return np.stack([np.asarray(guise(Image.fromarray(image))) for image in drawn]), labels


def pretrained(seed: int, count: int = 1500) -> nn.Module:
    """Return a residual network of 19,810 weights, trained on clean letters, in evaluation mode."""
    rng = np.random.default_rng((seed, 4))
    images, labels = _letters(rng, accuracy_tasks.found()[0], count)

    def network() -> nn.Module:
        return _digits.residual_network(
            channels=1, widths=(8, 16, 32), blocks=(1, 1, 1), classes=len(LETTERS), small_input=True, seed=seed
        )

    return _digits.pretrain(images, labels, model_factory=network, seed=seed)
