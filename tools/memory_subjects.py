"""What the memory grid trains: models whose activations outweigh the runtime, and pictures for them.

Pictures are smooth noise: what a step takes depends on shapes and ranks alone. Imports torch only when a model is made.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from edgetune.bundle import Array


@dataclass(frozen=True)
class Subject:
    """A model; ``shape`` of one sample, ``classes``, and whether every position has one or the whole sample."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    classes: int = 1000
    scale: int | None = None
    """None: one class per sample; k: one per position of an output k times smaller than the input."""

    def draw(self, count: int, seed: int) -> tuple[Array, Array]:
        """Return ``count`` samples [b, *shape] float32 and their targets int64."""
        import numpy as np

        from tools.zoo import draw_smooth

        rng = np.random.default_rng(seed)
        extents = () if self.scale is None else tuple(size // self.scale for size in self.shape[1:])
        return draw_smooth(rng, (count, *self.shape)), rng.integers(0, self.classes, (count, *extents))


def _tools(name: str) -> Callable[[], nn.Module]:
    def make() -> Any:
        from tools import models

        return getattr(models, name)()

    return make


def _seeded(make: Callable[[], Any]) -> Callable[[], nn.Module]:
    def seeded() -> Any:
        import torch

        from tools.zoo import randomise

        torch.manual_seed(0)
        return randomise(make(), 0)

    return seeded


def _vit(side: int) -> Callable[[], Any]:
    def make() -> Any:
        from tools import codec_subjects

        return codec_subjects.vit(side=side, patch=8, layers=4, classes=10)

    return _seeded(make)


def _unet() -> Any:
    from tools import codec_subjects

    return codec_subjects.unet(classes=3)


def _plain(name: str, *given: Any, **more: Any) -> Callable[[], nn.Module]:
    def make() -> Any:
        from tools.zoo import plain

        return getattr(plain, name)(*given, **more)

    return _seeded(make)


def _convnext() -> Any:
    import transformers

    settings: dict[str, Any] = {
        "image_size": 96, "hidden_sizes": [48, 96, 192, 384], "depths": [1, 1, 2, 1], "num_labels": 10
    }  # fmt: skip
    return transformers.ConvNextForImageClassification(transformers.ConvNextConfig(**settings))


def _segformer() -> Any:
    import transformers

    settings: dict[str, Any] = {
        "depths": [1, 1, 1, 1], "hidden_sizes": [16, 32, 64, 96], "num_attention_heads": [1, 1, 2, 3],
        "sr_ratios": [8, 4, 2, 1], "mlp_ratios": [4, 4, 4, 4], "decoder_hidden_size": 64, "num_labels": 4,
    }  # fmt: skip
    return transformers.SegformerForSemanticSegmentation(transformers.SegformerConfig(**settings))


def _tiny() -> Any:
    from edgetune.commands import _digits

    widths, blocks = (8, 16, 16), (1, 1, 1)
    return _digits.residual_network(channels=3, widths=widths, blocks=blocks, classes=10, small_input=True, seed=0)


SUBJECTS = {
    **{f"{name}-{side}": Subject(_tools(name), (3, side, side))
       for name, sides in {"resnet18": (96, 160, 224), "mobilenet_v2": (96, 128, 224), "mcunet": (96, 160)}.items()
       for side in sides},
    "vit-64": Subject(_vit(64), (3, 64, 64), 10),
    **{f"unet-{side}": Subject(_seeded(_unet), (3, side, side), 3, 1) for side in (64, 96)},
    "deeplabv3-96": Subject(_plain("DeepLabV3", 5), (3, 96, 96), 5, 1),
    "pspnet-96": Subject(_plain("PSPNet", 5), (3, 96, 96), 5, 1),
    "convnext-96": Subject(_seeded(_convnext), (3, 96, 96), 10),
    "segformer-128": Subject(_seeded(_segformer), (3, 128, 128), 4, 4),
    "unet3d-16": Subject(_plain("UNet", 3, 3, widths=(8, 16, 32)), (1, 16, 32, 32), 3, 1),
    "convnet1d-4096": Subject(_plain("ConvNet1d"), (3, 4096), 6),
    "tiny-32": Subject(_tiny, (3, 32, 32), 10),
}  # fmt: skip
