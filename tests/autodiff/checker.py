"""The gradient checker: what reverse mode emits against finite differences of the forward pass in float64.

The forward pass is evaluated by ``onnx.reference`` in float64, the emitted gradients by onnxruntime in float32. A test
proves that the checker notices wrong rules.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, inliner, numpy_helper
from onnx.reference import ReferenceEvaluator

from edgetune.autodiff.builder import DOMAIN, OPSET, FunctionLibrary, GraphBuilder
from edgetune.autodiff.graph import BATCH, ForwardGraph, Node
from edgetune.autodiff.losses import LossConfig, loss_from
from edgetune.autodiff.lowering import emit_node
from edgetune.autodiff.memory import TrainedLayer
from edgetune.autodiff.reverse import emit_gradients
from edgetune.bundle import Array
from edgetune.codecs import Dense
from edgetune.export.shapes import infer_shapes
from tests.autodiff.definitions import DEFINITIONS

CLASSES = 3
STEP = 1e-4
SAMPLES = 2
COORDINATES = 24  # per tensor, drawn at random


def node(op: str, inputs: Sequence[str], output: str = "y", **attributes: Any) -> onnx.NodeProto:
    """Return a node with one output."""
    return helper.make_node(op, list(inputs), [output], **attributes)


def normal(shape: Sequence[int], seed: int = 1) -> Array:
    """Return standard normal numbers, float32."""
    return np.asarray(np.random.default_rng(seed).standard_normal(tuple(shape)), np.float32)


def vector(*values: int) -> Array:
    """Return an int64 vector."""
    return np.array(values, np.int64)


def grid(rng: np.random.Generator, shape: Sequence[int]) -> Array:
    """Return distinct numbers around zero, all farther than STEP from each other and from the usual kinks."""
    count = math.prod(shape)
    values = 0.07 * (rng.permutation(count) - count // 2) + 0.013
    return np.asarray(values.reshape(shape), np.float32)


def check_gradients(
    nodes: Iterable[onnx.NodeProto],
    shape: Sequence[int],
    parameters: Mapping[str, Array] | None = None,
    constants: Mapping[str, Array] | None = None,
    *,
    seed: int = 0,
    scale: float = 1.0,
) -> None:
    """Check the gradients of a loss of ``y``, which ``nodes`` make of ``a`` [b, *shape] and of ``parameters``.

    ``a`` = x + shift with a parameter ``shift`` [1, *shape], so its gradient is checked too.

    Raises:
        AssertionError: a gradient is not that of the forward pass.
    """
    rng = np.random.default_rng(seed)
    x = grid(rng, (SAMPLES, *shape)) * np.float32(scale)
    trained = {"shift": np.zeros((1, *shape), np.float32), **(parameters or {})}
    fixed = {name: np.asarray(value) for name, value in (constants or {}).items()}
    protos = [helper.make_node("Add", ["x", "shift"], ["a"]), *nodes]
    y = _evaluate(_forward(protos, x, trained, fixed, "y"), {"x": x, **trained})
    features = y.size // SAMPLES
    inferred = forward_graph([*protos, node("Identity", ["y"], "z")], shape, trained, fixed).shapes["y"]
    if inferred[:1] != (0,):
        # The nodes left no batch axis (a loss, a statistic): all samples see the same y.
        features = y.size
        protos += _head(fixed, rng, "a", math.prod(shape), "own")
        protos += [node("Reshape", ["y", "one_row"], "row"), *_head(fixed, rng, "row", features, "common")]
        protos += [node("Add", ["own", "common"], "z")]
        fixed["one_row"] = vector(1, -1)
    else:
        protos += _head(fixed, rng, "y", features, "z")
    targets = rng.integers(0, CLASSES, SAMPLES)

    loss, gradients = _emitted(protos, x, trained, fixed, targets)
    forward = _forward(protos, x, trained, fixed, "z")
    values = {name: value.astype(np.float64) for name, value in trained.items()}

    def loss_at(name: str, index: tuple[int, ...], change: float) -> float:
        moved = values[name].copy()
        moved[index] += change
        return _cross_entropy(_evaluate(forward, {"x": x, **values, name: moved}), targets)

    assert abs(loss - loss_at("shift", (0,) * (1 + len(shape)), 0.0)) <= 1e-5 * max(1.0, abs(loss))
    assert set(gradients) == set(trained)
    for name, value in trained.items():
        assert gradients[name].shape == value.shape, name
        picked = rng.permutation(value.size)[:COORDINATES]
        for index in (tuple(int(i) for i in np.unravel_index(k, value.shape)) for k in picked):
            slope = (loss_at(name, index, STEP) - loss_at(name, index, -STEP)) / (2 * STEP)
            found = float(gradients[name][index])
            largest = float(np.abs(gradients[name]).max())
            assert abs(found - slope) <= 1e-5 + 1e-4 * max(largest, abs(slope)), f"{name}{index}: {found}, not {slope}"


def _head(
    fixed: dict[str, Array], rng: np.random.Generator, source: str, features: int, output: str
) -> list[onnx.NodeProto]:
    """Return the nodes of a fixed random projection of ``source`` to the logits."""
    fixed[f"to_{output}"] = (rng.standard_normal((features, CLASSES)) / math.sqrt(features)).astype(np.float32)
    return [node("Flatten", [source], f"flat_{output}"), node("Gemm", [f"flat_{output}", f"to_{output}"], output)]


def _forward(
    nodes: Sequence[onnx.NodeProto], x: Array, trained: Mapping[str, Array], fixed: Mapping[str, Array], output: str
) -> ReferenceEvaluator:
    """Return the evaluator of ``output`` in float64."""
    inputs = [helper.make_tensor_value_info(n, TensorProto.DOUBLE, None) for n in ("x", *trained)]
    wide = {k: v.astype(np.float64) if v.dtype == np.float32 else v for k, v in fixed.items()}
    initializers = [numpy_helper.from_array(value, name) for name, value in wide.items()]
    outputs = [helper.make_tensor_value_info(output, TensorProto.DOUBLE, None)]
    graph = helper.make_graph([_widened(n) for n in nodes], "forward", inputs, outputs, initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)])
    return ReferenceEvaluator(model, new_ops=DEFINITIONS)


def _widened(proto: onnx.NodeProto) -> onnx.NodeProto:
    """Return ``proto``; a Cast to float32 becomes one to float64."""
    if proto.op_type != "Cast" or helper.get_attribute_value(proto.attribute[0]) != TensorProto.FLOAT:
        return proto
    return node("Cast", proto.input, proto.output[0], to=TensorProto.DOUBLE)


def _evaluate(evaluator: ReferenceEvaluator, feeds: Mapping[str, Array]) -> Array:
    results: Any = evaluator.run(None, {name: value.astype(np.float64) for name, value in feeds.items()})
    return np.asarray(results[0])


def _cross_entropy(logits: Array, targets: Array) -> float:
    shifted = logits - logits.max(axis=1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return float(-log_p[np.arange(len(targets)), targets].mean())


def _inferable(proto: onnx.NodeProto) -> onnx.NodeProto:
    """Return a node of the same result shape, where onnx does not infer it in the project's opset."""
    unknown = ("GroupNormalization", "Gelu", "Swish")
    return node("Relu", proto.input[:1], proto.output[0]) if proto.op_type in unknown else proto


def forward_graph(
    nodes: Sequence[onnx.NodeProto], shape: Sequence[int], trained: Mapping[str, Array], fixed: Mapping[str, Array]
) -> ForwardGraph:
    """Return the canonical graph of ``nodes`` with the input ``x`` [b, *shape] and the output ``z``."""
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [BATCH, *shape])]
    inputs += [helper.make_tensor_value_info(n, TensorProto.FLOAT, v.shape) for n, v in trained.items()]
    initializers = [numpy_helper.from_array(value, name) for name, value in fixed.items()]
    outputs = [helper.make_tensor_value_info("z", TensorProto.FLOAT, None)]
    graph = helper.make_graph([_inferable(n) for n in nodes], "forward", inputs, outputs, initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=8)
    shapes, dtypes = infer_shapes(model, dict(fixed))
    named = [helper.make_node(n.op_type, n.input, n.output, name=n.output[0]) for n in nodes]
    for copy, node in zip(named, nodes, strict=True):
        copy.attribute.extend(node.attribute)
    return ForwardGraph([Node.from_proto(n) for n in named], ("x",), ("z",), dict(fixed), shapes, dtypes)


def _emitted(
    nodes: Sequence[onnx.NodeProto],
    x: Array,
    trained: Mapping[str, Array],
    fixed: Mapping[str, Array],
    targets: Array,
) -> tuple[float, dict[str, Array]]:
    """Emit the gradients of ``trained`` and run them in onnxruntime."""
    graph = forward_graph(nodes, x.shape[1:], trained, fixed)
    g, library = GraphBuilder(taken=set(graph.shapes)), FunctionLibrary()
    layers = {n.name: TrainedLayer(n.name, (Dense(),)) for n in graph.nodes if n.op in ("Conv", "Gemm")}
    made = emit_gradients(g, library, graph, layers, list(trained), "targets", loss_from(LossConfig()))
    wanted = {"loss": made.loss, **made.parameters}
    # One emitted tensor may be the gradient of two parameters: every output gets a name of its own.
    copies = [helper.make_node("Identity", [name], [f"out/{key}"]) for key, name in wanted.items()]
    feeds = {"x": x, "targets": targets, **trained}
    inputs = [
        helper.make_tensor_value_info(k, helper.np_dtype_to_tensor_dtype(v.dtype), v.shape) for k, v in feeds.items()
    ]
    outputs = [helper.make_empty_tensor_value_info(f"out/{key}") for key in wanted]
    constants = [numpy_helper.from_array(value, name) for name, value in {**fixed, **g.constants}.items()]
    model = helper.make_model(
        helper.make_graph([*g.nodes, *copies], "train", inputs, outputs, constants),
        opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)],
        functions=list(library.functions.values()),
        ir_version=8,
    )
    session = _session(model)
    found = dict(zip(wanted, session.run([f"out/{key}" for key in wanted], feeds), strict=True))
    return float(found.pop("loss")), found


def forward_outputs(
    nodes: Sequence[onnx.NodeProto], x: Array, fixed: Mapping[str, Array], wanted: Sequence[str]
) -> list[Array]:
    """Run the forward pass of ``nodes``, as it is emitted, in onnxruntime; return the tensors ``wanted``."""
    graph = forward_graph([*nodes, node("Identity", [wanted[0]], "z")], x.shape[1:], {}, fixed)
    g = GraphBuilder(taken=set(graph.shapes))
    for each in graph.nodes:
        g.scope = each.name
        emit_node(g, each, graph)
    constants = [numpy_helper.from_array(value, name) for name, value in {**fixed, **g.constants}.items()]
    model = helper.make_model(
        helper.make_graph(
            g.nodes,
            "forward",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)],
            [helper.make_empty_tensor_value_info(name) for name in wanted],
            constants,
        ),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=8,
    )
    return [np.asarray(value) for value in _session(model).run(list(wanted), {"x": x})]


def _session(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    """Load ``model`` without optimisations.

    Raises:
        AssertionError: the runtime has no kernel for an operator and expanded it.
    """
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    flat = inliner.inline_local_functions(model)
    with tempfile.TemporaryDirectory() as folder:
        options.optimized_model_filepath = f"{folder}/executed.onnx"
        providers = ["CPUExecutionProvider"]
        session = onnxruntime.InferenceSession(flat.SerializeToString(), options, providers=providers)
        executed = onnx.load(options.optimized_model_filepath)
    ran, meant = ({n.name for n in m.graph.node if n.op_type != "Constant"} for m in (executed, flat))
    assert ran == meant, f"the runtime expands what has no kernel: {sorted(ran ^ meant)}"
    return session
