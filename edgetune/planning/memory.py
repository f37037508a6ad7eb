"""How many bytes of one graph are alive while each of its nodes runs, and where that is most.

This module may know a graph's description and the values of its symbols; it must not know phases, budgets or plans.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass

from edgetune.bundle import GraphSpec
from edgetune.planning.sizes import elements, itemsize, nbytes

FIXED_KINDS = ("constant", "parameter", "buffer", "state", "basis", "scalar")
"""Kinds of tensors that are resident all the time: the ledger counts them once, a timeline not at all."""

HOLES = "holes of the block"
"""The name under which a peak lists what a block takes beyond the tensors that are alive in it."""

# A buffer that several tensors occupy in turn bears the most lasting of their kinds.
_PRECEDENCE = ("feature", "saved", "gradient", "target", "output", "transient")


@dataclass(frozen=True)
class LiveTensor:
    """One buffer (``kind`` as in ``TensorUse``) or the scratch memory of the running node (``workspace``)."""

    name: str
    kind: str
    bytes: int


@dataclass(frozen=True)
class Peak:
    """The first instant at which the most bytes are alive.

    ``node`` is the index of the node that runs then (-1 in a graph without nodes); ``live`` is what is alive, largest
    first, and its bytes sum to ``bytes``.
    """

    bytes: int
    node: int
    node_name: str
    live: tuple[LiveTensor, ...]


@dataclass(frozen=True)
class _Buffer:
    """Memory that one or more tensors occupy, from node ``first`` to node ``last`` (inclusive)."""

    name: str
    kind: str
    bytes: int
    first: int
    last: int


def timeline(graph: GraphSpec, symbols: Mapping[str, int], *, without: Container[str] = FIXED_KINDS) -> list[int]:
    """Return the live bytes during each node of ``graph``, in execution order, workspaces included.

    A buffer lives from the least ``first`` to the greatest ``last`` of the tensors in it and is as large as the
    largest. A buffer that holds a tensor of a kind in ``without`` is left out, with every view of it.

    Raises:
        BundleError: a shape holds a symbol that ``symbols`` lacks.
    """
    return timeline_of(graph, symbols, spans(graph, symbols, without=without))


def peak(
    graph: GraphSpec, symbols: Mapping[str, int], *, without: Container[str] = FIXED_KINDS, holes: Sequence[int] = ()
) -> Peak:
    """Return the maximum of :func:`timeline` and what is alive there.

    Args:
        holes: what memory is taken during each node by no tensor (``planning.packing``).

    Raises:
        BundleError: a shape holds a symbol that ``symbols`` lacks.
    """
    buffers = _buffers(graph, symbols, without)
    usage = timeline_of(graph, symbols, [(buffer.first, buffer.last, buffer.bytes) for buffer in buffers])
    if not usage:
        return Peak(0, -1, "", ())
    if holes:
        usage = [size_bytes + more for size_bytes, more in zip(usage, holes, strict=True)]
        # A block is there all the time: of the instants that need as much, the one at which most of it is used.
        node = max(range(len(usage)), key=lambda index: (usage[index], -holes[index]))
    else:
        node = usage.index(max(usage))
    live = [LiveTensor(b.name, b.kind, b.bytes) for b in buffers if b.first <= node <= b.last]
    live += [
        LiveTensor(graph.nodes[node], "workspace", elements((w.elements,), symbols) * itemsize(w.dtype))
        for w in graph.workspaces
        if w.node == node
    ]
    if holes and holes[node]:
        live.append(LiveTensor(HOLES, "transient", holes[node]))
    live.sort(key=lambda tensor: (-tensor.bytes, tensor.name))
    return Peak(usage[node], node, graph.nodes[node], tuple(live))


def spans(
    graph: GraphSpec, symbols: Mapping[str, int], *, without: Container[str] = FIXED_KINDS
) -> list[tuple[int, int, int]]:
    """Return of each buffer the first and the last node (inclusive) and the bytes, as :func:`timeline` counts them.

    Raises:
        BundleError: a shape holds a symbol that ``symbols`` lacks.
    """
    return [(buffer.first, buffer.last, buffer.bytes) for buffer in _buffers(graph, symbols, without)]


def bands(graph: GraphSpec, symbols: Mapping[str, int]) -> dict[str, list[int]]:
    """Return :func:`timeline` by kind of tensor, ``workspace`` one of them: at every node they sum to it.

    Raises:
        BundleError: a shape holds a symbol that ``symbols`` lacks.
    """
    found: dict[str, list[tuple[int, int, int]]] = {}
    for buffer in _buffers(graph, symbols, FIXED_KINDS):
        found.setdefault(buffer.kind, []).append((buffer.first, buffer.last, buffer.bytes))
    bare = dataclasses.replace(graph, workspaces=())
    by_kind = {kind: timeline_of(bare, symbols, some) for kind, some in found.items()}
    by_kind["workspace"] = timeline_of(graph, symbols, [])
    return by_kind


def _buffers(graph: GraphSpec, symbols: Mapping[str, int], without: Container[str]) -> list[_Buffer]:
    """Return the buffers of ``graph`` in the order of their first mention."""
    found: dict[str, _Buffer] = {}
    resident: set[str] = set()
    for use in graph.tensors:
        if use.kind in without:
            resident.add(use.buffer)
            continue
        size_bytes = nbytes(use, symbols)
        old = found.get(use.buffer)
        if old is None:
            found[use.buffer] = _Buffer(use.buffer, use.kind, size_bytes, use.first, use.last)
        else:
            kind = min(old.kind, use.kind, key=_precedence)
            first, last = min(old.first, use.first), max(old.last, use.last)
            found[use.buffer] = _Buffer(use.buffer, kind, max(old.bytes, size_bytes), first, last)
    return [buffer for name, buffer in found.items() if name not in resident]


def timeline_of(graph: GraphSpec, symbols: Mapping[str, int], lives: Iterable[tuple[int, int, int]]) -> list[int]:
    """Return the bytes of ``lives`` (as of :func:`spans`) and of workspaces during each node of ``graph``."""
    count = len(graph.nodes)
    change = [0] * (count + 1)
    for first, last, size_bytes in lives:
        start, stop = max(first, 0), min(last + 1, count)
        if start < stop:
            change[start] += size_bytes
            change[stop] -= size_bytes
    usage = list(itertools.accumulate(change[:count]))
    for work in graph.workspaces:
        usage[work.node] += elements((work.elements,), symbols) * itemsize(work.dtype)
    return usage


def _precedence(kind: str) -> int:
    return _PRECEDENCE.index(kind) if kind in _PRECEDENCE else len(_PRECEDENCE)
