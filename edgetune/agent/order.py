"""In which order samples are trained. Pure: a function of the seed, the pass and the contents, and of nothing else.

Every sample has, for each pass, a key drawn from (seed, pass, its content). Sorting by key is the pass's permutation.
Because a key does not depend on the other samples, taking one away (a file that went bad) or adding one leaves the
order of the rest as it was, and what is left of a pass after a restart is exactly the rest of the same permutation.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Sequence


def key(seed: int, epoch: int, content: str) -> int:
    """Return the 64-bit sort key of the sample with hash ``content`` in pass ``epoch`` (0-based)."""
    digest = hashlib.blake2b(f"{seed}:{epoch}:{content}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def order(seed: int, epoch: int, contents: Sequence[str]) -> list[int]:
    """Return the permutation of ``range(len(contents))`` in which pass ``epoch`` visits the samples."""
    return sorted(range(len(contents)), key=lambda index: (key(seed, epoch, contents[index]), contents[index]))


class Pool:
    """The samples that still have passes to make, the least trained first, in the order above.

    Holds three integers per sample (about 150 bytes), not the samples.
    """

    def __init__(self, seed: int, epochs: int) -> None:
        self.seed = seed
        self.epochs = epochs
        self._heap: list[tuple[int, int, int]] = []

    def __len__(self) -> int:
        return len(self._heap)

    @property
    def epoch(self) -> int:
        """The pass (0-based) of the sample that comes next; ``epochs`` when none is left."""
        return self._heap[0][0] if self._heap else self.epochs

    def add(self, sample: int, content: str, passes: int = 0) -> None:
        """Put a sample with ``passes`` passes behind it in its place; one that has made all passes is left out."""
        if passes < self.epochs:
            heapq.heappush(self._heap, (passes, key(self.seed, passes, content), sample))

    def take(self, epoch: int | None = None) -> tuple[int, int] | None:
        """Remove and return the next sample with the number of its passes so far.

        None when none is left (or none of pass ``epoch``, if given).
        """
        if not self._heap or (epoch is not None and self._heap[0][0] != epoch):
            return None
        passes, _, sample = heapq.heappop(self._heap)
        return sample, passes

    def peek(self, count: int) -> list[int]:
        """Return the next ``count`` samples (fewer if fewer are left) without removing them."""
        return [entry[2] for entry in heapq.nsmallest(count, self._heap)]
