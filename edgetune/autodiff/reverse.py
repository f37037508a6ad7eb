"""Reverse mode on ONNX graphs: a forward graph in, one graph with its gradients out.

Two passes over the rules. The first asks every rule what it will want in the backward pass; so each tensor is kept at
most once, in the cheapest form that serves all who want it (``memory.py``). The second emits: the forward pass with
every encoder right behind the tensor that it keeps, the loss, and the backward pass, adding gradients where a tensor
fans out.

Where a plan may choose between several codecs for one tensor, the graph holds them all, and a ``Choose`` node stands
where their results meet. It is no operator that runs: choosing means taking one of its inputs and dropping what then
serves nothing (``planning.selection``).

Knows the builder, the rules and the codecs; knows nothing of files, models or runtimes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from edgetune.autodiff.builder import DOMAIN, FunctionLibrary, GraphBuilder
from edgetune.autodiff.graph import ForwardGraph, Node, prune
from edgetune.autodiff.losses import EmittedLoss, Loss
from edgetune.autodiff.lowering import emit_node
from edgetune.autodiff.memory import Memory, Option, Slot, TrainedLayer
from edgetune.autodiff.rebuild import rebuild
from edgetune.autodiff.rule import FLOATS, FunctionBody, Kept, Rule, Stored
from edgetune.autodiff.rules import rule_for
from edgetune.autodiff.rules.axes import expand
from edgetune.codecs import Codec, Dense, Recompute, Saved, Source, identifier, label_of
from edgetune.codecs.base import Encoded
from edgetune.codecs.sign import Interval, emit_inside, emit_pack, emit_unpack
from edgetune.errors import ExportError, UnsupportedOperatorError, choices

__all__ = ["Gradients", "Option", "Slot", "TrainedLayer", "emit_gradients", "function_name"]

CHOOSE = "Choose"
"""Operator of the domain ``edgetune`` with attributes ``saved`` (name of the saved tensor) and ``options`` (labels)."""


@dataclass
class Gradients:
    """What reverse mode emitted: graph inputs beyond the forward graph's own, and the outputs.

    ``energies`` are emitted names by the name of the slot; ``carried`` by that of the graph input
    whose next value it is.
    """

    loss: str
    correct: str | None
    parameters: dict[str, str]
    slots: list[Slot]
    kept: list[str]
    forward_ends: tuple[str, ...]
    energies: dict[str, str]
    carried: dict[str, str]


class _Reverser:
    """Emits one train graph; satisfies :class:`edgetune.autodiff.rule.Context`."""

    def __init__(
        self,
        g: GraphBuilder,
        library: FunctionLibrary,
        graph: ForwardGraph,
        layers: Mapping[str, TrainedLayer],
        values: Sequence[Codec],
    ) -> None:
        self.g = g
        self.graph = graph
        self.library = library
        self.memory = Memory(graph, layers, values)
        self.energies: dict[str, str] = {}
        self.carried: dict[str, str] = {}
        self._decoded: dict[tuple[str, str], str] = {}
        self._kept: dict[str, tuple[str, ...]] = {}
        self._masks: dict[tuple[str, Interval], str] = {}
        self._narrow: dict[str, tuple[int, ...]] = {}
        self.kept_names: list[str] = []

    # -- what rules call ------------------------------------------------------------------------------------------

    def value(self, tensor: str) -> str:
        if tensor in self.memory.dense or tensor in self.graph.constants:
            return tensor
        key = self.memory.slot_of(tensor)
        if key is None:
            raise KeyError(f"a rule loads '{tensor}' without having wanted its value")
        # once per rule: between two rules the decoded tensor would only take memory
        if (self.g.scope, tensor) not in self._decoded:
            slot = self.memory.slots[key]
            results = [self._decode(slot, stored) for stored in self._options(slot)]
            self._decoded[self.g.scope, tensor] = self.choose(slot.saved.name, results, "decoded")
        return self._decoded[self.g.scope, tensor]

    def _decode(self, slot: Slot, stored: Stored) -> str:
        if stored.codec.name == Dense.name:  # the tensor, or the same computed again
            return stored.encoded.stored[0]
        letters, shape = list(stored.encoded.bases), self.graph.shapes[slot.tensor]

        def body(g: GraphBuilder, names: Sequence[str]) -> str:
            count = len(stored.encoded.stored)
            bases = dict(zip(letters, names[count:], strict=True))
            decoded = stored.codec.emit_decode(g, Encoded(tuple(names[:count]), bases, None), stored.saved)
            if shape == (0, *stored.saved.shape):
                return decoded
            return str(g.op("Reshape", decoded, g.const(self.graph.reshape_target(slot.tensor)), hint="decoded"))

        label = _function_name("Decode", stored.codec, slot, self.graph)
        inputs = [*stored.encoded.stored, *stored.encoded.bases.values()]
        return self.function("_".join([label, *letters]), inputs, "decoded", body)

    def mask(self, tensor: str, interval: Interval) -> str:
        if tensor in self.memory.dense:
            return emit_inside(self.g, tensor, interval)
        shape = self.graph.per_sample(tensor)

        def body(g: GraphBuilder, names: Sequence[str]) -> str:
            return emit_unpack(g, names[0], shape)

        inside = self.function(f"SignUnpack_{_dims(shape)}", [self._masks[tensor, interval]], "inside", body)
        if self.graph.shapes[tensor] == (0, *shape):
            return inside
        return str(self.g.op("Reshape", inside, self.g.const(self.graph.reshape_target(tensor)), hint="inside"))

    def stored(self, tensor: str, groups: int = 1, channels_last: bool = False) -> Kept:
        slot = self.memory.slots[tensor, groups, channels_last]
        return Kept(slot.saved.name, slot.saved, tuple(self._options(slot)))

    def _options(self, slot: Slot) -> list[Stored]:
        """Return what every option of ``slot`` stored; what is stored nowhere is computed again."""
        found = []
        for option in slot.options:
            assert option.encoded is not None
            codec, encoded = option.codec, option.encoded
            if isinstance(codec, Recompute):
                available = self.memory.dense | set(self.graph.inputs)
                again = rebuild(self.g, self.graph, slot.tensor, available)
                codec, encoded = Dense(), Encoded((again,), {}, None)
            found.append(Stored(codec, slot.saved, encoded))
        return found

    def choose(self, kept: str, results: Sequence[str], hint: str) -> str:
        slot = next(slot for slot in self.memory.slots.values() if slot.saved.name == kept)
        if len(results) == 1:
            return results[0]
        labels = [label_of(option.codec) for option in slot.options]
        return str(self.g.op(CHOOSE, *results, hint=hint, domain=DOMAIN, saved=kept, options=labels))

    def spread(self, gradient: str, shape: tuple[int, ...]) -> str:
        self._narrow[gradient] = shape
        return gradient

    def whole(self, gradient: str) -> str:
        """Return ``gradient`` with all its extents."""
        shape = self._narrow.get(gradient)
        return gradient if shape is None else expand(self.g, gradient, shape)

    def kept(self, node: Node) -> tuple[str, ...]:
        return self._kept[node.name]

    def function(self, name: str, inputs: Sequence[str], hint: str, body: FunctionBody) -> str:
        return self.library.call(self.g, name, inputs, [hint], lambda g, names: [body(g, names)])[0]

    # -- forward --------------------------------------------------------------------------------------------------

    def forward(self, rules: Mapping[str, Rule]) -> None:
        """Emit every node, and behind each tensor what is kept of it (graph inputs: before their first reader)."""
        pending = list(self.graph.inputs)
        for node in self.graph.nodes:
            for name in [n for n in pending if n in node.inputs]:
                pending.remove(name)
                self._keep(name)
            rule = rules.get(node.name)
            self.g.scope = node.name
            if rule is not None and rule.forward is not None:
                self._kept[node.name] = rule.forward(self, node)
                self.kept_names.extend(self._kept[node.name])
            else:
                emit_node(self.g, node, self.graph)
            for name in node.outputs:
                self._keep(name)

    def _keep(self, tensor: str) -> None:
        self.g.scope = tensor
        for key, slot in self.memory.slots.items():
            if slot.tensor == tensor and any(option.encoded is None for option in slot.options):
                self.memory.slots[key] = self._encode(slot)
        for interval in self.memory.intervals.get(tensor, ()):
            self._masks[tensor, interval] = self._pack(tensor, interval)
            self.kept_names.append(self._masks[tensor, interval])

    def _encode(self, slot: Slot) -> Slot:
        """Emit the encoders of all options of ``slot``."""
        options = [dataclasses.replace(option, encoded=self._encoded(slot, option)) for option in slot.options]
        energies = [option.encoded.energy or "" for option in options if option.encoded is not None]
        if any(energies):
            self.energies[slot.saved.name] = self.choose(slot.saved.name, energies, "energy")
        following = [option.following for option in options]
        for name in dict.fromkeys(name for made in following for name in made):
            self.carried[name] = self.choose(slot.saved.name, [made.get(name, "") for made in following], "next")
        return dataclasses.replace(slot, options=tuple(options))

    def _encoded(self, slot: Slot, option: Option) -> Encoded:
        codec = option.codec
        if isinstance(codec, Recompute):
            return Encoded((), {}, None)
        letters = [mode.letter for mode, _ in option.inputs]
        by_sample = self.graph.shapes[slot.tensor] == (0, *slot.saved.shape)

        def body(g: GraphBuilder, names: Sequence[str]) -> Sequence[str]:
            x = names[0] if by_sample else g.op("Reshape", names[0], g.const([-1, *slot.saved.shape]), hint="x")
            encoded = codec.emit_encode(g, x, slot.saved, dict(zip(letters, names[1:], strict=True)))
            return [*encoded.stored, *([encoded.energy] if encoded.energy else []), *encoded.carried.values()]

        if codec.name == Dense.name and by_sample:
            return Encoded((slot.tensor,), {}, None)
        hints = [tensor.name for tensor in codec.stored(slot.saved)]
        energy = ["energy"] if codec.lossy else []
        moving = [mode for mode, _ in option.inputs if mode.source is Source.CARRIED]
        inputs = [slot.tensor, *(name for _, name in option.inputs)]
        label = _function_name("Encode", codec, slot, self.graph)
        next_hints = [f"next_{mode.letter}" for mode in moving]
        made = self.library.call(self.g, label, inputs, [*hints, *energy, *next_hints], body)
        bases = {mode.letter: name for mode, name in option.inputs if mode.source is Source.BASIS}
        stored, rest = made[: len(hints)], made[len(hints) :]
        carried = dict(zip((mode.letter for mode in moving), rest[len(energy) :], strict=True))
        self.kept_names.extend(stored)
        return Encoded(stored, bases, rest[0] if energy else None, carried)

    def _pack(self, tensor: str, interval: Interval) -> str:
        shape = self.graph.per_sample(tensor)

        def body(g: GraphBuilder, names: Sequence[str]) -> str:
            return emit_pack(g, names[0], shape, interval)

        if self.graph.shapes[tensor] != (0, *shape):
            tensor = self.g.op("Reshape", tensor, self.g.const([-1, *shape]), hint="by_sample")

        bounds = f"{interval.low:g}_{interval.high:g}".replace("-", "m").replace(".", "p")
        return self.function(f"SignPack_{_dims(shape)}_{bounds}", [tensor], "mask", body)


def _dims(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def function_name(verb: str, codec: Codec, saved: Saved) -> str:
    """Return a name that tells apart all that an encoder or a decoder (``verb``) depends on."""
    order = "last" if saved.channels_last else f"g{saved.groups}"
    return f"{identifier(codec).capitalize()}{verb}_{_dims(saved.shape)}_{order}"


def _function_name(verb: str, codec: Codec, slot: Slot, graph: ForwardGraph) -> str:
    """Return :func:`function_name`, and the shape that the tensor has in the graph where that is another."""
    shape = graph.shapes[slot.tensor]
    source = "" if shape == (0, *slot.saved.shape) else f"_from_{_dims(shape)}".replace("-", "k")
    return function_name(verb, codec, slot.saved) + source


def emit_gradients(
    g: GraphBuilder,
    library: FunctionLibrary,
    graph: ForwardGraph,
    layers: Mapping[str, TrainedLayer],
    parameters: Sequence[str],
    targets: str,
    loss: Loss | None,
    values: Sequence[Codec] = (),
) -> Gradients:
    """Emit forward pass, loss and backward pass of ``graph`` into ``g``.

    Args:
        graph: the tail; its inputs are features, ``parameters`` are names in ``graph.shapes`` that it reads.
        layers: per name of a trained Conv/Gemm/MatMul node, its layer and the codecs for its input.
        targets: name of the graph input that the first output is compared with.
        loss: how; None where the graph makes its loss itself (``graph.loss``).
        values: the codecs for tensors whose values a rule wants (smooth nonlinearities, attention, normalisations);
            without any those are kept exactly, and a lossy codec never touches a gradient but that of one weight.

    Raises:
        UnsupportedOperatorError: an operator between a parameter and the loss has no rule.
        ExportError: the loss does not depend on a parameter.
    """
    goal = graph.goal
    graph = dataclasses.replace(graph, nodes=prune(graph.nodes, [goal]))
    active = set(parameters)
    wrt: dict[str, frozenset[int]] = {}
    rules: dict[str, Rule] = {}
    reverser = _Reverser(g, library, graph, layers, values)
    for node in graph.nodes:
        differentiable = frozenset(i for i, name in enumerate(node.inputs) if name in active)
        if not differentiable:
            continue
        rule = rule_for(node.op, node.name)
        # Integers and truth values carry no gradient: what is computed from them alone is not active.
        active.update(name for name in node.outputs if graph.dtypes.get(name, FLOATS[0]) in FLOATS)
        wrt[node.name], rules[node.name] = differentiable, rule
        for want in rule.wants(graph, node, differentiable):
            reverser.memory.add(node, want)
    reverser.memory.resolve()
    reverser.forward(rules)
    g.scope = "loss"
    if loss is None:
        emitted = EmittedLoss(goal, g.const(1.0), None)
    else:
        emitted = loss.emit(g, library, goal, graph.sample_shape(goal), targets)
    gradients = {goal: emitted.gradient}
    for node in reversed(graph.nodes):
        if node.name not in wrt:
            continue
        dys = [gradients.pop(name, None) for name in node.outputs]
        if all(dy is None for dy in dys):
            continue
        g.scope = f"grad/{node.name}"
        rule = rules[node.name]
        if not rule.broadcasts:
            dys = [None if dy is None else reverser.whole(dy) for dy in dys]
        if rule.backward_of_many is not None:
            made = rule.backward_of_many(reverser, node, wrt[node.name], dys)
        elif dys[0] is not None:
            made = rule.backward(reverser, node, wrt[node.name], dys[0])
        else:
            raise UnsupportedOperatorError(
                f"the loss depends on another output of {node.op} '{node.name}' than its first, which is not known"
            )
        for index, gradient in made.items():
            name = node.inputs[index]
            previous = gradients.get(name)
            if previous is None:
                gradients[name] = gradient
            else:
                gradients[name] = g.op("Add", reverser.whole(previous), gradient, hint="sum")
    missing = [name for name in parameters if name not in gradients]
    if missing:
        raise ExportError(f"{choices(missing)}: trained, but no gradient reaches it; choose other layers")
    memory = reverser.memory
    kept = sorted(memory.dense - set(graph.inputs)) + reverser.kept_names
    ends = tuple(name for name in (emitted.loss, emitted.gradient, emitted.correct) if name is not None)
    return Gradients(
        loss=emitted.loss,
        correct=emitted.correct,
        parameters={name: reverser.whole(gradients[name]) for name in parameters},
        slots=list(memory.slots.values()),
        kept=kept,
        forward_ends=ends,
        energies=reverser.energies,
        carried=reverser.carried,
    )
