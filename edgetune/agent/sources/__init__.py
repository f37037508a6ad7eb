"""Where samples come from: one file per kind of source, one protocol for all of them (``base.py``)."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from edgetune.agent.sources.base import MAX_FILE_BYTES, Found, Source, Waiter
from edgetune.agent.sources.folder import METADATA, FolderSource, Watcher

__all__ = ["MAX_FILE_BYTES", "METADATA", "FolderSource", "Found", "Source", "Waiter", "Watcher", "open_source"]


def open_source(spec: str | Path, classes: Sequence[str], suffixes: Collection[str]) -> Source:
    """Return the source that ``spec`` names: a folder.

    Args:
        classes: names of the classes, in the order of the model's outputs.
        suffixes: lower-case file name endings that can be samples.

    Raises:
        DataError: there is no such source.
    """
    return FolderSource(Path(spec), classes, suffixes)
