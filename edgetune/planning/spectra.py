"""From ε to what a codec is given: ranks and counts, through what a calibration learned.

The map is that of the HOSVD paper: per mode, the least K such that the K largest eigenvalues of the mode's Gram matrix
hold at least the fraction ε of their sum. As a function of ε a rank is a staircase whose steps are the cumulated
fractions of the spectrum, so a search over ε needs to try those only. A count is the least that keeps the fraction ε of
the energy.
This module may know numpy, the bundle and the sparse codecs' counts; it must not know graphs, bytes or engines.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from edgetune.bundle import Array, Manifest, ModeSpec, SavedSpec
from edgetune.codecs import count_grid
from edgetune.errors import BundleError, StateError, UsageError, choices
from edgetune.planning.calibration import Calibration, Spectrum, spectrum_of

__all__ = [
    "Calibration", "Ranks", "Spectrum", "breakpoints", "captured_energy_bound", "check_epsilon", "count_at",
    "counts_at_rate", "energy_of_count", "fractions", "identity_calibration", "most_useful", "rank_at", "ranks_at",
    "ranks_of", "spectrum_of",
]  # fmt: skip

Ranks = dict[str, dict[str, int]]
"""Ranks and counts by saved tensor and mode letter."""

COUNT = "count"
_BELOW_ONE = float(np.nextafter(1.0, 0.0))


def fractions(spectrum: Spectrum) -> Array:
    """Return [n] float64, ascending: the share of the total that the k + 1 largest eigenvalues of every group hold.

    The last is 1 and no other is: ε = 1 always means full rank, which is exact for any data, also where the
    calibration data left eigenvalues at zero. A tensor of zeros is held by rank 1 for every ε below 1.
    """
    held = np.cumsum(spectrum.eigenvalues.sum(axis=0))
    share = held / held[-1] if held[-1] > 0 else np.ones_like(held)
    share[:-1] = np.minimum(share[:-1], _BELOW_ONE)
    share[-1] = 1.0
    return share


def rank_at(spectrum: Spectrum, epsilon: float) -> int:
    """Return the least K such that the K largest eigenvalues of each group hold at least ``epsilon`` of the total.

    The groups share K. ``epsilon`` = 1 gives full rank; a tensor of zeros gives 1 below that. Never falls as
    ``epsilon`` rises.

    Raises:
        UsageError: ``epsilon`` is not in (0, 1].
    """
    check_epsilon(epsilon)
    return int(np.searchsorted(fractions(spectrum), epsilon, side="left")) + 1


def check_epsilon(epsilon: float) -> None:
    """Raise UsageError unless 0 < ``epsilon`` <= 1."""
    if not 0.0 < epsilon <= 1.0:
        raise UsageError(f"epsilon is {epsilon}; expected a fraction above 0 and at most 1, such as 0.9")


def breakpoints(calibration: Calibration) -> Array:
    """Return all ε at which some rank changes, ascending and distinct, float64; the last is 1 (empty without modes).

    Every rank is constant on each interval (breakpoint, next breakpoint], so the largest ε with a given property of
    the ranks is one of these. Counts change at nearly every ε: of those, the ε of the measured counts are here.
    """
    steps = [fractions(spectrum) for modes in calibration.spectra.values() for spectrum in modes.values()]
    held = [_held(energies) for modes in calibration.counts.values() for energies in modes.values()]
    steps += [np.append(shares[shares > 0], 1.0) for shares in held]
    return np.unique(np.concatenate(steps)) if steps else np.empty(0, np.float64)


def count_at(energies: Array, size: int, epsilon: float) -> int:
    """Return the least number of the ``size`` coefficients of a sample that hold at least ``epsilon`` of the energy.

    ``energies`` as in ``Calibration.counts``. Between two measured counts it is found on the chord, which is below the
    energy (the coefficients are taken by falling magnitude, so their energy is concave). Beyond the largest measured
    count, which is the largest that makes the sparse form smaller than the dense one, and for ε = 1, it is ``size``.

    Raises:
        UsageError: ``epsilon`` is not in (0, 1].
    """
    check_epsilon(epsilon)
    shares, grid = _held(energies), count_grid(size)
    if epsilon >= 1 or not len(shares) or epsilon > shares[-1]:
        return size
    return max(1, int(np.ceil(np.interp(epsilon, np.append(0.0, shares), (0, *grid)) - 1e-9)))


def energy_of_count(energies: Array, size: int, count: int) -> float:
    """Return the least share of the energy that ``count`` coefficients hold, by the chords of :func:`count_at`."""
    if count >= size:
        return 1.0
    return float(np.interp(count, (0, *count_grid(size)), np.append(0.0, _held(energies))))


def most_useful(size: int) -> int:
    """Return the largest count that is stored in fewer bytes than all ``size`` elements; 0 if there is none."""
    return max(count_grid(size), default=0)


def counts_at_rate(modes: Sequence[ModeSpec], rate: float) -> dict[str, int]:
    """Return the counts k = ⌊n/λ⌋, at least 1, that ``rate`` λ gives (DCT/WT/ST paper, section 3), by mode letter.

    Raises:
        UsageError: ``rate`` is below 1.
    """
    if rate < 1:
        raise UsageError(f"the rate is {rate}; expected a number of at least 1, such as 10: one element of ten is kept")
    return {mode.letter: max(1, int((mode.size or 1) / rate)) for mode in modes if mode.source == COUNT}


def _held(energies: Array) -> Array:
    """Return [m] float64, ascending: the share of the energy at each measured count; 1 - 2⁻⁵³ at most, 1 for zeros."""
    total = float(energies[-1])
    shares = np.asarray(energies[:-1], np.float64) / total if total > 0 else np.ones(len(energies) - 1)
    return np.maximum.accumulate(np.minimum(shares, _BELOW_ONE))


def identity_calibration(manifest: Manifest, batch: int) -> Calibration:
    """Return the calibration of no data: unit bases and flat spectra, for ``batch`` samples per batch.

    Any orthonormal basis is exact at full rank; below it these say nothing of the data, hence ``samples`` is 0.
    """
    spectra: dict[str, dict[str, Spectrum]] = {}
    counts: dict[str, dict[str, Array]] = {}
    for spec in manifest.saved:
        for mode in (mode for option in spec.options for mode in option.modes if mode.spectrum):
            size = _extent(spec, mode, batch)
            if mode.source == COUNT:
                counts.setdefault(spec.name, {})[mode.spectrum] = np.array((*count_grid(size), size), np.float64)
                continue
            flat = np.ones((mode.groups, size), np.float64)
            unit = None if mode.letter == "b" else np.tile(np.eye(size, dtype=np.float32), (mode.groups, 1, 1))
            spectra.setdefault(spec.name, {})[mode.spectrum] = Spectrum(flat, unit)
    return Calibration(spectra, samples=0, batch=batch, counts=counts)


def ranks_at(manifest: Manifest, calibration: Calibration, epsilon: float, batch: int) -> Ranks:
    """Return the rank or count of every mode of a settled bundle at ``epsilon``; see :func:`ranks_of`."""
    return {
        spec.name: ranks_of(spec, spec.modes, calibration, epsilon, batch)
        for spec in manifest.saved
        if any(mode.spectrum for mode in spec.modes)
    }


def ranks_of(
    spec: SavedSpec, modes: Sequence[ModeSpec], calibration: Calibration, epsilon: float, batch: int
) -> dict[str, int]:
    """Return the rank or count of each of ``modes`` (one option's) at ``epsilon``, by letter, for batches of ``batch``.

    The rank of a batch mode is capped by ``batch``. Where the calibration's batches were smaller, it is stretched
    linearly, such that 1 stays 1 and full rank stays full rank.

    Raises:
        StateError: the calibration lacks a mode of this bundle, or its extent differs.
        UsageError: ``epsilon`` is not in (0, 1].
    """
    found = {}
    for mode in (mode for mode in modes if mode.spectrum):
        if mode.source == COUNT:
            found[mode.letter] = count_at(_energies_for(calibration, spec, mode), _extent(spec, mode, batch), epsilon)
        else:
            spectrum = _spectrum_for(calibration, spec, mode)
            found[mode.letter] = _planned_rank(mode, rank_at(spectrum, epsilon), spectrum.size, batch)
    return found


def captured_energy_bound(
    spec: SavedSpec, calibration: Calibration, ranks: Mapping[str, int], batch: int
) -> float | None:
    """Return a lower bound of the energy ‖decoded‖² / ‖X‖² that ``ranks`` (by mode letter) keep of the data seen.

    The truncated HOSVD loses at most the sum over the modes of the eigenvalues that each discards (De Lathauwer,
    De Moor and Vandewalle, 2000, property 10), hence 1 - Σ_modes (1 - kept fraction), floored at 0. Of counts: what was
    measured. None where no mode has a rank or count, or where there was no data and some mode is below full rank.

    Raises:
        StateError: the calibration lacks a mode of this bundle, or its extent differs.
    """
    modes = [mode for mode in spec.modes if mode.spectrum]
    if not modes:
        return None
    lost = 0.0
    for mode in modes:
        rank, extent = ranks[mode.letter], _extent(spec, mode, batch)
        if rank >= extent:
            continue
        if calibration.samples == 0:
            return None
        if mode.source == COUNT:
            lost += 1.0 - energy_of_count(_energies_for(calibration, spec, mode), extent, rank)
            continue
        spectrum = _spectrum_for(calibration, spec, mode)
        if mode.letter == "b" and spectrum.size < batch:  # undo the stretching of `_planned_rank`, rounding down
            rank = 1 + (rank - 1) * (spectrum.size - 1) // (batch - 1)
        lost += 1.0 - float(fractions(spectrum)[min(rank, spectrum.size) - 1])
    return max(0.0, 1.0 - lost)


def _planned_rank(mode: ModeSpec, rank: int, size: int, batch: int) -> int:
    """Return ``rank`` of ``size`` as measured, as a rank for the planned ``batch`` where the mode is the batch."""
    if mode.letter != "b":
        return rank
    if size >= batch:
        return min(rank, batch)
    if size == 1:
        return batch
    return 1 - (-(rank - 1) * (batch - 1) // (size - 1))  # 1 + the quotient rounded up


def _spectrum_for(calibration: Calibration, spec: SavedSpec, mode: ModeSpec) -> Spectrum:
    """Return the spectrum of one mode, after checking that it belongs to this bundle."""
    modes = calibration.spectra.get(spec.name)
    if modes is None or mode.spectrum not in modes:
        known = (f"{saved}.{letter}" for saved, found in calibration.spectra.items() for letter in found)
        raise StateError(
            f"the calibration lacks mode '{mode.spectrum}' of '{spec.name}': it belongs to another bundle; calibrate "
            f"again (it holds: {choices(known)})"
        )
    found = modes[mode.spectrum]
    expected: tuple[Any, ...] = (mode.groups, found.size if mode.letter == "b" else mode.size)
    if found.eigenvalues.shape != expected:
        raise StateError(
            f"the calibration of '{spec.name}' mode '{mode.letter}' has [groups, n] = {found.eigenvalues.shape}, the "
            f"bundle {expected}: it belongs to another bundle; calibrate again"
        )
    return found


def _energies_for(calibration: Calibration, spec: SavedSpec, mode: ModeSpec) -> Array:
    """Return the energies by count of one mode, after checking that they belong to this bundle."""
    found = calibration.counts.get(spec.name, {}).get(mode.spectrum)
    expected = len(count_grid(mode.size or 1)) + 1
    if found is None or len(found) != expected:
        raise StateError(
            f"the calibration of '{spec.name}' has {'no' if found is None else len(found)} energies for "
            f"'{mode.spectrum}', the bundle {expected}: it belongs to another bundle; calibrate again"
        )
    return found


def _extent(spec: SavedSpec, mode: ModeSpec, batch: int) -> int:
    """Return the full rank of a mode for batches of ``batch`` samples."""
    if mode.letter == "b":
        return batch
    if mode.size is None:
        raise BundleError(f"mode '{mode.letter}' of '{spec.name}' has no size; only the batch may: export again")
    return mode.size
