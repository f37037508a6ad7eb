"""One option per slot, under a limit at every instant: the problem, its reduction, and its Lagrangian bound.

This module may know arrays of bytes and errors; it must not know graphs, codecs or plans. Legend: s slot, o option,
t instant (a row that is left of all instants), m vector of multipliers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class Candidates:
    """The options of one slot that are still open: their numbers [o], errors [o] and bytes at each row [o,t]."""

    options: IntArray
    errors: FloatArray
    bytes: IntArray

    def keep(self, which: NDArray[np.bool_]) -> Candidates:
        """Return the options that ``which`` [o] marks."""
        return self if which.all() else Candidates(self.options[which], self.errors[which], self.bytes[which])


@dataclass(frozen=True)
class Problem:
    """Choose one option per slot with the least total error, where ``base[t] + Σ_s bytes[s,o_s,t]`` is limited."""

    base: IntArray
    slots: tuple[Candidates, ...]

    @cached_property
    def padded(self) -> tuple[FloatArray, IntArray]:
        """The errors [s,o] and bytes [s,o,t], with options of infinite error and no bytes where a slot has fewer."""
        most = max(len(slot.errors) for slot in self.slots)
        errors = np.full((len(self.slots), most), np.inf)
        size_bytes = np.zeros((len(self.slots), most, len(self.base)), np.int64)
        for s, slot in enumerate(self.slots):
            errors[s, : len(slot.errors)] = slot.errors
            size_bytes[s, : len(slot.errors)] = slot.bytes
        return errors, size_bytes

    @cached_property
    def least(self) -> IntArray:
        """The least bytes of each slot at each row [s,t]."""
        return np.stack([slot.bytes.min(axis=0) for slot in self.slots])

    @cached_property
    def most(self) -> IntArray:
        """The most bytes of each slot at each row [s,t]."""
        return np.stack([slot.bytes.max(axis=0) for slot in self.slots])

    def total(self, choice: Sequence[int]) -> IntArray:
        """Return the bytes at each row [t] where slot s takes its open option ``choice[s]``."""
        total = self.base.copy()
        for slot, option in zip(self.slots, choice, strict=True):
            total += slot.bytes[option]
        return total

    def rows(self, which: IntArray) -> Problem:
        """Return the problem that limits only the rows ``which``."""
        slots = tuple(Candidates(slot.options, slot.errors, slot.bytes[:, which]) for slot in self.slots)
        return Problem(self.base[which], slots)


def reduced(problem: Problem) -> Problem:
    """Return ``problem`` without rows that another implies and without options that another beats.

    Both hold for every limit: no choice of the result has another peak than in ``problem``, and of the choices left
    out, each has its equal or better, in error and at every row, among those kept.
    """
    while True:
        slots = tuple(slot.keep(_unbeaten(slot)) for slot in problem.slots)
        smaller = Problem(problem.base, slots)
        smaller = smaller.rows(_unimplied(smaller))
        if smaller.base.shape == problem.base.shape and all(
            len(new.errors) == len(old.errors) for new, old in zip(slots, problem.slots, strict=True)
        ):
            return smaller
        problem = smaller


def within(problem: Problem, limit: int) -> Problem | None:
    """Return ``problem`` without options that cannot be within ``limit``, and rows that cannot be beyond it.

    None where a slot is left without options, or the least bytes of all slots are beyond the limit: nothing fits.
    """
    while True:
        spare = limit - problem.base - problem.least.sum(axis=0)
        if (spare < 0).any():
            return None
        fits = [
            (slot.bytes - least <= spare).all(axis=1) for slot, least in zip(problem.slots, problem.least, strict=True)
        ]
        if not all(which.any() for which in fits):
            return None
        done = all(which.all() for which in fits)
        if not done:
            problem = Problem(problem.base, tuple(s.keep(which) for s, which in zip(problem.slots, fits, strict=True)))
        bind = problem.base + problem.most.sum(axis=0) > limit
        problem = problem.rows(np.flatnonzero(bind))
        if done:
            return reduced(problem)


def changes(base: IntArray, profiles: Sequence[IntArray]) -> tuple[IntArray, IntArray]:
    """Return the first instant of each run in which no profile changes, and the most base bytes in that run."""
    starts = np.zeros(len(base), bool)
    starts[0] = True
    for profile in profiles:
        starts[1:] |= (profile[:, 1:] != profile[:, :-1]).any(axis=0)
    first = np.flatnonzero(starts)
    return first, np.maximum.reduceat(base, first)


def _unbeaten(slot: Candidates) -> NDArray[np.bool_]:
    """Mark the options that no other equals or betters in error and at every row; of equal ones the first."""
    order = np.lexsort((slot.bytes.sum(axis=1), slot.errors))  # only an earlier one can beat a later one
    kept: list[int] = []
    for o in order:
        if not kept or not (slot.bytes[kept] <= slot.bytes[o]).all(axis=1).any():
            kept.append(int(o))
    marks = np.zeros(len(order), bool)
    marks[kept] = True
    return marks


def _unimplied(problem: Problem) -> IntArray:
    """Return the rows that no other row exceeds whatever is chosen.

    Row t is implied by row u where base[t] - base[u] + Σ_s max_o (bytes[s,o,t] - bytes[s,o,u]) ≤ 0. Then its mean over
    all choices is at most that of u, so one pass in descending order of the means meets u before t.
    """
    means = problem.base + sum(slot.bytes.mean(axis=0) for slot in problem.slots)
    kept: list[int] = []
    for t in np.argsort(-means, kind="stable"):
        above = problem.base[t] - problem.base[kept]
        for slot in problem.slots:
            above = above + (slot.bytes[:, t, None] - slot.bytes[:, kept]).max(axis=0)
        if not (above <= 0).any():
            kept.append(int(t))
    return np.array(sorted(kept), np.int64)


def lower_bound(problem: Problem, limit: int, multipliers: FloatArray) -> float:
    """Return a lower bound of the least error within ``limit``, for any ``multipliers`` ≥ 0 [t] (error per byte).

    This is the Lagrangian Σ_s min_o (errors[s,o] + Σ_t λ[t] bytes[s,o,t]) - Σ_t λ[t] (limit - base[t]), less what
    rounding may add to it.
    """
    least = sum(float((slot.errors + slot.bytes @ multipliers).min()) for slot in problem.slots)
    return least - float(multipliers @ (limit - problem.base)) - rounding(limit, multipliers)


def promising(problem: Problem, limit: int, multipliers: FloatArray, error: float) -> Problem | None:
    """Return ``problem`` without options that are in no choice whose error is at most ``error``.

    An option's reduced cost is by how much its term exceeds the least of its slot; the Lagrangian bound of all choices
    with that option is higher by as much. None where a slot is left without options: there is no such choice.
    """
    allowed = error - lower_bound(problem, limit, multipliers)
    terms = [slot.errors + slot.bytes @ multipliers for slot in problem.slots]
    keep = [term - term.min() <= allowed for term in terms]
    if not all(which.any() for which in keep):
        return None
    return Problem(problem.base, tuple(slot.keep(which) for slot, which in zip(problem.slots, keep, strict=True)))


def rounding(limit: int, multipliers: FloatArray) -> float:
    """Return what rounding may add to a Lagrangian: its terms are at most of the size of λ × limit."""
    return 1e-13 * float(multipliers.sum()) * limit


def multipliers(problem: Problem, limit: int) -> FloatArray:
    """Return multipliers [t] whose Lagrangian bound is nearly the best, that of the linear relaxation.

    An interior-point method: each min_o is replaced by the soft minimum of temperature μ and each λ[t] ≥ 0 by a
    logarithmic barrier, which leaves a smooth concave function; Newton's method climbs it for a falling series of μ.
    Only rows that the relaxation would exceed take part: few do, of many.
    """
    errors, size_bytes = problem.padded
    limit = max(limit, 1)
    scale_error = float(np.where(np.isfinite(errors), errors, 0.0).max()) or 1.0
    costs = errors / scale_error
    usage = size_bytes / limit
    spare = (limit - problem.base) / limit
    active: list[int] = []
    weights = np.zeros(0)
    for _ in range(_MOST_ROUNDS):
        chances = _soft_choice(costs, usage[:, :, active], weights, _LAST_TEMPERATURE)
        beyond = np.einsum("so,sot->t", chances, usage) - spare
        beyond[active] = -np.inf
        new = [int(t) for t in np.argsort(-beyond, kind="stable")[:_ROWS_PER_ROUND] if beyond[t] > -1e-6]
        if not new:
            break
        active += new
        weights = _climb(costs, usage[:, :, active], spare[active])
    result = np.zeros(len(problem.base))
    result[active] = np.where(weights > 1e-9, weights, 0.0) * scale_error / limit
    return result


_MOST_ROUNDS = 8
_ROWS_PER_ROUND = 8
_LAST_TEMPERATURE = 1e-8
_MOST_WEIGHT = 1e4
"""Where the limit is the least possible, the best multipliers are infinite; this bounds them, in scaled units."""


def _soft_choice(costs: FloatArray, usage: FloatArray, weights: FloatArray, temperature: float) -> FloatArray:
    """Return the chances [s,o] with which the soft minimum of temperature μ takes each option."""
    priced = costs + usage @ weights
    chances = np.exp((priced.min(axis=1, keepdims=True) - priced) / temperature)
    return np.asarray(chances / chances.sum(axis=1, keepdims=True))


def _climb(costs: FloatArray, usage: FloatArray, spare: FloatArray) -> FloatArray:
    def height(weights: FloatArray, temperature: float) -> float:
        priced = costs + usage @ weights
        least = priced.min(axis=1, keepdims=True)
        soft = least[:, 0] - temperature * np.log(np.exp((least - priced) / temperature).sum(axis=1))
        barrier = temperature * (np.log(weights).sum() - weights.sum() / _MOST_WEIGHT)
        return float(soft.sum() - weights @ spare + barrier)

    weights, temperature = np.ones(len(spare)), 1.0
    flat = usage.reshape(-1, len(spare))
    while temperature > _LAST_TEMPERATURE:
        temperature = max(0.2 * temperature, _LAST_TEMPERATURE)
        for _ in range(30):
            chances = _soft_choice(costs, usage, weights, temperature)
            means = np.einsum("so,sot->st", chances, usage)
            slope = means.sum(axis=0) - spare + temperature * (1 / weights - 1 / _MOST_WEIGHT)
            spread = flat.T @ (flat * chances.reshape(-1, 1)) - means.T @ means
            try:
                step = np.linalg.solve(spread / temperature + np.diag(temperature / weights**2), slope)
            except np.linalg.LinAlgError:
                return weights  # the barrier is lost in rounding; any weights give a bound, and these are close
            gain = float(step @ slope)
            if gain < 0.01 * temperature:
                break
            relative = step / weights
            # No weight may reach zero, nor grow tenfold at once: far from the top the step says little but its sign.
            shrink = 1 / max(1.0, -float(relative.min()) / 0.95, float(relative.max()) / 10)
            here = height(weights, temperature)
            while shrink > 1e-9 and height(weights + shrink * step, temperature) < here + 0.1 * shrink * gain:
                shrink *= 0.5
            if shrink <= 1e-9:
                break  # at the limit of what rounding lets it climb
            weights = weights + shrink * step
    return weights
