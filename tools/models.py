"""Models for tests and benchmarks, named as in ``edgetune export tools/models.py:resnet18``.

Plain torch, no download: the weights are random but seeded, and so are the statistics of every batch-norm, because with
the usual ones (mean 0, variance 1, scale 1, shift 0) a wrong folding would go unnoticed. All factories return the model
in evaluation mode. Knows nothing of how a model is exported or trained.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from edgetune.commands import _digits


def resnet18(seed: int = 0) -> nn.Module:
    """Return ResNet-18 for 1000 classes: 11,689,512 parameters, named as in torchvision.

    He, Zhang, Ren, Sun: "Deep Residual Learning for Image Recognition", 2015, table 1.
    """
    return _randomised(_resnet((2, 2, 2, 2), seed), seed)


def resnet34(seed: int = 0) -> nn.Module:
    """Return ResNet-34 for 1000 classes: 21,797,672 parameters, named as in torchvision.

    He, Zhang, Ren, Sun: "Deep Residual Learning for Image Recognition", 2015, table 1.
    """
    return _randomised(_resnet((3, 4, 6, 3), seed), seed)


def _resnet(blocks: tuple[int, ...], seed: int) -> nn.Module:
    return _digits.residual_network(
        channels=3, widths=(64, 128, 256, 512), blocks=blocks, classes=1000, small_input=False, seed=seed
    )


def mobilenet_v2(seed: int = 0) -> nn.Module:
    """Return MobileNetV2 (width 1.0) for 1000 classes: 3,504,872 parameters, named as in torchvision.

    Sandler, Howard, Zhu, Zhmoginov, Chen: "MobileNetV2: Inverted Residuals and Linear Bottlenecks", 2018, table 2.
    """
    return _randomised(_seeded(_MobileNetV2, seed), seed)


def mcunet(seed: int = 0) -> nn.Module:
    """Return a network in the style of MCUNet for 3 x 160 x 160 and 1000 classes: 16 inverted residuals, narrow at
    first, with depthwise kernels of 3, 5 and 7 in no regular order.

    Lin et al., "MCUNet: Tiny Deep Learning on IoT Devices", 2020, searched such networks for a microcontroller; the
    widths and kernels here are our own.
    """
    return _randomised(_seeded(_MCUNet, seed), seed)


def digits_resnet(seed: int = 0) -> nn.Module:
    """Return the demonstration's small residual network for 1 x 8 x 8 to 1 x 16 x 16 digits: 174,970 parameters.

    The blocks of He, Zhang, Ren, Sun: "Deep Residual Learning for Image Recognition", 2015, section 4.2.
    """
    return _randomised(_digits.digits_resnet(seed), seed)


def awkward_convs(seed: int = 0) -> nn.Module:
    """Return a small network whose last layers are those that published on-device training code gets wrong.

    Grouped and depthwise convolution, dilation (2, 1), stride (2, 1), padding that differs on every side, a convolution
    with bias and no batch-norm, and the operators of mobile networks: HardSwish and the sigmoid gate from Howard et
    al., "Searching for MobileNetV3", 2019, sections 5.2 and 5.3; ReLU6, pooling of both kinds, concatenation. Input
    [b, 3, 24, 20], output [b, 10].
    """
    return _randomised(_seeded(_AwkwardConvs, seed), seed)


def plain_norms(model: nn.Module) -> nn.Module:
    """Set every batch-norm and every bias to the usual start of a training; return the same model."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.reset_parameters()
            elif isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
                module.bias.zero_()
    return model


_INPUT_SHAPES = {
    "resnet18": (3, 224, 224),
    "resnet34": (3, 224, 224),
    "mobilenet_v2": (3, 224, 224),
    "mcunet": (3, 160, 160),
    "digits_resnet": (1, _digits.SIZE, _digits.SIZE),
    "awkward_convs": (3, 24, 20),
}


def model_input_shape(name: str) -> tuple[int, ...]:
    """Return the shape of one sample of the factory called ``name``, without the batch.

    Raises:
        ValueError: there is no such factory.
    """
    if name not in _INPUT_SHAPES:
        raise ValueError(f"no model is called '{name}'; choose one of: {', '.join(sorted(_INPUT_SHAPES))}")
    return _INPUT_SHAPES[name]


def _seeded(factory: Callable[[], nn.Module], seed: int) -> nn.Module:
    """Return ``factory()`` in evaluation mode, with He's initial weights by ``seed``; torch's own generator is kept."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = factory()
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                # By fan-in: fan-out counts all channels of a depthwise convolution, and the signal would vanish.
                nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
    return model.eval()


def _randomised(model: nn.Module, seed: int) -> nn.Module:
    """Draw every bias and the four vectors of every batch-norm at random; return the same model."""
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                assert module.running_mean is not None and module.running_var is not None
                module.running_mean.normal_(0, 0.1, generator=generator)
                module.running_var.uniform_(0.5, 1.5, generator=generator)
                module.weight.uniform_(0.5, 1.5, generator=generator)
                module.bias.normal_(0, 0.1, generator=generator)
            elif isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
                module.bias.normal_(0, 0.1, generator=generator)
    return model


def _conv_bn_relu6(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, (kernel - 1) // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU6(),
    )


class _InvertedResidual(nn.Module):
    """Expand by 1 x 1, filter depthwise, project without a non-linearity; add the input where the shapes agree."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int, kernel: int = 3) -> None:
        super().__init__()
        hidden = inputs * expansion
        layers: list[nn.Module] = [_conv_bn_relu6(inputs, hidden, 1)] if expansion != 1 else []
        layers += [
            _conv_bn_relu6(hidden, hidden, kernel, stride, groups=hidden),
            nn.Conv2d(hidden, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        ]
        self.conv = nn.Sequential(*layers)
        self.adds_input = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.conv(x)
        return x + result if self.adds_input else result


class _MobileNetV2(nn.Module):
    # (expansion t, channels c, repeats n, stride of the first s), as in the paper's table 2.
    STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [_conv_bn_relu6(3, 32, 3, stride=2)]
        inputs = 32
        for expansion, outputs, repeats, first_stride in self.STAGES:
            for index in range(repeats):
                layers.append(_InvertedResidual(inputs, outputs, first_stride if index == 0 else 1, expansion))
                inputs = outputs
        layers.append(_conv_bn_relu6(inputs, 1280, 1))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(1280, 1000))

    def forward(self, x: Tensor) -> Tensor:
        x = functional.adaptive_avg_pool2d(self.features(x), 1)
        result: Tensor = self.classifier(torch.flatten(x, 1))
        return result


class _MCUNet(nn.Module):
    # (depthwise kernel, expansion, channels, stride) of every block.
    BLOCKS = (
        (3, 1, 8, 1),
        (7, 3, 16, 2), (3, 5, 16, 1), (5, 5, 16, 1),
        (7, 5, 24, 2), (5, 4, 24, 1), (5, 5, 24, 1),
        (5, 5, 40, 2), (7, 5, 40, 1), (7, 4, 40, 1), (3, 5, 48, 1), (5, 4, 48, 1),
        (5, 5, 96, 2), (7, 4, 96, 1), (5, 5, 96, 1), (7, 5, 160, 1),
    )  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self.stem = _conv_bn_relu6(3, 16, 3, stride=2)
        blocks, inputs = list[nn.Module](), 16
        for kernel, expansion, outputs, stride in self.BLOCKS:
            blocks.append(_InvertedResidual(inputs, outputs, stride, expansion, kernel))
            inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.classifier = nn.Linear(inputs, 1000)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.adaptive_avg_pool2d(self.blocks(self.stem(x)), 1)
        result: Tensor = self.classifier(torch.flatten(x, 1))
        return result


class _AwkwardConvs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.stem_bn = nn.BatchNorm2d(8)
        self.hardswish = nn.Hardswish()
        self.grouped = nn.Conv2d(8, 12, 3, padding=1, groups=2, bias=False)
        self.grouped_bn = nn.BatchNorm2d(12)
        self.relu6 = nn.ReLU6()
        self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12, bias=False)
        self.depthwise_bn = nn.BatchNorm2d(12)
        self.gate = nn.Conv2d(12, 12, 1)
        self.pad = nn.ZeroPad2d((1, 0, 2, 1))  # left, right, top, bottom
        self.dilated = nn.Conv2d(12, 16, 3, padding=(0, 1), dilation=(2, 1), bias=False)
        self.dilated_bn = nn.BatchNorm2d(16)
        self.strided = nn.Conv2d(16, 16, (3, 2), stride=(2, 1))
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.avgpool = nn.AvgPool2d(3, 2, 1)
        self.fc = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.hardswish(self.stem_bn(self.stem(x)))
        x = self.relu6(self.grouped_bn(self.grouped(x)))
        x = self.hardswish(self.depthwise_bn(self.depthwise(x)))
        x = x * torch.sigmoid(self.gate(x))
        x = self.relu6(self.dilated_bn(self.dilated(self.pad(x))))
        x = functional.relu(self.strided(functional.pad(x, (0, 1, 1, 0))))
        x = torch.cat([self.maxpool(x), self.avgpool(x)], dim=1)
        result: Tensor = self.fc(torch.flatten(functional.adaptive_avg_pool2d(x, 1), 1))
        return result
