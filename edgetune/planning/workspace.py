"""What is in memory around the run of a graph: not in it, so no lifetime tells of it, but a matter of its shapes alone.

This module may know a graph's description and sizes; it must not know plans, budgets or engines.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from edgetune.bundle import GraphSpec, TensorUse
from edgetune.planning.memory import LiveTensor, Peak
from edgetune.planning.sizes import elements

_SOLVER_COPIES = 4
"""Matrices that LAPACK's symmetric solver (syevd, as numpy calls it) holds beside its input: the input once more, of
which the eigenvectors are made, two as scratch (its documentation: 1 + 6n + 2n²), and the result."""


def around_calibration(graph: GraphSpec, symbols: Mapping[str, int], found: Peak) -> Peak:
    """Return the peak of a calibration, of which ``found`` is that of its graph's run alone.

    The Gram matrices of all modes are summed over batches in float64 (``engines.calibration``). So there are three
    instants: a run with the sums of the batches before; its end, with the runtime's results and copies of them; and the
    solver at the largest matrix, with all sums and the float32 bases of the matrices before.
    """
    grams = [use for use in graph.tensors if use.name in graph.outputs]
    count = sum(elements(use.shape, symbols) for use in grams)
    largest = max((_matrix(use, symbols) for use in grams), default=0)
    sums = LiveTensor("sums of Gram matrices", "workspace", 8 * count)
    inputs = [tensor for tensor in found.live if tensor.kind == "feature"]
    instants = {
        found.node_name: [*found.live, sums],
        "copies of the Gram matrices": [
            *inputs, sums,
            LiveTensor("Gram matrices", "output", 4 * count),
            LiveTensor("copies of the Gram matrices", "workspace", 4 * count + 8 * largest),
        ],
        "eigenvectors": [
            sums,
            LiveTensor("scratch of the solver", "workspace", 8 * _SOLVER_COPIES * largest),
            LiveTensor("new bases", "workspace", 4 * (count - largest)),
        ],
    }  # fmt: skip
    name = max(instants, key=lambda name: sum(tensor.bytes for tensor in instants[name]))
    live = tuple(sorted(instants[name], key=lambda tensor: (-tensor.bytes, tensor.name)))
    return dataclasses.replace(found, bytes=sum(tensor.bytes for tensor in live), node_name=name, live=live)


def _matrix(use: TensorUse, symbols: Mapping[str, int]) -> int:
    """Return the elements of one square matrix of ``use``, [groups, n, n]; 0 for what is none."""
    square = len(use.shape) >= 2 and use.shape[-1] == use.shape[-2]
    return elements(use.shape[-2:], symbols) if square else 0
