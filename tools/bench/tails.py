"""A torch model cut where EdgeTune cuts it: what no trained tensor has a part in, and the rest. Knows torch alone.

``torch.export`` writes the model down as a list of ATen operators, whatever its code looks like. The tail is run from
that list with autograd switched on, which is what PyTorch itself would do with those layers of the model: the same
kernels in the same order, and a tensor is let go when nothing reads it any more.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.fx import Node
from torch.utils.checkpoint import checkpoint

Call = Callable[..., Any]


@dataclass(frozen=True)
class Step:
    """One operator: ``call`` on ``args`` and ``kwargs`` makes ``name``; ``dies``: read here for the last time.

    ``weight`` is the trained weight that it applies, if that is what it does; ``block`` the module that it is part of.
    """

    name: str
    call: Call
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    reads: tuple[str, ...]
    dies: tuple[str, ...]
    weight: str | None
    block: str | None


class Tail:
    """The trained part of a model, and the frozen part before it.

    Attributes:
        parameters: what is trained, by the model's own names.
        features: the names of the tensors that cross the cut.
    """

    def __init__(self, model: nn.Module, x: Tensor, trained: Sequence[str], blocks: str = "$.") -> None:
        """Cut ``model``, in evaluation mode, for batches of the shape of ``x`` [b, ...].

        ``blocks`` is a regular expression for the names of the modules that checkpointing recomputes.

        Raises:
            KeyError: the model has no parameter of a name in ``trained``.
        """
        known = dict(model.named_parameters())
        for value in model.parameters():
            value.requires_grad_(False)
        self.parameters = {name: known[name].requires_grad_(True) for name in trained}
        module = torch.export.export(model, (x,), strict=False).module()
        nodes = [node for node in module.graph.nodes if node.op != "call_module"]  # those are guards of the shape
        self._constants = {n.name: _attribute(module, str(n.target)) for n in nodes if n.op == "get_attr"}
        own = {value.data_ptr(): name for name, value in self.parameters.items()}
        named = {n: own[v.data_ptr()] for n, v in self._constants.items() if v.numel() and v.data_ptr() in own}
        self._constants |= {n: self.parameters[name] for n, name in named.items()}
        (self._input,) = [node.name for node in nodes if node.op == "placeholder"]
        (end,) = [node for node in nodes if node.op == "output"]
        (outputs,) = end.args
        self._output = _first(outputs).name
        active, calls = set(named), [node for node in nodes if node.op == "call_function"]
        for node in calls:
            if active.intersection(i.name for i in node.all_input_nodes):
                active.add(node.name)
        pattern = re.compile(blocks)
        tail = [n for n in _needed(calls, {self._output}) if n.name in active]
        inside = {n.name for n in tail}
        read = dict.fromkeys(i.name for n in tail for i in n.all_input_nodes)
        self.features = tuple(n for n in read if n not in inside and n not in self._constants)
        trunk = [n for n in _needed(calls, set(self.features)) if n.name not in active]
        self.steps = _linked(tail, self._constants, {self._output}, named, pattern)
        self._trunk = _linked(trunk, self._constants, set(self.features), {}, pattern)

    def trunk(self, x: Tensor) -> list[Tensor]:
        """Return the features for ``x``."""
        values = {**self._constants, self._input: x}
        with torch.no_grad():
            _run(self._trunk, values)
        return [values[name] for name in self.features]

    def forward(self, features: list[Tensor], calls: Mapping[str, Call] | None = None) -> Tensor:
        """Return the model's first output; empty ``features``, so that they live no longer than they are read.

        ``calls`` replaces the operator of trained weights, by their names.
        """
        values = dict(self._constants)
        values.update(zip(self.features, features, strict=True))
        features.clear()
        _run(self.steps, values, calls)
        result: Tensor = values[self._output]
        return result

    def forward_by_blocks(self, features: list[Tensor]) -> Tensor:
        """As :meth:`forward`; each block keeps what it was given, and is run again in the backward pass."""
        values = dict(self._constants)
        values.update(zip(self.features, features, strict=True))
        features.clear()
        for steps in self._blocks():
            if steps[0].block is None:
                _run(steps, values)
                continue
            made = {step.name for step in steps}
            gone = {name for step in steps for name in step.dies}
            read = dict.fromkeys(name for step in steps for name in step.reads if name not in made)
            given = [name for name in read if name not in self._constants]
            leaves = [step.name for step in steps if step.name not in gone]
            kept = [Step(**{**vars(step), "dies": ()}) for step in steps]

            def again(
                *tensors: Tensor, names: list[str] = given, steps: list[Step] = kept, out: list[str] = leaves
            ) -> Any:
                inner = {**self._constants, **dict(zip(names, tensors, strict=True))}
                _run(steps, inner)
                return tuple(inner[name] for name in out)

            found = checkpoint(again, *(values[name] for name in given), use_reentrant=False)
            values.update(zip(leaves, found, strict=True))
            for name in gone - made:
                values.pop(name, None)
        result: Tensor = values[self._output]
        return result

    def _blocks(self) -> list[list[Step]]:
        found: list[list[Step]] = []
        for step in self.steps:
            if found and found[-1][0].block == step.block:
                found[-1].append(step)
            else:
                found.append([step])
        return found


def saved_bytes(forward: Callable[[], Tensor], own: Iterable[Tensor]) -> int:
    """Return the bytes of the storages that autograd holds when ``forward()`` is done, those of ``own`` left out."""
    known = {value.untyped_storage().data_ptr() for value in own}
    found: dict[int, int] = {}
    alive = []

    def pack(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage.nbytes()
            alive.append(storage)  # so that no address is used twice
        return value

    with saved_tensors_hooks(pack, lambda value: value):
        forward()
    return sum(found.values())


def _run(steps: Sequence[Step], values: dict[str, Any], calls: Mapping[str, Call] | None = None) -> None:
    def value(node: Node) -> Any:
        return values[node.name]

    for step in steps:
        args = torch.fx.node.map_arg(step.args, value)
        call = calls.get(step.weight, step.call) if calls and step.weight else step.call
        values[step.name] = call(*args, **step.kwargs)
        del args
        for name in step.dies:
            del values[name]


def _needed(calls: Sequence[Node], wanted: set[str]) -> list[Node]:
    """Return those of ``calls`` that ``wanted`` follows from."""
    wanted, found = set(wanted), []
    for node in reversed(calls):
        if node.name in wanted:
            wanted.update(i.name for i in node.all_input_nodes)
            found.append(node)
    return found[::-1]


def _linked(
    nodes: Sequence[Node],
    constants: Mapping[str, Any],
    kept: set[str],
    named: Mapping[str, str],
    blocks: re.Pattern[str],
) -> list[Step]:
    last: dict[str, int] = {}
    for index, node in enumerate(nodes):
        for name in (node.name, *(i.name for i in node.all_input_nodes)):
            last[name] = index
    steps = []
    for index, node in enumerate(nodes):
        assert not any(isinstance(value, Node) for value in node.kwargs.values())
        reads = tuple(dict.fromkeys(i.name for i in node.all_input_nodes))
        ends = [n for n in (*reads, node.name) if last[n] == index and n not in constants and n not in kept]
        second = node.args[1] if len(node.args) > 1 else None
        weight = named.get(second.name) if isinstance(second, Node) else None
        paths = [str(path) for path, _ in (node.meta.get("nn_module_stack") or {}).values()]
        block = next((path for path in paths if blocks.fullmatch(path)), None)
        call: Any = node.target
        steps.append(Step(node.name, call, node.args, dict(node.kwargs), reads, tuple(ends), weight, block))
    return steps


def _attribute(module: Any, path: str) -> Any:
    for part in path.split("."):
        module = getattr(module, part)
    return module


def _first(value: Any) -> Node:
    while not isinstance(value, Node):
        value = next(iter(value.values())) if isinstance(value, dict) else value[0]
    return value
