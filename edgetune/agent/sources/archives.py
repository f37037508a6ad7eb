"""Archives: files that hold many samples, ``.npz`` and ``.tar``, one of them or all that a pattern finds.

An entry is named ``<file name>#<name inside>``. Nothing is extracted, and no file stays open. Knows files and what is
common to archives; ``arrays.py`` and ``shards.py`` know what is inside.
"""

from __future__ import annotations

import glob
import os
import stat
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from edgetune.agent.sources.base import Found, Lasting, Waiter, storable
from edgetune.agent.sources.folder import Watcher
from edgetune.errors import DataError


class Archive(Protocol):
    """One file that holds samples, as it was when it was opened; paths are names inside of it."""

    def entries(self) -> Iterator[Found]:
        """Yield all entries, in the order of the file. A ``path`` that begins with @ names a place, not an entry."""

    def stat(self, path: str) -> tuple[int, int]:
        """Return (bytes, version) of an entry. Raises DataError as :meth:`read`."""

    def read(self, path: str) -> bytes:
        """Return the content of an entry. Raises DataError: there is none of this name, or it cannot be read."""

    def close(self) -> None:
        """Let go of what is held."""


@dataclass
class _Known:
    signature: tuple[int, int, int]
    archive: Archive
    complete: bool = False  # every entry was yielded since
    unrecorded: int = 0  # of those


class ArchiveSource(Lasting):
    """The file ``pattern``, or all files that it stands for (``shards/*.tar``; wildcards only in the last part).

    Args:
        make: opens one file.

    Raises:
        DataError: no such file, or for a pattern no such folder.
    """

    growing = True

    def __init__(self, pattern: Path, classes: Sequence[str], make: Callable[[Path], Archive]) -> None:
        self.spec, self.classes, self._make = str(pattern), tuple(classes), make
        self._folder, self._pattern = pattern.parent.absolute(), pattern.name
        self._many = glob.has_magic(self._pattern)
        self._known: dict[str, _Known] = {}
        self._closed = threading.Event()
        if (absent := self.absent()) is not None:
            raise DataError(f"{absent}; give another --data")

    def scan(self) -> Iterator[Found]:
        names = sorted(glob.glob(self._pattern, root_dir=self._folder)) if self._many else [self._pattern]
        for gone in set(self._known) - set(names):
            self._known.pop(gone).archive.close()
        for name in names:
            try:
                known = self._open(name)
            except DataError as error:
                yield storable(Found(name, None, str(error), mending=True))
                continue
            if known.complete and known.unrecorded <= 0:
                continue
            known.complete, known.unrecorded = False, 0
            for found in known.archive.entries():
                known.unrecorded += 1
                inside = found.path if found.path.startswith("@") else f"#{found.path}"
                yield storable(replace(found, path=name + inside))
            known.complete = True

    def stat(self, path: str) -> tuple[int, int]:
        name, inside = self._split(path)
        if inside is None:
            size_bytes, mtime_ns, _ = self._signature(name)
            return size_bytes, mtime_ns
        return self._open(name).archive.stat(inside)

    def read(self, path: str) -> bytes:
        name, inside = self._split(path)
        if inside is None:
            raise DataError("it names no sample of the archive")
        return self._open(name).archive.read(inside)

    def recorded(self, paths: Iterable[str], *, finished: bool = False) -> None:
        for path in paths:
            known = self._known.get(self._split(path)[0])
            if known is not None:
                known.unrecorded -= 1

    def absent(self) -> str | None:
        if self._many:
            return None if self._folder.is_dir() else f"the folder '{self._folder}' of the archives is not there"
        return None if (self._folder / self._pattern).is_file() else f"the archive '{self.spec}' is not there"

    def waiter(self, rescan_seconds: float) -> Waiter:
        return Watcher(self._folder, rescan_seconds=rescan_seconds, closed=self._closed)

    def close(self) -> None:
        self._closed.set()
        while self._known:
            self._known.popitem()[1].archive.close()

    def _split(self, path: str) -> tuple[str, str | None]:
        """Return the archive's file name and the name inside (None: ``path`` means the archive, or a place in it)."""
        if self._many:  # an archive's own name may hold a mark
            names = [known for known in self._known if path.startswith((known + "#", known + "@"))]
            name = max(names, key=len) if names else path.partition("#")[0].partition("@")[0]
        else:
            name = self._pattern
        rest = path[len(name) :]
        return name, rest[1:] if rest.startswith("#") else None

    def _signature(self, name: str) -> tuple[int, int, int]:
        try:
            info = (self._folder / name).stat()
        except OSError as error:
            known = isinstance(error, FileNotFoundError)
            raise DataError("missing" if known else f"cannot be read ({error.strerror or error})") from None
        if not stat.S_ISREG(info.st_mode):
            raise DataError("not a regular file")
        return info.st_size, info.st_mtime_ns, info.st_ino

    def _open(self, name: str) -> _Known:
        if os.sep in name or name in ("", ".", ".."):
            raise DataError("refused: its name leaves the data folder")
        signature, known = self._signature(name), self._known.get(name)
        if known is None or known.signature != signature:
            if known is not None:
                del self._known[name]
                known.archive.close()
            known = self._known[name] = _Known(signature, self._make(self._folder / name))
        return known


def open_regular(path: Path) -> int:
    """Return a descriptor of the regular file ``path``, open for reading.

    Raises:
        DataError: there is none.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror or error})") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise DataError("not a regular file")
    return descriptor


def read_at(descriptor: int, size_bytes: int, offset: int) -> bytes:
    """Return ``size_bytes`` from ``offset`` on.

    Raises:
        DataError: the file ends before that, or the disk fails.
    """
    try:
        found = os.pread(descriptor, size_bytes, offset)
        while len(found) < size_bytes:
            more = os.pread(descriptor, size_bytes - len(found), offset + len(found))
            if not more:
                raise DataError("the archive ends before it")
            found += more
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror or error})") from None
    return found
