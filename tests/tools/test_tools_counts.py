"""What a train step costs by count: the counter against torch's, and the steps against what is written down."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from edgetune.bundle import Bundle
from tools import counts
from tools.counting import Count, Tensor, count_graph, count_nodes

Shape = tuple[int, ...]
# By operator: shapes of the operands, attributes, and the same in torch.
PLAIN: dict[str, tuple[str, tuple[Shape, ...], dict[str, Any], Callable[..., torch.Tensor]]] = {
    "conv": ("Conv", ((2, 6, 9, 8), (4, 6, 3, 3)), {"strides": [2, 2]}, lambda x, w: functional.conv2d(x, w, stride=2)),
    "depthwise": ("Conv", ((2, 6, 9, 8), (6, 1, 3, 3)), {"group": 6}, lambda x, w: functional.conv2d(x, w, groups=6)),
    "transposed": ("ConvTranspose", ((2, 6, 5, 4), (6, 3, 2, 2)), {}, functional.conv_transpose2d),
    "matmul": ("MatMul", ((3, 5, 7), (3, 7, 4)), {}, torch.matmul),
    "gemm": ("Gemm", ((5, 7), (7, 4)), {}, torch.matmul),
    "gemm-transposed": ("Gemm", ((7, 5), (4, 7)), {"transA": 1, "transB": 1}, lambda a, b: a.T @ b.T),
}  # fmt: skip


@pytest.mark.parametrize("name", PLAIN)
def test_products_are_counted_as_torch_counts_them(name: str) -> None:
    op, shapes, attributes, run = PLAIN[name]
    operands = [torch.zeros(shape) for shape in shapes]
    with FlopCounterMode(display=False) as counter:
        result = run(*operands)
    known = {letter: Tensor(shape) for letter, shape in zip("ab", shapes, strict=True)} | {"c": Tensor(result.shape)}
    found = count_nodes([helper.make_node(op, ["a", "b"], ["c"], **attributes)], known, 18)
    assert found.flops == counter.get_total_flops()
    assert found == Count(found.macs, 0, 4 * sum(t.numel() for t in (*operands, result)), 1)


def test_other_operators_are_counted_by_what_they_make_and_move() -> None:
    known = {
        "x": Tensor((2, 3)),
        "y": Tensor((2, 3)),
        "flat": Tensor((6,)),
        "u": Tensor((1, 3)),
        "m": Tensor((2, 3), 1),
    }
    node = helper.make_node
    assert count_nodes([node("Add", ["x", "u"], ["y"])], known, 18) == Count(0, 6, 24 + 12 + 24, 1)
    assert count_nodes([node("Reshape", ["x", "u"], ["flat"])], known, 18) == Count(0, 0, 0, 1)
    assert count_nodes([node("Greater", ["x", "u"], ["m"])], known, 18) == Count(0, 6, 24 + 12 + 6, 1)
    assert count_nodes([node("Slice", ["x", "flat"], ["u"])], known, 18) == Count(0, 3, 12 + 12, 1)


def test_the_body_of_a_scan_counts_once_per_round() -> None:
    def value(name: str) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, None])

    nodes = [helper.make_node("MatMul", ["row", "w"], ["made"]), helper.make_node("Add", ["state", "made"], ["next"])]
    body = helper.make_graph(nodes, "body", [value("state"), value("row")], [value("next")])
    scan = helper.make_node("Scan", ["start", "rows"], ["end"], body=body, num_scan_inputs=1)
    known = {"start": Tensor((2, 5)), "rows": Tensor((7, 2, 3)), "w": Tensor((3, 5)), "end": Tensor((2, 5))}
    once = Count(2 * 5 * 3, 0, 4 * (6 + 15 + 10), 1) + Count(0, 10, 4 * 30, 1)
    assert count_nodes([scan], known, 18) == once * 7


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder with the bundles of all subjects, and what their steps cost."""
    folder = tmp_path_factory.mktemp("counts")
    return folder, counts.plain_form(dict(counts.count_all(folder)))


def test_no_step_costs_more_than_it_did(steps: tuple[Path, dict[str, Any]]) -> None:
    problems = counts.differences(steps[1], json.loads(counts.GOLDEN.read_text("utf-8")))
    assert not problems, f"if this is meant: {counts.COMMAND}\n" + "\n".join(problems)


def test_a_step_that_computes_something_twice_is_found(steps: tuple[Path, dict[str, Any]]) -> None:
    folder, found = steps
    bundle = Bundle.open(folder / "digits_resnet-dense")
    spec = bundle.manifest.graphs["train"]
    model = onnx.load(bundle.path / spec.flat_file, load_external_data=False)
    model.graph.node.append(max((n for n in model.graph.node if n.op_type == "Conv"), key=lambda n: n.name))
    inflated = count_graph(model, spec, counts.symbols_of(bundle.manifest))
    name = "digits_resnet dense train"
    (problem, *_) = counts.differences(found | counts.plain_form({name: inflated}), found)
    assert problem.startswith(f"{name}: ") and " more flops (" in problem


def test_what_was_won_is_to_be_written_down() -> None:
    before = counts.plain_form({"a": Count(1000, 0, 4000, 1), "b": Count(1, 0, 1, 1)})
    after = counts.plain_form({"a": Count(1000, 0, 3950, 1), "c": Count(1, 0, 1, 1)})
    assert counts.differences(after, before) == [
        "'b' is not counted any more",
        "a: 1.2% fewer bytes (4,000 before, 3,950 now)",
        "'c' has not been written down yet",
    ]
    within = counts.plain_form({"a": Count(1000, 0, 3961, 5), "b": Count(1, 0, 1, 1)})
    assert counts.differences(within, before) == []
