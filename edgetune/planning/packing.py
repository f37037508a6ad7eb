"""What a run takes when the runtime lays all of its tensors into one block: that block, and what lies beside it.

From its second run with the same shapes on, onnxruntime can keep the tensors that a run makes and frees in one block of
a fixed layout (``--memory fast``). It costs a fraction of the page faults; what was written to once stays resident
until the run ends, holes that the layout leaves included. This module may know a graph's description and the values of
its symbols; it must not know phases or plans.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from edgetune.bundle import GraphSpec
from edgetune.planning.memory import Peak, peak, spans, timeline_of

ALIGNMENT_BYTES = 256
Span = tuple[int, int, int]
"""First node, last node (inclusive), bytes."""


def layout(lives: Sequence[Span]) -> list[tuple[int, int]]:
    """Return where in the block each tensor of ``lives`` begins and ends; one of no bytes is nowhere: (0, 0).

    As onnxruntime does it (``MemPatternPlanner``): in the order in which they are made, each into the free gap that it
    fills best, else behind the last that is alive.
    """
    changes = [(first, 0, index) for index, (first, _, _) in enumerate(lives)]
    changes += [(last, 1, index) for index, (_, last, _) in enumerate(lives)]
    found = [(0, 0)] * len(lives)
    alive: list[tuple[int, int, int]] = []  # begin, end, index, by place
    for _, dies, index in sorted(changes):
        if dies:
            alive = [block for block in alive if block[2] != index]
            continue
        size_bytes = -(-lives[index][2] // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        if not size_bytes:
            continue
        begin = alive[-1][1] if alive else 0
        position, least_waste, free_from = len(alive), -1, 0
        for place, (taken_from, taken_to, _) in enumerate(alive):
            waste = taken_from - free_from - size_bytes
            if waste >= 0 and (least_waste < 0 or waste < least_waste):
                position, begin, least_waste = place, free_from, waste
            free_from = taken_to
        found[index] = begin, begin + size_bytes
        alive.insert(position, (*found[index], index))
    return found


def touched_bytes(lives: Sequence[Span], nodes: int) -> list[int]:
    """Return how much of the block has been written to when each of ``nodes`` has run: what was never is not resident,
    and what was once stays so."""
    made: dict[int, list[tuple[int, int]]] = {}
    for (first, _, _), place in zip(lives, layout(lives), strict=True):
        made.setdefault(first, []).append(place)
    written: list[tuple[int, int]] = []
    usage: list[int] = []
    for node in range(nodes):
        for place in made.get(node, ()):
            written = _with(written, place)
        usage.append(sum(end - begin for begin, end in written))
    return usage


def _with(written: Sequence[tuple[int, int]], more: tuple[int, int]) -> list[tuple[int, int]]:
    """Return the union of disjoint stretches and one more."""
    begin, end = more
    apart = []
    for one in written:
        if one[1] < begin or end < one[0]:
            apart.append(one)
        else:
            begin, end = min(begin, one[0]), max(end, one[1])
    return [*apart, (begin, end)]


def holes(graph: GraphSpec, symbols: Mapping[str, int]) -> list[int]:
    """Return, during each node, how much more of a stage's block is resident than is alive in it.

    What enters a stage, leaves it, or crosses from one to the next is no part of a block.

    Raises:
        BundleError: a shape holds a symbol that ``symbols`` lacks.
    """
    every = spans(graph, symbols)
    found: list[int] = []
    for stage in graph.run_stages():
        begin = len(found)
        inside = [span for span in every if begin <= span[0] and span[1] < stage.end]
        alive = timeline_of(dataclasses.replace(graph, workspaces=()), symbols, inside)
        touched = touched_bytes(inside, stage.end)
        found += [max(0, touched[node] - alive[node]) for node in range(begin, stage.end)]
    return found


def packed_peak(graph: GraphSpec, symbols: Mapping[str, int]) -> Peak:
    """Return the peak of ``graph`` where each of its stages has such a block.

    Raises:
        BundleError: a shape holds a symbol that ``symbols`` lacks.
    """
    return peak(graph, symbols, holes=holes(graph, symbols))
