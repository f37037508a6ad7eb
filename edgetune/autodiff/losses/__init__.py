"""Losses and their gradients, each one model-local function; ``LOSSES`` is the list."""

from __future__ import annotations

from collections.abc import Callable

from edgetune.autodiff.losses.base import EmittedLoss, Loss, LossConfig
from edgetune.autodiff.losses.binary_cross_entropy import BinaryCrossEntropy
from edgetune.autodiff.losses.cross_entropy import CrossEntropy
from edgetune.autodiff.losses.dice import Dice
from edgetune.autodiff.losses.mse import MeanSquaredError
from edgetune.errors import UsageError, choices

LOSSES: dict[str, Callable[[LossConfig], Loss]] = {
    "cross_entropy": CrossEntropy,
    "binary_cross_entropy": BinaryCrossEntropy,
    "mse": MeanSquaredError,
    "dice": Dice,
}


def loss_from(config: LossConfig) -> Loss:
    """Return the loss that ``config`` describes.

    Raises:
        UsageError: there is none of that kind (the message lists those that there are), or an option is not its own or
            out of range.
    """
    if config.kind not in LOSSES:
        raise UsageError(f"there is no loss '{config.kind}'; choose one of: {choices(LOSSES)}")
    return LOSSES[config.kind](config)


def loss_named(kind: str) -> Loss:
    """Return the loss ``kind`` without options; see :func:`loss_from`."""
    return loss_from(LossConfig(kind))


__all__ = ["LOSSES", "EmittedLoss", "Loss", "LossConfig", "loss_from", "loss_named"]
