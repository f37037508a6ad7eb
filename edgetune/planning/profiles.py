"""How many bytes one option of one saved tensor adds, at every instant of the whole train graph.

A graph that a selection has cut has fewer nodes. Each of its nodes is one of the whole graph's, so its lifetimes can be
told in the whole graph's instants; at a node that was cut away, what is alive around it is alive.
This module may know candidates, graphs and lifetimes; it must not know errors, solvers or engines.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from edgetune.bundle import GraphSpec, OptionSpec, SavedSpec, TensorUse
from edgetune.planning.candidates import Candidate, Workbench
from edgetune.planning.choices import IntArray
from edgetune.planning.memory import spans
from edgetune.planning.prediction import ALWAYS_THERE, accumulated, dense_bytes, full_basis_bytes, holding_inputs
from edgetune.planning.rates import Rated
from edgetune.planning.selection import LOSSLESS, choose
from edgetune.planning.sizes import elements, itemsize, nbytes


class Profiles:
    """Bytes by instant of a bundle, relative to a reference, from which one tensor at a time takes another option.

    Instants are the nodes of the train graph, and a last one for the other phases: there only what is resident all the
    time (bases, constants) changes with an option.

    Whether a train graph comes in two stages changes the life of all that crosses from one to the other, and of the
    features: no single option's doing. So a reference is in stages or is not, and so is all that is compared with it.
    """

    def __init__(self, bench: Workbench, reference: Candidate) -> None:
        self._manifest, self._batch = bench.manifest, bench.limits.piece
        self._reference, self._rates = reference, reference.rates
        self._staged = bool(reference.manifest.graphs["train"].stages)
        self._whole = self._manifest.graphs["train"]
        self._elsewhere = {
            use.buffer
            for name, graph in self._manifest.graphs.items()
            if name != "train"
            for use in graph.tensors
            if use.kind == "constant"
        }
        self._uses = {use.name: use for use in self._whole.tensors}
        saved = tuple(self._cut(spec, self._rates[spec.name].label) for spec in self._manifest.saved)
        self._kept = frozenset(choose(self._whole, saved, reference.selection).kept)
        self._made_by = {name: i for i, wire in enumerate(self._whole.wires) for name in wire.outputs}
        self._alias = {c.output: c.options[reference.selection[c.saved]] for c in self._whole.choices}
        self._around: dict[str, tuple[GraphSpec, tuple[int, ...]]] = {}
        self._symbols = {"batch": self._batch}
        for spec in self._manifest.saved:
            self._symbols |= _rank_symbols(spec.option(self._rates[spec.name].label), self._rates[spec.name].ranks)
        self._moving: dict[tuple[str, str], _Moving] = {}
        self._train = self._of(self._manifest.saved[0], self._rates[self._manifest.saved[0].name])

    def allows(self, spec: SavedSpec, label: str) -> bool:
        """Tell whether the reference would stay in stages, if it is, with ``spec`` kept by the option ``label``."""
        return not self._staged or self._moving_of(spec, label).staged

    def base(self) -> IntArray:
        """Return the bytes [t] of the reference: the whole process's, without correction or reserve."""
        prediction = self._reference.cost()
        always = sum(prediction.ledger.get(line, 0) for line in ALWAYS_THERE)
        others = max((peak.bytes for name, peak in prediction.peaks.items() if name != "train"), default=0)
        limits = self._reference.limits
        before = sum(t.bytes for t in accumulated(self._reference.manifest)) if limits.piece < limits.batch else 0
        return np.append(self._train[0] + before, others) + always

    def change(self, spec: SavedSpec, one: Rated) -> IntArray:
        """Return by how many bytes [t] the reference changes when ``spec`` is kept as ``one``."""
        usage, resident = self._of(spec, one)
        known, known_resident = self._train
        return np.append(usage - known, 0) + (resident - known_resident)

    def stored_bytes(self, spec: SavedSpec, one: Rated) -> int:
        """Return what ``one`` stores of ``spec``."""
        option = spec.option(one.label)
        if not option.stored and option.codec == LOSSLESS:
            return dense_bytes(spec, self._batch)
        moving = self._moving_of(spec, one.label)
        symbols = self._symbols | _rank_symbols(option, one.ranks)
        # A frozen layer's input may still be read, by what is recomputed from it; what codecs made of it is gone then.
        uses = (moving.tensors.get(name) or self._uses.get(name) for name in option.stored)
        return sum(nbytes(use, symbols) for use in uses if use is not None)

    def _of(self, spec: SavedSpec, one: Rated) -> tuple[IntArray, int]:
        """Return the live bytes [t] of the train graph, and the bytes of bases and of constants that only it has."""
        moving = self._moving_of(spec, one.label)
        option = spec.option(one.label)
        symbols = self._symbols | _rank_symbols(option, one.ranks)
        usage = moving.usage + self._usage(moving.graph, symbols)
        bases = sum(nbytes(use, symbols) for use in moving.graph.tensors if use.kind == "basis")
        return usage, moving.resident_bytes + bases

    def _moving_of(self, spec: SavedSpec, label: str) -> _Moving:
        key = spec.name, label
        if key not in self._moving:
            self._moving[key] = self._prepared(spec, spec.option(label))
        return self._moving[key]

    def _prepared(self, spec: SavedSpec, option: OptionSpec) -> _Moving:
        selection = {**self._reference.selection, spec.name: option.label}
        saved = tuple(self._cut(s, selection[s.name]) for s in self._manifest.saved)
        nearby, numbers = self._nearby(spec)
        chosen = choose(nearby, saved, selection, staged=self._staged)
        graph = _in_whole_time(self._whole, holding_inputs(chosen.spec), [numbers[index] for index in chosen.kept])
        free = {mode.rank for mode in option.modes if mode.rank}
        moving = {use.buffer for use in graph.tensors if _reads(use.shape, free)}
        still = [use for use in graph.tensors if use.buffer not in moving]
        symbols = {name: value for name, value in self._symbols.items() if name not in free}
        fixed = dataclasses.replace(
            graph,
            tensors=tuple(still),
            workspaces=tuple(work for work in graph.workspaces if not _reads((work.elements,), free)),
        )
        rest = dataclasses.replace(
            graph,
            tensors=tuple(use for use in graph.tensors if use.buffer in moving),
            workspaces=tuple(work for work in graph.workspaces if _reads((work.elements,), free)),
        )
        constants: dict[str, int] = {}
        for use in still:
            if use.kind == "constant" and use.buffer not in self._elsewhere:
                constants[use.buffer] = max(constants.get(use.buffer, 0), nbytes(use, symbols))
        resident = sum(constants.values()) + full_basis_bytes(saved)
        resident += sum(nbytes(use, symbols) for use in still if use.kind == "basis")
        tensors = {use.name: use for use in graph.tensors}
        return _Moving(self._usage(fixed, symbols), resident, rest, tensors, bool(chosen.spec.stages))

    def _nearby(self, spec: SavedSpec) -> tuple[GraphSpec, tuple[int, ...]]:
        """Return the part of the whole graph that the reference runs, or might with another option of ``spec``, and
        the numbers of its nodes in the whole graph."""
        if not self._whole.choices:  # one option each: there is nothing to cut, and no wires to cut by
            return self._whole, tuple(range(len(self._whole.nodes)))
        if spec.name not in self._around:
            pending = [name for c in self._whole.choices if c.saved == spec.name for name in c.options.values()]
            numbers = set(self._kept)
            while pending:
                name = pending.pop()
                index = self._made_by.get(self._alias.get(name, name))
                if index is not None and index not in numbers:
                    numbers.add(index)
                    pending.extend(self._whole.wires[index].inputs)
            order = tuple(sorted(numbers))
            wires = tuple(self._whole.wires[index] for index in order)
            read = {name for wire in wires for name in (*wire.inputs, *wire.outputs)}
            read |= {*self._whole.outputs, *(choice.output for choice in self._whole.choices)}
            place = {old: new for new, old in enumerate(order)}
            self._around[spec.name] = (
                dataclasses.replace(
                    self._whole,
                    nodes=tuple(self._whole.nodes[index] for index in order),
                    wires=wires,
                    tensors=tuple(use for use in self._whole.tensors if use.name in read),
                    workspaces=tuple(
                        dataclasses.replace(w, node=place[w.node]) for w in self._whole.workspaces if w.node in place
                    ),
                ),
                order,
            )
        return self._around[spec.name]

    def _cut(self, spec: SavedSpec, label: str) -> SavedSpec:
        return dataclasses.replace(spec, options=(spec.option(label),))

    def _usage(self, graph: GraphSpec, symbols: Mapping[str, int]) -> IntArray:
        """Return ``memory.timeline`` of few tensors in many instants."""
        change = np.zeros(len(graph.nodes) + 1, np.int64)
        for first, last, size_bytes in spans(graph, symbols):
            start, stop = max(first, 0), min(last + 1, len(graph.nodes))
            if start < stop:
                change[start] += size_bytes
                change[stop] -= size_bytes
        usage = np.cumsum(change[:-1])
        for work in graph.workspaces:
            usage[work.node] += elements((work.elements,), symbols) * itemsize(work.dtype)
        return usage


@dataclass(frozen=True)
class _Moving:
    """The train graph under one selection: what does not depend on one tensor's ranks, and what does.

    ``usage`` [t] are the live bytes of the former; ``graph`` holds the latter.
    """

    usage: IntArray
    resident_bytes: int
    graph: GraphSpec
    tensors: Mapping[str, TensorUse]
    staged: bool


def _reads(shape: tuple[str, ...], symbols: set[str]) -> bool:
    return bool(symbols) and any(factor in symbols for extent in shape for factor in extent.split("*"))


def _rank_symbols(option: OptionSpec, ranks: Mapping[str, int]) -> dict[str, int]:
    return {mode.rank: ranks[mode.letter] for mode in option.modes if mode.rank}


def _in_whole_time(whole: GraphSpec, cut: GraphSpec, kept: Sequence[int]) -> GraphSpec:
    """Return ``cut``, whose nodes are ``kept`` of ``whole``, with every lifetime in nodes of ``whole``."""
    count, total = len(cut.nodes), len(whole.nodes)

    def at(index: int) -> int:
        return -1 if index < 0 else total if index >= count else kept[index]

    tensors = tuple(
        TensorUse(use.name, use.shape, use.dtype, use.kind, at(use.first), at(use.last), use.buffer)
        for use in cut.tensors
    )
    workspaces = tuple(dataclasses.replace(work, node=kept[work.node]) for work in cut.workspaces)
    return dataclasses.replace(whole, tensors=tensors, workspaces=workspaces, choices=())
