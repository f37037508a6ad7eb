"""Writes that either happen whole or not at all, and one error for every disk that refuses them.

Knows files and SQLite's messages; knows nothing of what is stored.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from edgetune.bundle import sync_directory
from edgetune.errors import StateError, StorageError

# sqlite_errorcode exists only from Python 3.11 on, so the messages of SQLite itself are compared.
_SQLITE_STORAGE = ("disk is full", "readonly database", "disk i/o error", "unable to open database file")


@contextmanager
def guard(what: str) -> Iterator[None]:
    """Turn every refusal of the disk inside the block into a :class:`StorageError` that names ``what`` failed."""
    try:
        yield
    except sqlite3.DatabaseError as error:
        text = str(error).lower()
        if any(part in text for part in _SQLITE_STORAGE):
            raise StorageError(f"{what}: {error}; free space or make the directory writable") from error
        if "malformed" in text or "not a database" in text:
            raise StateError(f"{what}: it is damaged ({error}); restore it or use a new state directory") from error
        raise
    except OSError as error:
        reason = error.strerror or str(error)
        raise StorageError(f"{what}: {reason}; free space or make the directory writable") from error


def write_atomic(path: Path, data: bytes) -> None:
    """Replace ``path`` by ``data`` so that a reader, or a power loss, sees the old content or the new, never a mix.

    Raises:
        StorageError: the disk refused; ``path`` is as it was.
    """
    temporary = path.with_name(path.name + ".tmp")
    with guard(f"cannot write {path}"):
        try:
            with temporary.open("wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, path)
            sync_directory(path.parent)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
