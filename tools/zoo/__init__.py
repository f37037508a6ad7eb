"""Every model that must go through: small, seeded, in evaluation mode, named as in ``tools.zoo:swin``.

Those that `transformers` has are its own classes, unchanged (``third_party.py``); the others are written here in plain
torch (``plain.py``). ``ZOO`` is the list. No download: the weights are drawn, and so is everything that usually starts
as 0 or 1 (batch statistics, scales, shifts, position tables), because with those a wrong fold or a dropped term goes
unnoticed.

Knows nothing of how a model is exported or trained.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from tools.zoo import plain


@dataclass(frozen=True)
class ZooModel:
    """One model: how it is made, and what it takes.

    Attributes:
        inputs: per argument of ``forward``, the shape of one sample.
        kind: "classification" (output [b, k], or a tuple that starts with it) or "segmentation" ([b, k, ...]).
        classes: k.
        tokens: where positive, the inputs are int64 below it; else they are float32.
    """

    name: str
    make: Callable[[], nn.Module]
    inputs: Mapping[str, tuple[int, ...]]
    kind: str
    classes: int
    tokens: int = 0

    def factory(self, seed: int = 0) -> nn.Module:
        """Return the model with weights drawn by ``seed``; torch's own generator is left as it was."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = randomise(self.make(), seed)
            measure_batch_norms(model, [torch.from_numpy(value) for value in self.draw(32, seed).values()])
            return model

    def draw(self, batch: int, seed: int = 0) -> dict[str, np.ndarray]:
        """Return inputs for ``batch`` samples; see :func:`draw_smooth`."""
        rng = np.random.default_rng(seed)
        if self.tokens:
            return {n: rng.integers(0, self.tokens, (batch, *shape)) for n, shape in self.inputs.items()}
        return {n: draw_smooth(rng, (batch, *shape)) for n, shape in self.inputs.items()}


def draw_smooth(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Return float32 numbers of variance 1, smooth over the last axes [b, c, ...] as images are: spectra decay."""
    x = rng.standard_normal(shape)
    for axis in range(2, len(shape)):
        x = x + 0.9 * np.roll(x, 1, axis) + 0.7 * np.roll(x, 2, axis)
    result: np.ndarray = (x / x.std()).astype(np.float32)
    return result


def randomise(model: nn.Module, seed: int) -> nn.Module:
    """Draw every parameter of ``model``; return it in evaluation mode.

    Matrices and kernels are normal with variance 1/fan-in (2/fan-in for convolutions, He et al. 2015), so that the
    signal neither fades nor grows; vectors that scale are uniform in [0.5, 1.5], those that shift normal with 0.1.
    """
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for module in model.modules():
            convolutional = isinstance(module, nn.modules.conv._ConvNd)
            for name, value in module.named_parameters(recurse=False):
                if isinstance(module, nn.PReLU):
                    value.uniform_(0.1, 0.4, generator=generator)
                elif name == "bias" or (name == "beta" and value.ndim == 1):
                    value.normal_(0, 0.1, generator=generator)
                elif value.ndim == 1:
                    value.uniform_(0.5, 1.5, generator=generator)
                elif isinstance(module, nn.Embedding):
                    value.normal_(0, 0.5, generator=generator)
                elif convolutional or isinstance(module, nn.Linear):
                    gain = 2.0 if convolutional else 1.0
                    value.normal_(0, math.sqrt(gain / max(1, value[0].numel())), generator=generator)
                else:  # position tables, class tokens
                    value.normal_(0, 0.2, generator=generator)
    return model.eval()


def measure_batch_norms(model: nn.Module, inputs: Sequence[torch.Tensor]) -> None:
    """Set every batch-norm's statistics to those of ``inputs``, off by some tenths: depth does not blow up the signal.

    Off, because a batch-norm that normalises exactly would hide a mean or a variance that is left out.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model.train()(*inputs)
        model.eval()
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
            assert norm.running_mean is not None and norm.running_var is not None
            norm.running_mean += 0.2 * norm.running_var.sqrt() * torch.randn_like(norm.running_mean)
            norm.running_var *= torch.empty_like(norm.running_var).uniform_(0.6, 1.5)


_IMAGE, _WIDE = {"x": (3, 32, 32)}, {"x": (3, 48, 40)}

PLAIN = (
    ZooModel("mcunet", plain.MCUNet, _IMAGE, "classification", 10),
    ZooModel("fcn", plain.FCN, _WIDE, "segmentation", 5),
    ZooModel("pspnet", plain.PSPNet, {"x": (3, 48, 48)}, "segmentation", 5),
    ZooModel("deeplabv3", plain.DeepLabV3, _WIDE, "segmentation", 5),
    ZooModel("unet2d", lambda: plain.UNet(2, 4), {"x": (1, 16, 24)}, "segmentation", 4),
    ZooModel("unet2d_bilinear", lambda: plain.UNet(2, 4, "bilinear"), {"x": (1, 16, 24)}, "segmentation", 4),
    ZooModel("unet3d", lambda: plain.UNet(3, 3), {"x": (1, 8, 8, 12)}, "segmentation", 3),
    ZooModel("unet3d_nearest", lambda: plain.UNet(3, 3, "nearest"), {"x": (1, 8, 8, 12)}, "segmentation", 3),
    ZooModel("convnet1d", plain.ConvNet1d, {"x": (3, 64)}, "classification", 6),
    ZooModel("mixed_norms", plain.MixedNorms, {"x": (3, 16, 16)}, "classification", 7),
    ZooModel("tied_tokens", plain.TiedTokens, {"tokens": (9,)}, "segmentation", 23, tokens=23),
    ZooModel("two_by_two", plain.TwoByTwo, {"image": (3, 16, 16), "vector": (5,)}, "classification", 4),
)


def _third_party() -> tuple[ZooModel, ...]:
    if importlib.util.find_spec("transformers") is None:
        return ()
    from tools.zoo import third_party as tp

    def image(name: str, make: Callable[[], nn.Module], extent: int) -> ZooModel:
        return ZooModel(name, make, {"pixel_values": (3, extent, extent)}, "classification", tp.CLASSES)

    def pixels(name: str, make: Callable[[], nn.Module], extent: int) -> ZooModel:
        return ZooModel(name, make, {"pixel_values": (3, extent, extent)}, "segmentation", tp.PIXEL_CLASSES)

    return (
        image("resnet18", tp.resnet18, 32),
        image("resnet34", tp.resnet34, 32),
        image("resnet50", tp.resnet50, 32),
        image("mobilenet_v2", tp.mobilenet_v2, 32),
        image("efficientnet", tp.efficientnet, 64),
        image("vit", tp.vit, 16),
        image("swin", tp.swin, 32),
        image("convnext", tp.convnext, 32),
        pixels("segformer", tp.segformer, 32),
        pixels("upernet_convnext", tp.upernet_convnext, 64),
        pixels("upernet_swin", tp.upernet_swin, 32),
        pixels("mobilenet_v2_deeplab", tp.mobilenet_v2_deeplab, 48),
        pixels("mobilevit_deeplab", tp.mobilevit_deeplab, 64),
        pixels("dpt", tp.dpt, 32),
    )


ZOO: Mapping[str, ZooModel] = {model.name: model for model in (*_third_party(), *PLAIN)}


def zoo_model(name: str) -> ZooModel:
    """Return the model called ``name``.

    Raises:
        ValueError: there is none; the message lists those that there are.
    """
    if name not in ZOO:
        raise ValueError(f"no model is called '{name}'; choose one of: {', '.join(ZOO)}")
    return ZOO[name]
