"""What a saved tensor may become: its options at all rates, with their ranks and their errors.

This module may know the manifest, spectra and calibrations; it must not know bytes, lifetimes, budgets or engines.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from edgetune.bundle import Array, Manifest, OptionSpec, SavedSpec
from edgetune.codecs.narrow import FLOAT32
from edgetune.codecs.table import EXACT_AT_FULL_RANK
from edgetune.errors import BundleError
from edgetune.planning.selection import LOSSLESS
from edgetune.planning.spectra import (
    COUNT,
    Calibration,
    counts_at_rate,
    energy_of_count,
    most_useful,
    ranks_of,
)

LEVELS = (1e-6, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0)
"""The ε at which errors are measured. At the first, every rank and every count is 1."""

FINER = (0.6, 0.75, 0.85, 0.925, 0.97, 0.98, 0.995)
"""More ε that a mixed plan may take; their errors lie between those that were measured."""


@dataclass(frozen=True)
class Rated:
    """One option of a saved tensor at one rate.

    ``epsilon`` is None where the option has nothing to choose, or was chosen by a rate; ``error`` is None where no
    error was measured.
    """

    label: str
    epsilon: float | None
    ranks: Mapping[str, int]
    error: float | None


def ranked(option: OptionSpec) -> bool:
    """Tell whether a rank or count of ``option`` follows from ε."""
    return any(mode.spectrum for mode in option.modes)


def exact_option(spec: SavedSpec) -> OptionSpec:
    """Return the option that keeps ``spec`` exactly (at full rank): dense before others.

    Raises:
        BundleError: there is none.
    """
    lossless = [option for option in spec.options if not option.lossy]
    # What is stored in fewer bytes is rounded at any rank.
    wide = [o for o in spec.options if o.config.get("storage", FLOAT32) == FLOAT32]
    full = [o for o in wide if o.codec in EXACT_AT_FULL_RANK]
    dense = [option for option in lossless if option.codec == LOSSLESS]
    try:
        return next(itertools.chain(dense, lossless, full))
    except StopIteration:
        raise BundleError(f"no option keeps '{spec.name}' exactly; export the bundle again") from None


def rated(spec: SavedSpec, label: str, epsilon: float, calibration: Calibration | None, batch: int) -> Rated:
    """Return the option ``label`` at ``epsilon``; the exact one where that is no smaller than it (see :func:`useful`).

    Raises:
        StateError: the calibration lacks a mode of this bundle, or its extent differs.
        UsageError: there is no such option, or ``epsilon`` is not in (0, 1].
    """
    option = spec.option(label)
    if not ranked(option) or calibration is None:
        return Rated(label, None, {}, error_of(calibration, spec, option, 1.0))
    ranks = ranks_of(spec, option.modes, calibration, epsilon, batch)
    if not useful(option, ranks):
        return rated(spec, exact_option(spec).label, epsilon, calibration, batch)
    return Rated(label, epsilon, ranks, error_of(calibration, spec, option, epsilon))


def at_rate(spec: SavedSpec, label: str, rate: float, calibration: Calibration | None, batch: int) -> Rated:
    """Return the option ``label`` where every count keeps one element of ``rate``; ranks are full.

    Raises:
        UsageError: there is no such option, or ``rate`` is below 1.
    """
    option = spec.option(label)
    counts = counts_at_rate(option.modes, rate)
    if not counts:
        return rated(spec, label, 1.0, calibration, batch)
    if not useful(option, counts):
        return rated(spec, exact_option(spec).label, 1.0, calibration, batch)
    error = None
    if calibration is not None and calibration.samples:
        energies = calibration.counts.get(spec.name, {})
        held = [
            energy_of_count(energies[mode.spectrum], mode.size or 1, counts[mode.letter])
            for mode in option.modes
            if mode.source == COUNT and mode.spectrum in energies
        ]
        error = error_of(calibration, spec, option, max(1e-6, min(held))) if held else None
    return Rated(label, None, counts, error)


def useful(option: OptionSpec, ranks: Mapping[str, int]) -> bool:
    """Tell whether every count is below what the sparse form is worth: beyond, the dense tensor is smaller."""
    counts = (mode for mode in option.modes if mode.source == COUNT)
    return all(ranks[mode.letter] <= most_useful(mode.size or 1) for mode in counts)


def all_rates(spec: SavedSpec, calibration: Calibration, batch: int, extra: Iterable[float] = ()) -> list[Rated]:
    """Return every option of ``spec`` at every ε worth trying (``extra`` ones too), each set of ranks once.

    Raises:
        StateError: the calibration lacks a mode of this bundle, or an error.
    """
    found: dict[tuple[str, tuple[tuple[str, int], ...]], Rated] = {}
    for option in spec.options:
        levels = sorted({*LEVELS, *FINER, *extra}) if ranked(option) else [1.0]
        for epsilon in levels:
            one = rated(spec, option.label, epsilon, calibration, batch)
            known = found.setdefault((one.label, tuple(sorted(one.ranks.items()))), one)
            if one.error is not None and known.error is not None and one.error < known.error:
                found[one.label, tuple(sorted(one.ranks.items()))] = one  # the same ranks, at the ε that tells more
    return list(found.values())


def error_of(calibration: Calibration | None, spec: SavedSpec, option: OptionSpec, epsilon: float) -> float | None:
    """Return the relative weight-gradient error of ``option`` at ``epsilon``; None where it was not measured.

    What was not measured at this very ε lies on the line between its neighbours, in √(1 - ε): that is the relative
    error of the activation itself, to which the gradient's is nearly proportional. Never falls as ε falls.
    """
    if not option.lossy:
        return 0.0
    table = calibration.errors.get(spec.name, {}).get(option.label) if calibration is not None else None
    return None if table is None or not len(table) else interpolated(table, epsilon)


def interpolated(table: Array, epsilon: float) -> float:
    """Return the error at ``epsilon`` from rows [n, 2] of ascending ε and errors, as :func:`error_of` says."""
    lost = np.sqrt(np.maximum(1.0 - table[::-1, 0], 0.0))
    errors = np.maximum.accumulate(table[::-1, 1])
    return float(np.interp(np.sqrt(max(1.0 - epsilon, 0.0)), lost, errors))


def comparable(manifest: Manifest, calibration: Calibration | None) -> Manifest:
    """Return ``manifest`` without the lossy options whose error was not measured, where others remain."""

    def known(spec: SavedSpec) -> SavedSpec:
        errors = calibration.errors.get(spec.name, {}) if calibration is not None else {}
        options = tuple(option for option in spec.options if not option.lossy or option.label in errors)
        return dataclasses.replace(spec, options=options or spec.options)

    return dataclasses.replace(manifest, saved=tuple(known(spec) for spec in manifest.saved))


def has_errors(manifest: Manifest, calibration: Calibration | None) -> bool:
    """Tell whether the error of every lossy option was measured."""
    if calibration is None:
        return not any(spec.lossy for spec in manifest.saved)
    return all(
        option.label in calibration.errors.get(spec.name, {})
        for spec in manifest.saved
        for option in spec.options
        if option.lossy
    )
