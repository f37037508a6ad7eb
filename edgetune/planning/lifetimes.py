"""From nodes in execution order to lifetimes: when every tensor is made, last read, and in whose memory it lies.

This module may know the bundle's description of nodes and tensors; it must not know onnx, phases, budgets or plans.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from edgetune.bundle import TensorUse, WireSpec

# What onnxruntime's CPU kernels do, as measured (tests/engines holds these tables to the runtime): outputs that are
# views of their input, and outputs that take their input's memory when nobody reads it afterwards. Its arithmetic
# (Add, Sub, Mul, Div, Neg, Exp, Sqrt) always makes a new tensor.
VIEWS = frozenset({"Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity"})
IN_PLACE = frozenset({"Relu", "Sigmoid", "HardSigmoid", "Tanh", "Clip", "Softmax", "LogSoftmax"})


def lifetimes(
    wires: Sequence[WireSpec],
    resident: Sequence[str],
    outputs: Sequence[str],
    kinds: Mapping[str, str],
    shapes: Mapping[str, tuple[str, ...]],
    dtypes: Mapping[str, str],
    boundary: int | None = None,
    in_place: Mapping[str, str] | None = None,
) -> tuple[TensorUse, ...]:
    """Return sizes and lifetimes of all tensors of a graph, in the order in which its nodes stand.

    Args:
        resident: graph inputs and constants.
        kinds: kind of the inputs, outputs and saved tensors by name; constants and transients need no entry.
        boundary: index of the first node of the second stage, where there are two. What crosses it is an output of the
            first stage and an input of the second, alive to the end; features that do not cross it die there.
        in_place: outputs that an engine writes over an input, as in ``GraphSpec.in_place``.
    """
    end = len(wires)
    first = dict.fromkeys(resident, -1)
    last: dict[str, int] = dict.fromkeys([*resident, *outputs], end)
    for index, wire in enumerate(wires):
        for name in wire.inputs:
            last[name] = max(last.get(name, -1), index)
        for name in wire.outputs:
            first[name] = index
            last.setdefault(name, index)
    crossing: set[str] = set()
    if boundary is not None:
        crossing = {name for name, use in last.items() if use >= boundary > first[name] >= 0}
        last |= dict.fromkeys(crossing, end)
        read_later = {name for wire in wires[boundary:] for name in wire.inputs}
        last |= {
            n: boundary - 1 for n, kind in kinds.items() if kind == "feature" and n not in read_later and n in last
        }
    buffers = _buffers(wires, dtypes, last, set(resident), set(outputs) | crossing) | dict(in_place or {})
    return tuple(
        TensorUse(
            name,
            shapes[name],
            dtypes[name],
            kinds.get(name, "transient" if start >= 0 else "constant"),
            start,
            last[name],
            buffers.get(name, name),
        )
        for name, start in first.items()
    )


def boundary_of(wires: Sequence[WireSpec], ends: set[str], features: set[str]) -> int | None:
    """Return the index of the first backward node; None where the backward pass reads a feature."""
    made = [index for index, wire in enumerate(wires) if ends.intersection(wire.outputs)]
    if not made:
        return None
    boundary = max(made) + 1
    later = {name for wire in wires[boundary:] for name in wire.inputs}
    return None if later & features else boundary


def _buffers(
    wires: Sequence[WireSpec],
    dtypes: Mapping[str, str],
    last: Mapping[str, int],
    resident: set[str],
    outputs: set[str],
) -> dict[str, str]:
    """Return, per tensor that owns no memory, the tensor whose memory it occupies."""
    owner: dict[str, str] = {}
    busy_until: dict[str, int] = {}

    def root(name: str) -> str:
        return owner.get(name, name)

    for index, wire in enumerate(wires):
        for name in wire.outputs:
            busy_until[root(name)] = max(busy_until.get(root(name), -1), last.get(name, index))
        made = wire.outputs[0] if wire.outputs else ""
        if not made or made in outputs:
            continue
        base = root(wire.inputs[0]) if wire.inputs else ""
        if wire.op in VIEWS:
            owner[made] = base
            busy_until[base] = max(busy_until.get(base, last.get(base, index)), last.get(made, index))
        elif wire.op in IN_PLACE:
            free = base not in resident and base not in outputs and busy_until.get(base, index) <= index
            if free and dtypes[base] == dtypes[made]:
                owner[made] = base
                busy_until[base] = last.get(made, index)
    return owner
