"""The loop with the fake session: what it trains, plans, logs and refuses."""

from __future__ import annotations

import hashlib
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from edgetune.agent import checkpoint
from edgetune.agent.budget import ALWAYS_THERE
from edgetune.agent.config import AgentConfig
from edgetune.agent.feeder import Feeder
from edgetune.agent.images import Decoder
from edgetune.agent.intake import Intake
from edgetune.agent.ledger import Ledger
from edgetune.agent.loop import Outcome, run_agent
from edgetune.agent.order import order
from edgetune.agent.sources import FolderSource
from edgetune.agent.view import PlainView, QuietView, Snapshot
from edgetune.bundle import Array, Bundle
from edgetune.errors import BudgetError, DataError, StateError, UsageError
from edgetune.planning.plan import make_plan
from edgetune.telemetry import runlog
from tests.agent.fakes import (
    CLASSES,
    POISON,
    RUNTIME_BYTES,
    FakeSession,
    Workshop,
    make_bundle,
    make_folder,
    make_image,
)


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return make_bundle(tmp_path / "bundle")


def settings(tmp_path: Path, **changed: Any) -> AgentConfig:
    base: dict[str, Any] = {
        "data": tmp_path / "data", "state": tmp_path / "state", "batch": 4, "once": True, "quiet": True,
        "epsilon": 0.9, "settle_seconds": 0.1, "rescan_seconds": 0.3, "checkpoint_every": 5,
    }  # fmt: skip
    return AgentConfig(**{**base, **changed})


def run(tmp_path: Path, bundle: Bundle, shop: Workshop | None = None, **changed: Any) -> Outcome:
    return run_agent(bundle, settings(tmp_path, **changed), parts=(shop or Workshop()).parts(), view=QuietView())


def events(tmp_path: Path, *kinds: str) -> list[dict[str, Any]]:
    return [r for r in runlog.read(tmp_path / "state" / "log.jsonl") if not kinds or r["event"] in kinds]


def final_state(state: Path) -> dict[str, Array]:
    found = checkpoint.load_newest(state, lambda path: None)
    assert found is not None
    return dict(found.tensors)


def same(one: dict[str, Array], other: dict[str, Array]) -> bool:
    return one.keys() == other.keys() and all(one[name].tobytes() == other[name].tobytes() for name in one)


# ---- a whole run ---------------------------------------------------------------------------------------------------
def test_a_whole_run_learns_and_says_everything(tmp_path: Path, bundle: Bundle) -> None:
    make_folder(tmp_path / "data", 10)
    shop = Workshop()
    outcome = run(tmp_path, bundle, shop, epochs=2)
    # 30 images, every 5th of a class held out: 24 to train, 6 batches per pass.
    assert outcome == Outcome(12, outcome.accuracy_before, 1.0, "every sample is trained")
    assert outcome.accuracy_before is not None and outcome.accuracy_before < 1
    assert shop.session.largest_micro_batch <= 4 and shop.session.step_number == 12
    assert Ledger(tmp_path / "state" / "ledger.sqlite").counts() == {
        "new": 0, "heldout": 6, "trained": 24, "replayable": 0, "quarantined": 0,
    }  # fmt: skip
    kinds = [record["event"] for record in events(tmp_path) if record["event"] != "state"]
    assert kinds[:5] == ["start", "arrived", "engine", "promoted", "calibrated"]
    assert kinds[5:11] == ["planned", "evaluated", "checkpoint", "rehearsed", "timeline", "planned"]
    assert kinds[11:13] == ["step", "timeline"] and kinds.count("timeline") == 2  # one per plan that was measured
    assert kinds[-4:] == ["evaluated", "checkpoint", "not_promoted", "stopped"] and kinds.count("step") == 12
    step = events(tmp_path, "step")[-1]
    assert step["step"] == 12 and step["epoch"] == 1 and step["samples"] == 4 and step["accuracy"] == 1.0
    assert (
        step["epsilon"] == 0.9 and set(step["ranks"]["head"]) == {"c", "h", "w"} and 0.5 < step["energy"]["head"] <= 1
    )
    assert step["measured_peak_bytes"] == RUNTIME_BYTES + 20_000 == step["predicted_peak_bytes"]
    assert {"decode", "trunk", "train", "update"} <= set(step["seconds"])
    assert events(tmp_path, "checkpoint")[-1]["seconds"]["checkpoint"] > 0
    assert shop.meter.resets >= 12


def test_the_last_batch_of_a_pass_may_be_short(tmp_path: Path, bundle: Bundle) -> None:
    make_folder(tmp_path / "data", 3)
    run(tmp_path, bundle, holdout=0, epochs=2)
    assert [record["samples"] for record in events(tmp_path, "step")] == [4, 4, 1, 4, 4, 1]


@pytest.mark.parametrize("micro_batch", [1, 3, 8, 50])
def test_micro_batches_bound_what_is_in_memory_and_change_nothing(
    tmp_path: Path, bundle: Bundle, micro_batch: int
) -> None:
    make_folder(tmp_path / "data", 10)
    decoder = Decoder(bundle.manifest)
    source = FolderSource(tmp_path / "data", CLASSES, decoder.suffixes)
    ledger = Ledger(tmp_path / "ledger")
    Intake(source, decoder, ledger, holdout=0, settle_seconds=0).look(lambda: False)
    (tmp_path / "data" / "cat" / "003.png").unlink()
    session = FakeSession(bundle, make_plan(bundle.manifest, batch=20, calibration=None, runtime_bytes=0))
    rows = iter(list(ledger.samples()))
    fed = Feeder(source, decoder).feed(lambda: next(rows, None), 20, session, micro_batch)
    good = [sample for sample in ledger.samples() if sample.path != "cat/003.png"][:20]
    assert fed.samples == good and [(row.path, why) for row, why in fed.bad] == [("cat/003.png", "missing")]
    assert session.largest_micro_batch == min(micro_batch, 20)
    whole = np.stack([decoder.decode(source.read(row.path)) for row in good])
    np.testing.assert_array_equal(fed.features[0], session.features(whole)[0])
    assert fed.labels.tolist() == [row.label for row in good] and fed.labels.dtype == np.int64


def test_resuming_is_the_same_as_never_having_stopped(tmp_path: Path, bundle: Bundle) -> None:
    make_folder(tmp_path / "data", 10)
    run(tmp_path, bundle, epochs=3, state=tmp_path / "whole")
    for stop in (1, 4, 9, 17, None):  # each a new session, in the middle of passes and at their ends
        run(tmp_path, bundle, epochs=3, max_steps=stop, state=tmp_path / "parts")
    assert same(final_state(tmp_path / "whole"), final_state(tmp_path / "parts"))
    done = run(tmp_path, bundle, epochs=3, state=tmp_path / "parts")
    assert done.step == 18 and done.reason == "every sample is trained"


def test_the_seed_decides_the_order(tmp_path: Path, bundle: Bundle) -> None:
    make_folder(tmp_path / "data", 10)
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run(tmp_path, bundle, seed=seed, state=tmp_path / name)
    assert same(final_state(tmp_path / "a"), final_state(tmp_path / "b"))
    assert not same(final_state(tmp_path / "a"), final_state(tmp_path / "c"))


def test_a_run_on_a_state_with_new_samples_trains_only_those(tmp_path: Path, bundle: Bundle) -> None:
    make_folder(tmp_path / "data", 8)
    run(tmp_path, bundle, holdout=0)
    for seed in range(50, 54):
        make_image(tmp_path / "data" / "owl" / f"{seed}.png", 2, seed)
    outcome = run(tmp_path, bundle, holdout=0)
    assert outcome.step == 7 and events(tmp_path, "step")[-1]["samples"] == 4
    assert all(row.passes == 1 for row in Ledger(tmp_path / "state" / "ledger.sqlite").samples())


# ---- refusals ------------------------------------------------------------------------------------------------------
def test_an_empty_folder_is_an_error_that_says_what_to_do(tmp_path: Path, bundle: Bundle) -> None:
    (tmp_path / "data").mkdir()
    with pytest.raises(DataError, match="folder/<label>/"):
        run(tmp_path, bundle)
    (tmp_path / "data" / "cat").mkdir()
    (tmp_path / "data" / "cat" / "x.png").write_bytes(b"x")
    with pytest.raises(DataError, match=r"1 files are quarantined.*cat/x\.png"):
        run(tmp_path, bundle)


def test_a_foreign_bundle_is_refused_and_the_state_left_alone(tmp_path: Path, bundle: Bundle) -> None:
    make_folder(tmp_path / "data", 4)
    run(tmp_path, bundle)
    before = {p.name: p.read_bytes() for p in (tmp_path / "state").rglob("*") if p.is_file()}
    with pytest.raises(StateError, match=r"another bundle.*'fake'.*'other'"):
        run(tmp_path, make_bundle(tmp_path / "other", "other"))
    assert {p.name: p.read_bytes() for p in (tmp_path / "state").rglob("*") if p.is_file()} == before


def test_wrong_options_are_reported_together(tmp_path: Path, bundle: Bundle) -> None:
    make_folder(tmp_path / "data", 1)
    with pytest.raises(UsageError) as caught:
        run(tmp_path, bundle, epochs=0, epsilon=1.5, holdout=1, hyper={"beta1": 0.9})
    for part in ("--epochs", "--epsilon", "--holdout", "--beta1", "--learning-rate, --momentum, --weight-decay"):
        assert part in str(caught.value)
    assert not (tmp_path / "state").exists()


# ---- bad data during training --------------------------------------------------------------------------------------
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_step_that_is_not_finite_quarantines_what_broke_it_and_nothing_else(
    tmp_path: Path, bundle: Bundle, what: str
) -> None:
    """Oracle: a run in which that sample never existed ends with the same weights, bit for bit."""
    make_folder(tmp_path / "data", 10)
    poison = tmp_path / "data" / "owl" / "poison.png"
    Image.new("RGB", (12, 12), POISON).save(poison)
    contents = [hashlib.sha256(path.read_bytes()).hexdigest() for path in (tmp_path / "data").glob("*/*.png")]
    poisoned = contents.index(hashlib.sha256(poison.read_bytes()).hexdigest())
    # A seed with which the poison comes neither in the calibration (8 samples) nor in the last, short batch.
    seed = next(seed for seed in range(99) if 8 <= order(seed, 0, contents).index(poisoned) < 28)
    shop = Workshop(loss_is_nan=what == "loss")
    options: dict[str, Any] = {"holdout": 0, "epochs": 2, "checkpoint_every": 2, "seed": seed}
    outcome = run(tmp_path, bundle, shop, **options)
    ledger = Ledger(tmp_path / "state" / "ledger.sqlite")
    bad = {row.path for row in ledger.samples() if row.status == "quarantined"}
    assert bad == {"owl/poison.png"}
    assert {r["path"] for r in events(tmp_path, "quarantined")} == bad
    assert all(f"the {what} was not finite" in r["reason"] for r in events(tmp_path, "quarantined"))
    assert {row.passes for row in ledger.samples() if row.status == "trained"} == {2}
    for path in bad:
        (tmp_path / "data" / path).unlink()
    clean = run(tmp_path, bundle, state=tmp_path / "clean", **options)
    assert clean.step == outcome.step
    one, other = final_state(tmp_path / "state"), final_state(tmp_path / "clean")
    assert np.isfinite(one["head.weight"]).all() and same(one, other)


def test_a_step_that_breaks_although_no_sample_does_goes_back_without_its_batch(tmp_path: Path, bundle: Bundle) -> None:
    """The weights are at fault: the same batch would come to the same end."""
    make_folder(tmp_path / "data", 8)
    broken = False

    def on_step(session: FakeSession) -> None:
        nonlocal broken
        if session.step_number == 3 and not broken:
            broken = True
            session.weight = np.full_like(session.weight, np.nan)

    outcome = run(tmp_path, bundle, Workshop(on_step=on_step), holdout=0, checkpoint_every=2)
    (event,) = events(tmp_path, "not_finite")
    assert "at step 4: back to step 2, without 4 of 4 samples" in event["message"]
    ledger = Ledger(tmp_path / "state" / "ledger.sqlite")
    assert sum(row.status == "quarantined" for row in ledger.samples()) == 4 and outcome.step == 5
    assert all(row.passes == 1 for row in ledger.samples() if row.status == "trained")
    assert np.isfinite(final_state(tmp_path / "state")["head.weight"]).all()


def test_a_learning_rate_that_breaks_everything_stops_the_run(tmp_path: Path, bundle: Bundle) -> None:
    for seed in range(40):
        path = tmp_path / "data" / "cat" / f"{seed}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (10 + seed, 10), POISON).save(path)
    with pytest.raises(DataError, match="lower --learning-rate"):
        run(tmp_path, bundle, holdout=0)
    assert np.isfinite(final_state(tmp_path / "state")["head.weight"]).all()


def test_files_that_vanish_or_change_are_replaced_in_their_batch(tmp_path: Path, bundle: Bundle) -> None:
    make_folder(tmp_path / "data", 8)

    def meddle(session: FakeSession) -> None:
        if session.step_number == 1:
            for name in CLASSES:
                for path in (tmp_path / "data" / name).glob("*[13].png"):
                    path.unlink()
                for path in (tmp_path / "data" / name).glob("*5.png"):
                    path.write_bytes(b"something else")

    run(tmp_path, bundle, Workshop(on_step=meddle), holdout=0)
    reasons = {record["reason"] for record in events(tmp_path, "quarantined")}
    assert reasons == {"missing", "its content changed after it was recorded"}
    steps = [record["samples"] for record in events(tmp_path, "step")]
    assert all(count == 4 for count in steps[:-1]) and sum(steps) == 24 - len(events(tmp_path, "quarantined"))


# ---- memory and bases ----------------------------------------------------------------------------------------------
def test_an_overrun_lowers_the_plan_and_says_why(tmp_path: Path, bundle: Bundle) -> None:
    make_folder(tmp_path / "data", 20)
    full = make_plan(bundle.manifest, batch=16, calibration=None, runtime_bytes=RUNTIME_BYTES).predicted_peak_bytes
    with pytest.raises(BudgetError) as caught:
        make_plan(bundle.manifest, batch=16, calibration=None, budget_bytes=1, runtime_bytes=RUNTIME_BYTES)
    budget, between = full + 1000, (full + caught.value.least_bytes) // 2

    def measure() -> int:
        """Return the real memory: as predicted at first, and from step 3 on so much that half the ranks must go."""
        session = shop.session
        if session.step_number == 0:
            return RUNTIME_BYTES  # what is resident between the calibration and the first step
        plan = session.plans[-1]
        raw = plan.predicted_peak_bytes - plan.correction_bytes
        return raw if session.step_number < 3 else raw + budget - between

    shop = Workshop(measure=measure)
    run(tmp_path, bundle, shop, batch=16, epsilon=None, budget_bytes=budget, holdout=0, epochs=2)
    lowered = events(tmp_path, "degrade")
    assert len(lowered) == 1 and lowered[0]["step"] == 3 and "against a budget" in lowered[0]["reason"]
    steps = events(tmp_path, "step")
    assert [s["step"] for s in steps if s["measured_peak_bytes"] > budget] == [3]
    assert all(s["predicted_peak_bytes"] == s["measured_peak_bytes"] for s in steps if s["step"] > 3)
    assert steps[-1]["epsilon"] < steps[2]["epsilon"] == 1.0 and steps[-1]["ranks"] != steps[2]["ranks"]


def test_what_an_engine_keeps_from_step_to_step_is_in_the_correction(tmp_path: Path, bundle: Bundle) -> None:
    make_folder(tmp_path / "data", 4)
    made: list[int] = []

    def measure() -> int:
        return RUNTIME_BYTES + (30_000 if len(made) >= 2 else 20_000)  # from the second step on, whatever it trains

    shop = Workshop(measure=measure, on_step=lambda session: made.append(session.step_number))
    run(tmp_path, bundle, shop, holdout=0)
    (rehearsed,) = events(tmp_path, "rehearsed")
    assert rehearsed["measured_peak_bytes"] == RUNTIME_BYTES + 30_000
    steps = events(tmp_path, "step")
    assert steps and all(step["predicted_peak_bytes"] == step["measured_peak_bytes"] for step in steps)


def test_memory_that_the_runtime_keeps_is_planned_for_before_the_first_step(tmp_path: Path, bundle: Bundle) -> None:
    make_folder(tmp_path / "data", 20)
    full = make_plan(bundle.manifest, batch=16, calibration=None, runtime_bytes=RUNTIME_BYTES)
    resident = sum(full.ledger[line] for line in ALWAYS_THERE) + 3000
    options: dict[str, Any] = {"batch": 16, "epsilon": None, "holdout": 0}
    shop = Workshop(measure=lambda: resident)
    run(tmp_path, bundle, shop, max_steps=1, budget_bytes=full.predicted_peak_bytes + 1000, **options)
    settled = next(r for r in events(tmp_path, "planned") if "resident after the calibration" in r["reason"])
    assert settled["epsilon"] < 1 and settled["predicted_peak_bytes"] <= full.predicted_peak_bytes + 1000
    with pytest.raises(BudgetError, match="correction"):
        run(tmp_path, bundle, Workshop(measure=lambda: resident + 10**6), state=tmp_path / "other",
            budget_bytes=full.predicted_peak_bytes + 1000, **options)  # fmt: skip
    assert not [r for r in runlog.read(tmp_path / "other" / "log.jsonl") if r["event"] == "step"]


def test_a_budget_that_cannot_be_kept_stops_with_everything_stored(tmp_path: Path, bundle: Bundle) -> None:
    make_folder(tmp_path / "data", 10)
    shop = Workshop(measure=lambda: 10**9 if shop.session.step_number == 3 else 100)
    with pytest.raises(BudgetError, match="too small"):
        run(tmp_path, bundle, shop, epsilon=None, budget_bytes=RUNTIME_BYTES + 60_000)
    assert int(final_state(tmp_path / "state")["step"]) == 3
    assert "too small" in events(tmp_path)[-1]["reason"]


def test_a_budget_below_everything_is_refused_before_training(tmp_path: Path, bundle: Bundle) -> None:
    make_folder(tmp_path / "data", 4)
    with pytest.raises(BudgetError) as caught:
        run(tmp_path, bundle, epsilon=None, budget_bytes=RUNTIME_BYTES)
    assert caught.value.least_bytes > RUNTIME_BYTES


def test_a_changed_budget_makes_a_new_plan_on_resume(tmp_path: Path, bundle: Bundle) -> None:
    make_folder(tmp_path / "data", 10)
    run(tmp_path, bundle, max_steps=3)
    shop = Workshop()
    run(tmp_path, bundle, shop, epsilon=0.5)
    assert shop.session.plans[-1].epsilon == 0.5
    assert events(tmp_path, "step")[-1]["epsilon"] == 0.5
    assert len(events(tmp_path, "calibrated")) == 1  # the spectra are those of the first start


# ---- watching ------------------------------------------------------------------------------------------------------
def test_images_that_appear_while_it_runs_are_trained(tmp_path: Path, bundle: Bundle) -> None:
    (tmp_path / "data").mkdir()
    outcome: list[Outcome] = []
    worker = threading.Thread(
        target=lambda: outcome.append(run(tmp_path, bundle, once=False, max_steps=3, holdout=0, rescan_seconds=30))
    )
    worker.start()
    deadline = time.monotonic() + 20
    for seed in range(4):  # 12 images, one batch at a time
        while len(events(tmp_path, "waiting")) < 1 + seed * 3 // 4 and time.monotonic() < deadline:
            time.sleep(0.02)
        for label, name in enumerate(CLASSES):
            make_image(tmp_path / "data" / name / f"{seed}.png", label, seed)
    worker.join(25)
    assert not worker.is_alive() and outcome[0].step == 3 and outcome[0].reason == "reached step 3"
    assert [record["samples"] for record in events(tmp_path, "step")] == [4, 4, 4]
    assert Ledger(tmp_path / "state" / "ledger.sqlite").counts()["trained"] == 12


# ---- the view ------------------------------------------------------------------------------------------------------
def test_the_plain_view_prints_one_line_per_turn(capsys: pytest.CaptureFixture[str]) -> None:
    view = PlainView(every=3)
    for step in range(1, 8):
        view.update(Snapshot(step=step, steps_total=7, loss=0.5, budget_bytes=2**20, epsilon=0.9, energy=0.99))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" (")[0] for line in lines] == ["step 1/7", "step 3/7", "step 6/7"]
    assert "budget 1.00 MiB" in lines[0] and "ε 0.9000 (captured energy 0.9900)" in lines[0]
    assert "refreshes" not in lines[0]
    view.update(Snapshot(step=9, refreshes=2))
    assert "refreshes 2" in capsys.readouterr().out


def test_the_live_view_draws(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from edgetune.agent.view import LiveView

    view = LiveView()
    view.update(Snapshot(step=3, steps_total=9, loss=0.25, accuracy=0.5, heldout_accuracy=0.75, budget_bytes=2**20))
    view.event("something happened")
    view.close()
    shown = capsys.readouterr().out
    assert "something happened" in shown and "75.0%" in shown and "budget 1.00 MiB" in shown


# ---- months --------------------------------------------------------------------------------------------------------
def test_finished_samples_that_are_gone_are_forgotten(tmp_path: Path, bundle: Bundle) -> None:
    """Ten days of 18 samples each, of which a cleaner leaves only today's: the ledger stays as large as it may be."""
    sizes = []
    for day in range(10):
        for label, name in enumerate(CLASSES):
            for file in (tmp_path / "data" / name).glob("*.png"):
                file.unlink()
            for seed in range(6):
                make_image(tmp_path / "data" / name / f"{day}-{seed}.png", label, 10 * day + seed)
        run(tmp_path, bundle, remember=40)
        run(tmp_path, bundle, remember=40)  # the look at the start forgets what the run before has finished
        ledger = Ledger(tmp_path / "state" / "ledger.sqlite")
        sizes.append(len(ledger))
        newest = {row.path for row in ledger.samples()}
        assert {f"{name}/{day}-{seed}.png" for name in CLASSES for seed in range(6)} <= newest
        ledger.close()
    assert max(sizes) <= 18 + 40 and sizes[-1] < 60
    assert sum(event["samples"] for event in events(tmp_path, "forgot")) == 180 - sizes[-1]
    assert sum(step["samples"] for step in events(tmp_path, "step")) == 144, "the others are held out"


def test_what_is_still_there_is_remembered(tmp_path: Path, bundle: Bundle) -> None:
    make_folder(tmp_path / "data", 10)
    for _ in range(3):
        run(tmp_path, bundle, remember=0)
    assert len(Ledger(tmp_path / "state" / "ledger.sqlite")) == 30 and not events(tmp_path, "forgot")
