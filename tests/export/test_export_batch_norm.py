"""Trained batch-norm, and weights that two layers share. The oracle is torch."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import edgetune
from tests.autodiff.parity import relative_error
from tests.export.small_models import (
    BATCH,
    assert_equal_gradients,
    drawn,
    seeded,
    session_of,
    torch_gradients,
    with_statistics,
)

# -- trained batch-norm -----------------------------------------------------------------------------------------------


def normed() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4, momentum=0.3), nn.ReLU(),
        nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(24, 3),
    )  # fmt: skip


def test_trained_batch_norm_goes_on_as_in_torch(tmp_path: Path) -> None:
    """Three steps: parameters, running statistics and predictions are those of torch in training mode."""
    model = with_statistics(seeded(normed))
    bundle = edgetune.export(
        model, torch.zeros(2, 1, 6, 6), tmp_path / "b", last="all", codec="dense", batch_norm="trained"
    )
    assert {b.name for b in bundle.manifest.buffers} == {
        "1.running_mean", "1.running_var", "4.running_mean", "4.running_var",
    }  # fmt: skip
    hyper = {"learning_rate": 0.05, "momentum": 0.9}
    session = session_of(bundle, batch=8, hyper=hyper)
    other = copy.deepcopy(model).double().train()
    optimizer = torch.optim.SGD(other.parameters(), lr=0.05, momentum=0.9)
    for step in range(3):
        x, y = drawn((8 - step, 1, 6, 6), step), np.arange(8 - step) % 3
        optimizer.zero_grad()
        expected = nn.functional.cross_entropy(other(torch.from_numpy(x).double()), torch.from_numpy(y))
        expected.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        assert session.step(x, y) == pytest.approx(float(expected.detach()), rel=1e-5)
    state = session.state()
    for name, value in other.state_dict().items():
        if "num_batches" not in name:
            key = f"buffer/{name}" if "running" in name else name
            assert relative_error(state[key], value.numpy()) <= 1e-5, name
    x = drawn((5, 1, 6, 6), 9)
    logits = other.eval()(torch.from_numpy(x).double()).detach().numpy()
    np.testing.assert_allclose(session.predict(x), logits, rtol=1e-4, atol=1e-5)
    # a resumed session goes on from the same statistics
    resumed = session_of(bundle, batch=8, hyper=hyper)
    resumed.load_state(state)
    np.testing.assert_array_equal(resumed.predict(x), session.predict(x))


def test_a_step_without_a_finite_loss_leaves_the_statistics(tmp_path: Path) -> None:
    bundle = edgetune.export(
        with_statistics(seeded(normed)), torch.zeros(2, 1, 6, 6), tmp_path / "b", last="all", batch_norm="trained"
    )
    session = session_of(bundle)
    before = session.state()
    session.step(np.full((BATCH, 1, 6, 6), np.nan, np.float32), np.zeros(BATCH, np.int64))
    assert not session.report.applied
    assert all(np.array_equal(value, before[name]) for name, value in session.state().items() if name != "step")


def test_frozen_statistics_with_trained_scale_and_shift(tmp_path: Path) -> None:
    model = with_statistics(seeded(normed))
    bundle = edgetune.export(model, torch.zeros(2, 1, 6, 6), tmp_path / "b", train=r"^(1|4)\.", codec="dense")
    x, y = drawn((BATCH, 1, 6, 6)), np.array([0, 2, 1])
    _, found = session_of(bundle).gradients(x, y)
    assert set(found) == {"1.weight", "1.bias", "4.weight", "4.bias"} and not bundle.manifest.buffers
    expected = torch_gradients(
        model, lambda m: nn.functional.cross_entropy(m(torch.from_numpy(x).double()), torch.from_numpy(y))
    )
    assert_equal_gradients(found, expected)


# -- shared weights ---------------------------------------------------------------------------------------------------


class Tied(nn.Module):
    """An embedding whose table is also the last layer's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.middle = nn.Linear(6, 6)
        self.output = nn.Linear(6, 11, bias=False)
        self.output.weight = self.embedding.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.output(torch.tanh(self.middle(self.embedding(ids))).mean(1))
        return result


@pytest.mark.parametrize("codec", ["dense", "hosvd"])
def test_a_tied_weight_is_one_parameter_with_the_sum_of_its_gradients(tmp_path: Path, codec: str) -> None:
    model = seeded(Tied)
    ids = np.random.default_rng(0).integers(0, 11, (BATCH, 4))
    bundle = edgetune.export(model, torch.from_numpy(ids), tmp_path / "b", last="all", codec=codec)
    y = np.array([1, 10, 4])
    expected = torch_gradients(
        model, lambda m: nn.functional.cross_entropy(m(torch.from_numpy(ids)), torch.from_numpy(y))
    )
    _, found = session_of(bundle).gradients(ids, y)
    assert set(found) == set(expected) == {"embedding.weight", "middle.weight", "middle.bias"}
    assert_equal_gradients(found, expected, 1e-4)
