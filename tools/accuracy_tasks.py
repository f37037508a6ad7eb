"""Two tasks that drift: data to pretrain on, a drifted stream to fine-tune on, drifted data to judge by.

Digits are scikit-learn's, and drift as those of ``edgetune demo`` do. Glyphs are capitals and figures, rendered from
fonts that come with packages: the network is pretrained on some families, upright and clean, and meets others, turned,
blurred, pale and noisy.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont, features

from edgetune.bundle import Array
from edgetune.commands import _digits
from edgetune.errors import UsageError

if TYPE_CHECKING:
    from torch import nn

CHARACTERS = "ACEFHJKLMNPRTUVXY347"
DIGIT_SIDE, GLYPH_SIDE = 32, 64
PRETRAIN_FONTS = tuple(
    f"DejaVuSans{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique",
                                       "Mono", "Mono-Bold", "Mono-Oblique", "Mono-BoldOblique")
)  # fmt: skip
DRIFTED_FONTS = (
    "DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic", "DejaVuSerif-BoldItalic",
    "STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "STIXGeneralBolIta",
    "cmr10", "cmb10", "cmss10", "cmtt10", "cmti10",
)  # fmt: skip
PILLOWS_OWN = "Aileron (in Pillow)"
_SYSTEM_FONTS = Path("/usr/share/fonts/truetype/dejavu")
_HELD_OUT = 0.3


@dataclass(frozen=True)
class Task:
    """Images uint8 [n, side, side], labels int64 [n]. ``stream`` and ``test`` have drifted, ``pretrain`` has not.

    ``origins`` tell of every image of ``stream`` and ``test`` what it was drawn from: no origin is in both.
    """

    name: str
    classes: int
    pretrain: tuple[Array, Array]
    stream: tuple[Array, Array]
    test: tuple[Array, Array]
    origins: tuple[Array, Array]


@dataclass(frozen=True)
class Font:
    """One font by its file; None: the one that Pillow carries in its own code."""

    name: str
    path: Path | None

    def at(self, size: int) -> ImageFont.FreeTypeFont:
        """Return the font at ``size`` pixels."""
        font = ImageFont.load_default(size) if self.path is None else ImageFont.truetype(str(self.path), size)
        assert isinstance(font, ImageFont.FreeTypeFont), "found() makes sure of FreeType"
        return font


def digits(seed: int, repeats: int = 2) -> Task:
    """Return scikit-learn's digits, split 800 / 600 / 397 by ``seed``; each held-out digit drifts ``repeats`` times.

    Raises:
        UsageError: scikit-learn is not installed.
    """
    parts = _digits.load(seed)
    rng = np.random.default_rng((seed, 1))

    def enlarged(images: Array) -> Array:
        return _digits.enlarge(images, DIGIT_SIDE)

    test = np.concatenate([parts.test_images] * repeats)
    numbers = np.arange(len(parts.stream_labels)), len(parts.stream_labels) + np.arange(len(parts.test_labels))
    return Task(
        "digits",
        len(_digits.CLASSES),
        (enlarged(parts.pretrain_images), parts.pretrain_labels),
        (enlarged(_digits.drift(parts.stream_images, rng)), parts.stream_labels),
        (enlarged(_digits.drift(test, rng)), np.concatenate([parts.test_labels] * repeats)),
        (numbers[0], np.concatenate([numbers[1]] * repeats)),
    )


def found() -> tuple[list[Font], list[Font]]:
    """Return the fonts to pretrain on and those to drift to, as they are here.

    Raises:
        UsageError: there are none to pretrain on, or Pillow has no FreeType.
    """
    if not features.check("freetype2"):
        raise UsageError("this Pillow was built without FreeType and renders no fonts; install Pillow's own wheel")
    folders = [_SYSTEM_FONTS]
    spec = importlib.util.find_spec("matplotlib")
    for place in (spec.submodule_search_locations or ()) if spec is not None else ():
        folders.insert(0, Path(place) / "mpl-data" / "fonts" / "ttf")

    def present(names: Sequence[str]) -> list[Font]:
        files = ((name, [f / f"{name}.ttf" for f in folders if (f / f"{name}.ttf").exists()]) for name in names)
        return [Font(name, paths[0]) for name, paths in files if paths]

    pretrain = present(PRETRAIN_FONTS)
    if not pretrain:
        raise UsageError(
            f"no font to pretrain on was found (looked for DejaVu Sans in {', '.join(map(str, folders))}); they come "
            "with matplotlib: pip install matplotlib"
        )
    return pretrain, [*present(DRIFTED_FONTS), Font(PILLOWS_OWN, None)]


def glyphs(
    seed: int,
    fonts: tuple[Sequence[Font], Sequence[Font]],
    counts: tuple[int, int, int] = (2000, 1280, 1000),
    side: int = GLYPH_SIDE,
) -> Task:
    """Return rendered characters: ``counts`` images to pretrain on, of the stream, and to judge by.

    Of every character, 30 % of the fonts to drift to are held out: their outlines are seen only in the test.
    """
    rng = np.random.default_rng((seed, 2))
    before, after = fonts
    clean = _draw(rng, [(f, c) for f in range(len(before)) for c in range(len(CHARACTERS))], counts[0])
    held, seen = [], []
    for c in range(len(CHARACTERS)):
        order = rng.permutation(len(after))
        out = min(len(after) - 1, math.ceil(_HELD_OUT * len(after)))
        held += [(int(f), c) for f in order[:out]]
        seen += [(int(f), c) for f in order[out:]]
    stream, test = _draw(rng, seen, counts[1]), _draw(rng, held, counts[2])

    def drifted(pairs: Array) -> Array:
        return _seen_badly(rendered(rng, after, pairs, side), rng)

    return Task(
        "glyphs",
        len(CHARACTERS),
        (rendered(rng, before, clean, side), clean[:, 1]),
        (drifted(stream), stream[:, 1]),
        (drifted(test), test[:, 1]),
        (_outline(stream), _outline(test)),
    )


def _seen_badly(images: Array, rng: np.random.Generator) -> Array:
    """Return the images turned by 15 to 35 degrees, blurred, of less contrast, with noise of 12 grey levels."""
    turned = []
    for image in images:
        one = Image.fromarray(image).rotate(float(rng.uniform(15, 35)), Image.Resampling.BILINEAR)
        turned.append(np.asarray(one.filter(ImageFilter.GaussianBlur(float(rng.uniform(0.5, 1.2))))))
    dark, contrast = rng.uniform(0, 40, (len(images), 1, 1)), rng.uniform(0.6, 0.85, (len(images), 1, 1))
    noisy = dark + contrast * np.stack(turned) + rng.normal(0, 12, images.shape)
    return np.asarray(np.clip(np.round(noisy), 0, 255), np.uint8)


def _draw(rng: np.random.Generator, pairs: Sequence[tuple[int, int]], count: int) -> Array:
    """Return ``count`` pairs of font and character [count, 2], int64, each pair as often as any other or once more."""
    if not pairs:
        return np.empty((0, 2), np.int64)
    order = np.concatenate([rng.permutation(len(pairs)) for _ in range(-(-count // len(pairs)))])[:count]
    chosen: Array = np.array(pairs, np.int64)[order]
    return chosen


def _outline(pairs: Array) -> Array:
    numbers: Array = pairs[:, 0] * len(CHARACTERS) + pairs[:, 1]
    return numbers


def rendered(
    rng: np.random.Generator, fonts: Sequence[Font], pairs: Array, side: int, characters: Sequence[str] = CHARACTERS
) -> Array:
    """Return white characters on black [n, side, side], not quite upright, not quite in the middle.

    Args:
        pairs: of font and character, by their numbers [n, 2].
    """
    images = np.empty((len(pairs), side, side), np.uint8)
    for image, (font, character) in zip(images, pairs, strict=True):
        size = int(side * rng.uniform(0.6, 0.8))
        middle = side / 2 + rng.uniform(-side / 20, side / 20, 2)
        drawn = Image.new("L", (side, side), 0)
        ImageDraw.Draw(drawn).text(
            (float(middle[0]), float(middle[1])), characters[character], 255, fonts[font].at(size), anchor="mm"
        )
        image[:] = np.asarray(drawn.rotate(float(rng.uniform(-8, 8)), Image.Resampling.BILINEAR))
    return images


def pretrained(task: Task, seed: int) -> nn.Module:
    """Return a network trained on the clean part, in evaluation mode: for digits the residual network of the
    demonstration, for glyphs inverted residuals with depthwise kernels of 3 and 5 (as MCUNet's, 64 x 64 to 8 x 8)."""
    images, labels = task.pretrain
    if task.name == "digits":
        return _digits.pretrain(images, labels, model_factory=lambda: _digits.digits_resnet(seed), seed=seed)
    return _digits.pretrain(
        images, labels, model_factory=lambda: glyph_network(task.classes, seed), epochs=6, batch=64,
        learning_rate=1e-2, seed=seed,
    )  # fmt: skip


def glyph_network(classes: int, seed: int) -> nn.Module:
    """Return the network for glyphs, untrained: input [b, 1, 64, 64], output [b, classes]."""
    from torch import Tensor, nn

    from tools.models import _seeded
    from tools.zoo.plain import _InvertedResidual

    class GlyphNetwork(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Sequential(nn.Conv2d(1, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU6())
            self.blocks = nn.Sequential(
                _InvertedResidual(16, 24, 3, 2, 3),
                _InvertedResidual(24, 24, 5, 1, 3),
                _InvertedResidual(24, 32, 5, 2, 4),
                _InvertedResidual(32, 32, 3, 1, 4),
                _InvertedResidual(32, 48, 3, 1, 4),
            )
            self.classifier = nn.Linear(48, classes)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.classifier(self.blocks(self.stem(x)).mean((2, 3)))
            return result

    return _seeded(GlyphNetwork, seed)
