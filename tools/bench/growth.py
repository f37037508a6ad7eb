"""How cost grows: exponents fitted to the cells that differ in one thing alone. Knows numpy."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

FEWEST = 3


@dataclass(frozen=True)
class Fit:
    """``cost = scale * x ** exponent`` by least squares of the logarithms.

    ``residual``: the root of the mean square of what is left, in logarithms: 0.05 is 5 % off.
    """

    exponent: float
    scale: float
    points: int
    residual: float


def fit(x: Sequence[float], cost: Sequence[float]) -> Fit:
    """Return the power of ``x`` by which ``cost`` grows.

    Raises:
        ValueError: fewer than two different x, or a number that is not positive.
    """
    if len(set(x)) < 2 or min(*x, *cost) <= 0:
        raise ValueError("an exponent needs two different points at least, and positive numbers")
    logs = np.log(np.asarray([x, cost], np.float64))
    exponent, offset = np.polyfit(logs[0], logs[1], 1)
    left = logs[1] - exponent * logs[0] - offset
    return Fit(float(exponent), math.exp(offset), len(x), float(np.sqrt(np.mean(left**2))))


def mean_rank(figures: Mapping[str, Any]) -> float | None:
    """Return the geometric mean of all ranks of all tensors; None where nothing has a rank."""
    ranks = [r for modes in figures.get("gradients", {}).get("ranks", {}).values() for r in modes.values()]
    return math.exp(sum(math.log(r) for r in ranks) / len(ranks)) if ranks else None


@dataclass(frozen=True)
class Axis:
    """One thing that changes: how it is read from a cell and a contender's figures, and what stays the same."""

    name: str
    of: Callable[[Mapping[str, Any], Mapping[str, Any]], float | None]
    same: tuple[str, ...]


AXES = (
    Axis("batch", lambda cell, _: float(cell["batch"]), ("model", "side", "last", "epsilon")),
    Axis("side", lambda cell, _: float(cell["side"]), ("model", "batch", "last", "epsilon")),
    Axis("layers", lambda cell, _: _count(cell["last"]), ("model", "side", "batch", "epsilon")),
    Axis("mean rank", lambda _, figures: mean_rank(figures), ("model", "side", "batch", "last")),
)
COSTS: dict[str, Callable[[Mapping[str, Any]], float | None]] = {
    "seconds of a step": lambda f: f["seconds"]["step"],
    "seconds of processors": lambda f: f["seconds"]["processor"],
    "saved bytes": lambda f: f.get("saved"),
    "peak bytes": lambda f: f.get("peak", {}).get("peak"),
}


def _count(last: str) -> float | None:
    return float(last) if last.isdigit() else None


@dataclass(frozen=True)
class Curve:
    """The points of one contender along one axis, and the fit of each cost; ``place`` is what stayed the same."""

    axis: str
    place: Mapping[str, Any]
    contender: str
    x: tuple[float, ...]
    costs: Mapping[str, tuple[float, ...]]
    fits: Mapping[str, Fit]


def curves(cells: Mapping[str, Any]) -> list[Curve]:
    """Return every curve of three points or more that ``cells`` (of the JSON file) hold."""
    found: dict[tuple[Any, ...], list[tuple[float, Mapping[str, Any]]]] = {}
    for entry in cells.values():
        cell = entry["cell"]
        for name, figures in entry["contenders"].items():
            if "seconds" not in figures:
                continue
            for axis in AXES:
                x = axis.of(cell, figures)
                if x is not None:
                    place = tuple((key, cell[key]) for key in axis.same)
                    found.setdefault((axis.name, place, name), []).append((x, figures))
    made = []
    for (axis_name, place, name), points in found.items():
        points.sort(key=lambda point: point[0])
        along = tuple(point[0] for point in points)
        if len(set(along)) < FEWEST:
            continue
        costs = {cost: tuple(float(of(figures) or 0.0) for _, figures in points) for cost, of in COSTS.items()}
        whole = {cost: values for cost, values in costs.items() if all(values)}
        made.append(Curve(axis_name, dict(place), name, along, whole, {c: fit(along, v) for c, v in whole.items()}))
    return made
