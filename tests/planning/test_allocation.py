"""The allocation of options against an enumeration of all choices, its properties, and its time at full size."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize

from edgetune.errors import BudgetError
from edgetune.planning import allocation
from edgetune.planning.allocation import Allocator, Slot
from edgetune.planning.choices import IntArray, lower_bound, multipliers

Instance = tuple[IntArray, list[Slot]]


def instance(seed: int, slots: int, options: int, instants: int, *, nested: bool, scale: int = 20) -> Instance:
    """Slots that store a plateau of bytes from encode to release, with scratch at both ends, on a noisy base."""
    rng = np.random.default_rng(seed)
    first = np.sort(rng.integers(0, instants // 2, slots))
    last = np.sort(rng.integers(instants // 2, instants, slots))[::-1]
    if not nested:
        last = np.maximum(rng.permutation(last) - rng.integers(0, instants // 2, slots), first)
    base = rng.integers(0, scale, instants)
    made = []
    for s in range(slots):
        stored = rng.integers(1, scale, options)
        errors = np.round(rng.uniform(0.1, 1) * np.exp(-3 * stored / scale) * rng.uniform(0.5, 1.5, options), 3)
        errors[rng.integers(options)] = 0.0
        profiles = np.zeros((options, instants), np.int64)
        profiles[:, first[s] : last[s] + 1] = stored[:, None]
        profiles[:, first[s]] += rng.integers(0, scale, options)
        profiles[:, last[s]] += rng.integers(0, scale, options)
        made.append(Slot(errors, profiles))
    return base, made


def everything(base: IntArray, slots: list[Slot]) -> list[tuple[float, int]]:
    """The error and peak of every choice, by the definition."""
    return [
        (
            sum(float(slot.errors[o]) for slot, o in zip(slots, choice, strict=True)),
            int((base + sum(slot.profiles[o] for slot, o in zip(slots, choice, strict=True))).max()),
        )
        for choice in itertools.product(*(range(len(slot.errors)) for slot in slots))
    ]


@st.composite
def small(draw: st.DrawFn) -> Instance:
    """Up to 4 slots with profiles of any form: intervals, spikes, ties, zeros."""
    instants = draw(st.integers(1, 6))
    numbers = st.integers(0, 6)
    base = np.array(draw(st.lists(numbers, min_size=instants, max_size=instants)))
    slots = []
    for _ in range(draw(st.integers(1, 4))):
        count = draw(st.integers(1, 4))
        errors = draw(st.lists(st.sampled_from([0.0, 0.1, 0.25, 0.3, 1.0, 7.0]), min_size=count, max_size=count))
        row = st.lists(numbers, min_size=instants, max_size=instants)
        profiles = draw(st.lists(row, min_size=count, max_size=count))
        slots.append(Slot(np.array(errors), np.array(profiles)))
    return base, slots


@given(small())
@settings(max_examples=150, deadline=None)
def test_any_small_instance_equals_the_enumeration_at_every_budget(given_: Instance) -> None:
    _equals_the_enumeration(*given_)


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("seed", range(6))
def test_intervals_equal_the_enumeration_at_every_budget(seed: int, nested: bool) -> None:
    _equals_the_enumeration(*instance(seed, 6, 4, 14, nested=nested))


def _equals_the_enumeration(base: IntArray, slots: list[Slot]) -> None:
    allocator, choices = Allocator(base, slots), everything(base, slots)
    least_peak = min(peak for _, peak in choices)
    assert allocator.least_peak().peak_bytes == least_peak and allocator.least_peak().exact
    with pytest.raises(BudgetError) as caught:
        allocator.allocate(least_peak - 1)
    assert caught.value.least_bytes == least_peak
    for budget in sorted({peak for _, peak in choices})[::3]:
        found = allocator.allocate(budget)
        assert found.error == pytest.approx(min(error for error, peak in choices if peak <= budget), rel=1e-9)
        assert found.exact and found.bound == found.error
        assert (found.error, found.peak_bytes) == allocator.evaluate(found.choice) and found.peak_bytes <= budget


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("part", [0.05, 0.4])
def test_a_middling_instance_equals_an_integer_program(nested: bool, part: float) -> None:
    base, slots = instance(11, 15, 10, 100, nested=nested, scale=1000)
    allocator = Allocator(base, slots)
    low, high = (allocator.pareto_front(2)[i].peak_bytes for i in (0, -1))
    budget = low + int(part * (high - low))
    found = allocator.allocate(budget)
    assert found.exact and found.error == pytest.approx(_integer_program(base, slots, budget), rel=1e-7)


def _integer_program(base: IntArray, slots: list[Slot], budget: int) -> float:
    one_each = np.kron(np.eye(len(slots)), np.ones(len(slots[0].errors)))
    result = optimize.milp(
        np.concatenate([slot.errors for slot in slots]),
        constraints=[
            optimize.LinearConstraint(np.concatenate([slot.profiles for slot in slots]).T, -np.inf, budget - base),
            optimize.LinearConstraint(one_each, 1, 1),
        ],
        integrality=np.ones(one_each.shape[1]),
        bounds=optimize.Bounds(0, 1),
        options={"mip_rel_gap": 1e-9},
    )
    assert result.success
    return float(result.fun)


@pytest.mark.parametrize("seed", range(4))
def test_a_search_cut_short_still_bounds_the_best(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    base, slots = instance(seed, 15, 10, 100, nested=False, scale=1000)
    allocator = Allocator(base, slots)
    low, high = (allocator.pareto_front(2)[i].peak_bytes for i in (0, -1))
    best = allocator.allocate((4 * low + high) // 5)
    monkeypatch.setattr(allocation, "_MOST_WORK", 1)
    monkeypatch.setattr(allocation, "_MOST_FIRST_WORK", 1)
    cut = allocator.allocate((4 * low + high) // 5)
    assert best.exact and not cut.exact and 0 < cut.bound <= best.error * (1 + 1e-9) <= cut.error * (1 + 2e-9)


@given(st.integers(0, 10**6), st.booleans(), st.lists(st.floats(0, 1), min_size=2, max_size=2))
@settings(max_examples=25, deadline=None)
def test_error_falls_with_the_budget_and_beats_every_incumbent(seed: int, nested: bool, parts: list[float]) -> None:
    base, slots = instance(seed, 12, 8, 60, nested=nested, scale=1000)
    allocator = Allocator(base, slots)
    rng = np.random.default_rng(seed)
    incumbents = [tuple(rng.integers(0, 8, 12)) for _ in range(20)]
    low = allocator.least_peak().peak_bytes
    high = max(allocator.evaluate(choice)[1] for choice in incumbents)
    found = [allocator.allocate(low + int(part * (high - low)), incumbents) for part in sorted(parts)]
    assert found[1].error <= found[0].error * (1 + 1e-9)
    for part, made in zip(sorted(parts), found, strict=True):
        budget = low + int(part * (high - low))
        assert made.peak_bytes <= budget and made.bound <= made.error
        for error, peak in map(allocator.evaluate, incumbents):
            assert peak > budget or made.error <= error


@given(small())
@settings(max_examples=40, deadline=None)
def test_the_front_is_nondominated_and_spans_least_peak_to_least_error(given_: Instance) -> None:
    base, slots = given_
    front, choices = Allocator(base, slots).pareto_front(6), everything(base, slots)
    assert front[0].peak_bytes == min(peak for _, peak in choices)
    assert front[-1].error == pytest.approx(min(error for error, _ in choices))
    for before, after in itertools.pairwise(front):
        assert before.peak_bytes < after.peak_bytes and before.error > after.error
    for point in front:
        assert not any(error < point.error - 1e-9 and peak <= point.peak_bytes for error, peak in choices)


@pytest.mark.parametrize("nested", [True, False])
def test_the_lagrangian_is_below_every_choice_and_near_the_best(nested: bool) -> None:
    """Near: the linear relaxation is not far below the best choice where there are many slots."""
    base, slots = instance(3, 30, 12, 200, nested=nested, scale=10**6)
    allocator = Allocator(base, slots)
    low, high = allocator.least_peak().peak_bytes, allocator.pareto_front(2)[-1].peak_bytes
    budget = (low + high) // 2
    best = allocator.allocate(budget)
    problem = allocator._problem
    weights = multipliers(problem, budget)
    assert 0.8 * best.error < lower_bound(problem, budget, weights) <= best.error
    for scale in (0.0, 0.3, 3.0):
        assert lower_bound(problem, budget, scale * weights) <= lower_bound(problem, budget, weights) + 1e-9


@pytest.mark.parametrize("nested", [True, False])
def test_full_size_is_proven_best_in_seconds(nested: bool) -> None:
    base, slots = instance(7, 50, 30, 3000, nested=nested, scale=10**7)
    started = time.perf_counter()
    allocator = Allocator(base, slots)
    low = allocator.least_peak()
    high = sum(int(slot.profiles[slot.errors.argmin()].max()) for slot in slots)
    found = [allocator.allocate(low.peak_bytes + (high - low.peak_bytes) * i // 8) for i in (1, 3, 5)]
    seconds = time.perf_counter() - started
    assert low.exact and all(made.exact for made in found)
    assert seconds < 20, f"{seconds:.1f} s for one setup, one least peak and three budgets"


def test_bytes_and_errors_of_any_size() -> None:
    """Terabytes beside bytes, and an error of 1e-12 beside 2, keep their exact order."""
    big = 10**12
    slots = [
        Slot(np.array([0.0, 1e-12, 2.0]), np.array([[big + 1], [big], [1]])),
        Slot(np.array([0.0, 1.0]), np.array([[1], [0]])),
    ]
    allocator = Allocator(np.array([0]), slots)
    assert allocator.allocate(big + 2).choice == (0, 0)
    assert allocator.allocate(big + 1).choice == (1, 0)
    assert allocator.allocate(big).choice == (1, 1)
    assert allocator.allocate(big - 1).choice == (2, 0)


@pytest.mark.parametrize(
    ("base", "slots", "message"),
    [
        ([], [Slot(np.zeros(1), np.zeros((1, 0), np.int64))], "base"),
        ([1], [], "no slots"),
        ([1], [Slot(np.zeros(2), np.zeros((1, 1), np.int64))], "slot 0: profiles of shape"),
        ([1], [Slot(np.zeros(0), np.zeros((0, 1), np.int64))], "at least one option"),
        ([1], [Slot(np.array([np.nan]), np.zeros((1, 1), np.int64))], "not finite"),
        ([1], [Slot(np.zeros(1), np.array([[-1]]))], "negative"),
    ],
)
def test_a_malformed_problem_is_refused(base: list[int], slots: list[Slot], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Allocator(np.array(base, np.int64), slots)


def test_prices_that_rounding_cannot_tell_apart() -> None:
    """Found by a random instance: the matrix of a Newton step was singular."""
    slots = [
        Slot(np.zeros(3), np.array([[0, 3, 0], [0, 3, 0], [3, 0, 0]])),
        Slot(np.zeros(2), np.array([[0, 3, 0], [3, 0, 0]])),
    ]
    allocator = Allocator(np.zeros(3, np.int64), slots)
    least = allocator.least_peak()
    assert (least.peak_bytes, least.exact) == (3, True)
    for budget in range(3, 8):
        found = allocator.allocate(budget)
        assert (found.error, found.exact) == (0.0, True)
        assert found.peak_bytes <= budget
