"""Where samples come from: a folder, in one of two conventions, and nothing outside of it.

1. Class sub-folders: ``folder/<label>/.../<image>``.
2. ``folder/metadata.jsonl``: one object per line with ``file_name`` (relative to the folder) and ``label`` (a class
   name or its index), as Hugging Face image folders have it.

Knows paths and labels; does not decode, and remembers nothing.
"""

from __future__ import annotations

import json
import os
import stat
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath

from edgetune.agent.sources.base import MAX_FILE_BYTES, Found, Lasting, Waiter, labelled, storable, valid_labels
from edgetune.errors import DataError

METADATA = "metadata.jsonl"
_UNFINISHED = (".tmp", ".part", ".partial", ".crdownload", "~")


class FolderSource(Lasting):
    """The folder ``root``.

    Args:
        classes: names of the classes, in the order of the model's outputs.
        suffixes: lower-case file name endings that can be samples; other files are not looked at.

    Raises:
        DataError: no such folder.
    """

    growing = True

    def __init__(self, root: Path, classes: Sequence[str], suffixes: Collection[str]) -> None:
        if not root.is_dir():
            raise DataError(f"the data folder '{root}' does not exist; create it or give another --data")
        self.spec, self.root = str(root), root.resolve()
        self.classes = tuple(classes)
        self.suffixes = suffixes
        self._closed = threading.Event()

    def scan(self) -> Iterator[Found]:
        """Yield all entries in a fixed order (by path; of ``metadata.jsonl``, by line)."""
        for found in self._metadata() if (self.root / METADATA).is_file() else self._folders():
            yield storable(found)

    def stat(self, path: str) -> tuple[int, int]:
        """Return (bytes, modification time in ns). Raises DataError like :meth:`read`."""
        try:
            info = self._inside(path).stat()
        except OSError as error:
            raise DataError(f"cannot be read ({error.strerror or error})") from None
        return info.st_size, info.st_mtime_ns

    def read(self, path: str) -> bytes:
        """Return the content of the entry ``path``.

        Raises:
            DataError: it is missing, leaves the folder, is not a regular file, or is larger than MAX_FILE_BYTES.
        """
        target = self._inside(path)
        try:
            # O_NOFOLLOW: between the check and the opening the file may have been replaced by a link. O_NONBLOCK: a
            # named pipe must not stop the agent.
            descriptor = os.open(target, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise DataError(f"cannot be read ({error.strerror or error})") from None
        with os.fdopen(descriptor, "rb") as stream:
            info = os.fstat(stream.fileno())
            if not stat.S_ISREG(info.st_mode):
                raise DataError("not a regular file")
            if info.st_size > MAX_FILE_BYTES:
                raise DataError(f"larger than {MAX_FILE_BYTES} bytes")
            try:
                return stream.read(MAX_FILE_BYTES + 1)
            except OSError as error:
                raise DataError(f"cannot be read ({error.strerror or error})") from None

    def recorded(self, paths: Iterable[str], *, finished: bool = False) -> None:
        """Do nothing: a file may be written again at any time."""

    def absent(self) -> str | None:
        return None if self.root.is_dir() else f"the data folder '{self.root}' is gone"

    def waiter(self, rescan_seconds: float) -> Waiter:
        return Watcher(self.root, rescan_seconds=rescan_seconds, closed=self._closed)

    def close(self) -> None:
        """End the watch; no file stays open."""
        self._closed.set()

    def _inside(self, path: str) -> Path:
        pure = PurePosixPath(path)
        if pure.is_absolute() or ".." in pure.parts or "\0" in path:
            raise DataError("refused: its name leaves the data folder")
        try:
            target = (self.root / pure).resolve(strict=True)
        except (OSError, RuntimeError):
            raise DataError("missing") from None
        if not target.is_relative_to(self.root):
            raise DataError("refused: a link leads out of the data folder")
        return target

    def _folders(self) -> Iterator[Found]:
        for directory, folders, files in os.walk(self.root, followlinks=False):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            inside = Path(directory).relative_to(self.root)
            for name in sorted(files):
                if not self._candidate(name):
                    continue
                path = (inside / name).as_posix()
                if not inside.parts:
                    valid = valid_labels(self.classes)
                    yield Found(path, None, f"no label: expected it in a folder named as its class ({valid})")
                    continue
                yield labelled(path, inside.parts[0], self.classes)

    def _metadata(self) -> Iterator[Found]:
        try:
            with (self.root / METADATA).open("rb") as stream:
                lines = list(stream)
        except OSError:
            return
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                entry = json.loads(line)
            except ValueError:
                if line.endswith(b"\n"):  # else the line is still being written
                    yield Found(f"{METADATA}:{number}", None, "this line is not JSON")
                continue
            name = entry.get("file_name") if isinstance(entry, dict) else None
            if not isinstance(name, str) or not name or "label" not in entry:
                yield Found(f"{METADATA}:{number}", None, "this line lacks 'file_name' (text) or 'label'")
                continue
            pure = PurePosixPath(name)
            if pure.is_absolute() or ".." in pure.parts:
                yield Found(name, None, "refused: its name leaves the data folder")
                continue
            task = entry.get("task")
            yield labelled(pure.as_posix(), entry["label"], self.classes, task if isinstance(task, str) else None)

    def _candidate(self, name: str) -> bool:
        lower = name.lower()
        if lower.startswith(".") or lower.endswith(_UNFINISHED):
            return False
        return os.path.splitext(lower)[1] in self.suffixes


class Watcher:
    """Waits for changes in a folder. Where the system cannot report changes it sleeps and asks for a re-scan.

    A thread takes each report as it comes and keeps one bit of it: reports pile up while nobody waits, and an agent
    that has enough to train may not wait for months.

    Args:
        closed: set it, and the thread ends.
    """

    def __init__(self, root: Path, *, rescan_seconds: float, closed: threading.Event) -> None:
        self.rescan_seconds = rescan_seconds
        self._changed = threading.Event()
        try:
            from watchfiles import watch

            reports = watch(
                root, rust_timeout=200, yield_on_timeout=True, debounce=400, step=50, raise_interrupt=False,
                watch_filter=None, stop_event=closed,
            )  # fmt: skip
            next(reports)  # the watch begins here, hence before the caller's first scan
        except Exception:  # no inotify (its limit, a network drive) must not stop the agent
            return
        threading.Thread(target=self._take, args=(reports,), name="edgetune-watch", daemon=True).start()

    def _take(self, reports: Iterator[Collection[object]]) -> None:
        try:
            for report in reports:
                if report:
                    self._changed.set()
        except Exception:  # the watched folder went away: go on by re-scans
            return

    def wait(self, timeout_seconds: float, stopping: Callable[[], bool]) -> None:
        """Return when something changed, when ``stopping()``, or after ``timeout_seconds`` (at most a re-scan's)."""
        until = time.monotonic() + min(timeout_seconds, self.rescan_seconds)
        while (left := until - time.monotonic()) > 0 and not stopping():
            if self._changed.wait(min(left, 0.2)):
                self._changed.clear()  # before the caller looks: what comes during the look is another change
                return
