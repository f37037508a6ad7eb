"""Where samples come from: one file per kind of source, one protocol for all of them (``base.py``)."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from edgetune.agent.sources.archives import Archive, ArchiveSource
from edgetune.agent.sources.arrays import NpzArchive
from edgetune.agent.sources.base import MAX_FILE_BYTES, Found, Source, Waiter
from edgetune.agent.sources.config import KINDS, IntakeConfig
from edgetune.agent.sources.folder import METADATA, FolderSource, Watcher
from edgetune.agent.sources.shards import TarArchive
from edgetune.errors import DataError

__all__ = [
    "KINDS",
    "MAX_FILE_BYTES",
    "METADATA",
    "FolderSource",
    "Found",
    "IntakeConfig",
    "Source",
    "Waiter",
    "Watcher",
    "open_source",
]
_NPY = ".npy"


def open_source(
    spec: str | Path,
    classes: Sequence[str],
    suffixes: Collection[str],
    config: IntakeConfig | None = None,
    scratch: Path | None = None,
) -> Source:
    """Return the source that ``spec`` names.

    Args:
        classes: names of the classes, in the order of the model's outputs.
        suffixes: lower-case file name endings that can be samples.
        scratch: folder for what must be kept on disk meanwhile; None = the system's own.

    Raises:
        DataError: there is no such source.
    """
    config = IntakeConfig() if config is None else config
    path = Path(spec)
    if path.is_dir():
        return FolderSource(path, classes, suffixes)

    def npz(file: Path) -> Archive:
        return NpzArchive(file, classes, most_unpacked_bytes=config.spool_bytes, scratch=scratch)

    def tar(file: Path) -> Archive:
        return TarArchive(file, classes, {*suffixes, _NPY})

    ending = path.suffix.lower()
    if ending in (".npz", ".tar"):
        return ArchiveSource(path, classes, npz if ending == ".npz" else tar)
    if path.exists():
        raise DataError(f"'{spec}' is no source of samples; give {KINDS}")
    raise DataError(f"the data folder '{spec}' does not exist; create it or give another --data: {KINDS}")
