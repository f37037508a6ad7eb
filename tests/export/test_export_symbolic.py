"""The symbolic sizes that the planner reads: products of integers and symbols, however large, and nothing else."""

from __future__ import annotations

import pytest
from onnx import TensorProto, helper

from edgetune.errors import ExportError
from edgetune.export.symbolic import symbolic_shapes


def test_extents_beyond_a_million_are_products_too() -> None:
    graph = helper.make_graph(
        [helper.make_node("Flatten", ["x"], ["y"], axis=2)],
        "large",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", "rank.a", 64, 256, 256])],
        [helper.make_empty_tensor_value_info("y")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    assert symbolic_shapes(model)["y"] == ("batch*rank.a", str(64 * 256 * 256))


def test_a_sum_of_the_batch_and_a_rank_is_an_error() -> None:
    graph = helper.make_graph(
        [helper.make_node("Concat", ["x", "y"], ["z"], axis=0)],
        "sum",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [n, 3]) for name, n in (("x", "batch"), ("y", "rank"))],
        [helper.make_empty_tensor_value_info("z")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    with pytest.raises(ExportError, match=r"'z' is not a product of sizes and ranks"):
        symbolic_shapes(model)
