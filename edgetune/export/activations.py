"""GELU and Swish, which arrive as up to nine operators, made one node each: reverse mode then keeps their input alone.

    Gelu    x/2·(1 + erf(x/√2)), or x/2·(1 + tanh(√(2/π)·(x + 0.044715·x³))) (attribute ``approximate`` none | tanh, as
            in the ONNX standard, opset 20; Hendrycks & Gimpel 2016, "Gaussian error linear units")
    Swish   x·σ(αx) (attribute ``alpha``, as in opset 24; SiLU is α = 1; Ramachandran et al. 2017, "Searching for
            activation functions")

Written out, every factor and every argument is a tensor that the backward pass wants. Models spell them in many ways
(x·x·x or a power, a division or a product, the ½ first or last), so it is not the spelling that is compared: between
the input x and the result lies one *gate* (Erf, Tanh or Sigmoid); its argument must be the right polynomial in x, and
the result the right polynomial in x and the gate, every coefficient right to a few roundings of float32.

Left as it is: a pattern of which something inside is read elsewhere or is an output, one with a parameter where a
number is expected (it may be trained), and any other constant. ``autodiff.lowering`` writes the nodes out again, so no
file has them. Knows the graph.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from edgetune.autodiff.graph import ForwardGraph, Node

Polynomial = dict[tuple[int, int], float]
"""Coefficients by the powers of (the input x, the gate)."""

_FLOAT = 1  # onnx.TensorProto.FLOAT
_GATES = ("Erf", "Tanh", "Sigmoid")
_X, _GATE, _ONE = (1, 0), (0, 1), (0, 0)
_ROUNDING = 1e-6  # relative: a coefficient is the product of a few numbers of float32
_NODES_DEEP, _NODES_BEHIND, _LARGEST_POWER = 8, 4, 4
_SLOPE = math.sqrt(2.0 / math.pi)
_ERF: Polynomial = {_X: math.sqrt(0.5)}
_TANH: Polynomial = {_X: _SLOPE, (3, 0): _SLOPE * 0.044715}
_HALVES: Polynomial = {_X: 0.5, (1, 1): 0.5}  # x/2 + x/2·gate
_PRODUCT: Polynomial = {(1, 1): 1.0}  # x·gate


def with_whole_activations(nodes: Sequence[Node], graph: ForwardGraph) -> list[Node]:
    """Return ``nodes``, those of every GELU and Swish replaced by one; ``graph`` forgets the tensors in between."""
    search = _Search(nodes, graph)
    made: dict[str, Node] = {}
    dropped: set[str] = set()
    for node in nodes:
        found = search.activation(node) if node.op in _GATES else None
        if found is not None:
            made[found.outputs[0]] = found
            dropped |= search.inside.keys()
    for name in dropped:
        graph.shapes.pop(name, None)
        graph.dtypes.pop(name, None)
    return [made.get(node.outputs[0], node) for node in nodes if node.outputs[0] not in dropped]


class _Search:
    """Looks for an activation around one gate after the other.

    ``inside`` holds, by the tensor that each makes, the nodes between the input and the result last looked at.
    """

    def __init__(self, nodes: Sequence[Node], graph: ForwardGraph) -> None:
        self.graph = graph
        self.producers = {name: node for node in nodes for name in node.outputs}
        self.readers: dict[str, list[Node]] = defaultdict(list)
        for node in nodes:
            for name in dict.fromkeys(node.inputs):
                self.readers[name].append(node)
        self.inside: dict[str, Node] = {}

    def activation(self, gate: Node) -> Node | None:
        """Return the one node for the activation that ``gate`` is a part of, None if there is none."""
        for x in self._sources(gate.inputs[0]):
            for result in self._results(gate):
                self.inside = {gate.outputs[0]: gate}
                argument = self._polynomial(gate.inputs[0], {x: _X})
                value = self._polynomial(result.outputs[0], {x: _X, gate.outputs[0]: _GATE})
                self.inside.pop(result.outputs[0], None)
                known = _known(gate.op, argument or {}, value or {})
                if known is not None and self._closed(result) and self._alike(x, result.outputs[0]):
                    return Node(known[0], result.name, (x,), result.outputs, known[1])
        return None

    def _sources(self, argument: str) -> Iterator[str]:
        """Yield what the gate's ``argument`` may be a polynomial in, the nearest first."""
        level, seen = [argument], {argument}
        for _ in range(_NODES_DEEP):
            yield from level
            nodes = [self.producers[name] for name in level if name in self.producers]
            names = [name for node in nodes if node.op in _EXPANDED for name in node.inputs]
            level = [n for n in dict.fromkeys(names) if n not in seen and n not in self.graph.constants]
            seen.update(level)

    def _results(self, gate: Node) -> Iterator[Node]:
        """Yield the nodes behind ``gate``, as long as each has one reader."""
        node = gate
        for _ in range(_NODES_BEHIND):
            readers = self.readers[node.outputs[0]]
            if len(readers) != 1:
                return
            node = readers[0]
            yield node

    def _polynomial(self, name: str, atoms: Mapping[str, tuple[int, int]], depth: int = 0) -> Polynomial | None:
        """Return ``name`` as a polynomial in ``atoms``, None if it is none; note the nodes on the way."""
        if name in atoms:
            return {atoms[name]: 1.0}
        if name in self.graph.constants:
            value = self.graph.constants[name]
            number = value.size == 1 and name not in self.graph.parameters
            return {_ONE: float(value.item())} if number else None
        node = self.producers.get(name)
        if node is None or node.op not in _EXPANDED or depth == _NODES_DEEP:
            return None
        parts = [self._polynomial(operand, atoms, depth + 1) for operand in node.inputs]
        self.inside[name] = node
        known = [part for part in parts if part is not None]
        return _EXPANDED[node.op](*known) if len(known) == len(parts) else None

    def _closed(self, result: Node) -> bool:
        """Tell whether nothing but ``result`` leaves the pattern."""
        own = {*self.inside, result.outputs[0]}
        return not own.intersection(self.graph.wanted) - {result.outputs[0]} and all(
            reader.outputs[0] in own for name in self.inside for reader in self.readers[name]
        )

    def _alike(self, x: str, result: str) -> bool:
        """Tell whether both are float32 of one shape: constants with axes of their own may add some."""
        shapes, dtypes = self.graph.shapes, self.graph.dtypes
        return shapes[x] == shapes[result] and dtypes.get(x, _FLOAT) == dtypes.get(result) == _FLOAT


def _known(gate: str, argument: Polynomial, value: Polynomial) -> tuple[str, dict[str, Any]] | None:
    """Return operator and attributes of the activation that is ``value``, its gate that of ``argument``."""
    if gate == "Erf" and _equal(argument, _ERF) and _equal(value, _HALVES):
        return "Gelu", {"approximate": "none"}
    if gate == "Tanh" and _equal(argument, _TANH) and _equal(value, _HALVES):
        return "Gelu", {"approximate": "tanh"}
    if gate == "Sigmoid" and argument.keys() == {_X} and _equal(value, _PRODUCT):
        return "Swish", {"alpha": argument[_X]}
    return None


def _equal(found: Polynomial, expected: Polynomial) -> bool:
    return found.keys() == expected.keys() and all(
        math.isclose(found[powers], expected[powers], rel_tol=_ROUNDING) for powers in expected
    )


# -- arithmetic of polynomials; None where the result is none ------------------------------------------------------


def _sum(a: Polynomial, b: Polynomial) -> Polynomial:
    return {powers: a.get(powers, 0.0) + b.get(powers, 0.0) for powers in {**a, **b}}


def _product(a: Polynomial, b: Polynomial) -> Polynomial | None:
    made: Polynomial = defaultdict(float)
    for (i, j), left in a.items():
        for (k, m), right in b.items():
            made[i + k, j + m] += left * right
    return dict(made) if max(i + j for i, j in made) <= _LARGEST_POWER else None


def _quotient(a: Polynomial, b: Polynomial) -> Polynomial | None:
    return _product(a, {_ONE: 1.0 / b[_ONE]}) if b.keys() == {_ONE} and b[_ONE] else None


def _power(a: Polynomial, exponent: Polynomial) -> Polynomial | None:
    if exponent.keys() != {_ONE} or exponent[_ONE] not in (2.0, 3.0):
        return None
    square = _product(a, a)
    return _product(square, a) if square is not None and exponent[_ONE] == 3.0 else square


def _negative(a: Polynomial) -> Polynomial | None:
    return _product(a, {_ONE: -1.0})


_EXPANDED: Mapping[str, Any] = {
    "Add": _sum,
    "Sub": lambda a, b: _sum(a, {powers: -value for powers, value in b.items()}),
    "Mul": _product,
    "Div": _quotient,
    "Pow": _power,
    "Neg": _negative,
}
