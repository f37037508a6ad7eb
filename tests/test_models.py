"""The models that tests and benchmarks stand on are the published ones: sizes, names, shapes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from tools import models

FACTORIES = {
    "resnet18": (models.resnet18, 11_689_512, 1000),
    "resnet34": (models.resnet34, 21_797_672, 1000),
    "mobilenet_v2": (models.mobilenet_v2, 3_504_872, 1000),
    "digits_resnet": (models.digits_resnet, 174_970, 10),
    "awkward_convs": (models.awkward_convs, None, 10),
}


@pytest.mark.parametrize("name", FACTORIES)
def test_size_and_shapes(name: str) -> None:
    factory, parameters, classes = FACTORIES[name]
    model = factory()
    if parameters is not None:
        assert sum(p.numel() for p in model.parameters()) == parameters
    assert not model.training
    with torch.inference_mode():
        logits = model(torch.randn(4, *models.model_input_shape(name), generator=torch.Generator().manual_seed(0)))
    assert logits.shape == (4, classes)
    # Of a scale at which a softmax neither saturates nor is flat, so that gradients can be compared.
    assert 0.05 < float(logits.std()) < 20
    # And an answer to the input, not to the biases alone.
    assert float(logits.std(0).mean()) > 0.005


@pytest.mark.parametrize("name", FACTORIES)
def test_weights_follow_the_seed_and_leave_torchs_generator_alone(name: str) -> None:
    factory = FACTORIES[name][0]
    torch.manual_seed(11)
    expected = torch.randn(3)
    torch.manual_seed(11)
    first, again, other = factory(3), factory(3), factory(4)
    assert torch.equal(torch.randn(3), expected)
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), again.state_dict().values(), strict=True))
    assert not torch.equal(next(first.parameters()), next(other.parameters()))


@pytest.mark.parametrize("name", FACTORIES)
def test_batch_norms_would_expose_a_wrong_folding(name: str) -> None:
    norms = [m for m in FACTORIES[name][0]().modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms
    for norm in norms:
        assert norm.running_mean is not None and norm.running_var is not None
        assert all(
            float(v.detach().std()) > 0.01 for v in (norm.running_mean, norm.running_var, norm.weight, norm.bias)
        )
        assert 0.5 <= float(norm.running_var.min()) and float(norm.running_var.max()) <= 1.5


def test_parameters_are_named_as_in_torchvision() -> None:
    resnet = dict(models.resnet18().named_parameters())
    assert {"conv1.weight", "bn1.bias", "layer1.0.conv1.weight", "layer2.0.downsample.0.weight", "fc.bias"} <= set(
        resnet
    )
    assert resnet["layer4.1.conv2.weight"].shape == (512, 512, 3, 3)
    assert len(resnet) == 62
    mobilenet = dict(models.mobilenet_v2().named_parameters())
    assert mobilenet["features.0.0.weight"].shape == (32, 3, 3, 3)
    assert mobilenet["features.1.conv.0.0.weight"].shape == (32, 1, 3, 3)
    assert mobilenet["features.17.conv.2.weight"].shape == (320, 960, 1, 1)
    assert mobilenet["features.18.0.weight"].shape == (1280, 320, 1, 1)
    assert mobilenet["classifier.1.weight"].shape == (1000, 1280)
    assert len(mobilenet) == 158


def test_digits_resnet_takes_every_size_that_it_promises() -> None:
    model = models.digits_resnet()
    for size in (8, 12, 16):
        assert model(torch.zeros(1, 1, size, size)).shape == (1, 10)


def test_awkward_convs_has_what_its_description_says() -> None:
    convs = {n: m for n, m in models.awkward_convs().named_modules() if isinstance(m, nn.Conv2d)}
    assert convs["grouped"].groups == 2
    assert convs["depthwise"].groups == convs["depthwise"].in_channels == convs["depthwise"].out_channels
    assert convs["dilated"].dilation == (2, 1)
    assert convs["strided"].stride == (2, 1) and convs["strided"].bias is not None
    assert np.prod(models.model_input_shape("awkward_convs")) == 3 * 24 * 20


def test_an_unknown_model_is_named_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'vgg'.*awkward_convs.*resnet34"):
        models.model_input_shape("vgg")
