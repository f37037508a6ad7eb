"""Reverse mode on ONNX graphs: a forward graph in, one graph with its gradients out.

Two passes over the rules. The first asks every rule what it will want in the backward pass; so each tensor is kept at
most once, in the cheapest form that serves all who want it. The second emits: the forward pass with every encoder right
behind the tensor that it keeps, the loss, and the backward pass, adding gradients where a tensor fans out.

Knows the builder, the rules and the codecs; knows nothing of files, models or runtimes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from edgetune.autodiff.builder import FunctionLibrary, GraphBuilder
from edgetune.autodiff.graph import ForwardGraph, Node, prune
from edgetune.autodiff.losses import EmittedLoss, Loss
from edgetune.autodiff.lowering import emit_node
from edgetune.autodiff.rule import FLOATS, FunctionBody, Rule, Stored, Want
from edgetune.autodiff.rules import rule_for
from edgetune.codecs import Codec, Dense, Saved, Use
from edgetune.codecs.base import POSITIONS, Encoded
from edgetune.codecs.sign import Interval, emit_inside, emit_pack, emit_unpack
from edgetune.errors import ExportError, UnsupportedOperatorError, choices

BasisInput = tuple[str, str]  # (mode letter, name of the graph input)
SlotKey = tuple[str, int, bool]  # (tensor, groups, channels last): a convolution and a linear layer may read the same


@dataclass(frozen=True)
class Slot:
    """One tensor kept for weight gradients: which, for which layers, and how it was encoded."""

    tensor: str
    layers: tuple[str, ...]
    codec: Codec
    saved: Saved
    bases: tuple[BasisInput, ...] = ()
    encoded: Encoded | None = None


@dataclass
class Gradients:
    """What reverse mode emitted: graph inputs beyond the forward graph's own, and the outputs."""

    loss: str
    correct: str | None
    parameters: dict[str, str]
    slots: list[Slot]
    kept: list[str]
    forward_ends: tuple[str, ...]


@dataclass(frozen=True)
class TrainedLayer:
    """The name of a trained weight layer and the codec for its input."""

    name: str
    codec: Codec


class _Memory:
    """What is to be kept of every tensor, resolved from all wants before anything is emitted."""

    def __init__(self, graph: ForwardGraph, layers: Mapping[str, TrainedLayer]) -> None:
        self.graph = graph
        self.layers = layers
        self.dense: set[str] = set()
        self.compressed: dict[SlotKey, Slot] = {}
        self.uncompressed: dict[SlotKey, Slot] = {}
        self.intervals: dict[str, list[Interval]] = {}
        self._wants: list[tuple[Node, Want]] = []

    def add(self, node: Node, want: Want) -> None:
        if want.tensor in self.graph.constants and want.use is not Use.WEIGHT_GRAD:
            return
        if want.use is Use.SIGN and not self._grows(want.tensor):
            want = dataclasses.replace(want, use=Use.VALUE)  # made of parameters alone
        self._wants.append((node, want))

    def resolve(self) -> None:
        """Decide. A tensor that somebody needs exactly is kept as it is, and serves every other use too."""
        readers: dict[SlotKey, list[TrainedLayer]] = {}
        for node, want in self._wants:
            if want.use is Use.VALUE:
                self.dense.add(want.tensor)
            elif want.use is Use.WEIGHT_GRAD:
                # A weight that nobody listed (one inside an attention, say) is trained from its input as it is.
                layer = self.layers.get(node.name) or TrainedLayer(node.name, Dense())
                readers.setdefault((want.tensor, want.groups, want.channels_last), []).append(layer)
                if not layer.codec.lossy:
                    self.dense.add(want.tensor)
        for tensor, _, channels_last in readers:
            if not self._compressible(tensor, channels_last):
                self.dense.add(tensor)
        for key, layers in readers.items():
            tensor, groups, channels_last = key
            names = tuple(layer.name for layer in layers)
            saved = Saved(names[0], self._saved_shape(tensor, channels_last), groups, channels_last)
            codec = layers[0].codec if tensor not in self.dense else Dense()
            if codec.lossy:
                bases = tuple((letter, _basis_name(saved, letter)) for letter in codec.letters(saved))
                self.compressed[key] = Slot(tensor, names, codec, saved, bases)
            else:
                self.uncompressed[key] = Slot(tensor, names, codec, saved, (), Encoded((tensor,), {}, None))
        self.dense -= self.graph.constants.keys()  # these are there anyway
        for _, want in self._wants:
            if want.use is Use.SIGN and want.tensor not in self.dense:
                found = self.intervals.setdefault(want.tensor, [])
                if want.interval not in found:
                    found.append(want.interval)

    def _grows(self, tensor: str) -> bool:
        """Tell whether ``tensor`` has a batch axis."""
        return any(extent <= 0 for extent in self.graph.shapes[tensor])

    def _compressible(self, tensor: str, channels_last: bool) -> bool:
        """Where several images per sample pass through a convolution, their count is no mode of its input."""
        return self._grows(tensor) and (channels_last or self.graph.shapes[tensor][0] == 0)

    def _saved_shape(self, tensor: str, channels_last: bool) -> tuple[int, ...]:
        """Return what a slot of ``tensor`` says of one sample; of a linear layer's input [*positions, c].

        The order of the rows of a linear layer's input is free: its weight gradient is a sum over them. So where the
        batch does not lead, the rows are counted off in equal shares, and more than three axes of positions are
        joined to three.
        """
        if not self._grows(tensor):
            return self.graph.shapes[tensor]
        shape = self.graph.per_sample(tensor)
        if not channels_last:
            return shape
        channels = self.graph.shapes[tensor][-1]
        positions = shape[:-1]
        if not positions and shape != (channels,):
            positions = (shape[0] // channels,)
        if len(positions) > len(POSITIONS):
            joined = len(positions) - len(POSITIONS) + 1
            positions = (math.prod(positions[:joined]), *positions[joined:])
        return (*positions, channels)


def _basis_name(saved: Saved, letter: str) -> str:
    return f"{saved.name}.sketch" if letter == "b" else f"{saved.name}.basis.{letter}"


class _Reverser:
    """Emits one train graph; satisfies :class:`edgetune.autodiff.rule.Context`."""

    def __init__(
        self, g: GraphBuilder, library: FunctionLibrary, graph: ForwardGraph, layers: Mapping[str, TrainedLayer]
    ) -> None:
        self.g = g
        self.graph = graph
        self.library = library
        self.memory = _Memory(graph, layers)
        self._kept: dict[str, tuple[str, ...]] = {}
        self._masks: dict[tuple[str, Interval], str] = {}
        self.kept_names: list[str] = []

    # -- what rules call ------------------------------------------------------------------------------------------

    def value(self, tensor: str) -> str:
        if tensor not in self.memory.dense and tensor not in self.graph.constants:
            raise KeyError(f"a rule loads '{tensor}' without having wanted its value")
        return tensor

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

    def stored(self, tensor: str, groups: int = 1, channels_last: bool = False) -> Stored:
        key = (tensor, groups, channels_last)
        slot = self.memory.compressed.get(key) or self.memory.uncompressed[key]
        assert slot.encoded is not None
        return Stored(slot.codec, slot.saved, slot.encoded)

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
        for key, slot in self.memory.compressed.items():
            if slot.tensor == tensor:
                self.memory.compressed[key] = self._encode(slot)
        for interval in self.memory.intervals.get(tensor, ()):
            self._masks[tensor, interval] = self._pack(tensor, interval)
            self.kept_names.append(self._masks[tensor, interval])

    def _encode(self, slot: Slot) -> Slot:
        letters = [letter for letter, _ in slot.bases]
        by_sample = self.graph.shapes[slot.tensor] == (0, *slot.saved.shape)

        def body(g: GraphBuilder, names: Sequence[str]) -> Sequence[str]:
            x = names[0] if by_sample else g.op("Reshape", names[0], g.const([-1, *slot.saved.shape]), hint="x")
            encoded = slot.codec.emit_encode(g, x, slot.saved, dict(zip(letters, names[1:], strict=True)))
            return [*encoded.stored, *([encoded.energy] if encoded.energy else [])]

        order = "last" if slot.saved.channels_last else f"g{slot.saved.groups}"
        source = "" if by_sample else f"_from_{_dims(self.graph.shapes[slot.tensor])}".replace("-", "k")
        label = f"{slot.codec.name.capitalize()}Encode_{_dims(slot.saved.shape)}_{order}{source}"
        inputs = [slot.tensor, *(name for _, name in slot.bases)]
        made = self.library.call(self.g, label, inputs, ["factor", "core", "energy"], body)
        bases = {letter: name for letter, name in slot.bases if letter != "b"}
        self.kept_names.extend(made[:-1])
        return Slot(slot.tensor, slot.layers, slot.codec, slot.saved, slot.bases, Encoded(made[:-1], bases, made[-1]))

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


def emit_gradients(
    g: GraphBuilder,
    library: FunctionLibrary,
    graph: ForwardGraph,
    layers: Mapping[str, TrainedLayer],
    parameters: Sequence[str],
    targets: str,
    loss: Loss | None,
) -> Gradients:
    """Emit forward pass, loss and backward pass of ``graph`` into ``g``.

    Args:
        graph: the tail; its inputs are features, ``parameters`` are names in ``graph.shapes`` that it reads.
        layers: per name of a trained Conv/Gemm/MatMul node, its layer and the codec of its input.
        targets: name of the graph input that the first output is compared with.
        loss: how; None where the graph makes its loss itself (``graph.loss``).

    Raises:
        UnsupportedOperatorError: an operator between a parameter and the loss has no rule.
        ExportError: the loss does not depend on a parameter.
    """
    goal = graph.goal
    graph = dataclasses.replace(graph, nodes=prune(graph.nodes, [goal]))
    active = set(parameters)
    wrt: dict[str, frozenset[int]] = {}
    rules: dict[str, Rule] = {}
    reverser = _Reverser(g, library, graph, layers)
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
            gradients[name] = gradient if previous is None else g.op("Add", previous, gradient, hint="sum")
    missing = [name for name in parameters if name not in gradients]
    if missing:
        raise ExportError(f"{choices(missing)}: trained, but no gradient reaches it; choose other layers")
    memory = reverser.memory
    slots = [*memory.compressed.values(), *memory.uncompressed.values()]
    kept = sorted(memory.dense - set(graph.inputs)) + reverser.kept_names
    ends = tuple(name for name in (emitted.loss, emitted.gradient, emitted.correct) if name is not None)
    return Gradients(emitted.loss, emitted.correct, {name: gradients[name] for name in parameters}, slots, kept, ends)
