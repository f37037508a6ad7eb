"""The spool: samples of a stream on the disk, where they stay until they are trained for good.

One file per sample, named by the SHA-256 of its content: a line of JSON (its number in the stream, its label), then the
content. It is there as a whole or not at all, and on the disk before anybody is told of it. Knows files; nothing of
streams.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgetune.agent.sources.base import MAX_FILE_BYTES
from edgetune.agent.storage import guard, write_atomic
from edgetune.bundle import sync_directory
from edgetune.errors import DataError

_NAME = re.compile(r"[0-9a-f]{64}")
_MOST_HEADER_BYTES = 1 << 16
_BLOCK_BYTES = 4096  # what a file takes of a disk is a multiple of this
_POSITION = "position.json"


@dataclass(frozen=True)
class Spooled:
    """One sample: the ``number`` at which it came, what was said of it, and how long its content is."""

    sha256: str
    number: int
    label: Any
    task: str | None
    size_bytes: int

    @property
    def disk_bytes(self) -> int:
        return -(-(self.size_bytes + 256) // _BLOCK_BYTES) * _BLOCK_BYTES


class Spool:
    """The folder ``path``; made when missing. ``bytes`` is what its samples take.

    Raises:
        StorageError: it cannot be made or read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: dict[str, Spooled] = {}
        with guard(f"cannot use the spool {path}"):
            path.mkdir(parents=True, exist_ok=True)
            for file in path.iterdir():
                if file.suffix == ".tmp":
                    file.unlink()
                elif _NAME.fullmatch(file.name) and (entry := _described(file)) is not None:
                    self.entries[entry.sha256] = entry
        self.entries = {entry.sha256: entry for entry in sorted(self.entries.values(), key=lambda one: one.number)}
        self.bytes = _BLOCK_BYTES + sum(
            entry.disk_bytes for entry in self.entries.values()
        )  # the position's, and these

    def put(self, number: int, data: bytes, label: Any, task: str | None) -> tuple[Spooled, bool]:
        """Keep ``data``; return its entry, and whether it is new here. It is on the disk when this returns.

        Raises:
            StorageError: the disk refused.
        """
        sha256 = hashlib.sha256(data).hexdigest()
        if sha256 in self.entries:
            return self.entries[sha256], False
        entry = Spooled(sha256, number, label, task, len(data))
        header = json.dumps({"number": number, "label": label, "task": task}).encode() + b"\n"
        write_atomic(self.path / sha256, header + data)
        self.entries[sha256] = entry
        self.bytes += entry.disk_bytes
        return entry, True

    def read(self, sha256: str) -> bytes:
        """Return the content of a sample.

        Raises:
            DataError: it is not here any more, or cannot be read.
        """
        try:
            with (self.path / sha256).open("rb") as stream:
                stream.readline(_MOST_HEADER_BYTES)
                return stream.read(MAX_FILE_BYTES + 1)
        except FileNotFoundError:
            raise DataError("missing: it is not in the spool any more") from None
        except OSError as error:
            raise DataError(f"cannot be read ({error.strerror or error})") from None

    def remove(self, sha256: str) -> None:
        """Give up a sample. A file that the disk does not let go of is found again at the next start."""
        entry = self.entries.pop(sha256, None)
        if entry is not None:
            self.bytes -= entry.disk_bytes
            try:
                (self.path / sha256).unlink()
            except OSError:  # nothing depends on it
                pass

    def position(self, name: str) -> int:
        """Return how many samples of the stream ``name`` are known to be recorded."""
        try:
            found = json.loads((self.path / _POSITION).read_text("utf-8"))[name]
        except (OSError, ValueError, KeyError, TypeError):
            return 0
        return found if isinstance(found, int) and found >= 0 else 0

    def set_position(self, name: str, count: int) -> None:
        """Note how many samples of the stream ``name`` are recorded; those of other streams are forgotten.

        Raises:
            StorageError: the disk refused.
        """
        write_atomic(self.path / _POSITION, json.dumps({name: count}).encode())

    def sync(self) -> None:
        """Make what was removed stay removed."""
        with guard(f"cannot write the spool {self.path}"):
            sync_directory(self.path)


def _described(file: Path) -> Spooled | None:
    """Return what the first line of a file says; None if it is damaged."""
    with file.open("rb") as stream:
        header = stream.readline(_MOST_HEADER_BYTES)
        size_bytes = os.fstat(stream.fileno()).st_size - len(header)
    try:
        told = json.loads(header)
        number, label, task = int(told["number"]), told["label"], told["task"]
    except (ValueError, KeyError, TypeError):
        return None
    return Spooled(file.name, number, label, task if isinstance(task, str) else None, size_bytes)
