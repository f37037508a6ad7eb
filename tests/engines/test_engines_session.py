"""What a training session promises: it learns, it repeats bit for bit, and it refuses what does not fit."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest

import edgetune
from edgetune.bundle import Array
from edgetune.engines.onnxruntime import OnnxRuntime
from edgetune.errors import DataError, EngineError, UsageError
from tests.engines.workshop import CLASSES, CODECS, SMALL, bundle_of, plan_of, same_bits, samples

BATCH = 8
each_codec = pytest.mark.parametrize("codec", CODECS)
each_optimizer = pytest.mark.parametrize("optimizer", ["sgd", "adamw"])


def session_of(codec: str, optimizer: str = "sgd", **options: Any) -> edgetune.TrainingSession:
    bundle = bundle_of(codec, optimizer=optimizer)
    return edgetune.TrainingSession(bundle, plan_of(bundle, BATCH), verify=False, **options)


def train(session: edgetune.TrainingSession, steps: range) -> list[float]:
    return [session.step(*samples(BATCH, seed=step)) for step in steps]


# ---- learning -----------------------------------------------------------------------------------------------------


@each_codec
@each_optimizer
def test_the_loss_falls_on_a_fixed_batch(codec: str, optimizer: str) -> None:
    hyper = {"sgd": {"learning_rate": 0.05, "clip_norm": 0.5}, "adamw": {"learning_rate": 0.01}}[optimizer]
    session = session_of(codec, optimizer, hyper=hyper)
    x, y = samples(BATCH)
    losses = [session.step(x, y) for _ in range(120)]
    assert losses[-1] < 0.5 * losses[0]
    assert np.all(np.isfinite(losses))
    assert session.report.correct == BATCH and session.report.samples == BATCH
    assert np.array_equal(session.predict(x).argmax(1), y)


@each_codec
def test_a_report_tells_the_captured_energy_of_what_was_compressed(codec: str) -> None:
    session = session_of(codec)
    train(session, range(1))
    report = session.report
    lossy = {saved.name for saved in session.bundle.manifest.saved if saved.energy}
    assert set(report.energy) == lossy and bool(lossy) == (codec != "dense")
    assert all(0.5 < energy <= 1 + 1e-5 for energy in report.energy.values())
    assert report.applied and report.gradient_norm > 0
    assert set(report.seconds) == {"trunk", "train", "update"}


def test_there_is_no_report_before_the_first_step() -> None:
    with pytest.raises(EngineError, match="before the first step"):
        _ = session_of("dense").report


# ---- determinism --------------------------------------------------------------------------------------------------


@each_codec
@each_optimizer
def test_two_sessions_give_equal_bits(codec: str, optimizer: str) -> None:
    one, other = session_of(codec, optimizer, seed=3), session_of(codec, optimizer, seed=3)
    assert train(one, range(4)) == train(other, range(4))
    assert same_bits(one.state(), other.state())


@each_codec
@each_optimizer
def test_a_loaded_state_continues_bit_for_bit(codec: str, optimizer: str) -> None:
    whole, half = session_of(codec, optimizer), session_of(codec, optimizer)
    train(whole, range(6))
    train(half, range(3))
    stored = half.state()
    kept = {name: value.copy() for name, value in stored.items()}
    resumed = session_of(codec, optimizer)
    resumed.load_state(stored)
    assert same_bits(resumed.state(), kept)
    train(resumed, range(3, 6))
    assert same_bits(resumed.state(), whole.state())
    assert same_bits(stored, kept), "a state is a copy: a session never writes into it"
    assert int(whole.state()["step"]) == 6


def test_a_state_holds_parameters_slots_and_the_step() -> None:
    session = session_of("hosvd", "adamw")
    names = {spec.name for spec in session.bundle.manifest.parameters}
    slots = {f"optimizer/{slot}/{name}" for slot in ("first_moment", "second_moment") for name in names}
    assert session.state().keys() == names | slots | {"step"}
    assert same_bits(session.parameters(), session.bundle.initial_parameters())


@pytest.mark.parametrize("damage", ["missing", "shape", "no step"])
def test_a_state_that_does_not_fit_is_refused(damage: str) -> None:
    session = session_of("dense")
    state = session.state()
    if damage == "missing":
        del state["optimizer/momentum/fc.bias"]
    elif damage == "shape":
        state["fc.weight"] = state["fc.weight"].T
    else:
        del state["step"]
    with pytest.raises(EngineError, match="the state does not fit this bundle"):
        session.load_state(state)


def test_the_seed_is_that_of_the_sketches() -> None:
    one, other = session_of("svd", seed=0), session_of("svd", seed=1)
    train(one, range(1))
    train(other, range(1))
    assert not same_bits(one.state(), other.state())


@each_codec
def test_features_do_not_depend_on_the_micro_batch(codec: str) -> None:
    session = session_of(codec)
    x, _ = samples(7)
    whole = session.features(x)
    session.set_plan(dataclasses.replace(session.plan, micro_batch=2))
    for one, other in zip(whole, session.features(x), strict=True):
        assert np.allclose(one, other, rtol=1e-5, atol=1e-6)


@each_codec
def test_gradients_change_nothing_and_stay_valid(codec: str) -> None:
    session = session_of(codec)
    before = session.state()
    loss, gradients = session.gradients(*samples(BATCH))
    assert same_bits(session.state(), before)
    assert set(gradients) == set(session.parameters())
    assert all(gradients[name].shape == value.shape for name, value in session.parameters().items())
    kept = {name: value.copy() for name, value in gradients.items()}
    assert train(session, range(1)) == [loss]
    assert same_bits(gradients, kept)
    total = math.sqrt(sum(float(np.sum(np.square(g, dtype=np.float64))) for g in gradients.values()))
    assert session.report.gradient_norm == pytest.approx(total, rel=1e-5)


def test_the_exact_gradients_are_those_of_finite_differences() -> None:
    session = session_of("dense")
    x, y = samples(BATCH)
    _, gradients = session.gradients(x, y)
    state = session.state()
    rng = np.random.default_rng(0)
    for name in ("fc.weight", "block2.conv1.weight"):
        direction = np.asarray(rng.standard_normal(state[name].shape), np.float32)
        direction /= np.float32(np.linalg.norm(direction))
        losses = []
        for sign in (1, -1):
            session.load_state({**state, name: state[name] + np.float32(sign * 1e-2) * direction})
            losses.append(session.gradients(x, y)[0])
        assert (losses[0] - losses[1]) / 2e-2 == pytest.approx(float(np.sum(gradients[name] * direction)), rel=0.05)


# ---- plans --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", ["hosvd", "svd"])
def test_a_new_plan_changes_the_ranks_without_loading_anything(codec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    session = session_of(codec)
    x, y = samples(BATCH)
    session.step(x, y)
    before = session.report.energy
    lower = plan_of(session.bundle, BATCH, 0.5)
    assert lower.saved_bytes < session.plan.saved_bytes
    loaded: list[str] = []
    real = OnnxRuntime._session

    def counting(self: OnnxRuntime, graph: str, stage: int) -> Any:
        if (graph, stage) not in self._sessions:
            loaded.append(graph)
        return real(self, graph, stage)

    monkeypatch.setattr(OnnxRuntime, "_session", counting)
    session.set_plan(lower)
    session.step(x, y)
    assert session.plan is lower
    assert loaded == []
    after = session.report.energy
    assert all(after[name] < before[name] for name in before)


@pytest.mark.parametrize("codec", ["hosvd", "svd"])
def test_at_full_rank_the_gradients_are_exact(codec: str) -> None:
    x, y = samples(BATCH)
    _, exact = session_of("dense").gradients(x, y)
    session = session_of(codec)
    session.set_plan(plan_of(session.bundle, BATCH, 1.0))
    _, gradients = session.gradients(x, y)
    for name, value in exact.items():
        assert np.linalg.norm(gradients[name] - value) <= 1e-3 * np.linalg.norm(value) + 1e-6


def test_a_plan_for_another_codec_is_refused() -> None:
    with pytest.raises(EngineError, match="the plan is for codec 'dense'"):
        edgetune.TrainingSession(bundle_of("hosvd"), plan_of(bundle_of("dense"), BATCH))


def test_a_plan_without_bases_is_refused() -> None:
    plan = dataclasses.replace(plan_of(bundle_of("hosvd"), BATCH), calibration=None)
    with pytest.raises(EngineError, match=r"no basis for 'block2\.conv1'"):
        edgetune.TrainingSession(bundle_of("hosvd"), plan)


# ---- data ---------------------------------------------------------------------------------------------------------


@each_codec
@pytest.mark.parametrize("count", [1, 3])
def test_a_short_last_batch_works(codec: str, count: int) -> None:
    session = session_of(codec)
    before = session.parameters()
    loss = session.step(*samples(count))
    assert math.isfinite(loss) and session.report.samples == count and session.report.applied
    assert not same_bits(before, session.parameters())
    # and a full one after it
    assert all(math.isfinite(value) for value in train(session, range(1)))


@each_codec
@each_optimizer
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_changes_nothing(codec: str, optimizer: str, value: float) -> None:
    session = session_of(codec, optimizer)
    train(session, range(2))
    before = session.state()
    x, y = samples(BATCH)
    x[1, 0, 3, 3] = value
    assert not math.isfinite(session.step(x, y))
    assert not session.report.applied and math.isnan(session.report.gradient_norm)
    assert same_bits(session.state(), before)
    assert train(session, range(2, 3)) == train_from(before, codec, optimizer)
    assert session.report.applied


@each_codec
@each_optimizer
def test_a_gradient_that_is_not_finite_changes_nothing_though_the_loss_is(codec: str, optimizer: str) -> None:
    session = session_of(codec, optimizer)
    train(session, range(2))
    before = session.state()
    x, y = samples(BATCH)
    assert math.isfinite(session.step(x * np.float32(1e25), y)), "squares overflow, the loss does not"
    assert not session.report.applied and math.isnan(session.report.gradient_norm)
    assert same_bits(session.state(), before)
    assert train(session, range(2, 3)) == train_from(before, codec, optimizer)


def train_from(state: dict[str, Array], codec: str, optimizer: str) -> list[float]:
    fresh = session_of(codec, optimizer)
    fresh.load_state(state)
    return train(fresh, range(2, 3))


X, Y = samples(BATCH)
WRONG: dict[str, tuple[Array, Array]] = {
    "another image size": (np.zeros((BATCH, 1, 16, 15), np.float32), Y),
    "another number of channels": (np.zeros((BATCH, 3, 16, 16), np.float32), Y),
    "one sample without a batch": (np.zeros(SMALL, np.float32), Y),
    "no samples": (X[:0], Y[:0]),
    "fewer labels than samples": (X, Y[:-1]),
    "a label too high": (X, np.where(np.arange(BATCH) == 2, CLASSES, Y)),
    "a negative label": (X, np.where(np.arange(BATCH) == 2, -1, Y)),
    "labels with one more axis": (X, Y[:, None]),
    "labels that are no integers": (X, Y + 0.5),
    "more samples than planned": (np.concatenate([X, X]), np.concatenate([Y, Y])),
}


@pytest.mark.parametrize("case", WRONG)
def test_data_that_does_not_fit_is_refused(case: str) -> None:
    session = session_of("hosvd")
    before = session.state()
    with pytest.raises(DataError):
        session.step(*WRONG[case])
    assert same_bits(session.state(), before)
    train(session, range(1))


def test_features_that_do_not_fit_are_refused() -> None:
    session = session_of("hosvd")
    (feature,) = session.features(X)
    for wrong in ([], [feature, feature], [feature[:, 1:]], [feature[:-1]]):
        with pytest.raises(DataError):
            session.step_features(wrong, Y)


def test_features_handed_over_in_a_list_are_let_go() -> None:
    session = session_of("hosvd")
    assert session.bundle.manifest.graphs["train"].stages, "this test needs a train graph in stages"
    features = list(session.features(X))
    session.step_features(features, Y)
    assert features == []
    kept = session.features(X)
    session.step_features(kept, Y)
    assert len(kept) == 1


def test_an_unknown_hyper_parameter_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(UsageError, match="knows no warmup; it has: clip_norm, learning_rate, momentum, weight_decay"):
        session_of("dense", hyper={"warmup": 1.0})


def test_an_unknown_engine_is_refused() -> None:
    bundle = bundle_of("dense")
    with pytest.raises(UsageError, match="no engine 'abacus'"):
        edgetune.TrainingSession(bundle, plan_of(bundle), engine="abacus")
