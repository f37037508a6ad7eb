"""Codecs whose decoded tensor is close to the true one, inside an exported bundle: its gradients are close as well."""

from __future__ import annotations

from pathlib import Path

import pytest

import edgetune
from edgetune.engines.session import TrainingSession
from tests.autodiff.handmade import CLASSES, CONVS
from tests.autodiff.parity import batch_of, worst_error

BATCH = 6


@pytest.mark.parametrize(
    ("codec", "least", "most"),
    [
        ("fp16", 1e-6, 1e-3),
        ("int8", 1e-4, 2e-2),
        ("int4", 1e-2, 3e-1),
        ("int8:storage=float16", 1e-4, 2e-2),
        ("hosvd:storage=float16", 1e-6, 1e-3),
        ("svd:storage=float16", 1e-6, 1e-3),
        ("hosvd:storage=log8", 1e-3, 5e-2),
    ],
)
def test_gradients_are_as_close_as_the_stored_numbers(codec: str, least: float, most: float, tmp_path: Path) -> None:
    """At full rank only the storage is left to err, and it does: the tensor was stored through the codec."""
    case = CONVS["everything_at_once"]
    x, y = batch_of(case.shape, BATCH, CLASSES, seed=1)

    def gradients(codec: str) -> dict[str, edgetune.bundle.Array]:
        bundle = edgetune.export(case.model(), None, tmp_path / codec.partition(":")[0], last=1, codec=codec)
        plan = edgetune.plan(bundle, batch=BATCH, epsilon=1.0)
        return TrainingSession(bundle, plan).gradients(x, y)[1]

    assert least < worst_error(gradients(codec), gradients("dense")) < most
