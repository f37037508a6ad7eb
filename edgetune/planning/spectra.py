"""What a calibration learned: the spectrum of every mode that a codec truncates, and the map from ε to ranks.

The map is that of the HOSVD paper: per mode, the least K such that the K largest eigenvalues of the mode's Gram matrix
hold at least the fraction ε of their sum. As a function of ε a rank is a staircase whose steps are the cumulated
fractions of the spectrum, so a search over ε needs to try those only.
This module may know numpy, safetensors and the bundle; it must not know graphs, bytes, engines or where data is from.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from edgetune.bundle import Array, Manifest, ModeSpec, SavedSpec, sync_directory
from edgetune.errors import BundleError, DataError, StateError, StorageError, UsageError, choices

Ranks = dict[str, dict[str, int]]
"""Ranks by saved tensor and mode letter."""

_FORMAT = "edgetune-calibration-1"
_BELOW_ONE = float(np.nextafter(1.0, 0.0))


@dataclass(frozen=True, eq=False)
class Spectrum:
    """The eigen-decomposition of the Gram matrices of one mode.

    Attributes:
        eigenvalues: [groups, n] float64, descending in each group, not negative.
        basis: [groups, n, n] float32, whose columns are the eigenvectors in the same order; None for the batch mode,
            whose basis means nothing to the next batch.
    """

    eigenvalues: Array
    basis: Array | None

    @property
    def size(self) -> int:
        """The extent n of the mode (per group), which is its full rank."""
        return int(self.eigenvalues.shape[1])


@dataclass(frozen=True, eq=False)
class Calibration:
    """The spectra of all truncated modes, by saved tensor and ``ModeSpec.spectrum``.

    ``samples`` is how many samples they were measured on (0: none, see :func:`identity_calibration`); ``batch`` the
    number of samples per batch, which is the extent of the batch modes.
    """

    spectra: Mapping[str, Mapping[str, Spectrum]]
    samples: int
    batch: int

    def save(self, path: str | Path) -> None:
        """Write the calibration as safetensors to ``path``, which holds either the old or the new file at any instant.

        Raises:
            StorageError: the disk refused the write.
        """
        target = Path(path)
        temporary = target.with_name(target.name + ".tmp")
        tensors: dict[str, Array] = {}
        for saved, modes in self.spectra.items():
            for letter, spectrum in modes.items():
                tensors[f"eigenvalues/{letter}/{saved}"] = np.ascontiguousarray(spectrum.eigenvalues)
                if spectrum.basis is not None:
                    tensors[f"basis/{letter}/{saved}"] = np.ascontiguousarray(spectrum.basis)
        metadata = {"format": _FORMAT, "samples": str(self.samples), "batch": str(self.batch)}
        try:
            save_file(tensors, temporary, metadata=metadata)
            with temporary.open("rb") as stream:
                os.fsync(stream.fileno())
            temporary.replace(target)
            sync_directory(target.parent)
        except (OSError, SafetensorError) as error:
            raise StorageError(f"the calibration cannot be written to '{target}' ({error}); make room") from None
        finally:
            with contextlib.suppress(OSError):  # after success it has its new name; after a failure, that one counts
                temporary.unlink()

    @staticmethod
    def load(path: str | Path) -> Calibration:
        """Return the calibration that :meth:`save` wrote to ``path``.

        Raises:
            StateError: the file is missing, damaged, or not a calibration of this version.
        """
        spectra: dict[str, dict[str, Spectrum]] = {}
        try:
            with safe_open(Path(path), framework="numpy") as stream:
                metadata: dict[str, str] = stream.metadata() or {}
                if metadata.get("format") != _FORMAT:
                    raise StateError(
                        f"'{path}' is not a calibration: its format is {metadata.get('format')!r}, expected '{_FORMAT}'"
                    )
                names = set(stream.keys())
                for name in sorted(n for n in names if n.startswith("eigenvalues/")):
                    _, letter, saved = name.split("/", 2)
                    basis = f"basis/{letter}/{saved}"
                    spectra.setdefault(saved, {})[letter] = Spectrum(
                        stream.get_tensor(name), stream.get_tensor(basis) if basis in names else None
                    )
                return Calibration(spectra, int(metadata["samples"]), int(metadata["batch"]))
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise StateError(f"the calibration '{path}' cannot be read ({error}); calibrate again") from None


def spectrum_of(gram: Array, *, with_basis: bool = True) -> Spectrum:
    """Return the spectrum of symmetric matrices ``gram`` [groups, n, n]; rounding below zero is clipped.

    Without ``with_basis`` no eigenvectors are found, as suits the batch mode.

    Raises:
        DataError: a value is not finite.
    """
    if not np.isfinite(gram).all():
        raise DataError("a Gram matrix is not finite; look for NaN or infinity in the calibration data")
    groups, size, _ = gram.shape
    eigenvalues = np.empty((groups, size), np.float64)
    basis = np.empty((groups, size, size), np.float32) if with_basis else None
    # One group at a time: a solver's scratch memory is several times its matrix.
    for group in range(groups):
        matrix = gram[group].astype(np.float64)
        if basis is None:
            eigenvalues[group] = np.linalg.eigvalsh(matrix)[::-1]
        else:
            values, vectors = np.linalg.eigh(matrix)
            eigenvalues[group], basis[group] = values[::-1], vectors[:, ::-1]
    return Spectrum(np.maximum(eigenvalues, 0.0), basis)


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
    the ranks is one of these.
    """
    steps = [fractions(spectrum) for modes in calibration.spectra.values() for spectrum in modes.values()]
    return np.unique(np.concatenate(steps)) if steps else np.empty(0, np.float64)


def identity_calibration(manifest: Manifest, batch: int) -> Calibration:
    """Return the calibration of no data: unit bases and flat spectra, for ``batch`` samples per batch.

    Any orthonormal basis is exact at full rank; below it these say nothing of the data, hence ``samples`` is 0.
    """
    spectra: dict[str, dict[str, Spectrum]] = {}
    for spec in manifest.saved:
        for mode in (mode for mode in spec.modes if mode.spectrum):
            size = _extent(spec, mode, batch)
            flat = np.ones((mode.groups, size), np.float64)
            unit = None if mode.letter == "b" else np.tile(np.eye(size, dtype=np.float32), (mode.groups, 1, 1))
            spectra.setdefault(spec.name, {})[mode.spectrum] = Spectrum(flat, unit)
    return Calibration(spectra, samples=0, batch=batch)


def ranks_at(manifest: Manifest, calibration: Calibration, epsilon: float, batch: int) -> Ranks:
    """Return the rank of every truncated mode at ``epsilon`` for batches of ``batch`` samples.

    The rank of a batch mode is capped by ``batch``. Where the calibration's batches were smaller, it is stretched
    linearly, such that 1 stays 1 and full rank stays full rank.

    Raises:
        StateError: the calibration lacks a mode of this bundle, or its extent differs.
        UsageError: ``epsilon`` is not in (0, 1].
    """
    return {
        spec.name: {
            mode.letter: _planned_rank(mode, rank_at(found, epsilon), found.size, batch)
            for mode in spec.modes
            if mode.spectrum
            for found in (_spectrum_for(calibration, spec, mode),)
        }
        for spec in manifest.saved
        if any(mode.spectrum for mode in spec.modes)
    }


def captured_energy_bound(
    spec: SavedSpec, calibration: Calibration, ranks: Mapping[str, int], batch: int
) -> float | None:
    """Return a lower bound of the energy ‖decoded‖² / ‖X‖² that ``ranks`` (by mode letter) keep of the data seen.

    The truncated HOSVD loses at most the sum over the modes of the eigenvalues that each discards (De Lathauwer,
    De Moor and Vandewalle, 2000, property 10), hence 1 - Σ_modes (1 - kept fraction), floored at 0. None where
    nothing is truncated by design (no modes), or where there was no data and some mode is below full rank.

    Raises:
        StateError: the calibration lacks a mode of this bundle, or its extent differs.
    """
    if not spec.modes:
        return None
    lost = 0.0
    for mode in (mode for mode in spec.modes if mode.spectrum):
        spectrum, rank = _spectrum_for(calibration, spec, mode), ranks[mode.letter]
        if rank >= _extent(spec, mode, batch):
            continue
        if calibration.samples == 0:
            return None
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


def _extent(spec: SavedSpec, mode: ModeSpec, batch: int) -> int:
    """Return the full rank of a mode for batches of ``batch`` samples."""
    if mode.letter == "b":
        return batch
    if mode.size is None:
        raise BundleError(f"mode '{mode.letter}' of '{spec.name}' has no size; only the batch may: export again")
    return mode.size
