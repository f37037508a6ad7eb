"""ADWIN: a window over a stream of numbers that forgets what came before a change of the mean.

Bifet and Gavaldà, "Learning from Time-Changing Data with Adaptive Windowing", SIAM Data Mining 2007 (algorithm ADWIN2:
an exponential histogram, and the cut with the window's variance). Details are those of the library river
(``river.drift.ADWIN``, version 0.26), to which a golden file holds this: the counts that enter the cut, and that a
window in which a change was found is forgotten as a whole. Pure arithmetic; its state is small and plain.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

MOST_BUCKETS = 5
"""Per row; a row's buckets hold 1, 2, 4, ... values each."""
LEAST_SIDE = 5
"""No cut leaves less than this on one side."""
LEAST_WINDOW = 10
"""A window of no more values than this is not judged."""


@dataclass(frozen=True)
class Change:
    """The mean changed: what it was before the cut that showed it, what it is after, and of how many values."""

    before: float
    after: float
    values: int


class Adwin:
    """One detector. ``delta``: confidence of each judgement. ``clock``: it judges at every so-manieth value."""

    def __init__(self, delta: float = 0.002, clock: int = 32) -> None:
        self.delta, self.clock = delta, clock
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.width, self.total, self.variance, self._tick = 0, 0.0, 0.0, 0
        # Row i: the sums and the variances (times the count) of its buckets of 2**i values, the oldest first.
        self._rows: list[list[tuple[float, float]]] = [[]]
        self._changed = False

    @property
    def mean(self) -> float:
        """Of the window; 0 of an empty one."""
        return self.total / self.width if self.width else 0.0

    def update(self, value: float) -> Change | None:
        """Take in a value; return the change that was found with it."""
        if self._changed:
            self.reset()
        self.width += 1
        if self.width > 1:
            self.variance += (self.width - 1) * (value - self.total / (self.width - 1)) ** 2 / self.width
        self.total += value
        self._rows[0].append((value, 0.0))
        self._compress()
        self._tick += 1
        if self._tick % self.clock or self.width <= LEAST_WINDOW:
            return None
        found = change = self._cut()
        while found is not None:
            self._changed, found = True, self._cut()
        return change

    def _compress(self) -> None:
        """Join the two oldest buckets of every row that has one too many."""
        for index, row in enumerate(self._rows):
            if len(row) <= MOST_BUCKETS:
                return
            size = 1 << index
            (sum1, variance1), (sum2, variance2) = row[:2]
            del row[:2]
            if index + 1 == len(self._rows):
                self._rows.append([])
            between = size * size * (sum1 / size - sum2 / size) ** 2 / (2 * size)
            self._rows[index + 1].append((sum1 + sum2, variance1 + variance2 + between))

    def _cut(self) -> Change | None:
        """Drop the oldest bucket if some cut splits the window into parts of different means; return these."""
        old, old_sum = 0, 0.0
        for index in range(len(self._rows) - 1, -1, -1):
            for place, (bucket_sum, _) in enumerate(self._rows[index]):
                old, old_sum = old + (1 << index), old_sum + bucket_sum
                new = self.width - old
                if index == 0 and place == len(self._rows[0]) - 1:
                    return None  # nothing is left on the other side
                if new < LEAST_SIDE or old < LEAST_SIDE:
                    continue
                before, after = old_sum / old, (self.total - old_sum) / new
                if self._differ(old, new, before - after):
                    self._drop()
                    return Change(before, after, new)
        return None

    def _differ(self, old: int, new: int, distance: float) -> bool:
        confidence = math.log(2 * math.log(self.width) / self.delta)
        inverse = 1 / (old - LEAST_SIDE + 1) + 1 / (new - LEAST_SIDE + 1)
        variance = self.variance / self.width
        return abs(distance) > math.sqrt(2 * inverse * variance * confidence) + 2 / 3 * confidence * inverse

    def _drop(self) -> None:
        """Forget the oldest bucket."""
        row = self._rows[-1]
        size = 1 << len(self._rows) - 1
        bucket_sum, variance = row.pop(0)
        self.width -= size
        self.total -= bucket_sum
        self.variance -= variance + size * self.width * (bucket_sum / size - self.mean) ** 2 / (size + self.width)
        while len(self._rows) > 1 and not self._rows[-1]:
            self._rows.pop()

    def to_plain(self) -> dict[str, Any]:
        """Return the state as JSON data."""
        return {
            "width": self.width, "total": self.total, "variance": self.variance, "tick": self._tick,
            "changed": self._changed, "rows": [[list(bucket) for bucket in row] for row in self._rows],
        }  # fmt: skip

    def from_plain(self, data: Mapping[str, Any]) -> None:
        """Take the state that :meth:`to_plain` described."""
        self.width, self.total, self.variance = int(data["width"]), float(data["total"]), float(data["variance"])
        self._tick, self._changed = int(data["tick"]), bool(data["changed"])
        self._rows = [[(float(total), float(variance)) for total, variance in row] for row in data["rows"]]
