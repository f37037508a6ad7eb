"""What was learned of a bundle's data: spectra, energies by count, gradient errors; and the file that keeps it.

This module may know numpy, safetensors and the errors; it must not know what is done with it, or where data is from.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from edgetune.bundle import Array, sync_directory
from edgetune.errors import DataError, StateError, StorageError

_FORMAT = "edgetune-calibration-2"


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
    """What was measured of all modes, by saved tensor and ``ModeSpec.spectrum``.

    Attributes:
        spectra: of the modes that have a rank.
        samples: how many samples they were measured on (0: none, see ``spectra.identity_calibration``).
        batch: the number of samples per batch, which is the extent of the batch modes.
        counts: of the modes that have a count, [m + 1] float64: the energy that each count of ``codecs.count_grid``
            keeps, and at last the energy of all.
        errors: by saved tensor and label of an option, [n, 2] float64: rows of ε, ascending, and the relative
            weight-gradient error there (``engines.gradient_error``); one row where there is no ε. Empty: not measured.
    """

    spectra: Mapping[str, Mapping[str, Spectrum]]
    samples: int
    batch: int
    counts: Mapping[str, Mapping[str, Array]] = field(default_factory=dict)
    errors: Mapping[str, Mapping[str, Array]] = field(default_factory=dict)

    def save(self, path: str | Path) -> None:
        """Write the calibration as safetensors to ``path``, which holds either the old or the new file at any instant.

        Raises:
            StorageError: the disk refused the write.
        """
        target = Path(path)
        temporary = target.with_name(target.name + ".tmp")
        tensors: dict[str, Array] = {}
        for saved, modes in self.spectra.items():
            for key, spectrum in modes.items():
                tensors[f"eigenvalues/{key}/{saved}"] = np.ascontiguousarray(spectrum.eigenvalues)
                if spectrum.basis is not None:
                    tensors[f"basis/{key}/{saved}"] = np.ascontiguousarray(spectrum.basis)
        for kind, table in (("counts", self.counts), ("errors", self.errors)):
            for saved, found in table.items():
                for key, values in found.items():
                    tensors[f"{kind}/{key}/{saved}"] = np.ascontiguousarray(values, np.float64)
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
        tables: dict[str, dict[str, dict[str, Array]]] = {"counts": {}, "errors": {}}
        try:
            with safe_open(Path(path), framework="numpy") as stream:
                metadata: dict[str, str] = stream.metadata() or {}
                if metadata.get("format") != _FORMAT:
                    raise StateError(
                        f"'{path}' is not a calibration of this version: its format is {metadata.get('format')!r}, "
                        f"expected '{_FORMAT}'; calibrate again"
                    )
                names = set(stream.keys())
                for name in sorted(names):
                    kind, key, saved = name.split("/", 2)
                    if kind == "eigenvalues":
                        basis = f"basis/{key}/{saved}"
                        spectra.setdefault(saved, {})[key] = Spectrum(
                            stream.get_tensor(name), stream.get_tensor(basis) if basis in names else None
                        )
                    elif kind in tables:
                        tables[kind].setdefault(saved, {})[key] = stream.get_tensor(name)
                return Calibration(spectra, int(metadata["samples"]), int(metadata["batch"]), **tables)
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
        matrix = gram[group].astype(np.float64, copy=False)
        if basis is None:
            eigenvalues[group] = np.linalg.eigvalsh(matrix)[::-1]
        else:
            values, vectors = np.linalg.eigh(matrix)
            eigenvalues[group], basis[group] = values[::-1], vectors[:, ::-1]
    return Spectrum(np.maximum(eigenvalues, 0.0), basis)
