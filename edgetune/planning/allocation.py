"""Which option each saved tensor takes: the least total error whose peak over time is within a budget.

A training step has instants t (nodes in execution order). Each slot s (a saved tensor) takes one of its options o (a
codec at a rate), which has an error and adds bytes at each instant: what it stores, from encode to last use, and the
scratch of its encode and of the weight gradient. The peak is ``max_t (base[t] + Σ_s bytes[s,o_s,t])``.

This module may know arrays of bytes and errors; it must not know graphs, codecs or plans.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from edgetune.errors import BudgetError
from edgetune.planning.choices import (
    Candidates,
    FloatArray,
    IntArray,
    Problem,
    changes,
    lower_bound,
    multipliers,
    promising,
    reduced,
    within,
)
from edgetune.planning.search import RELATIVE_TOLERANCE, Search
from edgetune.units import format_bytes

__all__ = ["Allocation", "Allocator", "Slot"]

_WIDTH, _MOST_WORK = 1024, 10_000_000
"""How long the search goes on before it gives up its proof: about two seconds (a count: the same plan everywhere)."""
_FIRST_WIDTH, _MOST_FIRST_WORK = 48, 500_000
"""A short, narrow search first: the better the best known choice, the more options need not be looked at."""


@dataclass(frozen=True)
class Slot:
    """The options of one saved tensor.

    Attributes:
        errors: [o] ≥ 0.
        profiles: [o,t] ≥ 0: the bytes that each option adds at each instant.
    """

    errors: FloatArray
    profiles: IntArray


@dataclass(frozen=True)
class Allocation:
    """One option per slot.

    Attributes:
        choice: the option of each slot.
        error: the sum of their errors.
        peak_bytes: the most bytes at any instant, base included.
        bound: no choice within the budget has a lower error (from :meth:`Allocator.least_peak`: no choice has a lower
            peak, in bytes). Equal to ``error`` (``peak_bytes``) where ``exact``.
        exact: proven the best, to a relative 1e-9.
    """

    choice: tuple[int, ...]
    error: float
    peak_bytes: int
    bound: float
    exact: bool


class Allocator:
    """Answers, for one training step, what the least error within a budget is, and what the least peak.

    Options that another beats and instants that cannot be the peak are left out once, for all questions.

    Raises:
        ValueError: no instant, a slot without options, shapes that disagree, or a negative or infinite value.
    """

    def __init__(self, base: IntArray, slots: Sequence[Slot]) -> None:
        self._base, self._slots = np.asarray(base, np.int64), tuple(slots)
        _check(self._base, self._slots)
        first, most_base = changes(self._base, [slot.profiles for slot in self._slots])
        order = np.argsort([_first_use(slot) for slot in self._slots], kind="stable")
        self._order = [int(s) for s in order]
        candidates = (
            Candidates(
                np.arange(len(slot.errors)),
                np.asarray(slot.errors, np.float64),
                slot.profiles[:, first].astype(np.int64),
            )
            for slot in (self._slots[s] for s in self._order)
        )
        self._problem = reduced(Problem(most_base, tuple(candidates)))
        self._least_peak: Allocation | None = None

    def evaluate(self, choice: Sequence[int]) -> tuple[float, int]:
        """Return the total error and the peak in bytes of ``choice``, one option per slot."""
        total = self._base.copy()
        for slot, option in zip(self._slots, choice, strict=True):
            total += slot.profiles[option]
        return math.fsum(slot.errors[o] for slot, o in zip(self._slots, choice, strict=True)), int(total.max())

    def allocate(self, budget_bytes: int, incumbents: Iterable[Sequence[int]] = ()) -> Allocation:
        """Return the choice with the least error whose peak is at most ``budget_bytes``.

        It is never worse than any of ``incumbents`` within the budget. Where the proof takes too long, the best choice
        met is returned with the bound that was proven.

        Raises:
            BudgetError: no choice fits; ``least_bytes`` is the least budget that one does.
        """
        known = [tuple(int(o) for o in choice) for choice in incumbents]
        known = [choice for choice in known if self.evaluate(choice)[1] <= budget_bytes]
        problem = within(self._problem, budget_bytes)
        if problem is not None:
            weights = multipliers(problem, budget_bytes)
            known += [self._named(problem, choice) for choice in _rounded(problem, budget_bytes, weights)]
        if problem is None or not known:
            least = self.least_peak()
            if problem is None or least.peak_bytes > budget_bytes:
                raise BudgetError(
                    f"no choice of options fits {format_bytes(budget_bytes)} ({budget_bytes} bytes): the least peak is "
                    f"{format_bytes(least.peak_bytes)} ({least.peak_bytes} bytes); raise the budget to that",
                    least_bytes=least.peak_bytes,
                )
            known.append(least.choice)
        best = min(known, key=self.evaluate)
        bound = max(0.0, lower_bound(problem, budget_bytes, weights))
        for width, most_work in ((_FIRST_WIDTH, _MOST_FIRST_WORK), (_WIDTH, _MOST_WORK)):
            error, peak_bytes = self.evaluate(best)
            goal = error * (1 - RELATIVE_TOLERANCE)
            smaller = None if bound >= goal else promising(problem, budget_bytes, weights, goal)
            smaller = None if smaller is None else within(smaller, budget_bytes)
            if smaller is None:
                return Allocation(best, error, peak_bytes, error, True)
            problem = smaller
            weights = multipliers(problem, budget_bytes)
            bound = max(bound, min(error, lower_bound(problem, budget_bytes, weights)))
            found = Search(problem, budget_bytes, weights, error).run(width=width, most_work=most_work)
            if found.choice is not None:
                best = min(best, self._named(problem, found.choice), key=self.evaluate)
            bound = max(bound, min(self.evaluate(best)[0], found.bound))
        error, peak_bytes = self.evaluate(best)
        exact = bound >= error * (1 - RELATIVE_TOLERANCE)
        return Allocation(best, error, peak_bytes, error if exact else bound, exact)

    def least_peak(self) -> Allocation:
        """Return a choice with the least peak."""
        if self._least_peak is None:
            self._least_peak = self._with_least_peak(self._problem)
        return self._least_peak

    def pareto_front(self, points: int = 24, incumbents: Iterable[Sequence[int]] = ()) -> list[Allocation]:
        """Return at most ``points`` (≥ 2) choices from the least peak to the least error, ascending in peak.

        Each has a higher peak and a lower error than the one before. Budgets lie closer where they are tight, since the
        error falls fastest there.
        """
        known = [tuple(choice) for choice in incumbents]
        end = self._least_error()
        low, high = self.least_peak().peak_bytes, end.peak_bytes
        front: list[Allocation] = []
        for i in range(points):
            budget = low + int((high - low) * (i / (points - 1)) ** 2)
            found = end if i == points - 1 else self.allocate(budget, [*known, *(p.choice for p in front[-1:])])
            if front and found.error >= front[-1].error:
                continue
            while front and found.peak_bytes <= front[-1].peak_bytes:
                front.pop()  # it was not proven the best
            front.append(found)
        return front

    def _least_error(self) -> Allocation:
        """Return the choice with the least error, of several the one with the least peak."""
        slots = tuple(slot.keep(slot.errors == slot.errors.min()) for slot in self._problem.slots)
        found = self._with_least_peak(Problem(self._problem.base, slots))
        return replace(found, bound=found.error, exact=True)

    def _with_least_peak(self, problem: Problem) -> Allocation:
        """Return the choice of ``problem`` with the least peak, by halving the range in which that lies."""
        slots = tuple(Candidates(slot.options, np.zeros(len(slot.errors)), slot.bytes) for slot in problem.slots)
        free = reduced(Problem(problem.base, slots))
        low = int((free.base + free.least.sum(axis=0)).max())
        best = self._named(free, _descend(free))
        high = self.evaluate(best)[1]
        limit, proven = low, low  # the lower bound itself is often met
        while low < high:
            tight = within(free, limit)
            found = None
            if tight is not None:
                weights = multipliers(tight, limit)
                found = Search(tight, limit, weights, None).run(width=_WIDTH, most_work=_MOST_WORK)
            if tight is not None and found is not None and found.choice is not None:
                best = self._named(tight, found.choice)
                high = self.evaluate(best)[1]
            else:
                low = limit + 1
                if found is None or found.bound == np.inf:
                    proven = low
            limit = (low + high) // 2
        error, peak_bytes = self.evaluate(best)
        return Allocation(best, error, peak_bytes, proven, proven == peak_bytes)

    def _named(self, problem: Problem, choice: Sequence[int]) -> tuple[int, ...]:
        """Return the options, in the order of the given slots, that ``choice`` takes in ``problem``."""
        named = [0] * len(self._slots)
        for s, slot, o in zip(self._order, problem.slots, choice, strict=True):
            named[s] = int(slot.options[o])
        return tuple(named)


def _rounded(problem: Problem, limit: int, weights: FloatArray) -> list[tuple[int, ...]]:
    """Return choices within ``limit`` near the one that the relaxation prices best, at several levels of prices."""
    found = []
    for scale in (1.0, 1.1, 1.4, 2.5):
        start = [int((slot.errors + scale * (slot.bytes @ weights)).argmin()) for slot in problem.slots]
        choice = _repaired(problem, limit, start)
        if choice is not None:
            found.append(_improved(problem, limit, choice))
    return found


def _repaired(problem: Problem, limit: int, choice: list[int]) -> list[int] | None:
    """Return ``choice`` after swaps that cost least error per byte over the limit that they free; None if stuck."""
    errors, size_bytes = problem.padded
    rows, choice = np.arange(len(choice)), list(choice)
    while True:
        total = problem.total(choice)
        over = int(np.maximum(total - limit, 0).sum())
        if over == 0:
            return choice
        moved = total + size_bytes - size_bytes[rows, choice][:, None]
        freed = over - np.maximum(moved - limit, 0).sum(axis=2)
        freed[np.isinf(errors)] = 0
        if freed.max() <= 0:
            return None
        cost = np.maximum(errors - errors[rows, choice][:, None], 0.0)
        price = np.where(freed > 0, cost / np.maximum(freed, 1), np.inf)
        s, o = np.unravel_index(np.lexsort((-freed.ravel(), price.ravel()))[0], price.shape)
        choice[s] = int(o)


def _improved(problem: Problem, limit: int, choice: list[int]) -> tuple[int, ...]:
    """Return ``choice`` after the swaps, largest first, that lower the error within ``limit``."""
    errors, size_bytes = problem.padded
    rows = np.arange(len(choice))
    while True:
        spare = limit - problem.total(choice)
        fits = (size_bytes - size_bytes[rows, choice][:, None] <= spare).all(axis=2)
        gain = np.where(fits, errors[rows, choice][:, None] - errors, -np.inf)
        if gain.max() <= 0:
            return tuple(choice)
        s, o = np.unravel_index(gain.argmax(), gain.shape)
        choice[s] = int(o)


def _descend(problem: Problem) -> tuple[int, ...]:
    """Return a choice with a low peak: the least at the instant that is highest at best, then swaps that lower it."""
    _, size_bytes = problem.padded
    highest = int((problem.base + problem.least.sum(axis=0)).argmax())
    choice = [int(slot.bytes[:, highest].argmin()) for slot in problem.slots]
    rows = np.arange(len(choice))
    closed = np.isinf(problem.padded[0])
    while True:
        total = problem.total(choice)
        peaks = (total + size_bytes - size_bytes[rows, choice][:, None]).max(axis=2)
        peaks[closed] = np.iinfo(np.int64).max
        if peaks.min() >= total.max():
            return tuple(choice)
        s, o = np.unravel_index(peaks.argmin(), peaks.shape)
        choice[s] = int(o)


def _first_use(slot: Slot) -> int:
    """Return the first instant at which an option takes bytes, the number of instants where none ever does."""
    used = np.flatnonzero(slot.profiles.max(axis=0))
    return int(used[0]) if len(used) else slot.profiles.shape[1]


def _check(base: IntArray, slots: Sequence[Slot]) -> None:
    if base.ndim != 1 or not len(base) or base.min() < 0:
        raise ValueError(f"base of shape {base.shape}: expected the bytes, at least 0, of at least one instant")
    if not slots:
        raise ValueError("no slots: expected at least one")
    for s, slot in enumerate(slots):
        shape = (len(slot.errors), len(base))
        if slot.profiles.shape != shape or not len(slot.errors):
            raise ValueError(
                f"slot {s}: profiles of shape {slot.profiles.shape}, expected {shape}, at least one option"
            )
        if slot.profiles.min() < 0 or not np.isfinite(slot.errors).all() or slot.errors.min() < 0:
            raise ValueError(f"slot {s}: an error or a number of bytes is negative or not finite")
