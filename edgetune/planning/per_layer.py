"""An option and a rate of its own for each saved tensor: the least total error within the limits.

The solver (``planning.allocation``) knows sums of bytes only: ``base[t] + Σ_s bytes[s,o,t]`` over the instants t of the
whole train graph. Here the sums are made of graphs, one tensor's option at a time, and the solver's choice is predicted
as every plan is. Where bytes did not add up (two tensors that are computed again together, a buffer that is reused),
the limit that the solver is given moves by the difference, so what is returned always fits. Choices whose train graph
comes in two stages and choices whose graph does not are weighed apart (``planning.profiles``).

This module may know candidates, graphs and the solver; it must not know engines.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from edgetune.errors import BudgetError, StateError
from edgetune.planning.allocation import Allocation, Allocator, Slot
from edgetune.planning.candidates import Candidate, Workbench
from edgetune.planning.choices import FloatArray, IntArray
from edgetune.planning.profiles import Profiles
from edgetune.planning.rates import FINER, LEVELS, Rated, all_rates, has_errors
from edgetune.planning.uniform import labels_of, uniform_of_every_codec

_ROUNDS = 6
"""How often the solver's limit is moved by what did not add up."""
_UNLIMITED = 1 << 62


@dataclass(frozen=True)
class FrontPoint:
    """One plan in front of a user who chooses: ``label`` is ``per-layer``, or the codec that keeps all tensors."""

    label: str
    epsilon: float | None
    peak_bytes: int
    saved_bytes: int
    error: float
    selection: Mapping[str, str]


@dataclass(frozen=True)
class Front:
    """The plans that no other betters, by ascending peak, and uniform ones beside them, by codec and ascending ε."""

    mixed: tuple[FrontPoint, ...]
    uniform: tuple[FrontPoint, ...]


class PerLayer:
    """The least total error within the limits, for each saved tensor by an option and a rate of its own. As
    ``cheapest.Method``."""

    def find(self, bench: Workbench) -> tuple[Candidate, float] | None:
        """Return the candidate with the least total error within the limits, if one fits, and a lower bound of that
        error.

        It is never worse than a uniform one of any codec. The bound holds for the rates that were weighed, and as far
        as bytes add up.

        Raises:
            StateError: the calibration has no errors.
        """
        _check_errors(bench)
        known = uniform_of_every_codec(bench)
        found = [mixing.least_error() for mixing in _mixings(bench, known)]
        fitting = [candidate for candidate in (*(one for one, _ in found), *known) if candidate is not None]
        if not fitting:
            return None
        best = min(fitting, key=lambda c: (_error(c), c.needed_bytes()))
        return dataclasses.replace(best, epsilon=None), min(*(bound for _, bound in found), _error(best))

    def least(self, bench: Workbench) -> Candidate:
        """Return the candidate that takes least; with an activation budget, of those that keep it if there are any.

        Raises:
            StateError: the calibration has no errors.
        """
        _check_errors(bench)
        mixings = _mixings(bench, [])
        candidates = [least for mixing in mixings for least in (mixing.least_peak(), mixing.least_saved())]
        candidates += [bench.uniform(label, LEVELS[0]) for label in labels_of(bench.manifest)]
        activation = bench.limits.activation_budget_bytes
        if activation is not None:
            keeping = [candidate for candidate in candidates if candidate.saved_bytes <= activation]
            if not keeping:
                return min(candidates, key=lambda c: c.saved_bytes)
            candidates = keeping
        return min(candidates, key=lambda c: c.needed_bytes())

    def loss(self, bench: Workbench, candidate: Candidate) -> float:
        """Return the mean error per saved tensor; 0 where nothing was measured of them."""
        known = bench.calibration is not None and bench.calibration.samples > 0
        return _error(candidate) / max(1, len(candidate.rates)) if known else 0.0

    def words(self, least: Candidate) -> tuple[str, str]:
        """Return what was tried for ``least``, and what a user may change of it."""
        return ", the least that any codec of the menu keeps", ""


def pareto_front(bench: Workbench, points: int = 16) -> Front:
    """Return what peaks and errors can be had, whatever the budgets.

    Raises:
        StateError: the calibration has no errors.
    """
    _check_errors(bench)
    free = dataclasses.replace(bench.limits, budget_bytes=None, activation_budget_bytes=None)
    bench = Workbench(bench.manifest, bench.calibration, free)
    uniform: list[tuple[str, Candidate]] = []
    for label in labels_of(bench.manifest):
        seen = []
        for epsilon in sorted({*LEVELS, *FINER}):
            candidate = bench.uniform(label, epsilon)
            if candidate.rates not in seen:
                seen.append(candidate.rates)
                uniform.append((label, candidate))
    known = [candidate for _, candidate in uniform]
    mixed = [candidate for mixing in _mixings(bench, known) for candidate in mixing.front(points)]
    every = [_point("per-layer", candidate) for candidate in (*mixed, *known)]
    front: list[FrontPoint] = []
    for point in sorted(every, key=lambda p: (p.peak_bytes, p.error)):
        if not front or point.error < front[-1].error:
            front.append(dataclasses.replace(point, epsilon=None))
    return Front(tuple(front), tuple(_point(label, candidate) for label, candidate in uniform))


def _mixings(bench: Workbench, incumbents: Sequence[Candidate]) -> list[Mixing]:
    """Return one for train graphs in stages and one for others, as far as the bundle has such."""
    references: dict[bool, Candidate] = {}
    candidates = [bench.uniform(label, 0.5) for label in labels_of(bench.manifest)]
    for candidate in sorted(candidates, key=lambda c: len(c.manifest.graphs["train"].nodes)):
        references.setdefault(bool(candidate.manifest.graphs["train"].stages), candidate)
    return [Mixing(bench, reference, incumbents) for reference in references.values()]


class Mixing:
    """The options of all saved tensors as the solver wants them."""

    def __init__(self, bench: Workbench, reference: Candidate, incumbents: Sequence[Candidate]) -> None:
        """Weigh all rates of all options, those of ``incumbents`` among them, by changes of ``reference``."""
        assert bench.calibration is not None
        self._bench = bench
        limits = bench.limits
        extra = {one.epsilon for candidate in incumbents for one in candidate.rates.values() if one.epsilon}
        profiles = Profiles(bench, reference)
        self._rates: list[list[Rated]] = []
        self._slots: list[tuple[FloatArray, IntArray, IntArray]] = []
        base = np.maximum(profiles.base() + limits.correction_bytes + limits.reserve_bytes, 0)
        for spec in bench.manifest.saved:
            every = all_rates(spec, bench.calibration, limits.piece, extra)
            rates = [one for one in every if profiles.allows(spec, one.label)]
            changed = np.stack([profiles.change(spec, one) for one in rates])  # [o,t], of either sign
            least = changed.min(axis=0)
            base = base + least
            errors = np.array([_known(one) for one in rates])
            stored = np.array([profiles.stored_bytes(spec, one) for one in rates], np.int64)
            self._rates.append(rates)
            self._slots.append((errors, changed - least, stored))
        self._base = np.maximum(base, 0)
        self._solver: Allocator | None = None
        choices = (self._choice(candidate) for candidate in incumbents)
        self._incumbents = [choice for choice in choices if choice is not None]

    def least_error(self) -> tuple[Candidate | None, float]:
        """Return the best candidate that fits, as predicted, and a bound; None and infinite where none fits."""
        limits = self._bench.limits
        budget = limits.budget_bytes
        limit, best, bound = _UNLIMITED if budget is None else budget, None, np.inf
        tried = set()
        for _ in range(_ROUNDS):
            if limit in tried:
                break
            tried.add(limit)
            try:
                found = self._allocator(limit).allocate(limit, self._incumbents)
            except BudgetError:
                found = None
            if found is None:
                if best is not None or budget is None:
                    break
                limit = self._least_peak().peak_bytes  # perhaps less is needed than the sums say
                if limit in tried:
                    break
                continue
            bound = min(bound, found.bound)
            candidate = self._candidate(found)
            if candidate.fits() and (best is None or _error(candidate) < _error(best)):
                best = candidate
            if budget is None:
                break
            surplus = found.peak_bytes - candidate.needed_bytes()  # what the sums count too much, or too little
            limit = budget + surplus if candidate.needed_bytes() <= budget else min(limit, budget + surplus) - 1
        return best, bound

    def least_peak(self) -> Candidate:
        """Return the candidate with the least peak, by the sums of bytes."""
        return self._candidate(self._least_peak())

    def least_saved(self) -> Candidate:
        """Return the candidate that saves the fewest bytes."""
        return self._candidate_of([int(stored.argmin()) for _, _, stored in self._slots])

    def front(self, points: int) -> list[Candidate]:
        """Return candidates from the least peak to the least error."""
        return [self._candidate(found) for found in self._allocator(None).pareto_front(points, self._incumbents)]

    def _least_peak(self) -> Allocation:
        return self._allocator(None).least_peak()

    def _allocator(self, limit: int | None) -> Allocator:
        """Return the solver; an activation budget is one more instant, at which ``limit`` is that budget."""
        activation = self._bench.limits.activation_budget_bytes
        base, slots = self._base, [(errors, profiles) for errors, profiles, _ in self._slots]
        if limit is None or activation is None or activation >= limit:
            if self._solver is None:
                self._solver = Allocator(base, [Slot(errors, profiles) for errors, profiles in slots])
            return self._solver
        base = np.append(base, limit - activation)
        slots = [
            (errors, np.concatenate([profiles, stored[:, None]], axis=1)) for errors, profiles, stored in self._slots
        ]
        return Allocator(base, [Slot(errors, profiles) for errors, profiles in slots])

    def _choice(self, candidate: Candidate) -> tuple[int, ...] | None:
        """Return the options that ``candidate`` takes; None where one of them is not weighed here."""
        choice = []
        for spec, rates in zip(self._bench.manifest.saved, self._rates, strict=True):
            wanted = candidate.rates[spec.name]
            same = (i for i, one in enumerate(rates) if (one.label, one.ranks) == (wanted.label, wanted.ranks))
            choice.append(next(same, None))
        return None if None in choice else tuple(option for option in choice if option is not None)

    def _candidate(self, found: Allocation) -> Candidate:
        return self._candidate_of(found.choice)

    def _candidate_of(self, choice: Sequence[int]) -> Candidate:
        chosen = zip(self._bench.manifest.saved, self._rates, choice, strict=True)
        return self._bench.mixed({spec.name: rates[option] for spec, rates, option in chosen})


def _point(label: str, candidate: Candidate) -> FrontPoint:
    peak_bytes = candidate.cost().peak_bytes
    return FrontPoint(
        label, candidate.epsilon, peak_bytes, candidate.saved_bytes, _error(candidate), candidate.selection
    )


def _known(one: Rated) -> float:
    assert one.error is not None
    return one.error


def _error(candidate: Candidate) -> float:
    assert candidate.error is not None
    return candidate.error


def _check_errors(bench: Workbench) -> None:
    if not has_errors(bench.manifest, bench.calibration):
        raise StateError(
            "the calibration holds no gradient errors, by which codecs are compared: calibrate again, with samples "
            "(--data FOLDER) and for a per-layer allocation"
        )
