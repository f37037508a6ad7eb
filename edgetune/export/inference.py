"""The model for use rather than for training: one ordinary graph from its inputs to its outputs, without its weights.

The device puts the weights in (``agent.gate.onnxfile``) and has a file that any runtime loads. Knows the canonical
graph and onnx.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import onnx
from onnx import TensorProto, helper

from edgetune.autodiff.builder import GraphBuilder
from edgetune.autodiff.graph import BATCH, ForwardGraph, prune
from edgetune.autodiff.lowering import emit_node
from edgetune.bundle import InferenceSpec
from edgetune.export.emit import Value, WeightFile, rename_outputs, save_checked
from edgetune.export.symbolic import reads
from edgetune.export.writer import in_evaluation

INFERENCE = "infer.onnx"


def write_inference(root: Path, graph: ForwardGraph, weights: WeightFile, changed: Collection[str]) -> InferenceSpec:
    """Write ``infer.onnx``: trunk and tail as one graph, convolutions as the operator Conv, batch-norm as in use.

    It is checked with its weights, which are then left out. Small constants stay in it.

    Args:
        changed: names of the tensors that training changes; they are left out, whatever their size.
    """
    g = GraphBuilder(taken=set(graph.shapes))
    for node in prune(graph.nodes, graph.outputs):
        emit_node(g, in_evaluation(node), graph)
    inputs = [name for name in graph.inputs if name not in graph.targets]
    emitted, outputs = {}, []
    for public, tensor in zip(graph.output_names, graph.outputs, strict=True):
        made = g.op("Identity", tensor, hint=f"{tensor}.copy") if tensor in inputs else tensor
        # The model's own name, unless another tensor has it.
        name = public if public == made or public not in graph.shapes else f"output/{public}"
        emitted[name] = made
        outputs.append(_value(graph, tensor, name))
    nodes = rename_outputs(g.nodes, emitted)
    read = {name for node in nodes for name in reads(node)}
    constants = {name: value for name, value in {**graph.constants, **g.constants}.items() if name in read}
    tensors = [weights.initializer(name, value) for name, value in constants.items()]
    whole = helper.make_graph(
        nodes, "infer", [_value(graph, name, name).info() for name in inputs], [v.info() for v in outputs], tensors
    )
    model = save_checked(root / INFERENCE, whole)
    left_out = [t.name for t in tensors if t.data_location == TensorProto.EXTERNAL]
    kept = [tensor for tensor in model.graph.initializer if tensor.data_location != TensorProto.EXTERNAL]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    onnx.save_model(model, root / INFERENCE)
    assert set(changed) & read <= set(left_out)
    return InferenceSpec(INFERENCE, tuple(v.name for v in outputs), tuple(left_out))


def _value(graph: ForwardGraph, tensor: str, name: str) -> Value:
    return Value(name, (BATCH, *graph.sample_shape(tensor)), "output", graph.dtypes[tensor])
