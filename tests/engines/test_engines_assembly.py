"""Models cut out of ONNX files without the package onnx, held to the package onnx."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from edgetune.engines.assembly import Port, assemble
from edgetune.errors import BundleError

COUNT = 6


def model() -> onnx.ModelProto:
    """A chain t0 -> t1 -> ... of Adds with constants, names that are not ASCII, and everything a file may carry."""
    nodes = [
        helper.make_node("Add", [f"t{i}", f"wéight{i}"], [f"t{i + 1}"], name=f"n{i}", doc_string="x" * 200)
        for i in range(COUNT)
    ]
    constants = [numpy_helper.from_array(np.full(40, i, np.float32), f"wéight{i}") for i in range(COUNT)]
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [40]) for n in ("t0", f"t{COUNT}")]
    inside = [helper.make_tensor_value_info("t1", TensorProto.FLOAT, [40])]
    graph = helper.make_graph(nodes, "chain", ends[:1], ends[1:], constants, value_info=inside)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8, producer_name="test")


@settings(max_examples=40, deadline=None, derandomize=True)
@given(kept=st.sets(st.integers(0, COUNT - 1)), symbol=st.text("abc.é", min_size=1), extent=st.integers(1, 1 << 40))
def test_what_is_kept_and_renamed_is_what_onnx_would_keep_and_rename(kept: set[int], symbol: str, extent: int) -> None:
    whole = model()
    renamed = {"t2": "new·name", "t5": "u" * 300}
    constants = {f"wéight{i}" for i in sorted(kept)[:2]}
    inputs = [Port("a", "float32", (symbol, str(extent))), Port("k", "int64", ("1",))]
    outputs = [Port("b", "uint8", ())]
    made = onnx.ModelProto.FromString(assemble(whole.SerializeToString(), kept, renamed, inputs, outputs, constants))

    expected = onnx.ModelProto()
    expected.CopyFrom(whole)
    graph = expected.graph
    nodes = [node for index, node in enumerate(whole.graph.node) if index in kept]
    for field in (graph.node, graph.initializer, graph.input, graph.output, graph.value_info):
        del field[:]
    for node in nodes:
        copy = graph.node.add()
        copy.CopyFrom(node)
        copy.input[:] = [renamed.get(name, name) for name in node.input]
        copy.output[:] = [renamed.get(name, name) for name in node.output]
    graph.initializer.extend(t for t in whole.graph.initializer if t.name in constants)
    graph.input.append(helper.make_tensor_value_info("a", TensorProto.FLOAT, [symbol, extent]))
    graph.input.append(helper.make_tensor_value_info("k", TensorProto.INT64, [1]))
    graph.output.append(helper.make_tensor_value_info("b", TensorProto.UINT8, []))
    assert made == expected


@pytest.mark.parametrize("damage", [lambda b: b[:-3], lambda b: b"\xff" * 40, lambda b: b"\x0f" + b])
def test_what_is_no_onnx_file_is_refused(damage: object) -> None:
    assert callable(damage)
    with pytest.raises(BundleError, match="export the bundle again"):
        assemble(damage(model().SerializeToString()), {0}, {}, [], [], ())


def test_an_element_type_that_no_bundle_has_is_refused() -> None:
    with pytest.raises(BundleError, match="complex64"):
        assemble(model().SerializeToString(), {0}, {}, [Port("a", "complex64", ())], [], ())
