"""A step in pieces of its batch: the gradient of the whole batch, whatever the loss counts, on both engines."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import edgetune
from edgetune.bundle import Array, Bundle
from edgetune.engines.calibration import calibrate
from edgetune.engines.pieces import mass_of
from edgetune.errors import DataError, EngineError, UsageError
from edgetune.planning.plan import Plan, make_plan
from tests.engines import workshop
from tests.engines.workshop import bundle_of, same_bits, samples
from tests.export.small_models import Traced

BATCH, PIECE = 12, 5  # 5, 5 and 2
IGNORED, WEIGHTS = 9, (0.5, 2.0, 0.0)
each_engine = pytest.mark.parametrize("engine", ["onnxruntime", "torch"])


class Pixels(nn.Module):
    """Three classes for every pixel."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.head = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(torch.relu(self.second(torch.relu(self.first(x)))))
        return out


@functools.cache
def pixel_bundle() -> Bundle:
    return edgetune.export(
        Pixels().eval(), torch.zeros(1, 1, 6, 6), Path(workshop._SHELF.name) / "pixels", last=1, codec="dense",
        class_weights=WEIGHTS, ignore_index=IGNORED,
    )  # fmt: skip


def pixels() -> tuple[Array, Array]:
    """Return a batch whose pieces count very different numbers of pixels, and its second piece none."""
    rng = np.random.default_rng(1)
    x = rng.standard_normal((BATCH, 1, 6, 6)).astype(np.float32)
    y = rng.integers(0, 3, (BATCH, 4, 4)).astype(np.int64)
    y[:3] = IGNORED
    y[5:10] = 2  # of weight 0
    y[5:10, 0] = IGNORED
    return x, y


def dense_plan(bundle: Bundle) -> Plan:
    return make_plan(bundle.manifest, batch=BATCH, calibration=None, epsilon=1.0, runtime_bytes=0)


def in_pieces(bundle: Bundle, plan: Plan, piece: int = PIECE, **options: Any) -> edgetune.TrainingSession:
    return edgetune.TrainingSession(bundle, dataclasses.replace(plan, tail_micro_batch=piece), verify=False, **options)


def close(found: dict[str, Array], expected: dict[str, Array], rtol: float = 2e-5) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert np.linalg.norm(found[name] - value) <= rtol * np.linalg.norm(value) + 1e-7, name


@each_engine
def test_the_gradient_is_that_of_the_whole_batch_by_what_counts(engine: str) -> None:
    bundle, (x, y) = pixel_bundle(), pixels()
    session = in_pieces(bundle, dense_plan(bundle), engine=engine)
    loss, gradients = session.gradients(x, y)
    model = Pixels()
    oracle = nn.functional.cross_entropy(
        model(torch.from_numpy(x)), torch.from_numpy(y), weight=torch.tensor(WEIGHTS), ignore_index=IGNORED
    )
    oracle.backward()  # type: ignore[no-untyped-call]
    assert loss == pytest.approx(oracle.item(), rel=1e-5)
    named = dict(model.named_parameters())
    close(gradients, {name: named[name].grad.numpy() for name in gradients})  # type: ignore[union-attr]
    assert mass_of(bundle.manifest, y[5:10]) == 0 < mass_of(bundle.manifest, y[:5])


def test_a_batch_of_which_nothing_counts_changes_nothing() -> None:
    bundle, (x, _) = pixel_bundle(), pixels()
    session = in_pieces(bundle, dense_plan(bundle))
    y, before = np.full((BATCH, 4, 4), IGNORED), session.state()
    assert np.isnan(session.step(x, y)) and not session.report.applied and session.report.samples == BATCH
    assert same_bits(session.state(), before)
    assert all(np.isnan(value).all() for value in session.gradients(x, y)[1].values())


@each_engine
def test_steps_in_pieces_learn_what_whole_ones_do(engine: str) -> None:
    bundle = bundle_of("dense")
    plan = dense_plan(bundle)
    whole = edgetune.TrainingSession(bundle, plan, engine=engine, verify=False)
    parts = in_pieces(bundle, plan, engine=engine)
    for seed in range(2):
        x, y = samples(BATCH, seed=seed)
        assert parts.step(x, y) == pytest.approx(whole.step(x, y), rel=1e-5)
        assert (parts.report.correct, parts.report.samples) == (whole.report.correct, BATCH)
        assert parts.report.gradient_norm == pytest.approx(whole.report.gradient_norm, rel=1e-4)
    close(parts.parameters(), whole.parameters())


def test_pieces_capture_no_less_than_the_whole_batch_would() -> None:
    """A batch rank r keeps of a piece at least what the best r directions of the whole batch do."""
    bundle, (x, y) = bundle_of("hosvd"), samples(16)
    full = make_plan(bundle.manifest, batch=16, calibration=None, epsilon=1.0, runtime_bytes=0)
    first = edgetune.TrainingSession(bundle, full, verify=False)
    calibration = calibrate(first, bundle.manifest, [first.features(x)])
    plan = make_plan(
        bundle.manifest, batch=16, epsilon=0.8, calibration=calibration, runtime_bytes=0, tail_micro_batch=4
    )
    assert all(modes.get("b", 0) <= 4 for modes in plan.ranks.values())
    session = edgetune.TrainingSession(bundle, plan, verify=False)
    session.step(x, y)
    assert session.promises
    for name, promised in session.promises.items():
        assert session.report.energy[name] >= promised - 1e-3
    certificate = edgetune.Certificate()
    certificate.restart(session.promises)
    for seed in range(6):
        session.step(*samples(16, seed=seed))
        certificate.observe(session.report.energy)
    assert not certificate.due


def test_pieces_may_be_given_one_by_one_and_are_let_go() -> None:
    bundle = bundle_of("svd")
    plan, (x, y) = dense_plan(bundle), samples(BATCH)
    one, other = in_pieces(bundle, plan), in_pieces(bundle, plan)
    loss = one.step(x, y)
    with pytest.raises(EngineError, match="no step to finish"):
        other.finish()
    other.add(other.features(x[:PIECE]), y[:PIECE])
    other.discard()  # as if memory had run out
    for start in range(0, BATCH, PIECE):
        features = list(other.features(x[start : start + PIECE]))
        other.add(features, y[start : start + PIECE])
        assert features == []
    assert other.finish() == loss
    assert same_bits(one.state(), other.state())
    with pytest.raises(DataError, match="by 5 at a time"):
        other.add(other.features(x[:6]), y[:6])


def test_one_bad_piece_spoils_the_step_and_nothing_else() -> None:
    bundle = bundle_of("dense")
    session = in_pieces(bundle, dense_plan(bundle))
    x, y = samples(BATCH)
    session.step(x, y)
    before, bad = session.state(), x.copy()
    bad[3] = np.nan
    session.step(bad, y)
    assert not session.report.applied and same_bits(session.state(), before)
    with pytest.raises(DataError, match="classes 0 to 3"):  # in the last piece
        session.step(x, np.where(np.arange(BATCH) == BATCH - 1, 7, y))
    assert same_bits(session.state(), before)


def test_what_mixes_the_samples_of_a_batch_is_trained_whole(tmp_path: Path) -> None:
    bundle = edgetune.export(
        workshop.network("small"), torch.zeros(1, *workshop.SMALL), tmp_path / "b", last=3, codec="dense",
        batch_norm="trained",
    )  # fmt: skip
    with pytest.raises(UsageError, match="batch-norm takes its statistics from the whole batch"):
        make_plan(bundle.manifest, batch=8, calibration=None, runtime_bytes=0, tail_micro_batch=4)
    with pytest.raises(UsageError, match="cannot be trained in pieces"):
        in_pieces(bundle, dense_plan(bundle), 4)


def focal(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    log_p = outputs.log_softmax(1).gather(1, targets[:, None])
    return (-((1 - log_p.exp()) ** 2) * log_p).mean() * 2.0 + 0.5


def total(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(outputs, targets, reduction="sum") + (outputs**2).sum()


def centred(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(outputs - outputs.mean(0, keepdim=True), targets)


@pytest.mark.parametrize(("function", "pieces"), [(focal, "mean"), (total, "sum"), (centred, "")])
def test_a_loss_of_the_users_own_is_split_where_it_is_a_mean_or_a_sum(
    function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], pieces: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    bundle = edgetune.export(
        nn.Linear(5, 3), torch.zeros(2, 5), tmp_path / "b", last=0, codec="dense", loss=Traced(function),
        example_target=torch.zeros(2, dtype=torch.int64),
    )  # fmt: skip
    assert bundle.manifest.loss.pieces == pieces
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((BATCH, 5)).astype(np.float32), rng.integers(0, 3, BATCH)
    plan = dense_plan(bundle)
    if not pieces:
        with pytest.raises(UsageError, match="its own loss is neither a mean nor a sum over samples"):
            in_pieces(bundle, plan)
        return
    whole = edgetune.TrainingSession(bundle, plan, verify=False)
    expected, found = whole.gradients(x, y), in_pieces(bundle, plan).gradients(x, y)
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    close(found[1], expected[1])
