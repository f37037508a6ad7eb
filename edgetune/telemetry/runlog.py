"""The run log: one JSON object per line, appended and fsynced, never rewritten, and bounded.

Every line has ``event`` (its kind) and ``time`` (seconds since the epoch). A power loss can tear only the last line:
the reader skips what is no JSON object and the writer starts a fresh line after a torn one. A file that has become
large is renamed (``log.jsonl.1``, ``.2``, ...) and another one begun; the last few are kept, and read as one. Knows the
standard library and the errors; knows nothing of what the events mean.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Collection, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import IO, Any

from edgetune.errors import StorageError

SEGMENT_BYTES = 4 << 20
KEPT_SEGMENTS = 4
"""Beside the file that is written: so a log takes at most five times as much on the disk."""


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
    """The writing end. ``append`` returns once the line is on the disk. ``begun`` counts the files that were begun."""

    def __init__(self, path: Path, *, segment_bytes: int = SEGMENT_BYTES, kept: int = KEPT_SEGMENTS) -> None:
        self.path, self.segment_bytes, self.kept = path, segment_bytes, kept
        self.begun = 0
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
            if size_bytes >= self.segment_bytes:
                self._begin_another()
                descriptor, size_bytes = self._open(), 0
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

    def _begin_another(self) -> None:
        """Rename the file that is full, and delete the oldest. A crash on the way leaves one too many, for a while."""
        segments = _segments(self.path)
        number = segments[-1][0] + 1 if segments else 1
        self.close()
        self.begun += 1
        os.replace(self.path, self.path.with_name(f"{self.path.name}.{number}"))
        for _, old in segments[: max(0, len(segments) + 1 - self.kept)]:
            old.unlink(missing_ok=True)
        directory = os.open(self.path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)

    def _open(self) -> int:
        if self._descriptor is None:
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        return self._descriptor


def _segments(path: Path) -> list[tuple[int, Path]]:
    """Return the full files of a log with their numbers, the oldest first."""
    found = []
    for other in path.parent.glob(f"{path.name}.*"):
        number = other.name.removeprefix(f"{path.name}.")
        if number.isdigit():
            found.append((int(number), other))
    return sorted(found)


def read(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of a run log in order, as far as they are kept; a missing file yields none, and torn lines are
    skipped."""
    with ExitStack() as stack:
        for stream in _opened(path, stack):
            for line in stream:
                try:
                    record = json.loads(line)
                except ValueError:
                    continue
                if isinstance(record, dict) and "event" in record:
                    yield record


def _opened(path: Path, stack: ExitStack) -> list[IO[bytes]]:
    """Return all files of a log, opened, though its writer may begin another meanwhile."""
    while True:
        known, streams = _segments(path), list[IO[bytes]]()
        for file in [*(segment for _, segment in known), path]:
            with suppress(FileNotFoundError):
                streams.append(stack.enter_context(file.open("rb")))
        if _segments(path) == known:
            return streams


def steps(path: Path, names: Collection[str] | None = None) -> list[dict[str, Any]]:
    """Return the ``step`` records in the order of their step numbers, with the fields ``names`` alone, if any.

    A run that was killed repeats the steps after its last checkpoint: of such repetitions the last one counts.
    """
    found = {}
    for record in read(path):
        if record["event"] == "step" and "step" in record:
            wanted = record if names is None else {name: record[name] for name in names if name in record}
            found[record["step"]] = wanted
    return [found[number] for number in sorted(found)]
