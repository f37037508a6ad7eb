"""What a session is given, checked against the manifest. Knows the bundle and numpy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import numpy as np

from edgetune.bundle import TRACED, Array, Manifest
from edgetune.errors import DataError, choices

Inputs: TypeAlias = "Array | Mapping[str, Array]"
"""An array [b, ...] for a model with one input, or arrays by the names of the inputs."""


def checked_inputs(manifest: Manifest, x: Inputs) -> dict[str, Array]:
    """Return the inputs by name, each contiguous and of its type.

    Raises:
        DataError: an input is missing, unknown, or of another shape than [b, *its own]; or the batches differ.
    """
    specs = {spec.name: spec for spec in manifest.inputs}
    given = x if isinstance(x, Mapping) else {next(iter(specs)): x}
    if given.keys() != specs.keys():
        raise DataError(f"expected the inputs {choices(specs)}; found {choices(given)}")
    for name, spec in specs.items():
        array = given[name]
        if array.ndim != 1 + len(spec.shape) or tuple(array.shape[1:]) != spec.shape or not len(array):
            expected = ", ".join(map(str, ("batch", *spec.shape)))
            raise DataError(f"expected input '{name}' [{expected}], found {list(array.shape)}")
    if len({len(array) for array in given.values()}) > 1:
        raise DataError(f"inputs of different batches: { {name: len(array) for name, array in given.items()} }")
    return {name: np.ascontiguousarray(given[name], spec.dtype) for name, spec in specs.items()}


def checked_targets(manifest: Manifest, features: Sequence[Array], y: Array) -> Array:
    """Return the targets of ``features``, contiguous and of their type.

    Raises:
        DataError: features or targets of another shape or type, or a label that is none of the classes.
    """
    expected, found = [(len(y), *f.shape) for f in manifest.features], [f.shape for f in features]
    if not len(y) or found != expected:
        raise DataError(f"{len(y)} targets need features of the shapes {expected}, found {found}")
    spec = manifest.targets
    whole = np.issubdtype(np.dtype(spec.dtype), np.integer)
    if y.shape[1:] != spec.shape or (whole and not np.issubdtype(y.dtype, np.integer)):
        shape = ", ".join(map(str, ("batch", *spec.shape)))
        kind = "an integer type" if whole else spec.dtype
        raise DataError(f"expected targets [{shape}] of {kind}, found {list(y.shape)} of {y.dtype}")
    _check_labels(manifest, y)
    return np.ascontiguousarray(y, spec.dtype)


def _check_labels(manifest: Manifest, y: Array) -> None:
    """Raise DataError if a label is none of the classes (nor the label to be ignored)."""
    if manifest.loss.kind == TRACED or not np.issubdtype(y.dtype, np.integer):
        return
    ignored = manifest.loss.config.get("ignore_index")
    counted = y if ignored is None else y[y != ignored]
    classes = max(2, manifest.outputs[0].shape[0])  # a single output is one of two classes
    if counted.size and (counted.min() < 0 or counted.max() >= classes):
        raise DataError(
            f"targets reach from {counted.min()} to {counted.max()}; the model has the classes 0 to {classes - 1}"
        )
