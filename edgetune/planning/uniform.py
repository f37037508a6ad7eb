"""One codec and one ε for all saved tensors: the largest ε that is within the limits.

This module may know candidates and calibrations; it must not know how a mixed choice is found, or engines.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from edgetune.bundle import Manifest, OptionSpec
from edgetune.errors import UsageError
from edgetune.planning.candidates import Candidate, Workbench
from edgetune.planning.rates import ranked
from edgetune.planning.selection import check_codec, default_selection
from edgetune.planning.spectra import COUNT


@dataclass(frozen=True)
class Uniform:
    """``codec`` (None: the first of the menu) for all saved tensors, at the largest ε that fits, or at just the
    ``epsilon`` or ``rate`` that is given. As ``cheapest.Method``."""

    codec: str | None = None
    epsilon: float | None = None
    rate: float | None = None

    def check(self, manifest: Manifest) -> None:
        """Raise UsageError if no tensor of a whole bundle has an option ``codec``, or none of those options counts
        although there is a ``rate``."""
        if self.codec is not None:
            check_codec(manifest, self.codec)
        options = self._options(manifest)
        if self.rate is not None and not any(mode.source == COUNT for option in options for mode in option.modes):
            label = self.codec or manifest.codec
            raise UsageError(f"a rate is for codecs that count elements; '{label}' has none")

    def find(self, bench: Workbench) -> tuple[Candidate, None] | None:
        """Return the candidate with the largest ε that fits, if one does."""
        values = self._values(bench)
        chosen = last_that(lambda index: self._at(bench, values[index]).fits(), len(values))
        return None if chosen is None else (self._at(bench, values[chosen]), None)

    def least(self, bench: Workbench) -> Candidate:
        """Return the candidate that takes least."""
        return self._at(bench, self._values(bench)[0])

    def loss(self, bench: Workbench, candidate: Candidate) -> float:
        """Return the mean error per saved tensor where it was measured, or else √(1 - ε), the relative error of what is
        saved; 0 where the user set ε, or nothing is known of the data."""
        known = bench.calibration is not None and bench.calibration.samples > 0
        if not known or self.epsilon is not None or candidate.epsilon is None:
            return 0.0
        if candidate.error is not None:
            return candidate.error / max(1, len(candidate.rates))
        return math.sqrt(1.0 - candidate.epsilon)

    def words(self, least: Candidate) -> tuple[str, str]:
        """Return what was tried for ``least``, and what a user may change of it."""
        if not least.ranks:
            return "", ""
        if self.epsilon is not None:
            return f", epsilon = {self.epsilon:g} as given", "lower epsilon, "
        if self.rate is not None:
            return f", rate = {self.rate:g} as given", "raise the rate, "
        return ", the least ranks", ""

    def _values(self, bench: Workbench) -> Sequence[float | None]:
        truncates = any(ranked(option) for option in self._options(bench.manifest))
        if truncates and bench.calibration is not None and self.rate is None:
            return [self.epsilon] if self.epsilon is not None else bench.breakpoints()
        return [None]

    def _options(self, manifest: Manifest) -> list[OptionSpec]:
        selection = default_selection(manifest, self.codec)
        return [spec.option(selection[spec.name]) for spec in manifest.saved]

    def _at(self, bench: Workbench, value: float | None) -> Candidate:
        return bench.uniform(self.codec, value, self.rate)


def uniform_of_every_codec(bench: Workbench) -> list[Candidate]:
    """Return, for each codec of the menu that can fit, the candidate with its largest ε."""
    found = (Uniform(label).find(bench) for label in labels_of(bench.manifest))
    return [one[0] for one in found if one is not None]


def labels_of(manifest: Manifest) -> list[str]:
    """Return the labels of all options, each once, in the order of the menus."""
    return list(dict.fromkeys(option.label for spec in manifest.saved for option in spec.options))


def last_that(holds: Callable[[int], bool], count: int) -> int | None:
    """Return the last index below ``count`` that ``holds``, which no index after a failing one may; None if none."""
    low, high = -1, count  # `low` holds, `high` fails; neither end is ever asked
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low if low >= 0 else None
