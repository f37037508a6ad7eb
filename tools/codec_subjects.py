"""What the codecs are measured on: four models and crops of real photographs.

No download: the photographs are scikit-learn's two, and no trained weights come with anything. So the weights are
drawn, and the statistics of every batch-norm are those of the photographs. Knows torch; nothing of bundles.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from edgetune.bundle import Array
from tools import models, zoo
from tools.zoo import plain

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_THIRDS = 3


@dataclass(frozen=True)
class Subject:
    """A model, the part of it that is trained, and a batch.

    Attributes:
        side: of the square RGB images.
        last, compress: as for ``edgetune export``.
        dense_targets: whether every pixel has a class (its brightness in four steps), or the image as a whole (which
            photograph it is from, and which third of it).
    """

    name: str
    make: Callable[[], nn.Module]
    side: int
    batch: int
    last: int | str = 4
    compress: str = "layers"
    dense_targets: bool = False

    def model(self) -> nn.Module:
        """Return the model with drawn weights, in evaluation mode, its batch-norms set to the photographs."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = zoo.randomise(self.make(), 0)
            if any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules()):
                zoo.measure_batch_norms(model, [torch.from_numpy(self.draw(8, 1000)[0])])
            return model

    def draw(self, count: int, seed: int) -> tuple[Array, Array]:
        """Return ``count`` crops [b, 3, side, side] and their targets, [b] or [b, side, side], int64."""
        x, y = crops(count, self.side, seed)
        if self.dense_targets:
            brightness = x.mean(axis=1)
            y = np.digitize(brightness, np.quantile(brightness, (0.25, 0.5, 0.75))).astype(np.int64)
        return x, y


def crops(count: int, side: int, seed: int) -> tuple[Array, Array]:
    """Return ``count`` random square crops [b, 3, side, side] of real photographs, normalised as ImageNet is, and of
    each the photograph times three plus the third of it in which the crop's centre lies [b]."""
    from sklearn.datasets import load_sample_images

    rng = np.random.default_rng(seed)
    images = [np.asarray(image, np.float32) / 255.0 for image in load_sample_images().images]
    found, places = np.empty((count, 3, side, side), np.float32), np.empty(count, np.int64)
    for i in range(count):
        which = int(rng.integers(len(images)))
        height, width = images[which].shape[:2]
        top, left = int(rng.integers(height - side + 1)), int(rng.integers(width - side + 1))
        crop = images[which][top : top + side, left : left + side]
        found[i] = ((crop - MEAN) / STD).transpose(2, 0, 1)
        places[i] = which * _THIRDS + (left + side // 2) * _THIRDS // width
    return found, places


def vit(side: int = 112, patch: int = 8, layers: int = 4, classes: int = 10) -> Any:
    """Return a vision transformer of the width of ViT-Ti (192, three heads) with ``layers``, for square images."""
    import transformers

    settings: dict[str, Any] = {
        "image_size": side, "patch_size": patch, "hidden_size": 192, "num_hidden_layers": layers,
        "num_attention_heads": 3, "intermediate_size": 768, "num_labels": classes,
    }  # fmt: skip
    return transformers.ViTForImageClassification(transformers.ViTConfig(**settings))


def unet(classes: int = 4) -> nn.Module:
    """Return a U-Net of two levels, 16, 32 and 64 channels wide."""
    return plain.UNet(2, classes, channels=3, widths=(16, 32, 64))


SUBJECTS = (
    Subject("resnet18", models.resnet18, 224, 8),
    Subject("mobilenet_v2", models.mobilenet_v2, 224, 8),
    Subject("vit", vit, 112, 8),
    Subject("vit-all", vit, 112, 8, compress="all"),
    Subject("unet", unet, 64, 8, last="all", dense_targets=True),
)
