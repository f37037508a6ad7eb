"""A small convolutional network whose filters are no multiples of small slices, and data for it."""

from __future__ import annotations

import torch
from torch import nn

from tests.export.small_models import drawn, with_statistics

IMAGES = drawn((3, 1, 8, 8), seed=2)
LABELS = torch.tensor([0, 1, 3]).numpy()


def convolutional(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(6, 10, 3, padding=1, bias=False),
        nn.BatchNorm2d(10),
        nn.ReLU(),
        nn.Conv2d(10, 7, 3, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(7 * 9, 4),
    )
    return with_statistics(model.eval())


def odd_convolutions() -> nn.Module:
    """Return what slices meet seldom: grouped and depthwise filters, a weight that two layers share, 1 × 1 kernels."""

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(1, 8, 3, padding=1)
            self.grouped = nn.Conv2d(8, 12, 3, padding=1, groups=2)
            self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12)
            self.twice = nn.Conv2d(12, 12, 3, padding=1)
            self.point = nn.Conv2d(12, 8, 1)
            self.head = nn.Conv2d(8, 4, 3, stride=2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.depthwise(torch.relu(self.grouped(torch.relu(self.stem(x)))))
            x = torch.relu(self.twice(torch.relu(self.twice(x))))
            result: torch.Tensor = self.head(torch.relu(self.point(x))).mean((2, 3))
            return result

    torch.manual_seed(0)
    return Odd().eval()
