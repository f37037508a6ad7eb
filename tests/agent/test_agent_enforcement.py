"""The loop under a budget that changes, with a fake session that takes what its plan says: degrade, recover, wait, and
memory that runs out at any point of a step."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from edgetune.agent import enforcement
from edgetune.agent.allowance import Allowance, write_budget
from edgetune.agent.budget import Budgeter, PlanRequest
from edgetune.agent.deaths import Deaths
from edgetune.agent.enforcement import Enforcer
from edgetune.agent.images import Decoder
from edgetune.agent.ledger import Ledger
from edgetune.agent.loop import Outcome, run_agent
from edgetune.agent.summary import status
from edgetune.agent.view import QuietView
from edgetune.bundle import Array, Bundle
from edgetune.errors import BudgetError, MemoryExhaustedError
from edgetune.planning.plan import Plan, make_plan
from edgetune.telemetry import runlog
from edgetune.telemetry.available import Available
from edgetune.units import MIB
from tests.agent.fakes import RUNTIME_BYTES, FakeSession, Workshop, make_bundle, make_folder
from tests.agent.test_agent_loop import final_state, same, settings

BATCH, STEPS = 24, 60


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_bundle(tmp_path_factory.mktemp("bundle") / "bundle")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("data"), 8)


class Board:
    """A workshop whose process takes what the plan in force predicts, on a system that has ``room`` for it."""

    def __init__(self, room: Callable[[int], int] | None = None, on_step: Callable[[FakeSession], None] | None = None):
        self.room = room
        self.shop = Workshop(on_step=on_step, measure=self.taken)

    def taken(self) -> int:
        if not self.shop.sessions or self.shop.session.step_number == 0:
            return RUNTIME_BYTES  # nothing was computed yet
        return self.shop.session.plans[-1].predicted_peak_bytes

    def available(self) -> Available:
        step = self.shop.session.step_number if self.shop.sessions else 0
        return Available(1 << 50 if self.room is None else self.room(step), "the board")


def run(tmp_path: Path, bundle: Bundle, data: Path, board: Board, **changed: Any) -> Outcome:
    options: dict[str, Any] = {
        "data": data, "batch": BATCH, "epsilon": None, "holdout": 0, "epochs": 1000, "max_steps": STEPS,
        "checkpoint_every": 10, "pause_seconds": 0.001, "reserve_bytes": 1, **changed,
    }  # fmt: skip
    return run_agent(
        bundle, settings(tmp_path, **options), parts=board.shop.parts(available=board.available), view=QuietView()
    )


def records(tmp_path: Path) -> list[dict[str, Any]]:
    return list(runlog.read(tmp_path / "state" / "log.jsonl"))


def seen(tmp_path: Path, *kinds: str) -> list[tuple[str, int]]:
    return [(r["event"], r["step"]) for r in records(tmp_path) if r["event"] in kinds]


def least_and_full(bundle: Bundle) -> tuple[int, int]:
    full = make_plan(bundle.manifest, batch=BATCH, calibration=None, runtime_bytes=RUNTIME_BYTES).predicted_peak_bytes
    with pytest.raises(BudgetError) as caught:
        make_plan(bundle.manifest, batch=BATCH, calibration=None, budget_bytes=1, runtime_bytes=RUNTIME_BYTES)
    return caught.value.least_bytes, full


@pytest.fixture(autouse=True)
def small_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fake model takes kilobytes, so what is a little must be less."""
    monkeypatch.setattr("edgetune.agent.governor.MIB", 1)
    monkeypatch.setattr("edgetune.agent.governor.gain", lambda planned: 500)
    for module in ("governor", "enforcement"):
        monkeypatch.setattr(f"edgetune.agent.{module}.margin", lambda limit: 10)


def test_memory_that_is_taken_away_and_comes_back(tmp_path: Path, bundle: Bundle, data: Path) -> None:
    least, full = least_and_full(bundle)
    between = (least + full) // 2

    def room(step: int) -> int:
        return 1 << 50 if step < 10 or step >= 30 else between + 1

    run(tmp_path, bundle, data, Board(room))
    assert seen(tmp_path, "degrade", "recover", "paused") == [("degrade", 10), ("recover", 49)]
    down, up = (next(r for r in records(tmp_path) if r["event"] == kind) for kind in ("degrade", "recover"))
    for word in ("the plan needs", "the board", "effective", "->"):
        assert word in down["reason"]
    assert "room for 20 steps" in up["reason"] and up["condition"] == "running"
    steps = [r for r in records(tmp_path) if r["event"] == "step"]
    assert all(r["measured_peak_bytes"] <= r["effective_budget_bytes"] for r in steps)
    assert [r["condition"] for r in steps] == ["running"] * 10 + ["degraded"] * 39 + ["running"] * 11
    assert steps[9]["epsilon"] == steps[-1]["epsilon"] == 1.0 > steps[10]["epsilon"]


def test_a_lower_plan_counts_what_the_one_before_took_beyond_its_prediction(bundle: Bundle) -> None:
    budgeter = Budgeter(bundle.manifest, PlanRequest(BATCH, None, None, None), RUNTIME_BYTES)
    old = budgeter.plan
    lower = budgeter.within(old.predicted_peak_bytes, old.predicted_peak_bytes + 1000)
    assert lower.correction_bytes == old.correction_bytes + 1000
    assert lower.predicted_peak_bytes <= old.predicted_peak_bytes and lower.saved_bytes < old.saved_bytes
    assert budgeter.within(None, 1).correction_bytes == lower.correction_bytes, "less than predicted proves nothing"


def test_what_was_measured_within_the_budget_is_gone_back_to(bundle: Bundle) -> None:
    least, full = least_and_full(bundle)
    budget = (least + full) // 2
    budgeter = Budgeter(bundle.manifest, PlanRequest(BATCH, budget, None, None), RUNTIME_BYTES)
    reader = SimpleNamespace(read=lambda: Allowance(budget, 0, 1 << 50, "the board", 0))
    used: list[str] = []

    def use(plan: Plan, event: str, reason: str, **fields: Any) -> None:
        used.append(event)

    enforcer = Enforcer(
        budgeter, cast(Any, reader), cast(Any, SimpleNamespace()), use=use, save=lambda: None,
        refusing=True, deaths=Deaths(), step=lambda: 0,
    )  # fmt: skip
    first = budgeter.plan
    enforcer.measured(first.predicted_peak_bytes - 500, resettable=True)
    assert budgeter.plan.saved_bytes > first.saved_bytes, "it took less than predicted, so a better one is tried"
    enforcer.measured(budget + full, resettable=True)  # by what that took too much, no plan fits any more
    assert budgeter.plan == first and used == ["planned", "degrade"]
    with pytest.raises(BudgetError):
        enforcer.measured(budget + full, resettable=True)  # it was this one that took too much


def test_nothing_fits_for_a_while(tmp_path: Path, bundle: Bundle, data: Path) -> None:
    least, _ = least_and_full(bundle)
    looks: list[int] = []

    def room(step: int) -> int:
        if step != 5:
            return 1 << 50
        looks.append(step)
        return 1 << 50 if len(looks) > 8 else least - 100

    run(tmp_path, bundle, data, Board(room))
    assert seen(tmp_path, "paused", "resumed") == [("paused", 5), ("resumed", 5)]
    events = [r["event"] for r in records(tmp_path)]
    assert events[events.index("paused") + 1] == "checkpoint", "what is trained is safe while it waits"
    paused = next(r for r in records(tmp_path) if r["event"] == "paused")
    assert paused["least_bytes"] == least and str(least) in paused["message"] and paused["condition"] == "paused"
    assert [r["step"] for r in records(tmp_path) if r["event"] == "step"] == list(range(1, STEPS + 1))


def test_the_user_changes_the_budget_while_it_runs(tmp_path: Path, bundle: Bundle, data: Path) -> None:
    least, full = least_and_full(bundle)
    lower = (least + full) // 2

    def meddle(session: FakeSession) -> None:
        said = {12: f"{lower}", 30: "none", 40: "much"}.get(session.step_number)
        if said is not None and said != "much":
            write_budget(tmp_path / "state", said)
        elif said is not None:
            (tmp_path / "state" / "budget").write_text(said)

    run(tmp_path, bundle, data, Board(on_step=meddle), budget_bytes=full + 1000)
    assert seen(tmp_path, "degrade", "recover") == [("degrade", 12), ("recover", 30)]
    texts = [r["message"] for r in records(tmp_path) if r["event"].startswith("budget")]
    assert len(texts) == 3 and "to none" in texts[1] and "'much' is not a size" in texts[2]
    steps = [r for r in records(tmp_path) if r["event"] == "step"]
    assert all(r["measured_peak_bytes"] <= lower for r in steps if 12 < r["step"] <= 30)
    assert {r["budget_bytes"] for r in steps} == {full + 1000, lower, None}
    # The next start follows the file, too.
    write_budget(tmp_path / "state", f"{least - 100}")
    with pytest.raises(BudgetError, match="too small"):
        run(tmp_path, bundle, data, Board(), budget_bytes=full + 1000, max_steps=STEPS + 1)


def test_a_resumed_run_is_held_to_its_new_runtime_before_its_first_step(
    tmp_path: Path, bundle: Bundle, data: Path
) -> None:
    budget_bytes = least_and_full(bundle)[1] + 600
    run(tmp_path, bundle, data, Board(), budget_bytes=budget_bytes, max_steps=5)
    more = Board()
    taken = more.taken
    more.shop.meter.measure = lambda: taken() + 900 - more.shop.session.plans[-1].correction_bytes
    run(tmp_path, bundle, data, more, budget_bytes=budget_bytes, max_steps=10)
    assert seen(tmp_path, "rehearsed", "degrade")[-3:] == [("rehearsed", 5), ("degrade", 5), ("rehearsed", 5)]
    steps = [r for r in records(tmp_path) if r["event"] == "step"]
    assert [r["step"] for r in steps] == list(range(1, 11))
    assert all(r["measured_peak_bytes"] <= budget_bytes for r in steps)
    assert steps[5]["epsilon"] < steps[4]["epsilon"]


def test_status_says_how_it_goes(tmp_path: Path, bundle: Bundle, data: Path) -> None:
    least, full = least_and_full(bundle)
    run(tmp_path, bundle, data, Board(lambda step: (least + full) // 2 if step >= 5 else 1 << 50), max_steps=8)
    found = status(tmp_path / "state")["condition"]
    assert found["state"] == "degraded" and "the plan needs" in found["reason"]
    assert found["effective_budget_bytes"] == (least + full) // 2 - 1


def test_a_picture_that_takes_too_much_to_unpack_is_named_and_blames_no_plan(
    tmp_path: Path, bundle: Bundle, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, full = least_and_full(bundle)
    board, spike, seen_samples = Board(), [0], list[bytes]()
    decode, taken = Decoder.decode, board.taken
    board.shop.meter.measure = lambda: taken() + spike[0]
    monkeypatch.setattr(board.shop.meter, "reset", lambda: spike.__setitem__(0, 0))

    def unpack(self: Decoder, content: bytes) -> Array:
        seen_samples.append(content)
        if board.shop.sessions and board.shop.session.step_number == 2:
            spike[0] = 10**6
        return decode(self, content)

    monkeypatch.setattr(Decoder, "decode", unpack)
    run(tmp_path, bundle, data, board, budget_bytes=full + 5000, max_steps=5)
    (found,) = (r for r in records(tmp_path) if r["event"] == "decode_overrun")
    assert found["step"] == 3 and ".png" in found["path"] and found["measured_peak_bytes"] > 10**6
    assert seen(tmp_path, "degrade", "paused") == []
    steps = [r for r in records(tmp_path) if r["event"] == "step"]
    assert steps[2]["measured_peak_bytes"] == steps[2]["decode_peak_bytes"] > full + 10**5, "it is not hidden either"


# ---- running out ----------------------------------------------------------------------------------------------------
class Failing(FakeSession):
    """Runs out of memory at the steps it is told, once each: before the update, or in its midst."""

    at: dict[int, str]

    def step_features(self, features: Any, y: Array) -> float:
        how = self.at.pop(self.step_number + 1, None)
        if how == "before":
            raise MemoryExhaustedError("memory ran out in the step: std::bad_alloc")
        if how == "within":
            self.whole = False
            self.weight = self.weight + np.float32(1)
            raise MemoryError
        return super().step_features(features, y)


def failing(board: Board, at: dict[int, str], monkeypatch: pytest.MonkeyPatch) -> Board:
    class Told(Failing):
        pass

    Told.at = at
    monkeypatch.setattr("tests.agent.fakes.FakeSession", Told)
    return board


@pytest.mark.parametrize("how", ["before", "within"])
def test_a_step_that_runs_out_of_memory_is_made_again(
    how: str, tmp_path: Path, bundle: Bundle, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: a run whose plan is the least from the start, with nothing running out, trains the same batches."""
    board = failing(Board(), {7: how, 8: how}, monkeypatch)
    outcome = run(tmp_path, bundle, data, board, batch=8, epochs=8, max_steps=None, epsilon=0.9, budget_bytes=100 * MIB)
    assert outcome.reason == "every sample is trained" and outcome.step == 24
    exhausted = [r for r in records(tmp_path) if r["event"] == "exhausted"]
    assert [r["step"] for r in exhausted] == [6, 7]
    assert [r["applied"] for r in exhausted] == [how == "within"] * 2
    steps = [r["step"] for r in records(tmp_path) if r["event"] == "step"]
    back = [] if how == "before" else [*range(1, 7), *range(1, 8)]  # there is no checkpoint since step 0
    assert steps == ([*range(1, 25)] if not back else [*back, *range(1, 25)])
    ledger = Ledger(tmp_path / "state" / "ledger.sqlite")
    assert all((row.status, row.passes) == ("trained", 8) for row in ledger.samples())
    ledger.close()
    assert len(seen(tmp_path, "degrade", "paused")) >= 2
    assert int(final_state(tmp_path / "state")["step"]) == 24


def test_a_batch_that_ran_out_is_trained_as_if_nothing_had_been(
    tmp_path: Path, bundle: Bundle, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(enforcement, "LOWERED", 1.0)  # the same plan again, so that the weights can be compared
    options: dict[str, Any] = {"budget_bytes": 100 * MIB, "max_steps": 20}
    run(tmp_path, bundle, data, Board(), state=tmp_path / "whole", **options)
    board = failing(Board(), {1: "before", 7: "before", 15: "within"}, monkeypatch)
    run(tmp_path, bundle, data, board, **options)
    assert len(seen(tmp_path, "exhausted")) == 3
    assert same(final_state(tmp_path / "whole"), final_state(tmp_path / "state"))


def test_memory_that_runs_out_again_and_again_ends_in_longer_and_longer_waits(
    tmp_path: Path, bundle: Bundle, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(enforcement, "FIRST_WAIT_SECONDS", 0.02)
    monkeypatch.setattr(enforcement, "MOST_WAIT_SECONDS", 0.08)

    class Hopeless(FakeSession):
        failures = 0

        def step_features(self, features: Any, y: Array) -> float:
            if self.step_number >= 3 and Hopeless.failures < 6:
                Hopeless.failures += 1
                raise MemoryError
            return super().step_features(features, y)

    monkeypatch.setattr("tests.agent.fakes.FakeSession", Hopeless)
    run(tmp_path, bundle, data, Board(), max_steps=6)
    assert seen(tmp_path, "exhausted", "degrade", "paused")[:4] == [
        ("exhausted", 3), ("degrade", 3), ("exhausted", 3), ("paused", 3),
    ]  # fmt: skip
    times = [r["time"] for r in records(tmp_path) if r["event"] == "paused"]
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert len(times) == 5 and all(gap >= least for gap, least in zip(gaps, (0.02, 0.04, 0.08, 0.08), strict=True))
    assert [r["step"] for r in records(tmp_path) if r["event"] == "step"] == [1, 2, 3, 4, 5, 6]
