"""What every source of samples offers: entries with stable names, and the bytes behind each name.

Knows labels; nothing of where samples lie.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

MAX_FILE_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Found:
    """One entry of a source. ``path`` is its name, the same at every look; ``label`` indexes the classes.

    Attributes:
        problem: why it cannot be used at all. task: what the source's metadata call the task that it belongs to.
        final: it cannot change any more, so one that is damaged is given up at once.
        mending: the problem may go away by itself (a file that is still being written): it is looked at again first.
    """

    path: str
    label: int | None
    problem: str | None = None
    task: str | None = None
    final: bool = False
    mending: bool = False


class Waiter(Protocol):
    """Waits until a source may have something new."""

    def wait(self, timeout_seconds: float, stopping: Callable[[], bool]) -> None:
        """Return when something changed, when ``stopping()``, or after ``timeout_seconds`` at most."""


class Source(Protocol):
    """Where samples come from.

    Attributes:
        spec: what the user gave as --data, for messages. classes: names of the classes in the order of the outputs.
        growing: whether there may be more one day, when it has :meth:`ended`.
    """

    spec: str
    classes: tuple[str, ...]
    growing: bool

    def scan(self) -> Iterator[Found]:
        """Yield, in a fixed order, all entries that were not :meth:`recorded` yet; others may be among them."""

    def stat(self, path: str) -> tuple[int, int]:
        """Return (bytes, version) of the entry ``path``; the version of a file is its modification time in ns.

        Raises:
            DataError: as :meth:`read`.
        """

    def read(self, path: str) -> bytes:
        """Return the content of the entry ``path``: an encoded image, or a ``.npy`` array.

        Raises:
            DataError: there is no such entry, or it cannot be read; the message says why.
        """

    def recorded(self, paths: Iterable[str], *, finished: bool = False) -> None:
        """Take note that these entries are in the ledger, on the disk; ``finished``: nobody will train them again."""

    def held(self) -> dict[str, int]:
        """Return the recorded entries of which the source keeps a copy of its own until :meth:`release`, and how many
        bytes each takes of what it may take."""

    def release(self, paths: Iterable[str]) -> None:
        """Give up the copies of these entries: nobody will read them again."""

    def check(self) -> None:
        """Tell, once, what went wrong since the last call while nobody was waiting.

        Raises:
            StorageError: the disk refuses a copy; it is tried again. DataError: the source failed; it is opened again.
        """

    def ended(self) -> bool:
        """Return whether :meth:`scan` has yielded all that there will be, or, if ``growing``, all that there is."""

    def stalled(self) -> bool:
        """Return whether it yields nothing more before something that waits is trained, or released."""

    def heed(self, waiting: int) -> None:
        """Take note that so many recorded samples wait to be trained: one that reads ahead may stop."""

    def absent(self) -> str | None:
        """Return why nothing at all can be read now (a disk that is not mounted), or None."""

    def waiter(self, rescan_seconds: float) -> Waiter:
        """Return what waits for arrivals; it misses nothing that arrives after this call."""

    def close(self) -> None:
        """Let go of files and threads."""


class Lasting:
    """The part of a :class:`Source` whose entries stay where they are and can be read again: it keeps no copy of them,
    and never has to wait."""

    def ended(self) -> bool:
        return True

    def stalled(self) -> bool:
        return False

    def held(self) -> dict[str, int]:
        return {}

    def release(self, paths: Iterable[str]) -> None:
        """Do nothing: there are no copies."""

    def check(self) -> None:
        """Do nothing: all that goes wrong is told at once."""

    def heed(self, waiting: int) -> None:
        """Do nothing: what waits takes no room elsewhere."""


def labelled(path: str, label: Any, classes: Sequence[str], task: str | None = None, *, final: bool = False) -> Found:
    """Return the entry ``path`` with ``label``, the name of a class or its index; an unknown one is a problem."""
    if isinstance(label, str) and label in classes:
        return Found(path, list(classes).index(label), None, task, final)
    if isinstance(label, int) and not isinstance(label, bool) and 0 <= label < len(classes):
        return Found(path, label, None, task, final)
    return Found(path, None, f"unknown label {label!r}; valid labels: {valid_labels(classes)}", task, final)


def valid_labels(classes: Sequence[str]) -> str:
    """Return the names of the classes for a message, the first 20 of them."""
    shown = ", ".join(classes[:20])
    rest = len(classes) - 20
    return f"{shown} and {rest} more" if rest > 0 else shown


def storable(found: Found) -> Found:
    """Return ``found``, or a problem in its place if its name is none that ledger and log can hold."""
    if not _is_utf8(found.path):
        return Found(ascii(found.path), None, "its name is not UTF-8; rename the file")
    return found if found.task is None or _is_utf8(found.task) else replace(found, task=ascii(found.task))


def _is_utf8(text: str) -> bool:
    # What is not UTF-8 comes with lone surrogates.
    return text.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in text)
