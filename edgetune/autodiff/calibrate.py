"""The Gram matrices G_j = A_(j) A_(j)ᵀ of every tensor that will be compressed, as nodes (DESIGN.md section 4).

Knows the builder and the slots that reverse mode chose.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from edgetune.autodiff.builder import GraphBuilder
from edgetune.autodiff.graph import ForwardGraph
from edgetune.autodiff.lowering import emit_node
from edgetune.autodiff.memory import Slot
from edgetune.codecs import Mode


def emit_grams(g: GraphBuilder, graph: ForwardGraph, slots: Sequence[Slot]) -> dict[str, str]:
    """Emit the forward pass of ``graph`` and, behind each slot's tensor, one Gram matrix per mode.

    Returns output name ``gram/<slot>/<spectrum>`` -> emitted name; each is [groups, n, n].
    """
    made: dict[str, str] = {}
    pending = {slot.saved.name: slot for slot in slots}

    def measure(tensor: str) -> None:
        for name in [n for n, slot in pending.items() if slot.tensor == tensor]:
            slot = pending.pop(name)
            for mode in spectra_of(slot).values():
                g.scope = f"gram/{name}/{mode.spectrum}"
                made[g.scope] = _emit_gram(g, graph, slot, mode.letter)

    for name in graph.inputs:
        measure(name)
    for node in graph.nodes:
        g.scope = node.name
        emit_node(g, node, graph)
        for name in node.outputs:
            measure(name)
    if pending:
        raise ValueError(f"no node makes the tensors of {sorted(pending)}")
    return made


def spectra_of(slot: Slot) -> dict[str, Mode]:
    """Return what calibration has to learn of ``slot``: one mode per spectrum, whichever codecs share it."""
    return {mode.spectrum: mode for mode in slot.inputs.values() if mode.spectrum}


def _emit_gram(g: GraphBuilder, graph: ForwardGraph, slot: Slot, letter: str) -> str:
    """Emit A_(j) A_(j)ᵀ of mode ``letter``: [groups, n, n]."""
    saved, x = slot.saved, slot.tensor
    if graph.shapes[x] != (0, *saved.shape):
        x = g.op("Reshape", x, g.const([-1, *saved.shape]), hint="by_sample")
    order = ["b", *saved.extents()]
    if letter == "c" and saved.groups > 1:
        size = saved.channels // saved.groups
        planes = g.op("Reshape", x, g.const([0, saved.groups, size, math.prod(saved.positions)]), hint="planes")
        first = g.op("Transpose", planes, perm=[1, 2, 0, 3], hint="first")
        rows = g.op("Reshape", first, g.const([saved.groups, size, -1]), hint="rows")
        return str(g.op("MatMul", rows, g.op("Transpose", rows, perm=[0, 2, 1], hint="columns"), hint="gram"))
    if letter == order[-1]:  # the last axis: rows of it are there without a copy
        columns = g.op("Reshape", x, g.const([-1, saved.shape[-1]]), hint="columns")
        gram = g.op("Gemm", columns, columns, transA=1, hint="gram")
    else:
        axis = order.index(letter)
        if axis:
            x = g.op("Transpose", x, perm=[axis, *(i for i in range(len(order)) if i != axis)], hint="first")
        rows = g.op("Flatten", x, axis=1, hint="rows")
        gram = g.op("Gemm", rows, rows, transB=1, hint="gram")
    return str(g.op("Unsqueeze", gram, g.const([0]), hint="gram"))
