"""A bundle on the disk: opened with every hash checked, or completed by its manifest. Knows files."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from edgetune.bundle.manifest import MANIFEST, Manifest
from edgetune.errors import BundleError

WEIGHTS = "weights.safetensors"

Array = np.ndarray[Any, np.dtype[Any]]


def sha256_of(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while piece := stream.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def sync_directory(path: Path) -> None:
    """Flush a directory's entries to disk, so that a rename in it survives a power loss."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@dataclass(frozen=True)
class Bundle:
    """An opened bundle: its directory and its manifest."""

    path: Path
    manifest: Manifest

    @staticmethod
    def open(path: str | Path, *, verify: bool = True) -> Bundle:
        """Open the bundle in the directory ``path``; with ``verify``, check the hash of every file it lists.

        Raises:
            BundleError: missing, of another version, incomplete, or changed since it was written.
        """
        root = Path(path)
        if not (root / MANIFEST).is_file():
            raise BundleError(f"'{root}' is not a bundle: it holds no {MANIFEST}; make one with 'edgetune export'")
        manifest = Manifest.from_json((root / MANIFEST).read_text("utf-8"))
        for name, expected in manifest.files.items():
            if Path(name).name != name:
                raise BundleError(f"{MANIFEST} names '{name}', which is not a plain file name inside the bundle")
            file = root / name
            if not file.is_file():
                raise BundleError(f"the bundle '{root}' lacks its file {name}; copy or export it again")
            if verify and sha256_of(file) != expected:
                raise BundleError(
                    f"{file} is not the file that was exported (its SHA-256 differs); copy or export the bundle again"
                )
        listed = set(manifest.files)
        if manifest.inference.file not in listed:
            raise BundleError(
                f"{MANIFEST} names a graph without a hash: {manifest.inference.file}; export the bundle again"
            )
        for graph in manifest.graphs.values():
            if not {graph.file, graph.flat_file, *(stage.file for stage in graph.stages)} <= listed:
                raise BundleError(f"{MANIFEST} names a graph without a hash: {graph.file}; export the bundle again")
        return Bundle(root, manifest)

    @property
    def digest(self) -> str:
        """The SHA-256 of the manifest, which itself holds the hash of every file: the bundle's identity."""
        return sha256_of(self.path / MANIFEST)

    def initial_parameters(self) -> dict[str, Array]:
        """Return copies of the exported values of all trained tensors, keyed by the model's own names."""
        return dict(self._read([spec.name for spec in self.manifest.parameters]))

    def initial_buffers(self) -> dict[str, Array]:
        """Return copies of the exported values of all buffers."""
        return dict(self._read([spec.name for spec in self.manifest.buffers]))

    def _read(self, names: list[str]) -> Iterator[tuple[str, Array]]:
        with safe_open(self.path / WEIGHTS, framework="numpy") as stream:
            for name in names:
                yield name, stream.get_tensor(name)


def write_manifest(root: Path, manifest: Manifest) -> Bundle:
    """Hash every file in ``root``, write the manifest last, and return the opened bundle.

    The manifest is written to a temporary name and renamed, so a directory with a manifest is a complete bundle.
    """
    files = {p.name: sha256_of(p) for p in sorted(root.iterdir()) if p.name not in (MANIFEST, MANIFEST + ".tmp")}
    complete = dataclasses.replace(manifest, files=files)
    temporary = root / (MANIFEST + ".tmp")
    with temporary.open("w", encoding="utf-8") as stream:
        stream.write(complete.to_json())
        stream.flush()
        os.fsync(stream.fileno())
    temporary.rename(root / MANIFEST)
    sync_directory(root)
    return Bundle(root, complete)
