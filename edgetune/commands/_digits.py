"""The demonstration's data and model: handwritten digits that drift, and a small network trained before they did.

May know everything, as all commands do, but imports scikit-learn and torch only inside functions: the other commands
run on devices that have neither. Images are uint8 arrays [n, 16, 16], labels int64 arrays [n].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from edgetune.bundle import Array, PreprocessSpec
from edgetune.errors import UsageError

if TYPE_CHECKING:
    from torch import nn

SIZE = 16
CLASSES = tuple("0123456789")
PREPROCESS = PreprocessSpec(color="L", mean=(0.5,), std=(0.5,))


@dataclass(frozen=True)
class Digits:
    """1797 real handwritten digits in three disjoint parts: to train on before the deployment, to be the stream that
    the device sees after it, and to judge by. The last two are clean here: :func:`drift` is what changes them."""

    pretrain_images: Array
    pretrain_labels: Array
    stream_images: Array
    stream_labels: Array
    test_images: Array
    test_labels: Array


def load(seed: int = 0) -> Digits:
    """Return scikit-learn's digits, enlarged to 16 x 16 and split 800 / 600 / 397 at random by ``seed``.

    Raises:
        UsageError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UsageError("the demo needs scikit-learn, for its digits: pip install 'edgetune[demo]'") from None
    data = load_digits()
    order = np.random.default_rng(seed).permutation(len(data.target))
    images = np.stack([_enlarge(image) for image in data.images[order]])
    labels = data.target[order].astype(np.int64)
    return Digits(images[:800], labels[:800], images[800:1400], labels[800:1400], images[1400:], labels[1400:])


def _enlarge(image: Array) -> Array:
    """Return an 8 x 8 image with values 0..16 as 16 x 16 with values 0..255."""
    scaled = Image.fromarray(np.round(image * (255 / 16)).astype(np.uint8))
    return np.asarray(scaled.resize((SIZE, SIZE), Image.Resampling.BICUBIC))


def enlarge(images: Array, side: int) -> Array:
    """Return the images [n, side, side], resized as the device resizes what it decodes."""
    resized = [Image.fromarray(image).resize((side, side), Image.Resampling.BILINEAR) for image in images]
    return np.stack([np.asarray(image) for image in resized])


def drift(images: Array, rng: np.random.Generator) -> Array:
    """Return the images as a camera would see them that was knocked over and whose light changed: each rotated by 25
    to 40 degrees, dark and light exchanged, with noise of 16 grey levels. The same ``rng`` state, the same result."""
    angles_degrees = rng.uniform(25, 40, len(images))
    rotated = [
        np.asarray(Image.fromarray(image).rotate(angle, Image.Resampling.BILINEAR))
        for image, angle in zip(images, angles_degrees, strict=True)
    ]
    noisy = 255 - np.stack(rotated).astype(np.float64) + rng.normal(0, 16, images.shape)
    return np.clip(np.round(noisy), 0, 255).astype(np.uint8)


def write_stream(folder: Path, images: Array, labels: Array, *, first: int = 0) -> list[Path]:
    """Write the images as ``folder/<label>/<number>.png``, numbered in order from ``first``; return the files in that
    order. A file appears under its name only when it is complete, so that the folder may be watched meanwhile."""
    files = []
    for number, (image, label) in enumerate(zip(images, labels, strict=True), start=first):
        file = folder / CLASSES[int(label)] / f"{number:06d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_name(f".{file.name}.part")
        Image.fromarray(image).save(temporary, format="PNG")
        temporary.rename(file)
        files.append(file)
    return files


def to_input(images: Array) -> Array:
    """Return the images as a model takes them: float32 [n, 1, side, side], the same arithmetic as ``PREPROCESS``."""
    scaled = (images.astype(np.float32) / np.float32(255) - np.float32(0.5)) / np.float32(0.5)
    return np.asarray(scaled[:, None], dtype=np.float32)


def residual_network(
    *, channels: int, widths: Sequence[int], blocks: Sequence[int], classes: int, small_input: bool, seed: int
) -> nn.Module:
    """Return a residual network of two-convolution blocks, in evaluation mode (He et al., "Deep Residual Learning for
    Image Recognition", 2015, fig. 3 and table 1), with the parameter names that torchvision uses.

    Args:
        channels: of the input [b, channels, height, width].
        widths: channels of each stage; every stage but the first halves height and width.
        blocks: number of blocks of each stage.
        classes: of the output [b, classes].
        small_input: begin with a 3 x 3 convolution (section 4.2) and not with 7 x 7, stride 2 and a max-pool.
        seed: of the initial weights; torch's own generator is left as it was.
    """
    import torch
    from torch import Tensor, nn

    class Block(nn.Module):
        def __init__(self, inputs: int, outputs: int, stride: int) -> None:
            super().__init__()
            self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
            self.bn1 = nn.BatchNorm2d(outputs)
            self.relu = nn.ReLU()
            self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
            self.bn2 = nn.BatchNorm2d(outputs)
            self.downsample = (
                nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
                if stride != 1 or inputs != outputs
                else None
            )

        def forward(self, x: Tensor) -> Tensor:
            # The shortcut's convolution runs last, as in torchvision: "the last N layers" counts in this order.
            y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
            result: Tensor = self.relu(y + (x if self.downsample is None else self.downsample(x)))
            return result

    class ResidualNetwork(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            stem = (3, 1, 1) if small_input else (7, 2, 3)
            self.conv1 = nn.Conv2d(channels, widths[0], *stem, bias=False)
            self.bn1 = nn.BatchNorm2d(widths[0])
            self.relu = nn.ReLU()
            self.maxpool = nn.Identity() if small_input else nn.MaxPool2d(3, 2, 1)
            self.stages = []
            inputs = widths[0]
            for index, (width, count) in enumerate(zip(widths, blocks, strict=True), start=1):
                strides = [1 if index == 1 else 2] + [1] * (count - 1)
                sizes = [inputs] + [width] * (count - 1)
                stage = nn.Sequential(*(Block(n, width, s) for n, s in zip(sizes, strides, strict=True)))
                self.add_module(f"layer{index}", stage)
                self.stages.append(f"layer{index}")
                inputs = width
            self.avgpool = nn.AdaptiveAvgPool2d(1)
            self.fc = nn.Linear(inputs, classes)

        def forward(self, x: Tensor) -> Tensor:
            x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
            for name in self.stages:
                x = self.get_submodule(name)(x)
            result: Tensor = self.fc(torch.flatten(self.avgpool(x), 1))
            return result

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ResidualNetwork()
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        # Branches of half the usual size: each block adds to its input, and 16 untrained ones would reach the hundreds.
        for name, weight in model.named_parameters():
            if name.startswith("layer") and name.endswith("conv2.weight"):
                weight.data.mul_(0.5)
    return model.eval()


def digits_resnet(seed: int = 0) -> nn.Module:
    """Return the demonstration's network, untrained: input [b, 1, height, width] with 8..16 pixels a side, output
    [b, 10]; six residual blocks of 16, 32 and 64 channels, 174,970 weights."""
    return residual_network(
        channels=1, widths=(16, 32, 64), blocks=(2, 2, 2), classes=len(CLASSES), small_input=True, seed=seed
    )


def pretrain(
    images: Array,
    labels: Array,
    *,
    model_factory: Callable[[], nn.Module] = digits_resnet,
    epochs: int = 5,
    batch: int = 32,
    learning_rate: float = 3e-3,
    seed: int = 0,
) -> nn.Module:
    """Train a new model on the clean images with Adam and a falling rate, as it would be before it is deployed; return
    it in evaluation mode. Takes seconds on two cores. ``images`` and ``labels`` as in :class:`Digits`."""
    import torch
    from torch import nn

    model = model_factory().train()
    inputs, targets = torch.from_numpy(to_input(images)), torch.from_numpy(labels)
    steps = epochs * (len(labels) // batch)
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=learning_rate, total_steps=steps)
    rng = np.random.default_rng(seed)
    for _ in range(epochs):
        order = rng.permutation(len(labels))
        for first in range(0, len(labels) - batch + 1, batch):
            chosen = torch.from_numpy(order[first : first + batch])
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(inputs[chosen]), targets[chosen])
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    return model.eval()


def accuracy(model: nn.Module, images: Array, labels: Array) -> float:
    """Return the share of the images that the model names rightly, 0..1."""
    import torch

    with torch.inference_mode():
        answers = model(torch.from_numpy(to_input(images))).argmax(1).numpy()
    return float((answers == labels).mean())
