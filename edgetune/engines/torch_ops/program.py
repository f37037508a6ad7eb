"""A graph of ONNX nodes, made ready to run with torch tensors: kernels found, constants read, lifetimes known.

Nodes run in the order in which they stand. A tensor is let go at its last use. Knows torch and onnx.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from onnx import AttributeProto, GraphProto, NodeProto, TensorProto, helper
from torch import Tensor

from edgetune.engines.torch_ops import ALIASING, OPERATORS, elementwise, fusion
from edgetune.engines.torch_ops import IN_PLACE as PLAIN_IN_PLACE
from edgetune.engines.torch_ops.base import Call, Kernel, broadcast
from edgetune.engines.torch_ops.layout import constant
from edgetune.errors import EngineError, choices

IN_PLACE = PLAIN_IN_PLACE | fusion.IN_PLACE
INTO = elementwise.INTO | fusion.INTO
_STANDARD = ("", fusion.DOMAIN)
_HOST_ELEMENTS = 64  # constants up to this size are also kept as Python numbers: shapes, axes, bounds


@dataclass(frozen=True)
class Setting:
    """What holds for a whole program.

    Attributes:
        opset: version of the standard operator set.
        read: gives the tensor of an initializer, on the device and in the precision of the program.
        functions: kernels of model-local functions, by name.
        double: float64 in the place of float32.
    """

    opset: int
    read: Callable[[TensorProto], Tensor]
    device: torch.device
    functions: Mapping[str, Kernel] = field(default_factory=dict)
    double: bool = False


@dataclass(frozen=True)
class _Step:
    """One node. ``dies`` are the names that nothing reads afterwards.

    ``captured`` is what the node's subgraphs read from around them; None if it has no subgraph.
    ``over`` is the input that the result may be written over, unless one of ``shared``, the names of that memory, is
    wanted by the caller.
    """

    call: Call
    kernel: Kernel
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    captured: tuple[str, ...] | None
    dies: tuple[str, ...]
    over: int | None = None
    shared: frozenset[str] = frozenset()


class Program:
    """Runs nodes. ``inputs`` and ``outputs`` are names; ``captures`` are what a subgraph reads from around it."""

    def __init__(
        self,
        nodes: Iterable[NodeProto],
        inputs: Sequence[str],
        outputs: Sequence[str],
        constants: Mapping[str, Tensor],
        setting: Setting,
    ) -> None:
        """Compile ``nodes``.

        Raises:
            EngineError: an operator is not known, or a tensor is of an element type that torch lacks.
        """
        self.inputs, self.outputs = tuple(inputs), tuple(outputs)
        self._constants: dict[str, Tensor] = {}
        known = dict(constants)
        prepared = []
        for node in nodes:
            call, captured = _call(node, known, setting)
            if node.op_type == "Constant" and node.domain == "":
                known[node.output[0]] = constant(call)
            else:
                prepared.append((node, _kernel(node, setting), call, captured))
        made = {name for node, *_ in prepared for name in node.output}
        read = {name for node, _, _, captured in prepared for name in (*node.input, *captured) if name}
        self._constants = {name: known[name] for name in sorted((read | set(outputs)) - made) if name in known}
        given = set(self.inputs) | made | set(self._constants)
        self.captures = tuple(sorted((read | set(outputs)) - given))
        self._owner = {name: name for name in (*self.inputs, *self.captures, *self._constants)}
        self._steps = self._link(prepared, made)

    @staticmethod
    def of_graph(graph: GraphProto, setting: Setting, around: Mapping[str, Tensor] | None = None) -> Program:
        """Compile a graph; ``around`` holds the constants of the graphs that it stands in."""
        own = {tensor.name: setting.read(tensor) for tensor in graph.initializer}
        inputs = [value.name for value in graph.input if value.name not in own]
        outputs = [value.name for value in graph.output]
        return Program(graph.node, inputs, outputs, {**(around or {}), **own}, setting)

    @property
    def operators(self) -> tuple[str, ...]:
        """The operators in the order in which they run."""
        return tuple(step.call.op for step in self._steps)

    def _link(
        self, prepared: Sequence[tuple[NodeProto, Kernel, Call, tuple[str, ...]]], made: set[str]
    ) -> tuple[_Step, ...]:
        """Find where each tensor dies, and where a result may be written over an input."""
        last = dict.fromkeys((*self.inputs, *self.captures), -1)
        for index, (node, _, _, captured) in enumerate(prepared):
            last |= dict.fromkeys((name for name in (*node.input, *captured, *node.output) if name), index)
        dies: dict[int, list[str]] = {}
        for name, index in last.items():
            if name not in self._constants:
                dies.setdefault(index, []).append(name)
        memories = _Memories(made)
        steps = []
        for index, (node, kernel, call, captured) in enumerate(prepared):
            over = memories.overwritten(node, last, index)
            shared = frozenset[str]() if over is None else memories.names(node.input[over])
            memories.note(node, over)
            steps.append(
                _Step(
                    call,
                    kernel,
                    tuple(node.input),
                    tuple(node.output),
                    captured if _has_body(node) else None,
                    tuple(dies.get(index, ())),
                    over,
                    shared,
                )
            )
        self._owner.update(memories.owner)
        return tuple(steps)

    def run(
        self, feeds: Mapping[str, Tensor], outputs: Sequence[str], into: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Return ``outputs``, each in memory of its own; those named in ``into`` are written there.

        Raises:
            EngineError: a node fails; the message names it.
        """
        buffers = into or {}
        kept = frozenset(outputs) | buffers.keys()
        values = dict(self._constants)
        values.update((name, feeds[name]) for name in (*self.inputs, *self.captures))
        for step in self._steps:
            try:
                self._execute(step, values, kept, buffers)
            except EngineError:
                raise
            except Exception as error:  # torch raises many kinds
                shapes = [list(values[n].shape) for n in step.inputs if n in values]
                raise EngineError(
                    f"torch failed at node '{step.call.name}' ({step.call.op}, inputs of the shapes {shapes}): {error}"
                ) from error
        result: dict[str, Tensor] = {}
        taken: set[str] = set()
        for name in outputs:
            owner = self._owner[name]
            lent = owner in self._constants or owner in self.inputs or owner in self.captures or owner in taken
            result[name] = values[name] if name in buffers else _alone(values[name], lent)
            taken.add(owner)
        return result

    def _execute(
        self, step: _Step, values: dict[str, Tensor], kept: frozenset[str], buffers: Mapping[str, Tensor]
    ) -> None:
        given = [values[name] if name else None for name in step.inputs]
        target = buffers.get(step.outputs[0]) if buffers else None
        made: Tensor | tuple[Tensor, ...]
        if step.captured is not None:
            made = step.kernel(step.call, *given, outer={name: values[name] for name in step.captured})
        elif target is not None and step.call.op in INTO and _fits(target, given):
            made = INTO[step.call.op](*given, out=target)
        elif step.over is not None and kept.isdisjoint(step.shared) and _may_hold(given[step.over], step, given):
            made = _written_over(given[step.over], step, given)
        else:
            made = step.kernel(step.call, *given)
        for name, value in zip(step.outputs, (made,) if isinstance(made, Tensor) else made, strict=False):
            if name in buffers and value is not buffers[name]:
                if value.shape != buffers[name].shape:
                    raise EngineError(
                        f"'{name}' has the shape {list(value.shape)}, its buffer {list(buffers[name].shape)}"
                    )
                value = buffers[name].copy_(value)
            if name:
                values[name] = value
        for name in step.dies:
            if name not in kept:
                del values[name]


def _alone(value: Tensor, lent: bool) -> Tensor:
    """Return ``value`` in memory that nothing else uses, and no more of it than it needs."""
    larger = value.untyped_storage().nbytes() > value.numel() * value.element_size()
    return value.clone(memory_format=torch.contiguous_format) if lent or larger or not value.is_contiguous() else value


def _fits(target: Tensor, given: Sequence[Tensor | None]) -> bool:
    inputs = [x for x in given if x is not None]
    same_type = target.is_floating_point() and all(x.dtype == target.dtype for x in inputs)
    return same_type and broadcast(*(x.shape for x in inputs)) == list(target.shape)


def _has_body(node: NodeProto) -> bool:
    return any(attribute.type == AttributeProto.GRAPH for attribute in node.attribute)


def _may_hold(target: Tensor | None, step: _Step, given: Sequence[Tensor | None]) -> bool:
    """Tell whether the result of ``step`` has the shape and the type of ``target``, an input without holes."""
    if target is None or not target.is_contiguous() or not target.is_floating_point():
        return False
    return step.call.op in IN_PLACE or _fits(target, given)


def _written_over(target: Tensor | None, step: _Step, given: Sequence[Tensor | None]) -> Tensor | tuple[Tensor, ...]:
    if step.call.op in IN_PLACE:
        return IN_PLACE[step.call.op](step.call, *given)
    return INTO[step.call.op](*given, out=target)


class _Memories:
    """Which names may lie in one memory, found node by node: views, and results written over an input."""

    def __init__(self, made: Collection[str]) -> None:
        """Of ``made``, the names that nodes make, memory may be written over."""
        self.owner: dict[str, str] = {}
        self._made = made
        self._members: dict[str, set[str]] = {}

    def names(self, name: str) -> frozenset[str]:
        """Return all names so far of the memory in which ``name`` may lie."""
        return frozenset(self._members.get(self.owner.get(name, name), {name}))

    def overwritten(self, node: NodeProto, last: Mapping[str, int], index: int) -> int | None:
        """Return the first input that the result of ``node``, the one at ``index``, may be written over: nothing in its
        memory is read later. ``last`` tells where every name is read last.
        """
        if node.domain not in _STANDARD or not (node.op_type in IN_PLACE or node.op_type in INTO):
            return None
        places = range(len(node.input)) if node.op_type in INTO else range(1)
        roots = [self.owner.get(name, name) for name in node.input]
        for place in places:
            alone = roots.count(roots[place]) == 1 and roots[place] in self._made
            if alone and all(last[name] <= index for name in self.names(node.input[place])):
                return place
        return None

    def note(self, node: NodeProto, over: int | None) -> None:
        """Take note of what ``node`` makes; ``over`` is the input that its result may be written over."""
        if over is None and not node.domain and node.op_type in ALIASING:
            over = 0
        for place, name in enumerate(node.output):
            if name:
                shares = over is not None and place == 0
                self.owner[name] = self.owner.get(node.input[over], node.input[over]) if shares else name
                self._members.setdefault(self.owner[name], {self.owner[name]}).add(name)


def _kernel(node: NodeProto, setting: Setting) -> Kernel:
    if node.domain == fusion.DOMAIN:
        return fusion.KERNELS[node.op_type]
    table = OPERATORS if node.domain in ("", "ai.onnx") else setting.functions
    if node.op_type not in table:
        domain = f"{node.domain}." if node.domain else ""
        raise EngineError(
            f"the torch engine does not know the operator {domain}{node.op_type} (node '{node.name}'); use another "
            f"engine, or export the model without it. Known operators: {choices(OPERATORS)}"
        )
    return table[node.op_type]


def _call(node: NodeProto, known: Mapping[str, Tensor], setting: Setting) -> tuple[Call, tuple[str, ...]]:
    """Return what the kernel of ``node`` sees, and the names that its subgraphs read from around them."""
    attributes: dict[str, Any] = {}
    captured: dict[str, None] = {}
    for attribute in node.attribute:
        if attribute.type == AttributeProto.GRAPH:
            program = Program.of_graph(attribute.g, setting, known)
            captured |= dict.fromkeys(program.captures)
            attributes[attribute.name] = program
        elif attribute.type == AttributeProto.TENSOR:
            attributes[attribute.name] = setting.read(attribute.t)
        else:
            value = helper.get_attribute_value(attribute)
            attributes[attribute.name] = value.decode() if isinstance(value, bytes) else _plain(value)
    host = tuple(_host(known.get(name)) for name in node.input)
    wanted = max((i + 1 for i, name in enumerate(node.output) if name), default=0)
    call = Call(
        node.op_type, node.name or ", ".join(node.output), setting.opset, attributes, wanted, host, setting.double,
        setting.device,
    )  # fmt: skip
    return call, tuple(captured)


def _plain(value: Any) -> Any:
    return value if isinstance(value, int | float | str) else list(value)


def _host(value: Tensor | None) -> Any:
    return None if value is None or value.numel() > _HOST_ELEMENTS else value.tolist()
