"""The files of the replay buffer: one per sample, named by its content, in a directory of the state directory.

A file appears by a rename; :meth:`Store.sync` puts all new ones on the disk before a checkpoint refers to them. A file
is deleted when no kept checkpoint refers to it. What is on the disk besides (a process was killed) is deleted at the
next start. Knows names and bytes; nothing of samples.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from edgetune.agent.replay.index import Contents
from edgetune.agent.storage import guard
from edgetune.bundle import Array, sync_directory
from edgetune.errors import DataError

BLOCK_BYTES = 4096
"""Files take whole blocks of a disk."""


def disk_bytes(size: int) -> int:
    """Return what a file of ``size`` bytes takes on a disk."""
    return -(-size // BLOCK_BYTES) * BLOCK_BYTES


class Store:
    """The files in ``directory``, whose names end with ``suffix``."""

    def __init__(self, directory: Path, suffix: str) -> None:
        self.directory, self.suffix = directory, suffix
        self._unsynced: set[str] = set()  # written since the last checkpoint
        self._waiting: list[tuple[int, str, int]] = []  # (step from which on no state refers to it, file name, bytes)
        self.waiting_bytes = 0

    def write(self, digest: str, content: bytes) -> None:
        """Write the file of a sample; it is on the disk after the next :meth:`sync`.

        Raises:
            StorageError: the disk refused.
        """
        target = self.directory / (digest + self.suffix)
        temporary = target.with_name(target.name + ".tmp")
        with guard(f"cannot write into {self.directory}"):
            self.directory.mkdir(exist_ok=True)
            try:
                temporary.write_bytes(content)
                os.replace(temporary, target)
            except OSError:
                temporary.unlink(missing_ok=True)
                raise
        self._unsynced.add(target.name)

    def read(self, digest: str) -> bytes:
        """Return the file of a sample, whose content the caller verifies.

        Raises:
            DataError: it is missing or unreadable.
        """
        try:
            return (self.directory / (digest + self.suffix)).read_bytes()
        except OSError as error:
            raise DataError(f"cannot be read ({error.strerror or error})") from None

    def sync(self) -> None:
        """Put on the disk what was written since the last time.

        Raises:
            StorageError: the disk refused; the next call tries again.
        """
        if not self._unsynced:
            return
        with guard(f"cannot write into {self.directory}"):
            for name in sorted(self._unsynced):
                descriptor = os.open(self.directory / name, os.O_RDONLY)
                try:
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)
            sync_directory(self.directory)
            sync_directory(self.directory.parent)
        self._unsynced.clear()

    def drop(self, digest: str, size_bytes: int, step: int) -> None:
        """Delete the file of a sample that ``step`` took out: at once if no checkpoint refers to it, else when none of
        those that are kept is of an earlier step."""
        name = digest + self.suffix
        if name in self._unsynced:
            self._unsynced.discard(name)
            (self.directory / name).unlink(missing_ok=True)
            return
        self._waiting.append((step, name, size_bytes))
        self.waiting_bytes += size_bytes

    def tidy(self, oldest_step: int, live: Callable[[str], bool]) -> None:
        """Delete what waits for it, now that no checkpoint before ``oldest_step`` is kept.

        Args:
            live: whether a sample with this content has come back since.
        """
        for step, name, size_bytes in self._waiting:
            if step > oldest_step:
                continue
            self.waiting_bytes -= size_bytes
            if not live(name.partition(".")[0]):
                (self.directory / name).unlink(missing_ok=True)
        self._waiting = [entry for entry in self._waiting if entry[0] > oldest_step]

    def begin(self, kept: Contents, others: Sequence[tuple[str, Contents]], step: int) -> Array:
        """Take up the directory as a checkpoint of ``step`` finds it; return, of each row in ``kept``, whether its file
        is there, bool [n].

        Args:
            kept: contents that the state refers to. others: those that other kept checkpoints refer to, each with the
                suffix of their files; everything else is deleted.
        """
        self._unsynced.clear()
        self._waiting.clear()
        self.waiting_bytes = 0
        there = np.zeros(len(kept), bool)
        for entry in os.scandir(self.directory) if self.directory.is_dir() else ():
            digest, dot, rest = entry.name.partition(".")
            if dot + rest == self.suffix and (row := kept.find(digest)) is not None:
                there[row] = True
                continue
            rows = ((found, found.find(digest)) for suffix, found in others if suffix == dot + rest)
            size_bytes = next((found.bytes(row) for found, row in rows if row is not None), None)
            if size_bytes is None:
                Path(entry.path).unlink(missing_ok=True)
            else:
                self._waiting.append((step, entry.name, size_bytes))
                self.waiting_bytes += size_bytes
        return there
