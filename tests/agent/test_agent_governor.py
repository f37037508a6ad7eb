"""The laws of the governor, for any sequence of readings."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from edgetune.agent.governor import (
    MOST_PATIENCE,
    PATIENCE,
    RESUME_PATIENCE,
    Action,
    Condition,
    Decision,
    Governor,
    Reading,
    gain,
)
from edgetune.units import MIB

FULL, LEAST = 120 * MIB, 90 * MIB


@dataclass
class World:
    """A run in numbers: its plan takes all that it was planned for, up to FULL, and cannot take less than LEAST."""

    asked: int | None = None
    planned: int | None = None
    governor: Governor = field(default_factory=Governor)

    @property
    def need(self) -> int:
        return FULL if self.planned is None else min(FULL, self.planned)

    def look(self, room: int) -> Decision:
        """One look between two steps, and what an agent makes of it."""
        limit = room if self.asked is None else min(room, self.asked)
        decision = self.governor.look(Reading(limit, room, self.asked, self.planned, self.need, FULL))
        if decision.action is Action.KEEP:
            return decision
        targets = [decision.budget, limit] if decision.action is Action.DEGRADE else [decision.budget]
        for target in targets:
            if target is None or target >= LEAST:
                self.planned = target
                self.governor.planned(whole=target == self.asked)
                return decision
        self.governor.paused(LEAST)
        return decision


ROOMS = st.lists(st.integers(60 * MIB, 140 * MIB), min_size=1, max_size=150)
ASKED = st.none() | st.integers(LEAST, 130 * MIB)


@settings(max_examples=150, deadline=None)
@given(rooms=ROOMS, asked=ASKED)
def test_nothing_runs_that_needs_more_than_there_is(rooms: list[int], asked: int | None) -> None:
    world = World(asked, asked)
    for room in rooms:
        world.look(room)
        limit = room if asked is None else min(room, asked)
        assert world.governor.condition is Condition.PAUSED or world.need <= limit


@settings(max_examples=150, deadline=None)
@given(rooms=ROOMS, asked=ASKED)
def test_a_better_plan_comes_only_after_room_for_long_enough(rooms: list[int], asked: int | None) -> None:
    world = World(asked, asked)
    recoveries = 0
    for index, room in enumerate(rooms):
        before = world.planned
        if world.look(room).action is not Action.RECOVER:
            continue
        recoveries += 1
        window = rooms[index + 1 - PATIENCE : index + 1]
        assert len(window) == PATIENCE, "it waited"
        assert before is not None and min(window) >= before + gain(before), "there was more room, all the time"
        assert world.need <= min(window), "and the new plan would have fitted all the time"
    assert recoveries <= len(rooms) // PATIENCE


@settings(max_examples=100, deadline=None)
@given(room=st.integers(60 * MIB, 140 * MIB), asked=ASKED, looks=st.integers(1, 4 * PATIENCE))
def test_what_does_not_change_is_answered_once(room: int, asked: int | None, looks: int) -> None:
    world = World(asked, asked)
    actions = [world.look(room).action for _ in range(looks)]
    assert sum(action is not Action.KEEP for action in actions) <= 1 and actions[1:] == [Action.KEEP] * (looks - 1)


@settings(max_examples=60, deadline=None)
@given(low=st.integers(LEAST + 2 * MIB, FULL - MIB), swing=st.integers(0, 1 << 40), period=st.integers(1, 19))
def test_memory_that_comes_and_goes_does_not_make_it_flap(low: int, swing: int, period: int) -> None:
    world = World()
    actions = [world.look(low + swing * (look // period % 2)).action for look in range(10 * PATIENCE)]
    assert sum(action is not Action.KEEP for action in actions) <= 1


def test_each_setback_doubles_the_patience() -> None:
    world, waits = World(), list[int]()
    for _ in range(9):
        assert world.look(100 * MIB).action is Action.DEGRADE
        waits.append(next(look for look in range(1, 2000) if world.look(150 * MIB).action is Action.RECOVER))
        assert world.governor.condition is Condition.RUNNING
    assert waits == [min(PATIENCE * 2**k, MOST_PATIENCE) for k in range(9)]
    for _ in range(MOST_PATIENCE * 8):  # calm
        world.look(150 * MIB)
    assert world.governor.patience == PATIENCE


@settings(max_examples=60, deadline=None)
@given(rooms=ROOMS, asked=ASKED)
def test_it_is_back_as_asked_when_there_is_plenty(rooms: list[int], asked: int | None) -> None:
    world = World(asked, asked)
    for room in rooms:
        world.look(room)
    for _ in range(2 * world.governor.patience + RESUME_PATIENCE):  # by way of what was there before, perhaps
        world.look(1 << 40)
    assert world.governor.condition is Condition.RUNNING and world.planned == asked


def test_a_pause_ends_after_a_few_looks_with_room_for_the_least_plan() -> None:
    world = World()
    world.look(LEAST - 1)
    assert world.governor.condition is Condition.PAUSED
    assert [world.look(room).action for room in (95 * MIB, LEAST - 1, 95 * MIB, 94 * MIB)] == [Action.KEEP] * 4
    assert world.look(96 * MIB) == Decision(Action.RESUME, 94 * MIB), "what was there in all of them"


def test_a_setback_inside_the_users_wish_is_as_exact_as_the_wish() -> None:
    world = World(None, None)
    world.asked = 100 * MIB
    assert world.look(1 << 40) == Decision(Action.DEGRADE, 100 * MIB)
    assert world.look(1 << 40).action is Action.KEEP and world.governor.condition is Condition.RUNNING
