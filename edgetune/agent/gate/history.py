"""What became of every candidate, and what people did: one JSON object a line, appended and flushed to the disk.

A line that a power loss cut short never happened: it is taken away by the next one. Two files of a few MiB at most are
kept, so that the history of years does not fill a disk. What is in use does not depend on it. Knows files.
"""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from edgetune.agent.storage import guard
from edgetune.bundle import sync_directory

MOST_BYTES = 4 * 2**20


class History:
    """The history in the file ``path``; when it is full it becomes ``<path>.1``, and the one before goes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._older = path.with_name(path.name + ".1")

    def append(self, event: str, **fields: Any) -> None:
        """Write an entry; it is on the disk when this returns. Two processes must not do so at once.

        Raises:
            StorageError: the disk refused.
        """
        entry = {"event": event, "time": round(time.time(), 3), **fields}
        line = json.dumps(entry, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        with guard(f"cannot write the history {self.path}"):
            if self.path.exists() and self.path.stat().st_size + len(line) > MOST_BYTES:
                os.replace(self.path, self._older)
            new = not self.path.exists()
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                end = self._end(descriptor)
                os.truncate(descriptor, end)
                if os.pwrite(descriptor, line, end) < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            if new:
                sync_directory(self.path.parent)

    @staticmethod
    def _end(descriptor: int) -> int:
        """Return where the last whole line ends."""
        end = os.fstat(descriptor).st_size
        while end:
            begin = max(0, end - 65536)
            found = os.pread(descriptor, end - begin, begin).rfind(b"\n")
            if found >= 0:
                return begin + found + 1
            end = begin
        return 0

    def read(self) -> Iterator[dict[str, Any]]:
        """Yield the entries, the oldest first; what is no entry (a damaged line) is left out."""
        for path in (self._older, self.path):
            try:
                stream = path.open("rb")
            except FileNotFoundError:
                continue
            with stream:
                for line in stream:
                    try:
                        entry = json.loads(line) if line.endswith(b"\n") else None
                    except ValueError:
                        entry = None
                    if isinstance(entry, dict) and isinstance(entry.get("event"), str):
                        yield entry
