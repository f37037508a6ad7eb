"""A detector for numbers of any size: ADWIN on values in units of their own noise. Pure arithmetic.

ADWIN's cut is made for values between 0 and 1. The loss of a batch of 32 samples moves by some hundredths, and a jump
to three would be seen only after a dozen steps, when it may be learned already. So values are divided by a few standard
deviations of what they do from one to the next, which is found anew after every change.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from edgetune.agent.drift.adwin import Adwin, Change

LEARNED_FROM = 20
"""Values that tell the noise; until the first of them are there, nothing is found."""
DEVIATIONS = 4.0
"""What counts as the range of the noise. tools/drift_study.py has what other numbers would do."""
_NORMAL = 0.9539
"""Median distance of two draws of a normal variable, in its standard deviations; a jump among them hardly moves it."""


class Detector:
    """Watches one stream of numbers.

    Args:
        delta: confidence of each judgement. least_noise: noise that does not matter; less counts as so much.
    """

    def __init__(self, delta: float, least_noise: float = 0.0) -> None:
        self.least_noise = least_noise
        self._adwin = Adwin(delta, clock=1)  # a step is dear, and a judgement takes some 0.1 ms
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self._adwin.reset()
        self._first: list[float] | None = []
        self._unit: float | None = None

    def update(self, value: float) -> Change | None:
        """Take in a finite value; return the change that was found with it."""
        values = [value]
        if self._first is not None:
            self._first.append(value)
            if len(self._first) == LEARNED_FROM:  # what the old unit found or not is judged once more in the new one
                values, self._unit, self._first = self._first, self._unit_of(self._first), None
                self._adwin.reset()
        if self._unit is None:
            return None
        for known in values:
            change = self._adwin.update(known / self._unit)
            if change is not None:
                self._first = []  # the old unit serves until the new one is known
                return Change(change.before * self._unit, change.after * self._unit, change.values)
        return None

    def to_plain(self) -> dict[str, Any]:
        """Return the state as JSON data."""
        return {"adwin": self._adwin.to_plain(), "first": self._first, "unit": self._unit}

    def from_plain(self, data: Mapping[str, Any]) -> None:
        """Take the state that :meth:`to_plain` described."""
        self._adwin.from_plain(data["adwin"])
        self._first = None if data["first"] is None else [float(value) for value in data["first"]]
        self._unit = None if data["unit"] is None else float(data["unit"])

    def _unit_of(self, values: list[float]) -> float:
        noise = statistics.median(abs(later - earlier) for earlier, later in pairwise(values)) / _NORMAL
        return DEVIATIONS * max(noise, self.least_noise, 1e-12)
