"""Emits ONNX nodes in the order in which they must run. Knows onnx; knows nothing of models, rules or codecs.

Two ways to hold constants: a graph keeps them as initializers, a model-local function as Constant nodes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from edgetune.codecs.base import Array, Emitter

OPSET = 18
IR_VERSION = 8
DOMAIN = "edgetune"


class GraphBuilder:
    """Collects nodes and constants; names every value ``<scope>/<hint>`` and makes the name unique.

    Satisfies :class:`edgetune.codecs.base.Emitter`.
    """

    def __init__(self, scope: str = "", taken: set[str] | None = None, *, inline_constants: bool = False) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, Array] = {}
        self.scope = scope
        self._taken = taken if taken is not None else set()
        self._known: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self._inline_constants = inline_constants

    def fresh(self, hint: str) -> str:
        """Return a name that no value has yet."""
        base = f"{self.scope}/{hint}" if self.scope else hint
        name, number = base, 1
        while name in self._taken:
            number += 1
            name = f"{base}.{number}"
        self._taken.add(name)
        return name

    def op(
        self, op_type: str, *inputs: str, hint: str = "", outputs: int = 1, domain: str = "", **attributes: Any
    ) -> Any:
        """Append an operator; return its output name, or a tuple of names if ``outputs`` > 1."""
        names = [self.fresh(hint or op_type.lower()) for _ in range(outputs)]
        self.nodes.append(helper.make_node(op_type, list(inputs), names, name=names[0], domain=domain, **attributes))
        return names[0] if outputs == 1 else tuple(names)

    def const(self, value: Array | Sequence[int] | float, hint: str = "") -> str:
        """Return the name of a constant. Floats become float32, sequences of integers int64; equal ones are shared."""
        if isinstance(value, float):
            array: Array = np.array(value, np.float32)
        elif isinstance(value, np.ndarray):
            array = value
        else:
            array = np.array(value, np.int64)
        key = (str(array.dtype), array.shape, array.tobytes())
        if key not in self._known:
            name = self.fresh(hint or "const")
            if self._inline_constants:
                tensor = numpy_helper.from_array(array, name)
                self.nodes.append(helper.make_node("Constant", [], [name], name=name, value=tensor))
            else:
                self.constants[name] = array
            self._known[key] = name
        return self._known[key]

    def scan(
        self,
        body: Callable[[Emitter, Sequence[str], Sequence[str]], Sequence[str]],
        states: Sequence[tuple[str, int]],
        scanned: Sequence[tuple[str, int]],
        hint: str = "",
    ) -> tuple[str, ...]:
        """Append a Scan over axis 0 of ``scanned``; see :class:`edgetune.codecs.base.Emitter`."""
        inner = GraphBuilder("body", set())
        entries = [(inner.fresh("state"), rank) for _, rank in states]
        rows = [(inner.fresh("row"), rank) for _, rank in scanned]
        results = body(inner, [name for name, _ in entries], [name for name, _ in rows])
        graph = helper.make_graph(
            inner.nodes,
            "body",
            [_anonymous(name, rank) for name, rank in entries + rows],
            [_anonymous(name, rank) for name, (_, rank) in zip(results, states, strict=True)],
            [numpy_helper.from_array(value, name) for name, value in inner.constants.items()],
        )
        inputs = [name for name, _ in [*states, *scanned]]
        made = self.op(
            "Scan", *inputs, hint=hint or "scan", outputs=len(states), body=graph, num_scan_inputs=len(scanned)
        )
        return (made,) if len(states) == 1 else tuple(made)


def _anonymous(name: str, rank: int) -> onnx.ValueInfoProto:
    """Return a float32 value of ``rank`` axes of unknown extent."""
    return helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [None] * rank)


class FunctionLibrary:
    """Model-local functions of the domain ``edgetune``, made once per distinct body."""

    def __init__(self) -> None:
        self.functions: dict[str, onnx.FunctionProto] = {}

    def call(
        self,
        g: GraphBuilder,
        name: str,
        inputs: Sequence[str],
        hints: Sequence[str],
        body: Callable[[GraphBuilder, Sequence[str]], Sequence[str]],
    ) -> tuple[str, ...]:
        """Append a call of function ``name`` to ``g`` and return its outputs, named by ``hints``.

        ``body`` maps the function's formal inputs to its outputs; a name that exists already is not emitted again, so
        equal names must mean equal bodies.
        """
        if name not in self.functions:
            inner = GraphBuilder(inline_constants=True)
            formals = [inner.fresh(f"in{i}") for i in range(len(inputs))]
            results = list(body(inner, formals))
            self.functions[name] = helper.make_function(
                DOMAIN, name, formals, results, inner.nodes, [helper.make_opsetid("", OPSET)]
            )
        made = [g.fresh(hint) for hint in hints]
        g.nodes.append(helper.make_node(name, list(inputs), made, name=made[0], domain=DOMAIN))
        return tuple(made)
