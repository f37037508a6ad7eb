"""Small models of odd make, and torch's autograd in float64 as the oracle for them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

import edgetune
from edgetune.bundle import Array, Bundle
from tests.autodiff.parity import relative_error

BATCH = 3
LIMIT = 1e-5


def session_of(bundle: Bundle, batch: int = BATCH, **options: Any) -> edgetune.TrainingSession:
    return edgetune.TrainingSession(bundle, edgetune.plan(bundle, batch=batch, epsilon=1.0), **options)


def drawn(shape: tuple[int, ...], seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def torch_gradients(model: nn.Module, loss: Callable[[nn.Module], torch.Tensor]) -> dict[str, Array]:
    """Return the gradients of ``loss(model)`` in float64, by the model's own names."""
    wide = copy.deepcopy(model).double()
    loss(wide).backward()  # type: ignore[no-untyped-call]
    return {name: p.grad.numpy() for name, p in wide.named_parameters() if p.grad is not None}


def assert_equal_gradients(found: Mapping[str, Array], expected: Mapping[str, Array], limit: float = LIMIT) -> None:
    errors = {name: relative_error(found[name], expected[name]) for name in found}
    assert max(errors.values()) <= limit, errors


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make().eval()


class Tokens(nn.Module):
    """Patches and a class token, attention with the batch on the third axis, windows of k times the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.positions = nn.Parameter(torch.randn(1, 5, 8) * 0.1)
        self.patch = nn.Conv2d(1, 8, 4, stride=4)
        self.norm = nn.LayerNorm(8)
        self.qkv = nn.Linear(8, 24)
        self.mix = nn.Linear(8, 8)
        self.windows = nn.Linear(8, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.patch(image).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.positions
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        attention = torch.softmax(q @ k.transpose(-1, -2) / 2.0, -1) @ v
        x = x + self.mix(attention.transpose(1, 2).flatten(2))
        pairs = x[:, 1:].reshape(-1, 2, 8)  # two windows of two patches per image
        pairs = torch.tanh(self.windows(pairs)) + pairs
        result: torch.Tensor = self.head(x[:, 0] + pairs.reshape(-1, 4, 8).mean(1))
        return result


class TwoByTwo(nn.Module):
    """An image and a vector in; classes and a score out."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Conv2d(1, 4, 3)
        self.side = nn.Linear(5, 4)
        self.classes = nn.Linear(4, 3)
        self.score = nn.Linear(4, 1)

    def forward(self, image: torch.Tensor, side: torch.Tensor) -> dict[str, torch.Tensor]:
        x = torch.relu(self.image(image)).mean((2, 3)) + self.side(side)
        return {"classes": self.classes(x), "score": self.score(x)}


def small() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2))


def with_statistics(model: nn.Module) -> nn.Module:
    """Give every batch-norm statistics, scales and shifts that are not trivial."""
    generator = torch.Generator().manual_seed(3)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.copy_(torch.randn(module.running_mean.shape, generator=generator) * 0.2)
            module.running_var.copy_(torch.rand(module.running_var.shape, generator=generator) + 0.5)
            module.weight.data.uniform_(0.5, 1.5, generator=generator)
            module.bias.data.uniform_(-0.3, 0.3, generator=generator)
    return model


class Traced(nn.Module):
    """A loss as a function."""

    def __init__(self, function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return self.function(outputs, targets)
