"""The run log: one JSON object per line, appended and fsynced, never rewritten.

Every line has ``event`` (its kind) and ``time`` (seconds since the epoch). A power loss can tear only the last line:
the reader skips what is no JSON object and the writer starts a fresh line after a torn one. Knows the standard library
and the errors; knows nothing of what the events mean.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from edgetune.errors import StorageError


def plain(value: Any) -> Any:
    """Return ``value`` as strict JSON data: numpy scalars become numbers, numbers that are not finite become None."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if hasattr(value, "item"):
        return plain(value.item())
    return str(value)


class RunLog:
    """The writing end. ``append`` returns once the line is on the disk."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor: int | None = None

    def append(self, event: str, **fields: Any) -> dict[str, Any]:
        """Append one line and return what it holds.

        Raises:
            StorageError: the disk refused; the lines written before are untouched and no half line is left behind.
        """
        record = {"event": event, "time": round(time.time(), 3), **plain(fields)}
        self.write(record)
        return record

    def write(self, record: dict[str, Any]) -> None:
        """Append an already built record; see :meth:`append`."""
        line = json.dumps(record, allow_nan=False, separators=(",", ":")).encode() + b"\n"
        try:
            descriptor = self._open()
            size_bytes = os.fstat(descriptor).st_size
            if size_bytes and os.pread(descriptor, 1, size_bytes - 1) != b"\n":
                line = b"\n" + line
            try:
                written = os.write(descriptor, line)
                if written != len(line):
                    os.write(descriptor, line[written:])
                os.fsync(descriptor)
            except OSError:
                os.ftruncate(descriptor, size_bytes)
                raise
        except OSError as error:
            raise StorageError(
                f"cannot write the run log {self.path}: {error.strerror or error}; free space or make the directory "
                "writable"
            ) from error

    def close(self) -> None:
        """Close the file; a later append opens it again."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _open(self) -> int:
        if self._descriptor is None:
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        return self._descriptor


def read(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of a run log in order; a missing file yields none, and torn lines are skipped."""
    if not path.is_file():
        return
    with path.open("rb") as stream:
        for line in stream:
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict) and "event" in record:
                yield record


def steps(path: Path) -> list[dict[str, Any]]:
    """Return the ``step`` records in the order of their step numbers.

    A run that was killed repeats the steps after its last checkpoint: of such repetitions the last one counts.
    """
    found = {record["step"]: record for record in read(path) if record["event"] == "step" and "step" in record}
    return [found[number] for number in sorted(found)]
