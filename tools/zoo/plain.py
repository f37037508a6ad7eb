"""The zoo's own definitions, in plain torch: what `transformers` does not have, small, as its paper describes it.

Knows torch alone. Weights are drawn by ``tools.zoo.randomise``; sizes are for tests and not for accuracy.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional


class _InvertedResidual(nn.Module):
    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        self.expand = nn.Sequential(nn.Conv2d(inputs, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6())
        self.depthwise = nn.Sequential(
            nn.Conv2d(hidden, hidden, kernel, stride, kernel // 2, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU6(),
        )
        self.project = nn.Sequential(nn.Conv2d(hidden, outputs, 1, bias=False), nn.BatchNorm2d(outputs))
        self.adds_input = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.project(self.depthwise(self.expand(x)))
        return x + result if self.adds_input else result


class MCUNet(nn.Module):
    """Inverted residuals with depthwise kernels 3, 5 and 7, as Lin et al. "MCUNet", 2020, searched them."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU6())
        self.blocks = nn.Sequential(
            _InvertedResidual(8, 8, 3, 1, 2),
            _InvertedResidual(8, 12, 7, 2, 3),
            _InvertedResidual(12, 12, 5, 1, 3),
            _InvertedResidual(12, 16, 5, 2, 4),
            _InvertedResidual(16, 16, 7, 1, 3),
        )
        self.classifier = nn.Linear(16, classes)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.classifier(self.blocks(self.stem(x)).mean((2, 3)))
        return result


def _conv_block(inputs: int, outputs: int, stride: int = 1, dilation: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, dilation, dilation, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
    )


class _Backbone(nn.Module):
    """Four blocks to an eighth of the extent; the last is dilated instead of strided, as segmentation heads want it."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.Sequential(
            _conv_block(3, 8, 2), _conv_block(8, 12, 2), _conv_block(12, 16, 2), _conv_block(16, 16, 1, 2)
        )

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.stages(x)
        return result


class FCN(nn.Module):
    """A fully convolutional head with bilinear upsampling (Long, Shelhamer, Darrell 2015; torchvision's FCNHead)."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.backbone = _Backbone()
        self.classifier = nn.Sequential(_conv_block(16, 8), nn.Dropout(0.1), nn.Conv2d(8, classes, 1))

    def forward(self, x: Tensor) -> Tensor:
        scores = self.classifier(self.backbone(x))
        return functional.interpolate(scores, size=x.shape[-2:], mode="bilinear", align_corners=False)


class PSPNet(nn.Module):
    """Pyramid pooling to 1, 2, 3 and 6 bins, upsampled with aligned corners (Zhao et al. 2017, figure 3)."""

    def __init__(self, classes: int = 5, bins: Sequence[int] = (1, 2, 3, 6)) -> None:
        super().__init__()
        self.backbone = _Backbone()
        self.stages = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(size), nn.Conv2d(16, 4, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU())
            for size in bins
        )
        self.bottleneck = _conv_block(16 + 4 * len(bins), 8)
        self.classifier = nn.Conv2d(8, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        features = self.backbone(x)
        size = features.shape[-2:]
        pooled = [
            functional.interpolate(stage(features), size=size, mode="bilinear", align_corners=True)
            for stage in self.stages
        ]
        scores = self.classifier(self.bottleneck(torch.cat([features, *pooled], 1)))
        return functional.interpolate(scores, size=x.shape[-2:], mode="bilinear", align_corners=True)


class DeepLabV3(nn.Module):
    """Atrous spatial pyramid pooling: 1 x 1, dilations 2, 4 and 6, the image's mean (Chen et al. 2017, figure 5)."""

    def __init__(self, classes: int = 5, dilations: Sequence[int] = (2, 4, 6)) -> None:
        super().__init__()
        self.backbone = _Backbone()
        pointwise = nn.Sequential(nn.Conv2d(16, 8, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.branches = nn.ModuleList([pointwise, *(_conv_block(16, 8, 1, d) for d in dilations)])
        self.image = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(16, 8, 1, bias=False), nn.ReLU())
        self.project = nn.Sequential(
            nn.Conv2d(8 * (len(dilations) + 2), 8, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU()
        )
        self.classifier = nn.Conv2d(8, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        features = self.backbone(x)
        mean = functional.interpolate(self.image(features), size=features.shape[-2:], mode="bilinear")
        pyramid = torch.cat([*(branch(features) for branch in self.branches), mean], 1)
        scores = self.classifier(self.project(pyramid))
        return functional.interpolate(scores, size=x.shape[-2:], mode="bilinear", align_corners=False)


class UNet(nn.Module):
    """U-Net in 1, 2 or 3 dimensions (Ronneberger et al. 2015; Çiçek et al. 2016), two levels deep.

    ``upsample``: "transposed" (ConvTranspose of stride 2) or a mode of ``functional.interpolate`` before a convolution.
    ``widths``: channels of the levels, the finest first.
    """

    def __init__(
        self,
        axes: int,
        classes: int,
        upsample: str = "transposed",
        channels: int = 1,
        widths: tuple[int, int, int] = (6, 8, 12),
    ) -> None:
        super().__init__()
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1]
        transposed = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[axes - 1]
        norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[axes - 1]
        pool = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)[axes - 1]

        def block(inputs: int, outputs: int) -> nn.Module:
            return nn.Sequential(conv(inputs, outputs, 3, padding=1, bias=False), norm(outputs), nn.ReLU())

        self.upsample = upsample
        fine, middle, coarse = widths
        self.down1, self.down2, self.bottom = block(channels, fine), block(fine, middle), block(middle, coarse)
        self.pool = pool(2)
        if upsample == "transposed":
            self.up2: nn.Module = transposed(coarse, middle, 2, 2)
            self.up1: nn.Module = transposed(middle, fine, 2, 2)
        else:
            self.up2, self.up1 = conv(coarse, middle, 3, padding=1), conv(middle, fine, 3, padding=1)
        self.merge2, self.merge1 = block(2 * middle, middle), block(2 * fine, fine)
        self.classifier = conv(fine, classes, 1)

    def _up(self, layer: nn.Module, x: Tensor) -> Tensor:
        if self.upsample != "transposed":
            align = None if self.upsample == "nearest" else True
            x = functional.interpolate(x, scale_factor=2, mode=self.upsample, align_corners=align)
        result: Tensor = layer(x)
        return result

    def forward(self, x: Tensor) -> Tensor:
        first = self.down1(x)
        second = self.down2(self.pool(first))
        x = self._up(self.up2, self.bottom(self.pool(second)))
        x = self.merge2(torch.cat([second, x], 1))
        x = self.merge1(torch.cat([first, self._up(self.up1, x)], 1))
        result: Tensor = self.classifier(x)
        return result


class ConvNet1d(nn.Module):
    """Convolutions over a signal [b, channel, time], as for audio and sensors; one is grouped and dilated."""

    def __init__(self, classes: int = 6) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv1d(3, 8, 5, 2, 2),
            nn.BatchNorm1d(8),
            nn.ReLU(),
            nn.MaxPool1d(2),
            nn.Conv1d(8, 12, 3, padding=2, dilation=2, groups=2),
            nn.ELU(),
            nn.Conv1d(12, 12, 3, padding=1, padding_mode="reflect"),
            nn.Softplus(),
            nn.Conv1d(12, 12, 1),
            nn.Softplus(beta=2.0),
            nn.AdaptiveAvgPool1d(1),
        )
        self.classifier = nn.Linear(12, classes)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.classifier(self.layers(x).flatten(1))
        return result


class MixedNorms(nn.Module):
    """GroupNorm, InstanceNorm, LayerNorm over channels, PReLU, LeakyReLU and tanh in one network."""

    def __init__(self, classes: int = 7) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1),
            nn.GroupNorm(4, 8),
            nn.PReLU(8),
            nn.Conv2d(8, 12, 3, padding=1),
            nn.InstanceNorm2d(12, affine=True),
            nn.LeakyReLU(0.1),
            nn.Conv2d(12, 12, 3, padding=1, groups=12),
            nn.InstanceNorm2d(12),
            nn.Tanh(),
            nn.Conv2d(12, 16, 3, 2, 1),
            nn.GroupNorm(1, 16),
            nn.PReLU(),
        )
        self.norm = nn.LayerNorm(16)
        self.classifier = nn.Linear(16, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers(x).flatten(2).transpose(1, 2)
        result: Tensor = self.classifier(self.norm(x).amax(1))
        return result


class TiedTokens(nn.Module):
    """A causal language model of one layer, whose embedding is also its output matrix.

    Press, Wolf: "Using the Output Embedding to Improve Language Models", 2017. Input int64 [b, t]; output [b, k, t], so
    that the classes lie on axis 1 as cross-entropy wants them.
    """

    def __init__(self, words: int = 23, length: int = 9, width: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.embedding = nn.Embedding(words, width)
        self.position = nn.Parameter(torch.zeros(length, width))
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )
        self.output = nn.Linear(width, words, bias=False)
        self.output.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.position
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.project(mixed.transpose(1, 2).flatten(2))
        x = x + self.mlp(x)
        result: Tensor = self.output(x)
        return result.transpose(1, 2)


class TwoByTwo(nn.Module):
    """Two inputs (an image and a vector), two outputs (classes, and a box of four numbers)."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.image_layers = nn.Sequential(_conv_block(3, 8, 2), _conv_block(8, 12, 2))
        self.vector_layers = nn.Sequential(nn.Linear(5, 12), nn.SiLU())
        self.fused = nn.Linear(12, 16)
        self.classes = nn.Linear(16, classes)
        self.box = nn.Linear(16, 4)

    def forward(self, image: Tensor, vector: Tensor) -> tuple[Tensor, Tensor]:
        gate = torch.sigmoid(self.vector_layers(vector))
        x = self.image_layers(image).mean((2, 3)) * gate
        x = functional.gelu(self.fused(x))
        return self.classes(x), self.box(x)
