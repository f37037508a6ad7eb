"""From features to spectra: Gram matrices summed over batches, then their eigenvalues and bases.

Knows a session's ``grams`` and the planner's spectra; nothing of folders or budgets.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

import numpy as np

from edgetune.bundle import Array, Manifest, ModeSpec
from edgetune.errors import DataError
from edgetune.planning.calibration import Calibration, Spectrum, spectrum_of


class Measures(Protocol):
    """The part of a session that calibration needs."""

    def grams(self, features: tuple[Array, ...]) -> dict[str, dict[str, Array]]:
        """Return the Gram matrix [groups, n, n] of every mode of every compressed tensor."""


def calibrate(session: Measures, manifest: Manifest, batches: Iterable[tuple[Array, ...]]) -> Calibration | None:
    """Return what ``batches`` of features (each a tuple of [b, ...] arrays) say of every truncated mode.

    Gram matrices of the modes c, z, h and w add over batches, and so do energies by count. The batch mode has no
    meaning from one batch to the next: there the sorted eigenvalues add, shorter batches filled up with zeros, and no
    basis is kept.
    None if the bundle's codec truncates nothing, or there was no batch.

    Raises:
        DataError: a Gram matrix, or an energy, is not finite.
    """
    # Of every option: codecs that count share one input, but each has a spectrum of its own.
    modes_of = [(spec.name, mode) for spec in manifest.saved for option in spec.options for mode in option.modes]
    known_modes = {(name, mode.spectrum): mode for name, mode in modes_of if mode.spectrum}
    resident = {(name, mode.spectrum) for name, mode in modes_of if mode.source == "basis"}
    if not known_modes:
        return None
    sums: dict[tuple[str, str], Array] = {}
    eigenvalues: dict[tuple[str, str], Array] = {}
    samples, batch = 0, 0
    for features in batches:
        samples += len(features[0])
        batch = max(batch, len(features[0]))
        _sum(session.grams(features), known_modes, sums, eigenvalues)
        del features  # before the next batch is made
    if not samples:
        return None
    spectra: dict[str, dict[str, Spectrum]] = {}
    counts: dict[str, dict[str, Array]] = {}
    for name, letter in list(sums):
        gram = sums.pop((name, letter))  # the largest part of what is held here: each goes as soon as it is used
        if known_modes[name, letter].source == "count":
            if not np.isfinite(gram).all():
                raise DataError(
                    f"the energy of '{name}' is not finite; look for NaN or infinity in the calibration data"
                )
            counts.setdefault(name, {})[letter] = gram.reshape(-1)
            continue
        spectra.setdefault(name, {})[letter] = spectrum_of(gram, with_basis=(name, letter) in resident)
    for (name, letter), values in eigenvalues.items():
        spectra.setdefault(name, {})[letter] = Spectrum(values, None)
    return Calibration(spectra, samples=samples, batch=batch, counts=counts)


def _sum(
    grams: dict[str, dict[str, Array]],
    known_modes: Mapping[tuple[str, str], ModeSpec],
    sums: dict[tuple[str, str], Array],
    eigenvalues: dict[tuple[str, str], Array],
) -> None:
    """Add the Gram matrices of one batch. In a function of its own: a name left over from the last turn of a loop would
    hold the largest matrices, while their eigenvectors are sought."""
    for name, modes in grams.items():
        for letter, gram in modes.items():
            if known_modes[name, letter].size is None:
                values = spectrum_of(gram, with_basis=False).eigenvalues
                eigenvalues[name, letter] = _add(eigenvalues.get((name, letter)), values)
            else:
                # float64, because sums over many batches of float32 squares lose their small eigenvalues.
                known = sums.get((name, letter))
                sums[name, letter] = gram.astype(np.float64) if known is None else known + gram


def _add(known: Array | None, more: Array) -> Array:
    """Return the sum of two [groups, n] arrays of which one may be shorter in n."""
    if known is None:
        return more
    total = np.zeros((len(more), max(known.shape[1], more.shape[1])))
    total[:, : known.shape[1]] += known
    total[:, : more.shape[1]] += more
    return total
