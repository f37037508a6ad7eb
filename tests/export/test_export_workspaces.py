"""The scratch memory of onnxruntime's kernels, as the manifest lists it."""

from __future__ import annotations

from typing import Any

import pytest
from onnx import helper

from edgetune.export.symbolic import workspaces

SHAPES = {
    "x": ("batch", "64", "8", "8"), "many": ("128", "64", "3", "3"), "few": ("36", "64", "3", "3"),
    "grouped": ("128", "16", "3", "3"), "point": ("128", "64", "1", "1"), "y": ("batch", "128", "6", "6"),
    "up": ("64", "32", "2", "2"), "large": ("batch", "32", "16", "16"), "flag": ("batch", "1"), "row": ("batch", "10"),
}  # fmt: skip


def scratch(operator: str, *inputs: str, out: str, **attributes: Any) -> list[str]:
    found = list(workspaces([helper.make_node(operator, inputs, [out], **attributes)], SHAPES))
    assert all(work.node == 0 and work.dtype == "float32" for work in found)
    return [work.elements for work in found]


@pytest.mark.parametrize(
    ("weight", "group", "expected"),
    [("many", 1, ["64*3*3*6*6"]), ("few", 1, []), ("grouped", 4, []), ("grouped", 1, ["16*3*3*6*6"]), ("point", 1, [])],
)
def test_columns_are_whole_where_a_group_has_more_filters_than_outputs(
    weight: str, group: int, expected: list[str]
) -> None:
    assert scratch("Conv", "x", weight, out="y", group=group) == expected


def test_others() -> None:
    assert scratch("ConvTranspose", "x", "up", out="large", strides=[2, 2]) == ["32*2*2*8*8"]
    assert scratch("Where", "flag", "row", "row", out="row") == ["2*batch*10"]
    assert scratch("Softmax", "row", out="row") == scratch("Softmax", "row", out="row", axis=1) == []
    assert scratch("Softmax", "row", out="row", axis=0) == ["2*batch*10"]
    assert scratch("Einsum", "row", "flag", out="row", equation="ij,ik->ij") == ["batch*10", "batch*1"]
    assert scratch("MatMul", "row", "flag", out="row") == []
