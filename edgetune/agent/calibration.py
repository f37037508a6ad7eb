"""The files in which the agent keeps its calibrations, each named by its content. Knows nothing of what is in them."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from edgetune.agent.storage import guard
from edgetune.bundle import sync_directory
from edgetune.errors import StateError
from edgetune.planning.spectra import Calibration

_NAME = re.compile(r"calibration-\d{8,}(?:\.([0-9a-f]{64}))?\.safetensors")  # those of older states have no digest
_PIECE_BYTES = 1 << 20


def save(directory: Path, step: int, calibration: Calibration) -> str:
    """Write the calibration made after ``step`` steps and return its name; it is on the disk when this returns.

    Raises:
        StorageError: the disk refused; no file that is there was touched.
    """
    unnamed = directory / f"calibration-{step:08d}.unnamed"
    calibration.save(unnamed)
    with guard(f"cannot write a calibration into {directory}"):
        name = f"calibration-{step:08d}.{_digest_of(unnamed)}.safetensors"
        os.replace(unnamed, directory / name)
        sync_directory(directory)
    return name


def verify(directory: Path, name: str) -> None:
    """Check that the calibration ``name`` is there and what its name promises.

    Raises:
        StateError: it is not.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        raise StateError(f"'{name}' is no calibration's file")
    try:
        if match[1] is None:
            Calibration.load(directory / name)
        elif _digest_of(directory / name) != match[1]:
            raise StateError(f"the content of {name} is not what its name promises")
    except (OSError, ValueError) as error:
        raise StateError(f"{name} cannot be read ({error})") from None


def load(directory: Path, name: str) -> Calibration:
    """Return the calibration ``name``.

    Raises:
        StateError: missing, damaged, or not what its name promises.
    """
    verify(directory, name)
    return Calibration.load(directory / name)


def prune(directory: Path, wanted: Iterable[Mapping[str, object]]) -> None:
    """Delete every calibration that none of the checkpoint positions ``wanted`` names."""
    names = {position.get("calibration") for position in wanted}
    for path in directory.glob("calibration-*.safetensors"):
        if path.name not in names:
            path.unlink(missing_ok=True)


def _digest_of(path: Path) -> str:
    """Return the SHA-256 of what a safetensors file holds: the library writes the same header in many orders."""
    with path.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        if size > path.stat().st_size:
            raise ValueError("its header is longer than the file")
        header = json.loads(stream.read(size))
        digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
        while piece := stream.read(_PIECE_BYTES):
            digest.update(piece)
    return digest.hexdigest()
