"""By which held-out samples models are judged. Pure: a function of the seed, the contents, and of nothing else.

The samples of a class (of a task, where samples name one) are a stratum. Up to the bound all held-out samples are
taken. Beyond it every stratum gives as many as the next, or all that it has; those with the least keyed hash of their
content.
So the choice is uniform over all time, does not depend on the order of arrival, and changes little when samples come.
"""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Iterable, Mapping

from edgetune.agent.order import key

_HELD_OUT = -1
"""Stands for the pass in the keys: held-out samples make none."""


def choose(rows: Iterable[tuple[int, str, Hashable]], seed: int, most: int) -> list[int]:
    """Return the ids of at most ``most`` samples, in ascending order.

    Args:
        rows: id, content (its hash) and stratum of every held-out sample, in any order; they are not kept.
    """
    strata: dict[Hashable, list[tuple[int, int]]] = {}
    kept = 0
    for sample, content, stratum in rows:
        strata.setdefault(stratum, []).append((key(seed, _HELD_OUT, content), sample))
        kept += 1
        if kept > 4 * most + 1024:
            # Lossless: more samples can only lower what a stratum may give.
            kept = _cut(strata, most)
    _cut(strata, most)
    found = heapq.nsmallest(most, (entry for entries in strata.values() for entry in entries))
    return sorted(sample for _, sample in found)


def _cut(strata: dict[Hashable, list[tuple[int, int]]], most: int) -> int:
    """Leave each stratum its share, at least one sample; return how many samples are left."""
    level = share({stratum: len(entries) for stratum, entries in strata.items()}, most)
    for stratum, entries in strata.items():
        strata[stratum] = heapq.nsmallest(max(level, 1), entries)
    return sum(len(entries) for entries in strata.values())


def share(counts: Mapping[Hashable, int], most: int) -> int:
    """Return the largest number of samples that each stratum may give (fewer where it has fewer) with at most ``most``
    in all; where all may be taken, that of the largest stratum."""
    left, level = most, 0
    sizes = sorted(counts.values())
    for index, size in enumerate(sizes):
        strata_left = len(sizes) - index
        if size * strata_left > left:
            return left // strata_left
        left -= size
        level = size
    return level
