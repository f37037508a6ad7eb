"""Samples that come one after the other, and only once: an iterable of (sample, label) of the user's own.

A thread takes them and puts them into the spool; from there they are recorded and read like files. So a sample is lost
by no crash, and a slow source does not hold up training. The thread stops taking while enough samples wait, or while
the spool is full. Entries are named by their content: a function that gives the same samples again at the next start
finds them known. Knows the spool and iterables; nothing of ledgers.
"""

from __future__ import annotations

import inspect
import io
import operator
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeAlias

import numpy as np

from edgetune.agent.sources.arrays import npy
from edgetune.agent.sources.base import MAX_FILE_BYTES, Found, Waiter, labelled, storable
from edgetune.agent.sources.config import IntakeConfig
from edgetune.agent.sources.spool import Spool, Spooled
from edgetune.errors import DataError, StorageError

_LEAST_RETRY_SECONDS, _MOST_RETRY_SECONDS = 1.0, 60.0
_POSITION_EVERY = 256  # recorded samples


Begin: TypeAlias = "Callable[[int], tuple[Iterable[Any], int]]"


class StreamSource:
    """The stream that ``begin(start)`` opens: an iterable, and how many of its first ``start`` samples it left out.

    Args:
        name: what its entries are called, before the #. folder: of the spool, made when it is first needed.
        room: a folder around it that goes with the source.
    """

    growing = False

    def __init__(
        self,
        spec: str,
        name: str,
        classes: Sequence[str],
        begin: Begin,
        folder: Path,
        config: IntakeConfig,
        room: TemporaryDirectory[str] | None = None,
    ) -> None:
        self.spec, self.name, self.classes = spec, name, tuple(classes)
        self._begin, self._folder, self._config, self._room = begin, folder, config, room
        self._changed = threading.Condition()
        self._closing = False
        self._thread: threading.Thread | None = None
        # All below is shared with the thread, under the condition.
        self._spool: Spool | None = None
        self._unrecorded: dict[str, Spooled | Found] = {}  # by name, in the order in which they came
        self._fresh: set[str] = set()  # names of those that were put into the spool since the start
        self._by_name: dict[str, str] = {}  # name -> SHA-256
        self._number = self._saved_number = 0
        self._waiting = 0
        self._over = self._blocked = False
        self._trouble: DataError | StorageError | None = None

    def scan(self) -> Iterator[Found]:
        self._start()
        with self._changed:
            waiting = list(self._unrecorded.items())
        for name, entry in waiting:
            if isinstance(entry, Found):
                yield entry
            else:
                yield storable(labelled(name, entry.label, self.classes, entry.task, final=True))
        self._save_position(at_once=False)

    def stat(self, path: str) -> tuple[int, int]:
        with self._changed:
            entry = self._entry(path)
        return entry.size_bytes, 0

    def read(self, path: str) -> bytes:
        with self._changed:
            entry, spool = self._entry(path), self._spool
        assert spool is not None
        return spool.read(entry.sha256)

    def recorded(self, paths: Iterable[str], *, finished: bool = False) -> None:
        with self._changed:
            for path in paths:
                self._unrecorded.pop(path, None)
                if finished and path in self._fresh:  # it was let go of before, and came once more
                    self._remove(path)
            self._changed.notify_all()

    def held(self) -> dict[str, int]:
        with self._changed:
            entries = {} if self._spool is None else self._spool.entries
            names = self._by_name.items()
            return {name: entries[sha256].disk_bytes for name, sha256 in names if name not in self._unrecorded}

    def release(self, paths: Iterable[str]) -> None:
        with self._changed:
            for path in paths:
                self._remove(path)
                self._blocked = False  # until the thread finds that there is no room still
            self._changed.notify_all()

    def ended(self) -> bool:
        with self._changed:
            return self._over and not self._unrecorded

    def stalled(self) -> bool:
        with self._changed:
            return self._blocked and not self._unrecorded

    def heed(self, waiting: int) -> None:
        with self._changed:
            self._blocked = self._blocked and waiting >= self._waiting
            self._waiting = waiting
            self._changed.notify_all()

    def check(self) -> None:
        with self._changed:
            trouble, self._trouble = self._trouble, None
        if trouble is not None:
            raise trouble

    def absent(self) -> str | None:
        return None if self._folder.is_dir() else f"the spool '{self._folder}' is gone"

    def waiter(self, rescan_seconds: float) -> Waiter:
        return self

    def wait(self, timeout_seconds: float, stopping: Callable[[], bool]) -> None:
        """Return when there is something to record, or the stream ended, failed or stalled; see :class:`Waiter`."""
        until = time.monotonic() + timeout_seconds
        with self._changed:
            while not (self._unrecorded or self._over or self._trouble or self._blocked or stopping()):
                left = until - time.monotonic()
                if left <= 0:
                    return
                self._changed.wait(min(left, 0.2))
        if not self._unrecorded and (self._over or self._blocked):  # nothing to do here: do not keep a core busy
            time.sleep(min(timeout_seconds, 0.05))

    def close(self) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(timeout=1.0)  # one that waits for the user's function ends with the process
            self._thread = None
            try:
                self._save_position(at_once=True)
            except StorageError:  # a few samples more will be recognised by their content
                pass
        if self._room is not None:
            self._room.cleanup()

    # ---- the thread ----------------------------------------------------------------------------------------------
    def _start(self) -> None:
        if self._thread is not None or self._closing:
            return
        spool = self._spool = Spool(self._folder)
        for entry in spool.entries.values():
            name = self._name(entry.sha256)
            self._unrecorded[name], self._by_name[name] = entry, entry.sha256
        self._saved_number = spool.position(self.name)
        self._number = max([self._saved_number, *(entry.number + 1 for entry in spool.entries.values())])
        self._thread = threading.Thread(target=self._read_all, name="edgetune-stream", daemon=True)
        self._thread.start()

    def _read_all(self) -> None:
        pause_seconds = _LEAST_RETRY_SECONDS
        start = self._number
        while not self._closing:
            before = start
            try:
                items, self._number = self._begin(start)
                for item in items:
                    if not self._take(item):
                        return
                with self._changed:
                    self._over = True
                    self._changed.notify_all()
                return
            except Exception as error:  # the user's own function may raise anything; the agent goes on without it
                what = f"{self.spec} failed after {self._number} samples ({type(error).__name__}: {error})"
            start = max(start, self._number)
            pause_seconds = _LEAST_RETRY_SECONDS if start > before else 2 * pause_seconds
            self._tell(DataError(what))
            self._sleep(min(pause_seconds, _MOST_RETRY_SECONDS))

    def _take(self, item: Any) -> bool:
        """Put one item into the spool once there is room; return False if the source was closed meanwhile."""
        assert self._spool is not None
        try:
            data, label, task = _parts(item)
            if len(data) > min(MAX_FILE_BYTES, self._config.spool_bytes // 2):
                raise DataError(
                    f"it has {len(data)} bytes; a sample may take half of intake.spool_bytes, and {MAX_FILE_BYTES}"
                )
        except DataError as error:
            with self._changed:
                name = f"{self.name}@{self._number}"
                self._unrecorded[name] = Found(name, None, str(error), final=True)
                self._number += 1
                self._changed.notify_all()
            return self._wait_for_room(0)
        while self._wait_for_room(len(data)):
            try:
                with self._changed:
                    entry, new = self._spool.put(self._number, data, label, task)
                    if new:
                        name = self._name(entry.sha256)
                        self._unrecorded[name], self._by_name[name] = entry, entry.sha256
                        self._fresh.add(name)
                    self._number += 1
                    self._changed.notify_all()
                return True
            except StorageError as error:  # the sample is still in hand
                self._tell(error)
                self._sleep(_LEAST_RETRY_SECONDS)
        return False

    def _wait_for_room(self, size_bytes: int) -> bool:
        config, spool = self._config, self._spool
        assert spool is not None
        with self._changed:
            while not self._closing:
                many = self._waiting + len(self._unrecorded) >= config.max_pending
                full = bool(spool.entries) and spool.bytes + size_bytes > config.spool_bytes
                self._blocked = many or full
                if not self._blocked:
                    return True
                self._changed.notify_all()
                self._changed.wait(1.0)
        return False

    def _tell(self, trouble: DataError | StorageError) -> None:
        with self._changed:
            self._trouble = trouble
            self._changed.notify_all()

    def _sleep(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        with self._changed:
            while not self._closing and (left := until - time.monotonic()) > 0:
                self._changed.wait(left)

    # ---- names ---------------------------------------------------------------------------------------------------
    def _name(self, sha256: str) -> str:
        return f"{self.name}#{sha256[:16]}"

    def _entry(self, path: str) -> Spooled:
        self._start()
        assert self._spool is not None
        entry = self._spool.entries.get(self._by_name.get(path, ""))
        if entry is None:
            raise DataError("missing: it is not in the spool any more")
        return entry

    def _remove(self, path: str) -> None:
        sha256 = self._by_name.pop(path, None)
        self._fresh.discard(path)
        if sha256 is not None and self._spool is not None:
            self._spool.remove(sha256)

    def _save_position(self, *, at_once: bool) -> None:
        with self._changed:
            spool = self._spool
            numbers = [entry.number for entry in self._unrecorded.values() if isinstance(entry, Spooled)]
            count = min(numbers, default=self._number)
        far = abs(count - self._saved_number) >= _POSITION_EVERY
        if spool is not None and (far or (at_once and count != self._saved_number)):
            spool.set_position(self.name, count)
            self._saved_number = count


def opener(target: Any) -> Begin:
    """Return what opens the stream ``target`` at a given sample: a function (told ``start`` if it takes that), a data
    set (an object that has a length and gives its samples by index), or any iterable.

    Raises:
        DataError: it is none of these.
    """

    def begin(start: int) -> tuple[Iterable[Any], int]:
        made = target
        if callable(target):
            if "start" in inspect.signature(target).parameters:
                return _iterable(target(start=start), 0)[0], start
            made = target()
        return _iterable(made, start)

    if not (callable(target) or hasattr(target, "__iter__") or hasattr(target, "__getitem__")):
        raise DataError(f"a {type(target).__name__} is no source of samples; expected a function or a data set")
    return begin


def _iterable(made: Any, start: int) -> tuple[Iterable[Any], int]:
    """Return ``made`` as an iterable, and with which sample it begins: ``start`` if it can be read by index, else 0."""
    if hasattr(made, "__getitem__") and hasattr(made, "__len__") and not isinstance(made, dict):
        return (made[index] for index in range(start, len(made))), start
    if not hasattr(made, "__iter__"):
        raise DataError(f"it returned a {type(made).__name__}; expected an iterable of (sample, label) or a data set")
    return made, 0


def _parts(item: Any) -> tuple[bytes, int | str, str | None]:
    """Return what an item of a stream consists of: content, label and task.

    Raises:
        DataError: it is neither (sample, label) nor (sample, label, task), or one of them is of no known kind.
    """
    if not isinstance(item, tuple | list) or len(item) not in (2, 3):
        raise DataError(f"the stream gave a {type(item).__name__}; expected (sample, label) or (sample, label, task)")
    sample, label, task = (*item, None)[:3]
    if not isinstance(label, str):
        try:
            label = operator.index(label)
        except TypeError:
            raise DataError(f"its label is a {type(label).__name__}; expected a class's name or index") from None
    if task is not None and not isinstance(task, str):
        raise DataError(f"its task is a {type(task).__name__}; expected text")
    return _content(sample), label, task


def _content(sample: Any) -> bytes:
    if isinstance(sample, bytes | bytearray | memoryview):
        return bytes(sample)
    if hasattr(sample, "save") and hasattr(sample, "mode"):  # one of Pillow's images
        stream = io.BytesIO()
        sample.save(stream, format="PNG")
        return stream.getvalue()
    try:
        value = np.asarray(sample)  # torch's tensors too, without torch
    except Exception as error:  # whatever the user's object raises
        raise DataError(f"its sample is a {type(sample).__name__}, of which no array can be made ({error})") from None
    if value.dtype.kind not in "fiub":
        raise DataError(f"its sample is a {type(sample).__name__}; expected bytes, an image, or an array of numbers")
    return npy(np.ascontiguousarray(value))
