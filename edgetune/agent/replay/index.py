"""Which samples are in the replay buffer, and which of them a step draws. Pure: numbers in, numbers out.

Every sample has a priority, a hash of the seed and its content, so the choice is a function of what was offered and of
nothing else: not of the order, not of a generator's state (Vitter's reservoir with the random keys fixed beforehand).

- ``reservoir``: of all samples, those with the least priorities, as many as fit.
- ``balanced``: the bytes are shared among the classes. Those that have little keep all, and what they leave is shared
  among the others evenly (water-filling); within a class, those with the least priorities.

What was dropped once never fits again: the level falls, and a class's least dropped priority is remembered. So a sample
is refused at once if it would have been dropped, and no trace of the others is needed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgetune.bundle import Array
from edgetune.errors import StateError

ENTRY = np.dtype([("priority", "<u8"), ("sample", "<i8"), ("digest", ">u8", (4,)), ("label", "<i4"), ("bytes", "<u4")])
_NEVER = 2**64 - 1
_FIRST_ENTRIES = 16_384


@dataclass(frozen=True)
class Entry:
    """One sample of the buffer: its row in the ledger, its content's SHA-256, its class and its bytes on the disk."""

    sample: int
    digest: str
    label: int
    bytes: int


class Index:
    """The samples of a buffer that takes ``capacity_bytes`` on the disk.

    Args:
        classes: how many there are; 0: they do not matter (``reservoir``).
        most_bytes: a larger sample is never taken.
    """

    def __init__(self, capacity_bytes: int, most_bytes: int, classes: int, seed: int) -> None:
        self.capacity_bytes, self.most_bytes, self.classes, self.seed = capacity_bytes, most_bytes, classes, seed
        # full, not empty: memory that a budget counts should be there from the start, not page by page
        self._entries = np.full(min(_FIRST_ENTRIES, capacity_bytes // 4096 + 1), np.zeros((), ENTRY), ENTRY)
        self._count = 0
        groups = max(1, classes)
        self._seen_bytes = np.zeros(groups, np.int64)  # of all samples that were ever offered
        self._live_bytes = np.zeros(groups, np.int64)
        self._dropped = np.full(groups, _NEVER, np.uint64)  # the least priority that was ever dropped

    def __len__(self) -> int:
        return self._count

    @property
    def bytes(self) -> int:
        """What the samples take on the disk."""
        return int(self._live_bytes.sum())

    @property
    def memory_bytes(self) -> int:
        """What the index itself takes in memory."""
        return self._entries.nbytes

    def __iter__(self) -> Iterator[Entry]:
        return (self[row] for row in range(self._count))

    def __getitem__(self, row: int) -> Entry:
        found = self._entries[row]
        return Entry(int(found["sample"]), found["digest"].tobytes().hex(), int(found["label"]), int(found["bytes"]))

    def samples(self) -> Array:
        """Return the ledger rows of all entries, int64 [n]."""
        return self._entries["sample"][: self._count].copy()

    def contents(self) -> Contents:
        """Return what finds the row of a content."""
        return Contents(self._entries[: self._count])

    def find(self, sample: int) -> Entry | None:
        """Return the entry of the ledger row ``sample``."""
        rows = np.flatnonzero(self._entries["sample"][: self._count] == sample)
        return self[int(rows[0])] if len(rows) else None

    def holds(self, digest: str) -> bool:
        """Return whether a sample of this content is in."""
        wanted, mine = _words(digest), self._entries["digest"][: self._count]
        return any((mine[row] == wanted).all() for row in np.flatnonzero(mine[:, 0] == wanted[0]))

    def would_take(self, digest: str, label: int) -> bool:
        """Return False if :meth:`offer` would surely refuse the sample."""
        return self._priority(digest) < int(self._dropped[self._group(label)])

    def offer(self, entry: Entry, *, stored: bool = True) -> tuple[bool, list[Entry]]:
        """Take the sample in, or not; return whether it is in, and which others had to leave.

        Args:
            stored: False: it cannot be taken in, but counts among those that were seen.
        """
        if entry.bytes > self.most_bytes:
            return False, []
        group, priority = self._group(entry.label), self._priority(entry.digest)
        self._seen_bytes[group] += entry.bytes
        if stored and priority < int(self._dropped[group]):
            self._append(entry, priority, group)
        left = self._shrink()
        taken = stored and priority < int(self._dropped[group])
        return taken, [other for other in left if other.sample != entry.sample]

    def remove(self, samples: Sequence[int] | Array) -> list[Entry]:
        """Take samples out that cannot be used any more; return those that were in."""
        rows = np.flatnonzero(np.isin(self._entries["sample"][: self._count], samples))
        return [self._pop(int(row)) for row in rows[::-1]]

    def draw(self, step: int, without: Collection[int]) -> Iterator[Entry]:
        """Yield the samples of ``step`` in the order in which they are drawn, none twice and none of ``without``.

        A function of seed, step and the index: the first k are k drawn evenly from all.
        """
        swapped: dict[int, int] = {}  # Fisher and Yates, of which only what was touched is kept
        count = self._count
        for place in range(count):
            other = place + _hash(f"draw:{self.seed}:{step}:{place}") % (count - place)
            row = swapped.get(other, other)
            swapped[other] = swapped.get(place, place)
            if int(self._entries["sample"][row]) not in without:
                yield self[row]

    # ---- a checkpoint's view -------------------------------------------------------------------------------------
    def array(self) -> Array:
        """Return the entries as [n, 56] uint8."""
        return self._entries[: self._count].copy().view(np.uint8).reshape(-1, ENTRY.itemsize)

    def to_plain(self) -> dict[str, Any]:
        """Return everything but the entries as JSON data."""
        return {
            "classes": self.classes, "seen_bytes": self._seen_bytes.tolist(), "dropped": self._dropped.tolist(),
        }  # fmt: skip

    def load(self, plain: Mapping[str, Any], array: Array) -> list[Entry]:
        """Take what :meth:`to_plain` and :meth:`array` returned; return whom a smaller capacity has no room for.

        Where the choice has changed, what is known of the classes is carried over as far as it goes.

        Raises:
            StateError: they do not belong together.
        """
        entries = entries_of(array)
        groups, known = len(self._seen_bytes), len(plain["seen_bytes"])
        if len(plain["dropped"]) != known or known != max(1, plain["classes"]):
            raise StateError("the replay buffer's state in the checkpoint contradicts itself; restore an older one")
        self._entries = np.full(max(len(self._entries), len(entries)), np.zeros((), ENTRY), ENTRY)
        self._entries[: len(entries)] = entries
        self._count = len(entries)
        group_of = entries["label"] if self.classes else np.zeros(len(entries), np.int64)
        if self._count and not 0 <= int(group_of.min()) <= int(group_of.max()) < groups:
            raise StateError("the replay buffer in the checkpoint has a class that the bundle does not have")
        self._live_bytes = np.bincount(group_of, entries["bytes"], groups).astype(np.int64)
        if known == groups:
            self._seen_bytes = np.array(plain["seen_bytes"], np.int64)
            self._dropped = np.array(plain["dropped"], np.uint64)
        else:
            self._seen_bytes = self._live_bytes.copy()
            self._dropped[:] = min(plain["dropped"])
            if not self.classes:
                self._seen_bytes[0] = sum(plain["seen_bytes"])
        return self._shrink()

    # ---- within --------------------------------------------------------------------------------------------------
    def _priority(self, digest: str) -> int:
        return min(_hash(f"replay:{self.seed}:{digest}"), _NEVER - 1)

    def _group(self, label: int) -> int:
        return label if self.classes else 0

    def _append(self, entry: Entry, priority: int, group: int) -> None:
        if self._count == len(self._entries):
            more = np.full(self._count // 4 + 1, np.zeros((), ENTRY), ENTRY)
            self._entries = np.concatenate([self._entries, more])
        self._entries[self._count] = (priority, entry.sample, _words(entry.digest), entry.label, entry.bytes)
        self._count += 1
        self._live_bytes[group] += entry.bytes

    def _pop(self, row: int) -> Entry:
        entry = self[row]
        self._count -= 1
        self._entries[row] = self._entries[self._count]
        self._live_bytes[self._group(entry.label)] -= entry.bytes
        return entry

    def _shrink(self) -> list[Entry]:
        left = []
        level = level_bytes(self._seen_bytes, self.capacity_bytes)
        for group in np.flatnonzero(self._live_bytes > level):
            while self._live_bytes[group] > level:
                live = self._entries[: self._count]
                rows = np.flatnonzero(live["label"] == group) if self.classes else np.arange(self._count)
                row = int(rows[np.argmax(live["priority"][rows])])
                self._dropped[group] = min(int(self._dropped[group]), int(live["priority"][row]))
                left.append(self._pop(row))
        return left


def level_bytes(wanted: Array, capacity_bytes: int) -> int:
    """Return the largest level L with Σ min(wanted, L) ≤ ``capacity_bytes``: the share of those who want more."""
    ordered = np.sort(wanted)
    room = capacity_bytes
    for place, value in enumerate(ordered.tolist()):
        if value * (len(ordered) - place) > room:
            return int(room // (len(ordered) - place))
        room -= value
    return int(ordered[-1])


def entries_of(array: Array) -> Array:
    """Return the entries that :meth:`Index.array` returned, as a structured array.

    Raises:
        StateError: it is no such array.
    """
    if array.dtype != np.uint8 or array.ndim != 2 or array.shape[1] != ENTRY.itemsize:
        raise StateError(f"the replay buffer in the checkpoint is {array.dtype} {array.shape}; expected uint8 [n, 56]")
    return np.ascontiguousarray(array).reshape(-1).view(ENTRY)


class Contents:
    """Finds entries by their content, in 16 bytes of memory for each."""

    def __init__(self, entries: Array) -> None:
        self._entries = entries
        first = entries["digest"][:, 0].astype(np.uint64)
        self._order = np.argsort(first, kind="stable")
        self._first = first[self._order]

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, digest: str) -> int | None:
        """Return the row of the content with this SHA-256; None: it is not here, or that is none."""
        try:
            wanted = _words(digest)
        except ValueError:
            return None
        begin, end = (int(np.searchsorted(self._first, np.uint64(wanted[0]), side)) for side in ("left", "right"))
        rows = (int(row) for row in self._order[begin:end])
        return next((row for row in rows if (self._entries["digest"][row] == wanted).all()), None)

    def bytes(self, row: int) -> int:
        """Return what the entry takes on the disk."""
        return int(self._entries["bytes"][row])


def digests_of(array: Array) -> Iterator[tuple[str, int]]:
    """Yield content and bytes of each entry in what :meth:`Index.array` returned."""
    for found in entries_of(array):
        yield found["digest"].tobytes().hex(), int(found["bytes"])


def _words(digest: str) -> Array:
    """Return a SHA-256 in hexadecimal as four numbers.

    Raises:
        ValueError: it is none.
    """
    content = bytes.fromhex(digest)
    if len(content) != 32:
        raise ValueError(f"a SHA-256 has 64 digits, not {len(digest)}")
    return np.frombuffer(content, ">u8")


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
