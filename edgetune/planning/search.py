"""Branch and bound over the slots of a problem, many partial choices at a time.

Slots are decided in their order. A partial choice is dropped where it cannot be completed within the limit, where its
Lagrangian bound is no better than the best choice known, or where another of the same slots is no worse in error and
in all bytes that can still matter. Slots that are encoded one after the other and released in the opposite order add
to all later instants alike, so that few different sums matter, and often a single one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from edgetune.planning.choices import FloatArray, IntArray, Problem, rounding

RELATIVE_TOLERANCE = 1e-9
"""A choice counts as the best when no other is better by more than this part of its error."""

_Number = TypeVar("_Number", np.int64, np.float64)

_SCALES = (0.0, 0.4, 0.6, 0.75, 0.87, 1.0, 1.15, 1.35, 1.7, 2.5)
"""Of the multipliers: what has spent more, or less, than its share is bounded best by higher, or lower, ones."""

_WIDER = 16


@dataclass(frozen=True)
class Found:
    """The best choice that a search met (None: none better than the one given), and a bound of all it did not meet.

    ``bound`` is infinite where the search was complete.
    """

    choice: tuple[int, ...] | None
    bound: float


@dataclass(frozen=True)
class _Partial:
    """Partial choices n of the first slots: bound [n], error [n], bytes at each row [n,t] and options [n,s]."""

    bound: FloatArray
    error: FloatArray
    bytes: IntArray
    path: NDArray[np.int16]

    def take(self, which: NDArray[np.bool_] | NDArray[np.intp]) -> _Partial:
        return _Partial(self.bound[which], self.error[which], self.bytes[which], self.path[which])


class Search:
    """Find the choice within ``limit`` with the least error below ``best_error``, or that no such choice exists.

    With ``best_error`` None the first choice within ``limit`` will do: then all errors must be zero.
    """

    def __init__(self, problem: Problem, limit: int, multipliers: FloatArray, best_error: float | None) -> None:
        self._problem, self._limit, self._any = problem, limit, best_error is None
        self._best: tuple[int, ...] | None = None
        self._work = 0
        self._threshold = 0.0 if best_error is None else best_error * (1 - RELATIVE_TOLERANCE)
        slots = problem.slots
        self._least_rest = _sums_after(problem.least) + problem.base
        self._most_rest = _sums_after(problem.most) + problem.base
        self._priced_rows = np.flatnonzero(multipliers)
        self._prices = np.outer(_SCALES, multipliers[self._priced_rows])
        # Each option's error and price by vector of multipliers, and the sum of the least of all slots not yet decided.
        self._priced = [slot.errors[:, None] + slot.bytes[:, self._priced_rows] @ self._prices.T for slot in slots]
        self._priced_rest = _sums_after(np.stack([priced.min(axis=0) for priced in self._priced]))
        self._rounding = rounding(limit, multipliers) * np.array(_SCALES)
        self._rows = [self._rows_that_matter(level) for level in range(1, len(slots) + 1)]

    def run(self, *, width: int, most_work: int) -> Found:
        """Search until nothing is left, or ``most_work`` numbers were compared.

        ``width`` partial choices are extended at a time. The deepest and there the most promising go first, so that
        complete choices are met early.
        """
        depth = len(self._problem.slots)
        root = _Partial(
            np.full(1, -np.inf),
            np.zeros(1),
            np.zeros((1, len(self._problem.base)), np.int64),
            np.zeros((1, 0), np.int16),
        )
        pools: list[list[_Partial]] = [[] for _ in range(depth)]
        pools[0].append(root)
        while any(pools):
            if self._work >= most_work:
                open_bounds = [float(part.bound.min()) for pool in pools for part in pool]
                return Found(self._best, min(open_bounds))
            level = max(i for i, pool in enumerate(pools) if pool)
            part = pools[level].pop()
            part = part.take(part.bound <= self._threshold)
            sums = len(self._rows[level][0])
            # Dropping what another beats takes n log n steps with one sum, n² with several: more at a time pay there.
            most = width if sums > 1 else _WIDER * width
            if len(part.error) > most:
                order = np.argpartition(part.bound, most)
                pools[level].append(part.take(order[most:]))
                part = part.take(order[:most])
            if not len(part.error):
                continue
            children = self._extend(level, part)
            if not len(children.error):
                continue
            if level + 1 == depth:
                self._finish(children)
                if self._any:
                    break
            else:
                pools[level + 1].append(children)
        return Found(self._best, np.inf)

    def _extend(self, level: int, part: _Partial) -> _Partial:
        slot = self._problem.slots[level]
        room = (self._limit - self._problem.base)[self._priced_rows]
        spent = part.error[:, None] + (part.bytes[:, self._priced_rows] - room) @ self._prices.T  # [n,m]
        rest = self._priced[level] + self._priced_rest[level + 1] - self._rounding  # [o,m]
        bound = (spent[:, None, :] + rest).max(axis=2)
        parent, option = np.nonzero(bound <= self._threshold)
        size_bytes = part.bytes[parent] + slot.bytes[option]
        fits = (size_bytes <= self._limit - self._least_rest[level + 1]).all(axis=1)
        parent, option, size_bytes = parent[fits], option[fits], size_bytes[fits]
        path = np.column_stack([part.path[parent], option.astype(np.int16)])
        error = part.error[parent] + slot.errors[option]
        children = _Partial(bound[parent, option], error, size_bytes, path)
        rows, harmless = self._rows[level]
        self._work += bound.size + 2 * len(error) * len(rows)
        return children.take(_undominated(error, np.maximum(size_bytes[:, rows], harmless)))

    def _finish(self, complete: _Partial) -> None:
        best = int(complete.error.argmin())
        if complete.error[best] <= self._threshold:
            self._threshold = float(complete.error[best]) * (1 - RELATIVE_TOLERANCE)
            self._best = tuple(int(o) for o in complete.path[best])

    def _rows_that_matter(self, level: int) -> tuple[IntArray, IntArray]:
        """Return the rows whose sums after ``level`` slots may still decide, one for all that have always equal sums.

        The second array is the largest sum below which none of a row and its equals can bind any more.
        """
        undecided = (self._problem.most[level:] != self._problem.least[level:]).any(axis=0)
        rows = np.flatnonzero(undecided)
        if not len(rows):
            return rows, rows
        done = np.concatenate([slot.bytes[:, rows] for slot in self._problem.slots[:level]])
        _, first, group = np.unique(done, axis=1, return_index=True, return_inverse=True)
        harmless = np.full(len(first), np.iinfo(np.int64).max)
        np.minimum.at(harmless, group.ravel(), self._limit - self._most_rest[level][rows])
        return rows[first], harmless


def _sums_after(values: NDArray[_Number]) -> NDArray[_Number]:
    """Return [s+1,...]: at s the sum of ``values`` [s,...] from s on."""
    sums = np.zeros((len(values) + 1, *values.shape[1:]), values.dtype)
    sums[:-1] = np.cumsum(values[::-1], axis=0)[::-1]
    return sums


_BLOCK = 256  # states compared at a time


def _undominated(error: FloatArray, sums: IntArray) -> NDArray[np.intp]:
    """Return the states that no other equals or betters in error and all sums [n,t]; of equal ones one."""
    if len(error) < 2:
        return np.arange(len(error))
    sums = sums[:, sums.min(axis=0) != sums.max(axis=0)]
    order = np.lexsort((sums.sum(axis=1), error))
    if sums.shape[1] == 0:
        return order[:1]
    if sums.shape[1] == 1:
        ordered = sums[order, 0]
        before = np.minimum.accumulate(ordered)
        fewer = np.ones(len(order), bool)
        fewer[1:] = ordered[1:] < before[:-1]
        return order[fewer]
    kept = order[:0]
    for start in range(0, len(order), _BLOCK):
        block = order[start : start + _BLOCK]
        block = block[~_no_better(sums[block], sums[kept]).any(axis=1)]
        # Of a block's own states, only an earlier one may drop a later one.
        block = block[~np.tril(_no_better(sums[block], sums[block]), -1).any(axis=1)]
        kept = np.concatenate([kept, block])
    return kept


def _no_better(sums: IntArray, others: IntArray) -> NDArray[np.bool_]:
    """Mark [n,k] where no sum of state n [n,t] is less than that of state k of the others [k,t]."""
    marks = np.ones((len(sums), len(others)), bool)
    for mine, its in zip(sums.T, others.T, strict=True):
        marks &= its <= mine[:, None]
    return marks
