"""Operators that run subgraphs. A subgraph is a compiled program; ``outer`` holds what it reads from around it."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from edgetune.engines.torch_ops.base import Call, Kernel, owned
from edgetune.errors import EngineError

# The body by which codecs/subspace.py orthonormalises the columns of a matrix: ONNX has no QR, torch has.
_REMAINDER = ("MatMul", "MatMul", "Sub", "ReduceL2", "Max", "Div")
_GRAM_SCHMIDT = ("Transpose", "Unsqueeze", *_REMAINDER, *_REMAINDER, *_REMAINDER, "Unsqueeze", "MatMul", "Add")


def _starts_empty(done: Tensor, rows: Tensor, units: Tensor) -> bool:
    """Tell whether columns [b, r] that are all zero are filled, in their order, from ``rows`` [r, b], r <= b."""
    if rows.ndim != 2 or done.shape != rows.t().shape or rows.shape[0] > rows.shape[1]:
        return False
    unit = torch.eye(len(rows), dtype=units.dtype, device=units.device)
    return units.shape == unit.shape and bool(torch.equal(units, unit)) and not bool(done.any())


def orthonormal_columns(matrix: Tensor) -> Tensor:
    """Return the basis that Gram-Schmidt finds: that of a QR decomposition whose R has a positive diagonal."""
    q, r = torch.linalg.qr(matrix)
    signs: Tensor = torch.where(r.diagonal() < 0, -1.0, 1.0).to(q.dtype)
    return torch.mul(q, signs)


def _scan(n: Call, *x: Tensor, outer: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    if n.opset < 9:
        raise EngineError(f"Scan '{n.name}' is of opset {n.opset}; the torch engine runs Scan from opset 9 on")
    body, scanned = n.get("body"), n.get("num_scan_inputs")
    if body.operators == _GRAM_SCHMIDT and len(x) == 3 and _starts_empty(*x):
        return (orthonormal_columns(x[1].t()),)
    states, rows = list(x[: len(x) - scanned]), x[len(x) - scanned :]
    axes = n.get("scan_input_axes", [0] * scanned)
    backward = n.get("scan_input_directions", [0] * scanned)
    pieces = []
    for row, axis, reverse in zip(rows, axes, backward, strict=True):
        cut = row.unbind(axis)
        pieces.append(cut[::-1] if reverse else cut)
    kept: list[list[Tensor]] = [[] for _ in body.outputs[len(states) :]]
    for step in zip(*pieces, strict=True):
        made = _ordered(body, (*states, *step), outer)
        states = made[: len(states)]
        for column, value in zip(kept, made[len(states) :], strict=True):
            column.append(value)
    out_axes = n.get("scan_output_axes", [0] * len(kept))
    out_backward = n.get("scan_output_directions", [0] * len(kept))
    stacked = [
        torch.stack(column[::-1] if reverse else column, axis)
        for column, axis, reverse in zip(kept, out_axes, out_backward, strict=True)
    ]
    return tuple(owned(state, *x) for state in states) + tuple(stacked)


def _ordered(body: Any, inputs: tuple[Tensor, ...], outer: Mapping[str, Tensor]) -> list[Tensor]:
    feeds = {**outer, **dict(zip(body.inputs, inputs, strict=True))}
    made = body.run(feeds, body.outputs)
    return [made[name] for name in body.outputs]


def _if(n: Call, condition: Tensor, outer: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    branch = n.get("then_branch") if bool(condition.item()) else n.get("else_branch")
    return tuple(owned(value, *outer.values()) for value in _ordered(branch, (), outer))


def _loop(n: Call, count: Tensor | None, condition: Tensor | None, *x: Tensor, outer: Mapping[str, Tensor]) -> Any:
    body = n.get("body")
    states: list[Tensor] = list(x)
    kept: list[list[Tensor]] = [[] for _ in body.outputs[1 + len(states) :]]
    limit = None if count is None else int(count.item())
    goes_on = True if condition is None else bool(condition.item())
    for turn in itertools.count() if limit is None else range(limit):
        if not goes_on:
            break
        flags = (torch.tensor(turn, device=n.device), torch.tensor(True, device=n.device))
        made = _ordered(body, (*flags, *states), outer)
        goes_on, states = bool(made[0].item()), made[1 : 1 + len(states)]
        for column, value in zip(kept, made[1 + len(states) :], strict=True):
            column.append(value)
    stacked = [torch.stack(column) if column else torch.empty(0, device=n.device) for column in kept]
    return tuple(owned(state, *x) for state in states) + tuple(stacked)


KERNELS: dict[str, Kernel] = {"If": _if, "Loop": _loop, "Scan": _scan}
