"""Where samples come from: one file per kind of source, one protocol for all of them (``base.py``)."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Collection, Sequence
from pathlib import Path

from edgetune.agent.sources.archives import Archive, ArchiveSource
from edgetune.agent.sources.arrays import NpzArchive
from edgetune.agent.sources.base import MAX_FILE_BYTES, Found, Source, Waiter
from edgetune.agent.sources.camera import PREFIX, pictures
from edgetune.agent.sources.config import AUGMENTATIONS, KINDS, IntakeConfig
from edgetune.agent.sources.entry import is_entry, load_entry
from edgetune.agent.sources.folder import METADATA, FolderSource, Watcher
from edgetune.agent.sources.shards import TarArchive
from edgetune.agent.sources.stream import Begin, StreamSource, opener
from edgetune.errors import DataError

__all__ = [
    "AUGMENTATIONS",
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
SPOOL = "spool"
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
        config: None = the defaults.
        scratch: folder for what must be kept on disk meanwhile; nothing is made there before it is needed. None = one
            of the system's, removed with the source.

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

    def stream(name: str, begin: Begin) -> Source:
        room = tempfile.TemporaryDirectory(prefix="edgetune-") if scratch is None else None
        folder = Path(room.name) if room is not None else scratch
        assert folder is not None
        return StreamSource(str(spec), name, classes, begin, folder / SPOOL, config, room)

    if str(spec).startswith(PREFIX):
        device = str(spec).removeprefix(PREFIX)
        name = PREFIX + re.sub(r".*[/\\]|[@#]", "", device)  # an address may hold a password
        return stream(name, pictures(device, config.labeller, config.camera_interval_s))
    ending = path.suffix.lower()
    if ending in (".npz", ".tar"):
        return ArchiveSource(path, classes, npz if ending == ".npz" else tar)
    if is_entry(str(spec)):
        return stream(path.name, opener(load_entry(str(spec))))
    if path.exists():
        raise DataError(f"'{spec}' is no source of samples; give {KINDS}")
    raise DataError(f"the data folder '{spec}' does not exist; create it or give another --data: {KINDS}")
