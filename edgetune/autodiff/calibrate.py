"""What calibration measures of every tensor that will be compressed, as nodes (DESIGN.md section 4).

Of a mode with a rank the Gram matrix G_j = A_(j) A_(j)ᵀ; of one with a count the energy of the largest coefficients.

Knows the builder, the codecs, and the slots that reverse mode chose.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from onnx import TensorProto

from edgetune.autodiff.builder import GraphBuilder
from edgetune.autodiff.graph import ForwardGraph
from edgetune.autodiff.lowering import emit_node
from edgetune.autodiff.memory import Slot
from edgetune.codecs import Mode, Saved, Source, Sparse, count_grid

_FLOAT, _DOUBLE = TensorProto.FLOAT, TensorProto.DOUBLE


def emit_grams(g: GraphBuilder, graph: ForwardGraph, slots: Sequence[Slot]) -> dict[str, str]:
    """Emit the forward pass of ``graph`` and, behind each slot's tensor, what is to be learned of each mode.

    Returns output name ``gram/<slot>/<spectrum>`` -> emitted name. Of a rank it is the Gram matrix [groups, n, n]; of a
    count, for a mode of size n, [1, m + 1]: for each of the m counts of ``count_grid(n)`` the energy of that many
    largest coefficients of each sample, summed over the samples, and at last the energy of all.
    """
    made: dict[str, str] = {}
    pending = {slot.saved.name: slot for slot in slots}

    def measure(tensor: str) -> None:
        for name in [n for n, slot in pending.items() if slot.tensor == tensor]:
            slot = pending.pop(name)
            for mode in spectra_of(slot).values():
                g.scope = f"gram/{name}/{mode.spectrum}"
                x = _emit_by_sample(g, graph, slot)
                if mode.source is Source.COUNT:
                    made[g.scope] = _emit_kept(g, x, slot, mode)
                else:
                    made[g.scope] = _emit_gram(g, x, slot.saved, mode.letter)

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
    """Return what calibration has to learn of ``slot``: one mode per spectrum, whichever codecs share it.

    Codecs that count share one graph input, but each has a spectrum of its own.
    """
    modes = (mode for option in slot.options for mode, _ in option.inputs)
    return {mode.spectrum: mode for mode in modes if mode.spectrum}


def _emit_by_sample(g: GraphBuilder, graph: ForwardGraph, slot: Slot) -> str:
    """Emit the tensor of ``slot`` as [b, *saved.shape]."""
    if graph.shapes[slot.tensor] == (0, *slot.saved.shape):
        return slot.tensor
    return str(g.op("Reshape", slot.tensor, g.const([-1, *slot.saved.shape]), hint="by_sample"))


def _emit_kept(g: GraphBuilder, x: str, slot: Slot, mode: Mode) -> str:
    """Emit the energies of the largest coefficients, at the counts of ``count_grid``, and of all: [1, m + 1] float32.

    The samples are sorted each by itself, then summed by place. What is summed along a sample is float64: float32 would
    lose the fifth digit.
    """
    codec = next(o.codec for o in slot.options if any(m.spectrum == mode.spectrum for m, _ in o.inputs))
    if not isinstance(codec, Sparse) or mode.size is None:
        raise TypeError(f"calibration can not count for the codec {codec.name}: it has no coefficients to sort")
    found = g.op("Abs", codec.emit_coefficients(g, x, slot.saved), hint="sizes")
    energy = g.op("ReduceSumSquare", found, g.const([0]), keepdims=0, hint="energy_by_place")
    total = g.op("ReduceSum", g.op("Cast", energy, to=_DOUBLE, hint="energy_by_place"), keepdims=1, hint="total")
    # A sort may never end well where an element is unlike itself; the total still tells that there was one.
    number = g.op("Equal", found, found, hint="number")
    found = g.op("Where", number, found, g.const(0.0), hint="sizes")
    largest, places = g.op("TopK", found, g.const([mode.size]), axis=1, outputs=2, hint="sorted")
    # ONNX Runtime holds an output that nothing reads until the graph ends, and the places take twice what x does.
    none = g.op("Slice", places, g.const([0]), g.const([0]), g.const([1]), hint="places")
    none = g.op("Cast", g.op("Reshape", none, g.const([-1]), hint="places"), to=_DOUBLE, hint="places")
    by_rank = g.op("ReduceSumSquare", largest, g.const([0]), keepdims=0, hint="energy_by_rank")
    held = g.op("CumSum", g.op("Cast", by_rank, to=_DOUBLE, hint="energy_by_rank"), g.const(np.array(0)), hint="held")
    at = g.op("Gather", held, g.const([count - 1 for count in count_grid(mode.size)]), axis=0, hint="held")
    row = g.op("Concat", at, total, none, axis=0, hint="held")
    row = g.op("Cast", g.op("Unsqueeze", row, g.const([0]), hint="held"), to=_FLOAT, hint="held")
    return str(row)


def _emit_gram(g: GraphBuilder, x: str, saved: Saved, letter: str) -> str:
    """Emit A_(j) A_(j)ᵀ of mode ``letter`` of ``x`` [b, *saved.shape]: [groups, n, n]."""
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
