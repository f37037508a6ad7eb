"""The paper's parameter counts, without those of rival methods, computed: docs/adapters.md holds what this prints.

    python tools/csg_counts.py

Every network is the list of its convolutions and the number of its other parameters, from the architecture alone; which
of the convolutions become slices, and how many numbers that takes, is the package's own arithmetic.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from edgetune.adapters import AdapterSettings, Slicing, parse  # noqa: E402

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Network:
    """Weights of convolutions by name, in order, and the number of all other parameters."""

    convolutions: dict[str, Shape]
    others: int

    @property
    def parameters(self) -> int:
        """The number of parameters before anything is done."""
        return self.others + sum(map(math.prod, self.convolutions.values()))


class _Builder:
    """Collects layers; a batch-norm has two parameters per channel."""

    def __init__(self) -> None:
        self.convolutions: dict[str, Shape] = {}
        self.others = 0

    def conv(self, name: str, inputs: int, outputs: int, kernel: int, groups: int = 1, *, norm: bool = True) -> None:
        self.convolutions[name] = (outputs, inputs // groups, kernel, kernel)
        self.others += 2 * outputs if norm else 0

    def linear(self, inputs: int, outputs: int) -> None:
        self.others += inputs * outputs + outputs

    def network(self) -> Network:
        return Network(self.convolutions, self.others)


def resnet56() -> Network:
    """He et al. 2015, section 4.2, n = 9: shortcuts without parameters."""
    b = _Builder()
    b.conv("conv1", 3, 16, 3)
    inputs = 16
    for stage, width in enumerate((16, 32, 64), start=1):
        for block in range(9):
            b.conv(f"layer{stage}.{block}.conv1", inputs, width, 3)
            b.conv(f"layer{stage}.{block}.conv2", width, width, 3)
            inputs = width
    b.linear(64, 10)
    return b.network()


def _bottlenecks(b: _Builder, blocks: Sequence[int]) -> None:
    """He et al. 2015, table 1, up to the last block: 2048 channels."""
    b.conv("conv1", 3, 64, 7)
    inputs = 64
    for stage, count in enumerate(blocks, start=1):
        width = 32 * 2**stage
        for block in range(count):
            name = f"layer{stage}.{block}"
            b.conv(f"{name}.conv1", inputs, width, 1)
            b.conv(f"{name}.conv2", width, width, 3)
            b.conv(f"{name}.conv3", width, 4 * width, 1)
            if block == 0:
                b.conv(f"{name}.downsample", inputs, 4 * width, 1)
            inputs = 4 * width


RESNET50, RESNET101 = (3, 4, 6, 3), (3, 4, 23, 3)


def resnet(blocks: Sequence[int]) -> Network:
    """ResNet-50 or ResNet-101 for 1000 classes."""
    b = _Builder()
    _bottlenecks(b, blocks)
    b.linear(2048, 1000)
    return b.network()


def deeplab(blocks: Sequence[int]) -> Network:
    """Chen et al. 2017, and the decoder of DeepLabV3+ (Chen et al. 2018): with it the paper's counts come out."""
    b = _Builder()
    _bottlenecks(b, blocks)
    b.conv("aspp.1", 2048, 256, 1)
    for branch in (2, 3, 4):
        b.conv(f"aspp.{branch}", 2048, 256, 3)
    b.conv("aspp.pool", 2048, 256, 1)
    b.conv("aspp.project", 1280, 256, 1)
    b.conv("decoder.low", 256, 48, 1)
    b.conv("decoder.conv1", 304, 256, 3)
    b.conv("decoder.conv2", 256, 256, 3)
    b.conv("decoder.classes", 256, 21, 1, norm=False)
    b.others += 21
    return b.network()


def densenet_bc(growth: int) -> Network:
    """Huang et al. 2017: 40 layers, bottlenecks of 4·growth channels, transitions that halve the channels."""
    b = _Builder()
    channels = 2 * growth
    b.conv("conv1", 3, channels, 3, norm=False)
    for block in (1, 2, 3):
        for layer in range(6):
            b.others += 2 * channels
            b.conv(f"block{block}.{layer}.conv1", channels, 4 * growth, 1)
            b.conv(f"block{block}.{layer}.conv2", 4 * growth, growth, 3, norm=False)
            channels += growth
        b.others += 2 * channels
        if block < 3:
            b.conv(f"transition{block}", channels, channels // 2, 1, norm=False)
            channels //= 2
    b.linear(channels, 10)
    return b.network()


def mobilenet_v2() -> Network:
    """Sandler et al. 2018, table 2, as usual for CIFAR-10: shortcuts with a convolution where the channels change."""
    b = _Builder()
    b.conv("conv1", 3, 32, 3)
    inputs, number = 32, 0
    table = ((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
    for expansion, outputs, count, first_stride in table:
        for block in range(count):
            name, wide = f"block{number}", expansion * inputs
            b.conv(f"{name}.conv1", inputs, wide, 1)
            b.conv(f"{name}.conv2", wide, wide, 3, wide)
            b.conv(f"{name}.conv3", wide, outputs, 1)
            if (first_stride == 1 or block) and inputs != outputs:
                b.conv(f"{name}.shortcut", inputs, outputs, 1)
            inputs, number = outputs, number + 1
    b.conv("conv2", 320, 1280, 1)
    b.linear(1280, 10)
    return b.network()


def shufflenet_v2() -> Network:
    """Ma et al. 2018, table 5, 0.5×, with ten classes."""
    b = _Builder()
    b.conv("conv1", 3, 24, 3)
    inputs = 24
    for stage, (count, outputs) in enumerate(((4, 48), (8, 96), (4, 192)), start=2):
        half = outputs // 2
        for block in range(count):
            name = f"stage{stage}.{block}"
            if block == 0:
                b.conv(f"{name}.left1", inputs, inputs, 3, inputs)
                b.conv(f"{name}.left2", inputs, half, 1)
            b.conv(f"{name}.right1", half if block else inputs, half, 1)
            b.conv(f"{name}.right2", half, half, 3, half)
            b.conv(f"{name}.right3", half, half, 1)
        inputs = outputs
    b.conv("conv5", 192, 1024, 1)
    b.linear(1024, 10)
    return b.network()


@dataclass(frozen=True)
class Part:
    """An adapter, and a pattern for the convolutions that it takes (of those that its slices serve)."""

    settings: AdapterSettings
    pattern: str = ""


@dataclass(frozen=True)
class Row:
    """One row of the paper's tables 1 to 4."""

    name: str
    network: Network
    paper: int
    parts: tuple[Part, ...] = ()

    def count(self) -> int:
        """Return the number of trained parameters."""
        total = self.network.parameters
        first = next(iter(self.network.convolutions))
        for part in self.parts:
            settings, used = part.settings, set[int]()
            for name, shape in self.network.convolutions.items():
                index = settings.slice_for(shape) if re.search(part.pattern, name) and name != first else None
                cut = None if index is None else Slicing(shape, settings.slices[index])
                if index is not None and cut is not None and cut.shrinks(settings.codes[index]):
                    used.add(index)
                    total += cut.slices * settings.codes[index] - math.prod(shape)
            if not settings.freeze:
                total += sum(math.prod(settings.slices[i]) * settings.codes[i] for i in used)
        return total


def rows() -> list[Row]:
    """Return the rows, in the paper's order."""
    wide, narrow, small, n101 = densenet_bc(48), densenet_bc(36), resnet56(), resnet(RESNET101)
    n50, mobile, shuffle = resnet(RESNET50), mobilenet_v2(), shufflenet_v2()
    d50, d101 = deeplab(RESNET50), deeplab(RESNET101)
    twelve, sixteen = "slice=12x12x3x3,code=72", "slice=16x16x3x3,code=128"
    ones = "slice=16x16x1x1,code=16"

    def csg(settings: str, pattern: str = "") -> tuple[Part, ...]:
        return (Part(parse(f"csg:{settings}"), pattern),)

    def fixed(settings: str, pattern: str = "") -> tuple[Part, ...]:
        return (Part(parse(f"bcsg:{settings}"), pattern),)

    aspp, backbone = csg(sixteen, "^aspp"), csg(sixteen, "^layer")
    return [
        Row("DenseNet-BC-40-48", wide, 2_733_130),
        Row("DenseNet-BC-40-48-CSG-[12,12,3,3]-72", wide, 1_416_394, csg(twelve)),
        Row("the same, pre-trained map; the same, BCSG", wide, 1_323_082, fixed(twelve)),
        Row("the same, 1×1 kernels compressed", wide, 904_906, csg(f"{twelve},kernels=any", "^block")),
        Row("DenseNet-BC-40-36", narrow, 1_542_682),
        Row("DenseNet-BC-40-36-CSG-[12,12,3,3]-72", narrow, 842_842, csg(twelve)),
        Row("the same, pre-trained map", narrow, 749_530, fixed(twelve)),
        Row("ResNet-56", small, 853_018),
        Row("ResNet-56-CSG-[16,16,3,3]-128", small, 347_162, csg(sixteen)),
        Row("ResNet-56-CSG-[12,12,3,3]-72", small, 160_450, csg(twelve)),
        Row("ResNet-56-CSG-[16,16,3,3]-128, pre-trained map", small, 52_250, fixed(sixteen)),
        Row("ResNet-56-BCSG-[16,16,3,3]-1024", small, 381_978, fixed("slice=16x16x3x3,code=1024")),
        Row("ShuffleNet-(0.5×)", shuffle, 352_042),
        Row("ShuffleNet-(0.5×)-CSG-[16,16,1,1]-16", shuffle, 171_818, csg(ones, "conv5")),
        Row("ShuffleNet-(0.5×)-BCSG-[16,16,1,1]-16", shuffle, 167_722, fixed(ones, "conv5")),
        Row("MobileNetV2", mobile, 2_296_922),
        Row("MobileNetV2-CSG-[16,16,1,1]-16", mobile, 1_595_322, csg(ones, "^block.*conv1")),
        Row("MobileNetV2-BCSG-[16,16,1,1]-16", mobile, 1_591_226, fixed(ones, "^block.*conv1")),
        Row("ResNet-50", n50, 25_557_032),
        Row("ResNet-50-CSG-[16,16,3,3]-128", n50, 15_163_432, csg(sixteen)),
        Row("ResNet-50-BCSG-[16,16,3,3]-128", n50, 14_868_520, fixed(sixteen)),
        Row("ResNet-101", n101, 44_654_504),
        Row("ResNet-101-CSG-[16,16,3,3]-128", n101, 24_685_608, csg(sixteen)),
        Row("ResNet-101-BCSG-[16,16,3,3]-128", n101, 24_390_696, fixed(sixteen)),
        Row("DeeplabV3-ResNet-50", d50, 40_352_181),
        Row("DeeplabV3-ResNet-50-CSG-[16,16,3,3]-128", d50, 29_958_581, backbone),
        Row("the same, a second CSG for the ASPP", d50, 16_884_149, backbone + aspp),
        Row("DeeplabV3-ResNet-101", d101, 59_344_309),
        Row("DeeplabV3-ResNet-101-CSG-[16,16,3,3]-128", d101, 39_480_757, backbone),
        Row("the same, a second CSG for the ASPP", d101, 26_406_325, backbone + aspp),
    ]


def markdown() -> str:
    """Return the table for the documentation."""
    lines = ["| network | paper | here | difference |", "|---|---:|---:|---:|"]
    for row in rows():
        count = row.count()
        difference = f"{count - row.paper:+,}" if count != row.paper else "0"
        lines.append(f"| {row.name} | {row.paper:,} | {count:,} | {difference} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(markdown())
