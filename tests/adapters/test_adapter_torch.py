"""CSG in PyTorch: the paper's parameter counts on a real model, the oracle's weights, and the ways in and out."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import edgetune
from edgetune.adapters import expand, first_map, parse, save_maps
from edgetune.adapters.torch import SharedMap, attach, detach, maps_of
from edgetune.bundle import Array
from edgetune.errors import UsageError
from tests.adapters.small import IMAGES, LABELS, convolutional
from tests.export.small_models import assert_equal_gradients, session_of, torch_gradients


class _Block(nn.Module):
    """He et al. 2015, section 4.2: the shortcut of a block that halves the image has no parameters."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride, self.more = stride, outputs - inputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        shortcut = nn.functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.more))
        return torch.relu(y + shortcut)


def resnet56() -> nn.Module:
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    inputs = 16
    for width in (16, 32, 64):
        for _ in range(9):
            layers.append(_Block(inputs, width, 1 if width == inputs else 2))
            inputs = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("settings", "count"),
    [
        ("csg:slice=16x16x3x3,code=128,residual=no", 347_162),
        ("csg:slice=12x12x3x3,code=72,residual=no", 160_450),
        ("bcsg:slice=16x16x3x3,code=1024,residual=no", 381_978),
        ("csg:slice=16x16x3x3,code=128,freeze=yes,residual=no", 52_250),
    ],
)
def test_resnet_56_has_as_many_parameters_as_in_the_paper(settings: str, count: int) -> None:
    model = resnet56()
    assert parameters(model) == 853_018
    assert len(attach(model, parse(settings))) == 54
    assert parameters(model) == count
    with torch.inference_mode():
        assert torch.isfinite(model.eval()(torch.ones(1, 3, 8, 8))).all()


@pytest.mark.parametrize("settings", ["csg:slice=4x4x3x3,code=8", "bcsg:slice=4x5x3x3,code=8,residual=no"])
def test_the_weights_are_those_of_the_oracle(settings: str) -> None:
    plain, chosen = convolutional(), parse(settings)
    model = copy.deepcopy(plain)
    for name in attach(model, chosen):
        module, before = model.get_submodule(name), plain.get_submodule(name)
        codes = module.get_parameter("parametrizations.weight.original")
        nn.init.normal_(codes, generator=torch.Generator().manual_seed(1))
        assert isinstance(before, nn.Conv2d) and isinstance(module, nn.Conv2d)
        made = expand(codes.detach().numpy(), first_map(chosen, 0), tuple(before.weight.shape), chosen.slices[0])
        start: Array = before.weight.detach().numpy() if chosen.residual else np.zeros_like(made)
        np.testing.assert_allclose(module.weight.detach().numpy(), start + made, atol=1e-6)


def test_a_residual_leaves_the_model_as_it_was_and_detaching_leaves_it_as_it_became() -> None:
    plain = convolutional()
    model = copy.deepcopy(plain)
    attach(model, parse("csg:slice=4x4x3x3,code=8"))
    x = torch.from_numpy(IMAGES)
    assert torch.equal(model(x), plain(x))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), torch.from_numpy(LABELS)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    trained, other = model(x), copy.deepcopy(model)
    detach(model)
    assert torch.equal(model(x), trained) and not torch.equal(trained, plain(x))
    assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in plain.named_parameters()}
    assert torch.equal(other(x), trained)  # a copy keeps its codes
    assert any(name.endswith("original") for name, _ in other.named_parameters())


def test_a_model_trained_with_codes_is_exported_like_any_other_detached_or_whole(tmp_path: Path) -> None:
    model = convolutional()
    attach(model, parse("csg:slice=4x4x3x3,code=8,residual=no"))
    expected = model(torch.from_numpy(IMAGES)).detach().numpy()
    whole = edgetune.export(model, IMAGES, tmp_path / "whole", last="all", codec="dense")
    session = session_of(whole, engine="onnxruntime")
    _, gradients = session.gradients(IMAGES, LABELS)

    def loss(wide: nn.Module) -> torch.Tensor:
        return nn.functional.cross_entropy(wide(torch.from_numpy(IMAGES).double()), torch.from_numpy(LABELS))

    assert "2.parametrizations.weight.original" in gradients
    assert_equal_gradients(gradients, torch_gradients(model, loss))
    detach(model)
    ordinary = edgetune.export(model, IMAGES, tmp_path / "ordinary", last=1, codec="dense")
    for bundle in (whole, ordinary):
        np.testing.assert_allclose(session_of(bundle).predict(IMAGES), expected, atol=1e-5)


def test_a_binary_map_is_in_the_state_as_a_seed(tmp_path: Path) -> None:
    settings = "bcsg:slice=4x4x3x3,code=8,residual=no"
    model, other = convolutional(), convolutional(seed=1)
    attach(model, parse(f"{settings},seed=3"))
    attach(other, parse(settings))
    state = model.state_dict()
    assert max(value.numel() for name, value in state.items() if "shared" in name) == 3
    torch.save(state, tmp_path / "state.pt")
    other.load_state_dict(torch.load(tmp_path / "state.pt"))
    assert torch.equal(other(torch.from_numpy(IMAGES)), model(torch.from_numpy(IMAGES)))
    shared = next(module for module in other.modules() if isinstance(module, SharedMap))
    with pytest.raises(UsageError, match="does not fit"):
        shared.set_extra_state(torch.tensor([3, 9, 144]))


def test_a_map_serves_another_model_through_a_file(tmp_path: Path) -> None:
    first, second = convolutional(), convolutional(seed=1)
    attach(first, parse("csg:slice=4x4x3x3,code=8,seed=5"))
    save_maps(tmp_path / "map.safetensors", maps_of(first))
    attach(second, parse(f"csg:slice=4x4x3x3,code=8,map={tmp_path / 'map.safetensors'}"))
    shared = maps_of(second)[4, 4, 3, 3]
    assert np.array_equal(shared, maps_of(first)[4, 4, 3, 3])
    assert not any("shared" in name for name, _ in second.named_parameters())


def test_layers_can_be_chosen_and_what_cannot_be_taken_is_said() -> None:
    model = convolutional()
    with pytest.raises(UsageError, match="no convolution '9'; choose from: 0, 2, 5"):
        attach(model, parse("csg"), ["9"])
    with pytest.raises(UsageError, match="no convolution of this model"):
        attach(model, parse("csg:slice=16x16x5x5,code=2"))
    assert attach(model, parse("csg:slice=4x4x3x3,code=8"), ["5"]) == ["5"]
