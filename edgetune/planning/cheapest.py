"""The cheapest setting of all knobs that is within the limits, and what to say where none is.

What is given up for memory, in this order (docs/budget.md has what each costs, as measured):

1. samples per run of the trunk: a little time;
2. ε from 1 down to ``GOOD_EPSILON``: no accuracy that could be measured;
3. whole batches, for pieces of ``USUAL_PIECE`` samples or more, as large as keep ε at ``GOOD_EPSILON``: time, no error;
4. ε from there down to ``LEAST_EPSILON``, in whatever pieces allow the largest: accuracy;
5. pieces below ``USUAL_PIECE``, again the largest that keep ε at ``GOOD_EPSILON``, or else those with the largest ε:
   much time;
6. trained layers, from the front of the tail;
7. where not even that fits: ε without a bound, of as many layers as possible.

Where every tensor has an ε of its own, the mean error of a saved tensor stands for √(1 - ε), the error that an ε has.
This module may know candidates and how a bundle is narrowed; it must not know how a codec or ε is chosen, or engines.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from edgetune.bundle import Manifest
from edgetune.errors import BudgetError
from edgetune.planning.candidates import Candidate, Limits, Workbench
from edgetune.planning.freezing import narrow
from edgetune.planning.knobs import layers_before_head
from edgetune.planning.spectra import Calibration
from edgetune.units import format_bytes

GOOD_EPSILON = 0.97
"""Down to here no loss of accuracy was measured (docs/accuracy.md)."""
LEAST_EPSILON = 0.9
"""Below, accuracy falls by more than half of the layers are worth (docs/budget.md)."""
USUAL_PIECE = 8
"""Samples; smaller pieces take up to five times the time of a whole batch (docs/budget.md)."""

Cost = tuple[int, int, int, float, float]
_GOOD = (0, 1, 3)
"""Third numbers of the costs of pieces that keep ε at ``GOOD_EPSILON``."""


class Method(Protocol):
    """How saved tensors are kept once the other knobs are set: ``uniform.Uniform`` or ``per_layer.PerLayer``."""

    def find(self, bench: Workbench) -> tuple[Candidate, float | None] | None:
        """Return the best candidate that fits, if one does, and a bound of what any could reach."""

    def least(self, bench: Workbench) -> Candidate:
        """Return the candidate that takes least."""

    def loss(self, bench: Workbench, candidate: Candidate) -> float:
        """Return the relative error of what ``candidate`` saves, 0 to 1; 0 where it is not the planner's to choose."""

    def words(self, least: Candidate) -> tuple[str, str]:
        """Return what was tried for ``least``, and what a user may change of it."""


@dataclass(frozen=True)
class Choice:
    """The cheapest candidate, its bound, and why the knobs are not where they would be without a limit."""

    candidate: Candidate
    bound: float | None
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Found:
    trained: int
    piece: int
    loss: float
    candidate: Candidate
    bound: float | None


def cost_of(limits: Limits, given_up: int, piece: int, loss: float, least_epsilon: float = LEAST_EPSILON) -> Cost:
    """Return what a setting costs; less is better. ``given_up`` layers are not trained, ``piece`` samples run at once,
    ``loss`` is as :meth:`Method.loss` says."""
    good, acceptable = (loss <= _loss_at(epsilon) for epsilon in (GOOD_EPSILON, least_epsilon))
    whole, usual = piece == limits.batch, piece >= min(USUAL_PIECE, limits.batch)
    if good:
        return 0, given_up, 0 if whole else 1 if usual else 3, -piece, loss
    return int(not acceptable), given_up, 2 if usual else 4, loss, -piece


def cheapest(
    manifest: Manifest,
    calibration: Calibration | None,
    limits: Limits,
    method: Method,
    *,
    pieces: Sequence[int],
    trained: Sequence[int],
    least_epsilon: float = LEAST_EPSILON,
) -> Choice:
    """Return the cheapest setting within ``limits`` (:func:`cost_of`): of ``pieces`` (descending) and ``trained``
    layers (descending), and of what ``method`` keeps.

    Raises:
        BudgetError: nothing fits; ``least_bytes`` is the least budget that does.
    """
    search = _Search(manifest, calibration, limits, method, least_epsilon)
    found = search.run(pieces, trained)
    if found is None:
        raise search.refusal(pieces, trained)
    return Choice(found.candidate, found.bound, search.reasons(found, pieces, trained))


class _Search:
    def __init__(
        self, manifest: Manifest, calibration: Calibration | None, limits: Limits, method: Method, least_epsilon: float
    ) -> None:
        self._manifest, self._calibration, self._limits = manifest, calibration, limits
        self._method, self._least_epsilon = method, least_epsilon
        self._narrowed: dict[int, Manifest] = {}
        self._tried: dict[tuple[int, int], _Found | None] = {}
        self._most = layers_before_head(manifest)

    def run(self, pieces: Sequence[int], trained: Sequence[int]) -> _Found | None:
        """Return the cheapest; stop where nothing that was not tried can be cheaper."""
        best: _Found | None = None
        usual = min(USUAL_PIECE, self._limits.batch)
        for count in trained:
            for piece in self._worth_trying(count, pieces):
                if piece < usual and best is not None and self._cost(best)[:3] <= (0, self._most - count, 2):
                    return best
                found = self._try(count, piece)
                if found is not None and (best is None or self._cost(found) < self._cost(best)):
                    best = found
                if best is not None and self._is_good(best, count):
                    return best  # the largest piece that is good
            if best is not None and not self._cost(best)[0]:
                return best
        return best

    def _is_good(self, found: _Found, trained: int) -> bool:
        cost = self._cost(found)
        return cost[:2] <= (0, self._most - trained) and cost[2] in _GOOD

    def _worth_trying(self, trained: int, pieces: Sequence[int]) -> Iterator[int]:
        """Yield the whole batch, if it is among them, then of the others those that fit at the least, largest first."""
        parts = [piece for piece in pieces if piece < self._limits.batch]
        yield from (piece for piece in pieces if piece == self._limits.batch)
        fitting = False  # smaller pieces take less
        for piece in parts if parts and self._fits(trained, parts[-1]) else []:
            fitting = fitting or self._fits(trained, piece)
            if fitting:
                yield piece

    def _fits(self, trained: int, piece: int) -> bool:
        return self._method.least(self._bench(trained, piece)).fits()

    def _try(self, trained: int, piece: int) -> _Found | None:
        if (trained, piece) not in self._tried:
            bench = self._bench(trained, piece)
            found = self._method.find(bench)
            self._tried[trained, piece] = found and _Found(
                trained, piece, self._method.loss(bench, found[0]), found[0], found[1]
            )
        return self._tried[trained, piece]

    def _cost(self, found: _Found) -> Cost:
        return cost_of(self._limits, self._most - found.trained, found.piece, found.loss, self._least_epsilon)

    def _bench(self, trained: int, piece: int) -> Workbench:
        if trained not in self._narrowed:
            self._narrowed[trained] = narrow(self._manifest, trained).manifest
        limits = dataclasses.replace(self._limits, tail_micro_batch=piece)
        return Workbench(self._narrowed[trained], self._calibration, limits)

    def reasons(self, found: _Found, pieces: Sequence[int], trained: Sequence[int]) -> tuple[str, ...]:
        """Return why the batch is trained in pieces, and why not all layers are, where that was not given."""
        told = []
        if found.trained < self._most and len(trained) > 1:
            more = [one for (count, _), one in self._tried.items() if one and count > found.trained]
            with_more = f"more allow no ε above {max(map(_epsilon, more)):.3g}" if more else "more do not fit"
            told.append(f"the last {found.trained} of {self._most} layers are trained: {with_more}")
        if found.piece < self._limits.batch and len(pieces) > 1:
            whole = self._tried.get((found.trained, self._limits.batch))
            without = f"the whole batch allows no ε above {_epsilon(whole):.3g}" if whole else "the whole does not fit"
            told.append(f"the batch is trained in pieces of {found.piece}: {without}")
        return tuple(told)

    def refusal(self, pieces: Sequence[int], trained: Sequence[int]) -> BudgetError:
        """Return the error that names the least that fits. Of pieces the smallest takes least, or the whole batch does
        where the gradients are most of it."""
        ends = dict.fromkeys((pieces[0], pieces[-1]))
        every = [(self._method.least(self._bench(count, piece)), count) for count in trained for piece in ends]
        activation = self._limits.activation_budget_bytes
        keeping = [one for one in every if activation is None or one[0].saved_bytes <= activation]
        if keeping:
            least, count = min(keeping, key=lambda one: one[0].needed_bytes())
        else:
            least, count = min(every, key=lambda one: one[0].saved_bytes)
        setting, advice = self._method.words(least)
        where = f"a batch of {least.limits.batch} samples"
        where += f" in pieces of {least.limits.piece}" if least.limits.piece < least.limits.batch else ""
        where += f", the last {count} of {self._most} layers trained" if count < self._most else ""
        return _refusal(least, where + setting, f"raise it, {advice}")


def _loss_at(epsilon: float) -> float:
    return math.sqrt(1.0 - epsilon)


def _epsilon(found: _Found) -> float:
    """Return the ε of a candidate, or the one that has its error."""
    return found.candidate.epsilon or max(0.0, 1.0 - found.loss**2)


def _refusal(least: Candidate, setting: str, advice: str) -> BudgetError:
    """Return the error for limits that not even ``least`` fits; ``setting`` says what that is."""
    messages, least_bytes, limits = [], 0, least.limits
    activation, budget = limits.activation_budget_bytes, limits.budget_bytes
    if activation is not None and least.saved_bytes > activation:
        least_bytes = least.saved_bytes
        messages.append(
            f"the activation budget of {_exact(activation)} is too small: the least is {_exact(least_bytes)}, with "
            f"{setting}"
        )
    if budget is not None and least.needed_bytes() > budget:
        least_bytes, prediction = least.needed_bytes(), least.cost()
        largest = sorted(prediction.ledger.items(), key=lambda line: -line[1])[:3]
        messages.append(
            f"the budget of {_exact(budget)} is too small: the least is {_exact(least_bytes)}, with {setting} "
            f"and a micro-batch of {limits.micro_batch or 1}; its largest parts are "
            f"{', '.join(f'{name} {format_bytes(size)}' for name, size in largest)}; "
            f"the peak is at {prediction.bottleneck}"
        )
    advice += "choose a smaller batch, or export with fewer trained layers"
    return BudgetError("; ".join(reversed(messages)) + f"; {advice}", least_bytes=least_bytes)


def _exact(size_bytes: int) -> str:
    return f"{format_bytes(size_bytes)} ({size_bytes} bytes)"
