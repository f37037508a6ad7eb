"""What a bundle becomes when fewer of its layers are trained: the graphs of a step, without what served the rest.

Frozen is the front of the tail. Its forward pass stays; its gradients, what was saved for them and its part of the
update serve nothing and go. This module may know the manifest, selection and lifetimes; it must not know budgets,
engines, or how many layers are trained.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from edgetune.bundle import GraphSpec, Manifest, SavedSpec
from edgetune.planning.knobs import ACCUMULATE, layers_before_head
from edgetune.planning.selection import Chosen, described_part

_SUM = "Sum"
"""The one operator that does without some of its inputs: it adds those that there are."""


@dataclass(frozen=True)
class Narrowed:
    """A bundle of which fewer layers are trained. ``manifest`` holds the layers and saved tensors that are left, and
    the graphs (parameters stay: they are there, frozen or not); ``parts`` are the graphs of which something is gone."""

    manifest: Manifest
    parts: Mapping[str, Chosen] = field(default_factory=dict)


def frozen_parameters(manifest: Manifest, trained: int) -> frozenset[str]:
    """Return the parameters that stay as they are when the last ``trained`` weight layers and the head are trained.

    A tensor of no weight layer (of a normalisation, a map that adapters share) is frozen where it is read before all
    layers that are trained.
    """
    if trained >= layers_before_head(manifest):
        return frozenset()
    body = [layer for layer in manifest.layers if layer.role != "head"]
    kept_layers = [*body[len(body) - trained :], *(layer for layer in manifest.layers if layer.role == "head")]
    of_layers = {name for layer in manifest.layers for name in (layer.weight, layer.bias) if name}
    kept = {name for layer in kept_layers for name in (layer.weight, layer.bias) if name}
    first: dict[str, int] = {}
    for index, wire in enumerate(manifest.graphs["train"].wires):
        for name in wire.inputs:
            first.setdefault(name, index)
    begin = min((first[name] for name in kept if name in first), default=0)
    names = (spec.name for spec in manifest.parameters)
    return frozenset(
        name for name in names if name not in kept and (name in of_layers or first.get(name, begin) < begin)
    )


def narrow(manifest: Manifest, trained: int) -> Narrowed:
    """Return ``manifest`` with only the last ``trained`` weight layers and the head trained."""
    frozen = frozen_parameters(manifest, trained)
    if not frozen:
        return Narrowed(manifest)
    layers = tuple(layer for layer in manifest.layers if layer.weight not in frozen)
    train = manifest.graphs["train"]
    gone = {f"gradient/{name}" for name in frozen}
    outputs = [name for name in train.outputs if name not in gone]
    saved = _still_saved(manifest, train, [n for n in outputs if not n.startswith(("energy/", "next/"))], frozen)
    known, left = {spec.name for spec in saved}, {mode.input for spec in saved for mode in spec.modes}
    for spec in manifest.saved:
        if spec.name not in known:
            gone |= {f"next/{mode.input}" for mode in spec.modes if mode.input not in left}
            gone |= {spec.energy} if spec.energy else set()
    parts = {"train": _part(train, [name for name in train.outputs if name not in gone], frozenset())}
    slots = [f"{slot}/" for slot in manifest.optimizer.slots]
    buffers = {prefix + name for name in frozen for prefix in ("", "gradient/", "accumulated/", *slots)}
    absent = frozenset(f"gradient/{name}" for name in frozen)
    for graph in ("update", ACCUMULATE):
        if graph in manifest.graphs and manifest.graphs[graph].wires:
            whole = manifest.graphs[graph]
            outputs = [name for name in whole.outputs if whole.in_place.get(name) not in buffers]
            parts[graph] = _part(whole, outputs, absent)
    graphs = {**manifest.graphs, **{name: part.spec for name, part in parts.items()}}
    return Narrowed(dataclasses.replace(manifest, layers=layers, saved=saved, graphs=graphs), parts)


def _still_saved(
    manifest: Manifest, train: GraphSpec, outputs: Sequence[str], frozen: frozenset[str]
) -> tuple[SavedSpec, ...]:
    """Return the saved tensors that the backward pass still reads: for a layer that is trained, or for their values."""
    trained = {layer.name for layer in manifest.layers if layer.weight not in frozen}
    needed, _ = _reached(train, outputs, frozenset())
    begin = _backward_begins(train)
    read = {name for index in needed if index >= begin for name in train.wires[index].inputs}
    found = []
    for spec in manifest.saved:
        stored = {name for option in spec.options for name in option.stored}
        if trained.intersection(spec.layers) or (not spec.layers and not stored) or stored & read:
            layers = tuple(name for name in spec.layers if name in trained)
            found.append(dataclasses.replace(spec, layers=layers))
    return tuple(found)


def _backward_begins(graph: GraphSpec) -> int:
    """Return the index of the first node behind the forward pass."""
    ends = set(graph.ends)
    return max((i + 1 for i, wire in enumerate(graph.wires) if ends.intersection(wire.outputs)), default=0)


def _reached(graph: GraphSpec, outputs: Sequence[str], absent: frozenset[str]) -> tuple[set[int], frozenset[str]]:
    """Return the nodes that make ``outputs`` without the inputs ``absent``, and all names that are absent then."""
    gone, made_by = set(absent), dict[str, int]()
    for index, wire in enumerate(graph.wires):
        made_by |= dict.fromkeys(wire.outputs, index)
        lacking = [name in gone for name in wire.inputs]
        if lacking and (all(lacking) if wire.op == _SUM else any(lacking)):
            gone.update(wire.outputs)
    chosen = {choice.output: [name for name in choice.options.values() if name] for choice in graph.choices}
    pending, kept = list(outputs), set[int]()
    while pending:
        name = pending.pop()
        pending.extend(chosen.pop(name, ()))  # any of the options may be taken
        number = made_by.get(name)
        if number is not None and number not in kept:
            kept.add(number)
            pending.extend(name for name in graph.wires[number].inputs if name not in gone)
    return kept, frozenset(gone)


def _part(graph: GraphSpec, outputs: Sequence[str], absent: frozenset[str]) -> Chosen:
    """Return the part of ``graph`` that makes ``outputs``, its places of choice among it."""
    kept, gone = _reached(graph, outputs, absent)
    order = tuple(sorted(kept))
    wires = tuple(
        dataclasses.replace(wire, inputs=tuple(n for n in wire.inputs if n not in gone)) if wire.op == _SUM else wire
        for wire in (graph.wires[index] for index in order)
    )
    spec = described_part(graph, (), wires, order, tuple(outputs), {}, not graph.choices)
    made = {name for wire in wires for name in wire.outputs}
    read = {name for wire in wires for name in wire.inputs}
    later = {name for wire in wires[_backward_begins(spec) :] for name in wire.inputs}
    tensors = tuple(
        dataclasses.replace(use, kind="transient") if use.kind == "saved" and use.name not in later else use
        for use in spec.tensors
    )
    spec = dataclasses.replace(
        spec,
        tensors=tensors,
        choices=tuple(choice for choice in graph.choices if choice.output in made or choice.output in read),
        in_place={new: old for new, old in graph.in_place.items() if new in made},
    )
    return Chosen(spec, order, {}, gone)
