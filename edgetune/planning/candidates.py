"""Ways to train a bundle that a planner weighs: what each stores and takes, and whether it is within the limits.

This module may know the manifest, rates and predictions; it must not know how one is chosen, or engines.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from edgetune.bundle import Manifest
from edgetune.planning.prediction import Prediction, predict, saved_bytes_by_tensor
from edgetune.planning.rates import Rated, at_rate, rated
from edgetune.planning.selection import default_selection, settle
from edgetune.planning.spectra import Calibration, Ranks, breakpoints


@dataclass(frozen=True)
class Limits:
    """What a plan must hold, what is known of the process that will run it (see ``plan.make_plan``), and the knobs that
    do not touch what a saved tensor is kept as.

    Attributes:
        micro_batch: samples per run of the trunk; None: as many as fit.
        tail_micro_batch: samples per run of the train graph; None: the whole batch.
        cache_bytes: what the features that are kept from pass to pass may take.
        memory: ``lean``; ``fast``: the tensors of a run lie in one block; ``auto``: that too, where it fits at last.
    """

    batch: int
    runtime_bytes: int
    budget_bytes: int | None = None
    activation_budget_bytes: int | None = None
    correction_bytes: int = 0
    reserve_bytes: int = 0
    micro_batch: int | None = None
    tail_micro_batch: int | None = None
    cache_bytes: int = 0
    memory: str = "lean"

    @property
    def piece(self) -> int:
        """Samples per run of the train graph."""
        return self.batch if self.tail_micro_batch is None else self.tail_micro_batch


@dataclass(frozen=True)
class Candidate:
    """One option at one rate for every saved tensor, and what follows. ``manifest`` is settled; ``epsilon`` is the one
    ε of all (None: none, or several)."""

    manifest: Manifest
    rates: Mapping[str, Rated]
    limits: Limits
    epsilon: float | None = None
    _predictions: dict[int, Prediction] = field(default_factory=dict, compare=False, repr=False)

    @property
    def selection(self) -> dict[str, str]:
        """The label of the option by saved tensor."""
        return {name: one.label for name, one in self.rates.items()}

    @property
    def ranks(self) -> Ranks:
        """Ranks and counts by saved tensor and mode letter; tensors without any have no entry."""
        return {name: dict(one.ranks) for name, one in self.rates.items() if one.ranks}

    @property
    def error(self) -> float | None:
        """The sum of the errors; None where one is unknown."""
        known = [one.error for one in self.rates.values() if one.error is not None]
        return sum(known) if len(known) == len(self.rates) else None

    @cached_property
    def saved(self) -> Mapping[str, Mapping[str, int]]:
        """Bytes of what is stored at once, by saved tensor and tensor of the train graph."""
        return saved_bytes_by_tensor(self.manifest, batch=self.limits.piece, ranks=self.ranks)

    @property
    def saved_bytes(self) -> int:
        """The bytes of all that is stored, each tensor once."""
        return sum({name: size for tensors in self.saved.values() for name, size in tensors.items()}.values())

    def cost(self, micro_batch: int | None = None) -> Prediction:
        """Return what the process needs; with no ``micro_batch``, at the one that is given, or else the least."""
        micro_batch = micro_batch or self.limits.micro_batch or 1
        if micro_batch not in self._predictions:
            limits = self.limits
            self._predictions[micro_batch] = predict(
                self.manifest,
                batch=limits.batch,
                micro_batch=micro_batch,
                ranks=self.ranks,
                runtime_bytes=limits.runtime_bytes,
                correction_bytes=limits.correction_bytes,
                tail_micro_batch=limits.piece,
                cache_bytes=limits.cache_bytes,
                memory=limits.memory,
            )
        return self._predictions[micro_batch]

    def needed_bytes(self, micro_batch: int | None = None) -> int:
        """Return the least budget that this fits: the predicted peak and the reserve."""
        return self.cost(micro_batch).peak_bytes + self.limits.reserve_bytes

    def fits(self, micro_batch: int | None = None) -> bool:
        """Tell whether this is within both budgets."""
        limits = self.limits
        if limits.activation_budget_bytes is not None and self.saved_bytes > limits.activation_budget_bytes:
            return False
        return limits.budget_bytes is None or self.needed_bytes(micro_batch) <= limits.budget_bytes


class Workbench:
    """Makes candidates for one bundle, calibration and set of limits; each selection is settled once."""

    def __init__(self, manifest: Manifest, calibration: Calibration | None, limits: Limits) -> None:
        self.manifest, self.calibration, self.limits = manifest, calibration, limits
        self._settled: dict[tuple[str, ...], Manifest] = {}

    def breakpoints(self) -> Sequence[float]:
        """Return every ε at which some rank or count changes, ascending (``spectra.breakpoints``)."""
        assert self.calibration is not None
        known = {spec.name for spec in self.manifest.saved}
        spectra = {name: modes for name, modes in self.calibration.spectra.items() if name in known}
        counts = {name: modes for name, modes in self.calibration.counts.items() if name in known}
        found: list[float] = breakpoints(replace(self.calibration, spectra=spectra, counts=counts)).tolist()
        return found

    def uniform(self, codec: str | None, epsilon: float | None, rate: float | None = None) -> Candidate:
        """Return the candidate that keeps every tensor by ``codec`` at ``epsilon`` (None: 1), or at ``rate``.

        Raises:
            UsageError: a number is out of range.
        """
        selection = default_selection(self.manifest, codec)
        piece, known = self.limits.piece, self.calibration
        value = 1.0 if epsilon is None else epsilon
        rates = {
            spec.name: at_rate(spec, selection[spec.name], rate, known, piece)
            if rate is not None
            else rated(spec, selection[spec.name], value, known, piece)
            for spec in self.manifest.saved
        }
        return self.mixed(rates, epsilon)

    def mixed(self, rates: Mapping[str, Rated], epsilon: float | None = None) -> Candidate:
        """Return the candidate of ``rates``, one per saved tensor."""
        key = tuple(rates[spec.name].label for spec in self.manifest.saved)
        if key not in self._settled:
            self._settled[key] = settle(self.manifest, {name: one.label for name, one in rates.items()})
        return Candidate(self._settled[key], rates, self.limits, epsilon)
