"""One weight layer under test, as a forward graph made by hand: no exporter between the rule and its oracle.

    a = x + shift;  y = layer(a, weight, bias);  z = flatten(y)·head;  cross-entropy of z

so that the gradient of ``shift`` checks dX, and torch's autograd is the oracle of every gradient.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper, inliner, numpy_helper
from torch import Tensor
from torch.nn import functional

from edgetune.autodiff.builder import DOMAIN, OPSET, FunctionLibrary, GraphBuilder
from edgetune.autodiff.calibrate import emit_grams
from edgetune.autodiff.graph import ForwardGraph, Node
from edgetune.autodiff.losses import LossConfig, loss_from
from edgetune.autodiff.memory import Slot, TrainedLayer
from edgetune.autodiff.reverse import Gradients, emit_gradients
from edgetune.bundle import Array
from edgetune.codecs import Codec, codec_named
from edgetune.export.symbolic import symbolic_shapes
from tests.autodiff.handmade import CLASSES, model_of
from tests.autodiff.parity import batch_of

BATCH = 5


@dataclass(frozen=True)
class LayerCase:
    """A layer: operator, shape of one sample of its input, shape of its weight, attributes, and torch's forward.

    With ``windows`` the layer reads its input with the batch multiplied: [windows · b, *shape[1:]], where ``shape``
    starts with the number of windows.
    """

    op: str
    shape: tuple[int, ...]
    weight: tuple[int, ...]
    forward: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    attributes: Mapping[str, Any] = field(default_factory=dict, hash=False)
    bias: int = 0
    windows: bool = False

    @property
    def view(self) -> tuple[int, ...]:
        """The extents of the layer's input, the batch as a forward graph has it."""
        return (-self.shape[0], *self.shape[1:]) if self.windows else (0, *self.shape)

    def torch(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return y of ``x`` [b, *shape]."""
        return self.forward(x.flatten(0, 1) if self.windows else x, weight, bias)

    def parameters(self) -> dict[str, Array]:
        """Return the trained tensors."""
        rng = np.random.default_rng(3)
        made = {"shift": np.zeros((1, *self.shape)), "weight": 0.3 * rng.standard_normal(self.weight)}
        if self.bias:
            made["bias"] = 0.1 * rng.standard_normal(self.bias)
        return {name: value.astype(np.float32) for name, value in made.items()}

    def output(self) -> tuple[int, ...]:
        """Return the extents of y, the batch as a forward graph has it."""
        y = self.torch(torch.zeros(1, *self.shape), torch.zeros(self.weight), None)
        return (-self.shape[0] if self.windows else 0, *y.shape[1:])

    def graph(self) -> ForwardGraph:
        """Return the forward graph."""
        output, parameters = self.output(), self.parameters()
        features = math.prod(abs(extent) for extent in output if extent)
        head = np.random.default_rng(4).standard_normal((features, CLASSES)) / math.sqrt(features)
        constants: dict[str, Array] = {"head": head.astype(np.float32), "rows": np.array([-1, features])}
        constants["view"] = np.array([-1, *self.view[1:]])
        attributes = dict(self.attributes)
        if self.op == "Linear":
            attributes["shape"] = [-1, *output[1:]]
        inputs = ("view_of_a", "weight", *(["bias"] if self.bias else []))
        nodes = [
            Node("Add", "shifted", ("x", "shift"), ("a",), {}),
            Node("Reshape", "viewed", ("a", "view"), ("view_of_a",), {}),
            Node(self.op, "layer", inputs, ("y",), attributes),
            Node("Reshape", "flattened", ("y", "rows"), ("flat",), {}),
            Node("Gemm", "classified", ("flat", "head"), ("z",), {}),
        ]
        shapes = {name: value.shape for name, value in [*parameters.items(), *constants.items()]}
        shapes |= {"x": (0, *self.shape), "a": (0, *self.shape), "view_of_a": self.view}
        shapes |= {"y": output, "flat": (0, features), "z": (0, CLASSES)}
        return graph_of(nodes, constants, shapes)

    def model(self) -> onnx.ModelProto:
        """Return x -> layer (layer.weight, maybe layer.bias) -> Flatten -> Gemm (head.weight) -> y, to be exported."""
        parameters = self.parameters()
        constants = {f"layer.{name}": value for name, value in parameters.items() if name != "shift"}
        constants["head.weight"] = self.graph().constants["head"]
        layer = helper.make_node(self.op, ["x", *list(constants)[:-1]], ["a"], **self.attributes)
        nodes = [layer, helper.make_node("Flatten", ["a"], ["f"])]
        nodes.append(helper.make_node("Gemm", ["f", "head.weight"], ["y"]))
        return model_of(nodes, self.shape, constants)

    def batch(self) -> tuple[Array, Array]:
        """Return inputs and targets."""
        return batch_of(self.shape, BATCH, CLASSES, seed=2)

    def torch_gradients(self) -> dict[str, Array]:
        """Return the gradients of all parameters, by autograd in float64."""
        x, targets = self.batch()
        p = {name: torch.from_numpy(v).double().requires_grad_(True) for name, v in self.parameters().items()}
        y = self.torch(torch.from_numpy(x).double() + p["shift"], p["weight"], p.get("bias"))
        head = torch.from_numpy(self.graph().constants["head"]).double()
        loss = functional.cross_entropy(y.reshape(len(x), -1) @ head, torch.from_numpy(targets))
        loss.backward()  # type: ignore[no-untyped-call]
        return {name: np.asarray(t.grad.numpy()) for name, t in p.items() if t.grad is not None}

    def weight_gradient(self, x: Array, dy: Array) -> Array:
        """Return torch's dW for the input ``x`` [b, *shape] and ``dy``, in float64."""
        weight = torch.zeros(self.weight, dtype=torch.float64, requires_grad=True)
        y = self.torch(torch.from_numpy(x).double(), weight, None)
        (gradient,) = torch.autograd.grad((y * torch.from_numpy(dy).double().reshape(y.shape)).sum(), [weight])
        return np.asarray(gradient.numpy())


@dataclass
class Emitted:
    """A train graph, and what a test may ask of it."""

    case: LayerCase
    graph: ForwardGraph
    g: GraphBuilder
    library: FunctionLibrary
    made: Gradients

    @staticmethod
    def of(case: LayerCase, codec: str) -> Emitted:
        """Emit the gradients of ``case`` with ``codec`` for the layer's input."""
        graph = case.graph()
        return Emitted(case, graph, *emit(graph, {"layer": codec_named(codec)}, list(case.parameters())))

    @property
    def slot(self) -> Slot:
        (slot,) = self.made.slots
        return slot

    def inputs(self) -> dict[str, str]:
        """Return the graph inputs of the slot's codec by letter."""
        return {mode.letter: name for mode, name in self.slot.only.inputs}

    def extents(self) -> dict[str, int]:
        """Return the full rank of every mode that is cut."""
        return {mode.letter: BATCH if mode.size is None else mode.size for mode, _ in self.slot.only.inputs}

    def model(self, wanted: Sequence[str]) -> onnx.ModelProto:
        """Return the flat model; its inputs name the batch and the ranks as an exported one does."""
        parameters, saved = self.case.parameters(), self.slot.saved
        inputs: dict[str, Sequence[int | str | None]] = {"x": ["batch", *self.case.shape], "targets": ["batch"]}
        inputs |= {name: list(value.shape) for name, value in parameters.items()}
        for letter, name in self.inputs().items():
            size = [saved.groups if letter == "c" else 1, self.extents()[letter]]
            inputs[name] = [*(["batch"] if letter == "b" else size), f"rank.{letter}"]
        return train_model(self.g, self.library, self.graph, inputs, wanted)

    def run(self, bases: Mapping[str, Array], more: Sequence[str] = ()) -> dict[str, Array]:
        """Return loss, gradients by parameter, and the tensors ``more``; ``bases`` by letter."""
        x, targets = self.case.batch()
        feeds = {"x": x, "targets": targets, **self.case.parameters()}
        feeds |= {name: bases[letter] for letter, name in self.inputs().items()}
        named = {"loss": self.made.loss, **self.made.parameters, **{name: name for name in more}}
        found = run(self.model(list(named.values())), feeds)
        return {key: found[name] for key, name in named.items()}

    def symbolic(self) -> dict[str, tuple[str, ...]]:
        """Return the symbolic shape of every tensor, as the planner gets it."""
        return symbolic_shapes(self.model([self.made.loss, *self.made.parameters.values()]))

    def grams(self) -> dict[str, Array]:
        """Return by letter what the calibration graph measures."""
        g = GraphBuilder(taken=set(self.graph.shapes))
        made = emit_grams(g, self.graph, [self.slot])
        x, _ = self.case.batch()
        feeds = {"x": x, **self.case.parameters()}
        constants = {**self.graph.constants, **g.constants}
        graph = helper.make_graph(
            g.nodes,
            "calibrate",
            [helper.make_tensor_value_info(k, TensorProto.FLOAT, v.shape) for k, v in feeds.items()],
            [helper.make_empty_tensor_value_info(name) for name in made.values()],
            [numpy_helper.from_array(value, name) for name, value in constants.items()],
        )
        found = run(helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=8), feeds)
        return {output.rsplit("/", 1)[1]: found[name] for output, name in made.items()}

    def bases(self, share: float) -> dict[str, Array]:
        """Return by letter the leading ``share`` of each mode's eigenvectors, rounded up, and a sketch for b."""
        found: dict[str, Array] = {}
        for letter, gram in (self.grams() if self.inputs() else {}).items():
            rank = math.ceil(share * gram.shape[-1])
            vectors = np.linalg.eigh(gram.astype(np.float64))[1][:, :, ::-1][:, :, :rank]
            found[letter] = np.ascontiguousarray(vectors, np.float32)
            if letter == "b":
                found["b"] = np.random.default_rng(0).standard_normal((BATCH, rank)).astype(np.float32)
        return found


def graph_of(
    nodes: Sequence[Node], constants: Mapping[str, Array], shapes: Mapping[str, tuple[int, ...]]
) -> ForwardGraph:
    """Return the forward graph from the input x to the logits z."""
    return ForwardGraph(list(nodes), ("x",), ("z",), dict(constants), dict(shapes))


def emit(
    graph: ForwardGraph, codecs: Mapping[str, Codec], parameters: Sequence[str]
) -> tuple[GraphBuilder, FunctionLibrary, Gradients]:
    """Emit the gradients of the cross-entropy of z and ``targets``; ``codecs`` by name of the listed layers."""
    g, library = GraphBuilder(taken=set(graph.shapes)), FunctionLibrary()
    layers = {name: TrainedLayer(name, (codec,)) for name, codec in codecs.items()}
    loss = loss_from(LossConfig())
    return g, library, emit_gradients(g, library, graph, layers, parameters, "targets", loss)


def train_model(
    g: GraphBuilder,
    library: FunctionLibrary,
    graph: ForwardGraph,
    inputs: Mapping[str, Array | Sequence[int | str | None]],
    wanted: Sequence[str],
) -> onnx.ModelProto:
    """Return what was emitted into ``g`` as a flat model; ``inputs`` are the shapes by name, or arrays of them."""
    kinds = {"targets": TensorProto.INT64}
    arrays = {name: value for name, value in inputs.items() if isinstance(value, np.ndarray)}
    kinds |= {name: helper.np_dtype_to_tensor_dtype(value.dtype) for name, value in arrays.items()}
    dims = {name: value.shape if isinstance(value, np.ndarray) else value for name, value in inputs.items()}
    constants = {**graph.constants, **g.constants}
    model = helper.make_model(
        helper.make_graph(
            g.nodes,
            "train",
            [helper.make_tensor_value_info(k, kinds.get(k, TensorProto.FLOAT), shape) for k, shape in dims.items()],
            [helper.make_empty_tensor_value_info(name) for name in dict.fromkeys(wanted)],
            [numpy_helper.from_array(value, name) for name, value in constants.items()],
        ),
        opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)],
        functions=list(library.functions.values()),
        ir_version=8,
    )
    return inliner.inline_local_functions(model)


def run(model: onnx.ModelProto, feeds: Mapping[str, Array]) -> dict[str, Array]:
    """Run ``model`` in onnxruntime as an engine does: no optimisation."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    wanted = [output.name for output in session.get_outputs()]
    taken = {value.name: feeds[value.name] for value in session.get_inputs()}
    return dict(zip(wanted, session.run(wanted, taken), strict=True))


CONV = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}
SPREAD = {1: functional.conv_transpose1d, 2: functional.conv_transpose2d, 3: functional.conv_transpose3d}


def conv(
    shape: tuple[int, ...],
    out: int,
    kernel: tuple[int, ...],
    *,
    groups: int = 1,
    strides: tuple[int, ...] = (),
    dilations: tuple[int, ...] = (),
    pads: tuple[int, ...] = (),
    bias: bool = False,
) -> LayerCase:
    """A convolution; ``pads`` are those of all begins, then of all ends."""
    n = len(kernel)
    strides, dilations, pads = strides or (1,) * n, dilations or (1,) * n, pads or (0,) * (2 * n)
    sides = [pads[i + n * end] for i in reversed(range(n)) for end in (0, 1)]  # torch starts at the last axis

    def forward(x: Tensor, weight: Tensor, b: Tensor | None) -> Tensor:
        return CONV[n](functional.pad(x, sides), weight, b, strides, 0, dilations, groups)

    attributes = {"group": groups, "strides": strides, "dilations": dilations, "pads": pads, "kernel_shape": kernel}
    weight = (out, shape[0] // groups, *kernel)
    return LayerCase("Conv", shape, weight, forward, attributes, out if bias else 0)


def spread(
    shape: tuple[int, ...],
    out: int,
    kernel: tuple[int, ...],
    *,
    groups: int = 1,
    strides: tuple[int, ...] = (),
    dilations: tuple[int, ...] = (),
    pads: tuple[int, ...] = (),
    extra: tuple[int, ...] = (),
    bias: bool = False,
) -> LayerCase:
    """A transposed convolution; ``extra`` is its output padding."""
    n = len(kernel)
    strides, dilations, pads = strides or (1,) * n, dilations or (1,) * n, pads or (0,) * (2 * n)
    extra = extra or (0,) * n

    def forward(x: Tensor, weight: Tensor, b: Tensor | None) -> Tensor:
        # torch knows one padding for both sides: the whole output is made, and its border cut away
        y = SPREAD[n](x, weight, b, strides, 0, extra, groups, dilations)
        for axis in range(n):
            y = y.narrow(2 + axis, pads[axis], y.shape[2 + axis] - pads[axis] - pads[n + axis])
        return y

    attributes = {
        "group": groups, "strides": strides, "dilations": dilations, "pads": pads, "kernel_shape": kernel,
        "output_padding": extra,
    }  # fmt: skip
    weight = (shape[0], out // groups, *kernel)
    return LayerCase("ConvTranspose", shape, weight, forward, attributes, out if bias else 0)


def linear(shape: tuple[int, ...], out: int, *, transposed: int = 1, bias: bool = True, **more: Any) -> LayerCase:
    """A linear layer over the last axis."""

    def forward(x: Tensor, weight: Tensor, b: Tensor | None) -> Tensor:
        return functional.linear(x, weight if transposed else weight.T, b)

    weight = (out, shape[-1]) if transposed else (shape[-1], out)
    return LayerCase("Linear", shape, weight, forward, {"transposed": transposed}, out if bias else 0, **more)


def gemm(shape: tuple[int, ...], out: int, **more: Any) -> LayerCase:
    """A linear layer of two axes whose result is scaled by 1/2."""

    def forward(x: Tensor, weight: Tensor, b: Tensor | None) -> Tensor:
        return functional.linear(x, 0.5 * weight, b)

    return LayerCase("Gemm", shape, (out, shape[-1]), forward, {"transB": 1, "alpha": 0.5}, out, **more)


CASES: dict[str, LayerCase] = {
    "conv1d": conv((6, 11), 5, (3,), pads=(1, 1), bias=True),
    "conv1d everything": conv((6, 14), 4, (3,), groups=2, strides=(2,), dilations=(2,), pads=(0, 3)),
    "conv1d depthwise": conv((4, 9), 4, (3,), groups=4, pads=(2, 0)),
    "conv1d of one position": conv((6, 1), 5, (1,)),
    "conv2d several per group": conv((4, 6, 7), 8, (3, 2), groups=2, strides=(1, 2), pads=(1, 0, 0, 2), bias=True),
    "conv3d": conv((3, 4, 5, 6), 4, (2, 3, 3), pads=(0, 1, 1, 1, 1, 1), bias=True),
    "conv3d everything": conv(
        (4, 5, 6, 7), 6, (2, 3, 2), groups=2, strides=(2, 1, 2), dilations=(1, 2, 1), pads=(1, 2, 0, 0, 1, 2)
    ),
    "conv3d depthwise": conv((3, 4, 4, 5), 3, (3, 3, 3), groups=3, pads=(1,) * 6),
    "conv3d flat": conv((4, 1, 5, 6), 3, (1, 3, 3)),
    "spread1d": spread((5, 8), 4, (3,), bias=True),
    "spread1d everything": spread((6, 7), 4, (3,), groups=2, strides=(2,), dilations=(2,), pads=(2, 1), extra=(1,)),
    "spread2d": spread((6, 5, 7), 4, (2, 2), strides=(2, 2), bias=True),
    "spread2d everything": spread(
        (6, 5, 4), 4, (3, 2), groups=2, strides=(2, 3), dilations=(1, 2), pads=(1, 0, 2, 1), extra=(1, 2), bias=True
    ),
    "spread2d depthwise": spread((4, 5, 6), 4, (3, 3), groups=4, strides=(2, 2), pads=(1, 1, 1, 1), extra=(1, 1)),
    "spread2d several per group": spread((4, 5, 6), 8, (3, 3), groups=4, strides=(2, 1), pads=(1, 1, 0, 1)),
    "spread3d": spread((4, 3, 4, 5), 3, (2, 2, 2), strides=(2, 2, 2), bias=True),
    "spread3d everything": spread(
        (4, 3, 4, 3), 6, (2, 3, 2), groups=2, strides=(1, 2, 2), pads=(0, 1, 0, 0, 0, 1), extra=(0, 1, 0)
    ),
    "linear of 2 axes": linear((9,), 5),
    "linear of 2 axes, [c, o]": linear((9,), 5, transposed=0, bias=False),
    "linear of 3 axes": linear((7, 9), 5),
    "linear of 3 axes, [c, o]": linear((7, 9), 12, transposed=0),
    "linear of 4 axes": linear((4, 5, 8), 6),
    "linear of 4 axes, one long": linear((1, 5, 8), 6, bias=False),
    "linear of 5 axes": linear((3, 4, 5, 6), 4, transposed=0),
    "linear of 6 axes": linear((2, 3, 2, 4, 6), 4),
    "linear of one channel": linear((6, 1), 3),
    "linear with one number as bias": dataclasses.replace(linear((6, 5), 3), bias=1),
    "linear of windows": linear((4, 6, 5), 7, windows=True),
    "linear of windows of 4 axes": linear((3, 4, 3, 5), 7, windows=True, transposed=0),
    "gemm": gemm((8,), 5),
    "gemm of windows": gemm((6, 8), 5, windows=True),
}
