"""In which order samples are trained. Pure: a function of the seed, the pass and the contents, and of nothing else.

Every sample has, for each pass, a key drawn from (seed, pass, its content). Sorting by key is the pass's permutation.
Because a key does not depend on the other samples, taking one away (a file that went bad) or adding one leaves the
order of the rest as it was, and what is left of a pass after a restart is exactly the rest of the same permutation.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Sequence

HELDOUT = -1
"""In the place of a pass: the key by which held-out samples are chosen where there are too many."""


def key(seed: int, epoch: int, content: str) -> int:
    """Return the 64-bit sort key of the sample with hash ``content`` in pass ``epoch`` (0-based)."""
    digest = hashlib.blake2b(f"{seed}:{epoch}:{content}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def order(seed: int, epoch: int, contents: Sequence[str]) -> list[int]:
    """Return the permutation of ``range(len(contents))`` in which pass ``epoch`` visits the samples."""
    return sorted(range(len(contents)), key=lambda index: (key(seed, epoch, contents[index]), contents[index]))


class Pool:
    """The samples that still have passes to make, in the order above, the least trained first.

    With a ``window`` samples are mixed within blocks of so many arrivals, one block after the other: the order is that
    of (passes, block, key). A block is drawn from once it is complete, so the order does not depend on when samples
    arrive. Holds four integers per sample (about 200 bytes), not the samples.

    Args:
        strict: a sample that was trained waits for its next pass until :meth:`end`, so that several passes do not
            depend on when samples arrive either.
    """

    def __init__(self, seed: int, epochs: int, window: int | None = None, *, strict: bool = False) -> None:
        self.seed, self.epochs, self.window, self.strict = seed, epochs, window, strict
        self._heap: list[tuple[int, int, int, int]] = []
        self._waiting: list[tuple[int, int, int, int]] = []
        self._block = 0  # the first that is not complete
        self._ended = False

    def __len__(self) -> int:
        """Return how many samples may be drawn."""
        return len(self._heap)

    @property
    def waiting(self) -> int:
        """How many samples there are that may not be drawn yet."""
        return len(self._waiting)

    @property
    def epoch(self) -> int:
        """The pass (0-based) of the sample that comes next; ``epochs`` when none is left."""
        return self._heap[0][0] if self._heap else self.epochs

    def add(self, sample: int, content: str, passes: int = 0) -> None:
        """Put a sample with ``passes`` passes behind it in its place; one that has made all passes is left out.

        Args:
            sample: its number, by which it also counts as an arrival: the ledger numbers samples from 1 as they come.
        """
        if passes < self.epochs:
            block = 0 if self.window is None else (sample - 1) // self.window
            self._put((passes, block, key(self.seed, passes, content), sample))

    def arrived(self, last: int) -> None:
        """Take note that the samples up to the number ``last`` are known, and those of the blocks that are complete
        were added."""
        block = 0 if self.window is None else last // self.window
        if block > self._block:
            self._block = block
            self._sort_out()

    def end(self) -> None:
        """Take note that no more samples come: what there is may be drawn."""
        if not self._ended:
            self._ended = True
            self._sort_out()

    def give_in(self) -> bool:
        """Let what waits be drawn, because nothing more comes before it is; return whether anything did wait."""
        for entry in self._waiting:
            heapq.heappush(self._heap, entry)
        found = bool(self._waiting)
        self._waiting = []
        return found

    def take(self, epoch: int | None = None) -> tuple[int, int] | None:
        """Remove and return the next sample with the number of its passes so far.

        None when none is left (or none of pass ``epoch``, if given).
        """
        if not self._heap or (epoch is not None and self._heap[0][0] != epoch):
            return None
        passes, _, _, sample = heapq.heappop(self._heap)
        return sample, passes

    def peek(self, count: int) -> list[tuple[int, int]]:
        """Return what the next ``count`` calls of :meth:`take` give (fewer if fewer are left), removing nothing."""
        return [(entry[3], entry[0]) for entry in heapq.nsmallest(count, self._heap)]

    def _put(self, entry: tuple[int, int, int, int]) -> None:
        passes, block, _, _ = entry
        complete = self.window is None or block < self._block
        if self._ended or (complete and (passes == 0 or not self.strict)):
            heapq.heappush(self._heap, entry)
        else:
            self._waiting.append(entry)

    def _sort_out(self) -> None:
        waiting, self._waiting = self._waiting, []
        for entry in waiting:
            self._put(entry)
