"""Weights of trained convolutions as nodes that compute them from codes and a shared map. Knows the canonical graph.

    W = W₀ + Put(Reshape(codes · map))        [n, n_c]·[n_c, s] -> slices -> side by side -> cut to [o, c, *kernel]

The pass runs when it is settled what is trained and what became of batch-norm. W₀ stays a constant; what is trained are
the codes and, if it is learned, the map: one parameter that all layers share, so its gradient is the sum of theirs. All
nodes are ordinary ones, so reverse mode, codecs, engines and the plan need to know nothing of it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx

from edgetune.adapters.maps import BITS, draw_bits, first_codes, first_map, map_name
from edgetune.adapters.settings import BINARY, AdapterSettings
from edgetune.adapters.slices import Slicing
from edgetune.autodiff.graph import ForwardGraph, Node, prune
from edgetune.bundle import AdaptedWeightSpec, AdapterMapSpec, AdapterSpec, Array
from edgetune.errors import ExportError, UsageError
from edgetune.export.selection import Selection, WeightLayer


def adapt(graph: ForwardGraph, selection: Selection, settings: AdapterSettings) -> tuple[Selection, AdapterSpec]:
    """Compute the weights of trained convolutions from codes; return what is trained then, and what was done.

    Left alone, and trained as they are: the model's first convolution; kernels that no slice serves; weights of which
    the codes would be no fewer numbers; weights that something else than a convolution reads, too.

    Raises:
        UsageError: no convolution is left to adapt, or the file of a map does not fit.
        ExportError: the model has a tensor of a name that the adapter needs.
    """
    adaptable = _adaptable(graph, selection, settings)
    if not adaptable:
        slices = " or ".join("×".join(map(str, shape)) for shape in settings.slices)
        raise UsageError(
            f"adapter: no trained convolution can be generated from slices {slices} with fewer numbers (the model's "
            "first convolution never is); choose other slices, smaller codes, kernels=any, or train more layers"
        )
    builder = _Builder(graph)
    maps = {index: _add_map(builder, settings, index) for index in sorted(set(adaptable.values()))}
    start = builder.taken()
    weights, renamed, codes_of = [], dict[str, str](), dict[str, str]()
    added: dict[str, list[Node]] = {}
    for weight, index in adaptable.items():
        spec, source = maps[index]
        cut = Slicing(graph.shapes[weight], spec.slice)
        codes = builder.constant(f"{weight}.codes", first_codes(settings, weight, cut, spec.code))
        renamed[weight] = _generate(builder, weight, cut, codes, source, residual=settings.residual)
        codes_of[weight] = codes
        added[weight] = builder.taken()
        weights.append(AdaptedWeightSpec(weight, cut.shape, codes, spec.name))
    graph.nodes = list(_with_computed_weights(graph.nodes, start, added, renamed))
    trained_maps = [spec.name for spec, _ in maps.values() if spec.trained]
    parameters = (*trained_maps, *(codes_of.get(name, name) for name in selection.parameters))
    graph.parameters = frozenset(graph.parameters - codes_of.keys() | set(parameters))

    def moved(layer: WeightLayer) -> WeightLayer:
        return dataclasses.replace(layer, weight=codes_of.get(layer.weight, layer.weight))

    layers = tuple(moved(layer) for layer in selection.layers)
    head = None if selection.head is None else moved(selection.head)
    done = AdapterSpec(str(settings), settings.residual, tuple(spec for spec, _ in maps.values()), tuple(weights))
    return Selection(layers, head, parameters), done


def _adaptable(graph: ForwardGraph, selection: Selection, settings: AdapterSettings) -> dict[str, int]:
    """Return the weights to be generated, in execution order, each with the index of the slice that serves it."""
    nodes = prune(graph.nodes, [graph.goal])
    first = next((node.name for node in nodes if node.op == "Conv"), "")
    readers: dict[str, list[Node]] = {}
    for node in graph.nodes:
        for name in node.inputs:
            readers.setdefault(name, []).append(node)
    found = {}
    for layer in selection.layers:
        weight, reading = layer.weight, readers[layer.weight]
        index = settings.slice_for(graph.shapes[weight]) if layer.op == "Conv" else None
        plain = all(node.op == "Conv" and node.inputs.index(weight) == 1 and node.name != first for node in reading)
        if index is not None and plain:
            if Slicing(graph.shapes[weight], settings.slices[index]).shrinks(settings.codes[index]):
                found[weight] = index
    return found


class _Builder:
    """Appends nodes and constants without a batch axis to a forward graph; the caller places the nodes."""

    def __init__(self, graph: ForwardGraph) -> None:
        self.graph = graph
        self.nodes: list[Node] = []

    def taken(self) -> list[Node]:
        """Return the nodes appended since the last call."""
        nodes, self.nodes = self.nodes, []
        return nodes

    def constant(self, name: str, value: Array) -> str:
        self._claim(name, value.shape)
        self.graph.constants[name] = value
        return name

    def integers(self, values: Sequence[int]) -> str:
        """Return the name of a constant of these integers; equal ones are shared."""
        name = f"csg.shape.{'x'.join(map(str, values))}"
        self.graph.constants[name] = np.array(values, np.int64)
        self.graph.shapes[name] = (len(values),)
        return name

    def node(
        self,
        op: str,
        name: str,
        inputs: Sequence[str],
        shape: Sequence[int],
        attributes: Mapping[str, Any] | None = None,
        dtype: int = onnx.TensorProto.FLOAT,
    ) -> str:
        self._claim(name, shape)
        self.graph.dtypes[name] = dtype
        self.nodes.append(Node(op, name, tuple(inputs), (name,), dict(attributes or {})))
        return name

    def _claim(self, name: str, shape: Sequence[int]) -> None:
        if name in self.graph.shapes:
            raise ExportError(f"the adapter needs the name '{name}', which the model has already; rename it there")
        self.graph.shapes[name] = tuple(shape)


def _add_map(builder: _Builder, settings: AdapterSettings, index: int) -> tuple[AdapterMapSpec, str]:
    """Add the map of slice ``index``; return what it is, and the tensor that holds it as floats [n_c, s]."""
    shape, code = settings.slices[index], settings.codes[index]
    name = map_name(shape)
    if settings.map != BINARY:
        builder.constant(name, first_map(settings, index))
        return AdapterMapSpec(name, shape, code, not settings.freeze), name
    bits, elements = f"{name}.bits", math.prod(shape)
    packed = draw_bits(settings.seed, code, elements)
    builder.constant(bits, packed)
    # maps.unpack_bits: b -> (2b - 1)/√s, in the order in which sign masks are packed
    width = packed.shape[1]
    columns = builder.node(
        "Unsqueeze", f"{name}.columns", [bits, builder.integers([1])], (code, 1, width), dtype=onnx.TensorProto.UINT8
    )
    masks = builder.constant(f"{name}.masks", BITS[None, :, None])
    picked = builder.node(
        "BitwiseAnd", f"{name}.picked", [columns, masks], (code, 8, width), dtype=onnx.TensorProto.UINT8
    )
    truth = builder.node(
        "Cast", f"{name}.truth", [picked], (code, 8, width), {"to": onnx.TensorProto.BOOL}, onnx.TensorProto.BOOL
    )
    ones = builder.node("Cast", f"{name}.ones", [truth], (code, 8, width), {"to": onnx.TensorProto.FLOAT})
    rows = builder.node("Reshape", f"{name}.rows", [ones, builder.integers([code, 8 * width])], (code, 8 * width))
    if elements != 8 * width:
        bounds = [builder.integers(values) for values in ([0], [elements], [1])]
        rows = builder.node("Slice", f"{name}.cut", [rows, *bounds], (code, elements))
    size = np.float32(elements**-0.5)
    step = builder.constant(f"{name}.step", np.array(2 * size, np.float32))
    scaled = builder.node("Mul", f"{name}.scaled", [rows, step], (code, elements))
    low = builder.constant(f"{name}.low", np.array(size, np.float32))
    return AdapterMapSpec(name, shape, code, False, bits), builder.node("Sub", name, [scaled, low], (code, elements))


def _generate(builder: _Builder, weight: str, cut: Slicing, codes: str, source: str, *, residual: bool) -> str:
    """Append the nodes of ``adapters.expand``; return the tensor that takes the place of ``weight``."""
    made, integers = builder.node, builder.integers
    flat = made("MatMul", f"{weight}.slices", [codes, source], (cut.slices, math.prod(cut.slice)))
    apart = made("Reshape", f"{weight}.apart", [flat, integers(cut.apart)], cut.apart)
    pairs = tuple(cut.apart[axis] for axis in cut.interleaved)
    beside = made("Transpose", f"{weight}.beside", [apart], pairs, {"perm": list(cut.interleaved)})
    whole = made("Reshape", f"{weight}.whole", [beside, integers(cut.covered)], cut.covered)
    if cut.covered != cut.shape:
        rank = len(cut.shape)
        bounds = [integers(values) for values in ([0] * rank, cut.shape, range(rank))]
        whole = made("Slice", f"{weight}.cut", [whole, *bounds], cut.shape)
    if residual:
        whole = made("Add", f"{weight}.adapted", [weight, whole], cut.shape)
    return whole


def _with_computed_weights(
    nodes: Sequence[Node], start: Sequence[Node], added: dict[str, list[Node]], renamed: Mapping[str, str]
) -> Iterator[Node]:
    """Yield ``nodes`` reading computed weights, each computed right before its first reader; ``start`` before all."""
    waiting = list(start)
    for node in nodes:
        weights = [name for name in node.inputs if name in renamed]
        if weights:
            yield from waiting
            waiting = []
        for name in weights:
            yield from added.pop(name, ())
        yield dataclasses.replace(node, inputs=tuple(renamed.get(name, name) for name in node.inputs))
