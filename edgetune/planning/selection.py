"""What a graph with choices becomes once a plan has chosen: fewer nodes, and one option per saved tensor.

Choosing means taking one input of every place of choice and dropping the nodes that then serve nothing. So encoders and
decoders of the other options vanish by themselves, and nothing of them runs.
This module may know the manifest and lifetimes; it must not know budgets, engines, or how a choice is made.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from edgetune.bundle import GraphSpec, Manifest, SavedSpec, StageSpec, WireSpec, Workspace
from edgetune.codecs import codec_named, label_of
from edgetune.errors import BundleError, UsageError, choices
from edgetune.planning.lifetimes import boundary_of, lifetimes

Selection = Mapping[str, str]
"""The label of the chosen option by saved tensor."""

LOSSLESS = "dense"
"""Label of the codec that keeps a tensor as it is."""


@dataclass(frozen=True)
class Chosen:
    """A graph after the choice.

    Attributes:
        spec: its description; its stages have no files, because an engine makes them of ``GraphSpec.flat_file``.
        kept: indices of the nodes of the whole graph that remain, in order.
        renamed: new names of tensors, for whatever a remaining node reads or makes.
        absent: tensors that a remaining node of the file reads (a Sum), and that are not there any more.
    """

    spec: GraphSpec
    kept: tuple[int, ...]
    renamed: Mapping[str, str]
    absent: frozenset[str] = frozenset()


def check_codec(manifest: Manifest, codec: str) -> None:
    """Raise UsageError unless some saved tensor can be kept by ``codec`` (as spelled).

    Ask it of a whole bundle: where fewer layers are trained, nothing may be left to which the codec applies.
    """
    wanted = label_of(codec_named(codec))
    every = dict.fromkeys(option.label for spec in manifest.saved for option in spec.options)
    if wanted not in every:
        raise UsageError(f"the bundle keeps no tensor as '{codec}'; choose one of: {choices(every)}")


def default_selection(manifest: Manifest, codec: str | None = None) -> dict[str, str]:
    """Return the selection in which every saved tensor is kept by ``codec`` (as spelled), or else by the first
    of its menu.

    A tensor to which the codec does not apply is kept dense, or by the first of its menu.
    """
    labels = {spec.name: [option.label for option in spec.options] for spec in manifest.saved}
    wanted = label_of(codec_named(codec or manifest.codec.split("+")[0]))
    return {
        name: next((label for label in (wanted, LOSSLESS) if label in known), known[0])
        for name, known in labels.items()
    }


def described(selection: Selection) -> str:
    """Return how many tensors each codec keeps, such as ``9 int8, 3 hosvd``, the most first."""
    counts = Counter(selection.values())
    return ", ".join(f"{count} {label}" for label, count in sorted(counts.items(), key=lambda one: (-one[1], one[0])))


def settle(manifest: Manifest, selection: Selection) -> Manifest:
    """Return ``manifest`` as ``selection`` leaves it: one option per saved tensor, and the train graph of those.

    Raises:
        UsageError: the selection lacks a saved tensor, or names an option that it does not have.
    """
    saved = settled_tensors(manifest, selection)
    graphs = dict(manifest.graphs)
    if "train" in graphs:
        graphs["train"] = choose(graphs["train"], saved, selection).spec
    return dataclasses.replace(manifest, saved=saved, graphs=graphs)


def settled_tensors(manifest: Manifest, selection: Selection) -> tuple[SavedSpec, ...]:
    """Return the saved tensors of ``manifest``, each with the option that ``selection`` names."""
    return tuple(_settled(spec, selection) for spec in manifest.saved)


def _settled(spec: SavedSpec, selection: Selection) -> SavedSpec:
    if spec.name not in selection:
        raise UsageError(f"the selection lacks '{spec.name}'; it names: {choices(selection)}")
    option = spec.option(selection[spec.name])
    return dataclasses.replace(spec, options=(option,), energy=spec.energy if option.lossy else None)


def choose(graph: GraphSpec, saved: tuple[SavedSpec, ...], selection: Selection, *, staged: bool = True) -> Chosen:
    """Return what remains of ``graph``; ``saved`` are the settled saved tensors. Without choices, all of it.

    Without ``staged`` it is described as one stage, even where the features are not needed in the backward pass.
    """
    if not graph.choices:
        return Chosen(graph, tuple(range(len(graph.nodes))), {})
    alias: dict[str, str] = {}
    dropped: set[str] = set()
    for choice in graph.choices:
        taken = choice.options[selection[choice.saved]]
        if taken:
            alias[choice.output] = taken
        else:
            dropped.add(choice.output)
    for name in alias:
        while alias[name] in alias:
            alias[name] = alias[alias[name]]
    outputs = tuple(name for name in graph.outputs if name not in dropped)
    final = {}
    for name in outputs:
        if name in alias:
            final[alias[name]] = name
    renamed = {name: final.get(taken, taken) for name, taken in alias.items()} | final
    made_by = {name: index for index, wire in enumerate(graph.wires) for name in wire.outputs}
    origin = {new: old for old, new in final.items()}
    pending, kept = [origin.get(name, name) for name in outputs], set[int]()
    while pending:
        name = pending.pop()
        name = alias.get(name, name)
        index = made_by.get(name)
        if index is not None and index not in kept:
            kept.add(index)
            pending.extend(graph.wires[index].inputs)
    order = tuple(sorted(kept))
    wires = tuple(_renamed(graph.wires[index], renamed) for index in order)
    return Chosen(described_part(graph, saved, wires, order, outputs, renamed, staged), order, renamed)


def _renamed(wire: WireSpec, renamed: Mapping[str, str]) -> WireSpec:
    # Few nodes are next to a choice; a planner chooses hundreds of times, and most of the time went into copies here.
    if renamed.keys().isdisjoint(wire.inputs) and renamed.keys().isdisjoint(wire.outputs):
        return wire
    return WireSpec(
        wire.op,
        tuple(renamed.get(name, name) for name in wire.inputs),
        tuple(renamed.get(name, name) for name in wire.outputs),
    )


def described_part(
    graph: GraphSpec,
    saved: tuple[SavedSpec, ...],
    wires: tuple[WireSpec, ...],
    order: tuple[int, ...],
    outputs: tuple[str, ...],
    renamed: Mapping[str, str],
    staged: bool,
) -> GraphSpec:
    """Return the description of the remaining nodes ``order``, whose wires are ``wires``."""
    known = {use.name: use for use in graph.tensors}
    read = {name for wire in wires for name in wire.inputs}
    made = {name for wire in wires for name in wire.outputs}
    missing = sorted((read - made) - known.keys())
    if missing:
        raise BundleError(f"the train graph reads '{missing[0]}', which nothing makes; export the bundle again")
    inputs = tuple(name for name in graph.inputs if name in read)
    resident = [name for name in known if known[name].first < 0 and name in read]
    names = [*resident, *made]
    kinds = {n: known[n].kind for n in names if known[n].kind not in ("transient", "constant")}
    stored = {renamed.get(n, n) for spec in saved for n in spec.options[0].stored}
    kinds |= {n: "saved" for n in made if n in stored and kinds.get(n, "transient") == "transient"}
    shapes = {n: known[n].shape for n in names}
    dtypes = {n: known[n].dtype for n in names}
    features = {n for n in inputs if known[n].kind == "feature"}
    boundary = boundary_of(wires, {renamed.get(n, n) for n in graph.ends}, features) if staged else None
    tensors = lifetimes(wires, resident, outputs, kinds, shapes, dtypes, boundary, graph.in_place)
    place = {old: new for new, old in enumerate(order)}
    workspaces = tuple(Workspace(place[w.node], w.elements, w.dtype) for w in graph.workspaces if w.node in place)
    stages = _stages(wires, inputs, outputs, boundary) if boundary else ()
    return dataclasses.replace(
        graph,
        inputs=inputs,
        outputs=outputs,
        nodes=tuple(graph.nodes[index] for index in order),
        tensors=tensors,
        workspaces=workspaces,
        stages=stages,
        wires=wires,
        choices=(),
    )


def _stages(
    wires: tuple[WireSpec, ...], inputs: tuple[str, ...], outputs: tuple[str, ...], boundary: int
) -> tuple[StageSpec, ...]:
    """Return forward and backward; what the second reads of the first is made by the one and given to the other."""
    halves = (wires[:boundary], wires[boundary:])
    made = [{name for wire in half for name in wire.outputs} for half in halves]
    read = [dict.fromkeys(name for wire in half for name in wire.inputs) for half in halves]
    crossing = tuple(name for name in read[1] if name in made[0])
    first = StageSpec(
        "",
        tuple(name for name in inputs if name in read[0]),
        (*(name for name in outputs if name in made[0]), *(name for name in crossing if name not in outputs)),
        boundary,
    )
    second = StageSpec(
        "",
        (*(name for name in inputs if name in read[1]), *crossing),
        tuple(name for name in outputs if name in made[1]),
        len(wires),
    )
    return first, second
