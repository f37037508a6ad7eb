"""Pairs of nodes that the torch engine runs as one: what they compute, and which pairs are left alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from onnx import NodeProto, TensorProto, helper, numpy_helper

from edgetune.engines.torch_ops.fusion import fuse
from edgetune.engines.torch_ops.matrix import product
from edgetune.engines.torch_ops.program import Program, Setting


def setting() -> Setting:
    return Setting(18, lambda t: torch.from_numpy(np.array(numpy_helper.to_array(t))), torch.device("cpu"))


def step(kind: str, place: int) -> list[NodeProto]:
    last = ["y", "x"] if place else ["x", "y"]
    return [helper.make_node("Mul", ["a", "number"], ["y"]), helper.make_node(kind, last, ["z"])]


@pytest.mark.parametrize(("kind", "place", "fused"), [("Add", 0, True), ("Add", 1, True), ("Sub", 0, True)])
def test_a_multiple_is_added_in_one_pass_and_to_the_buffer_that_is_named(kind: str, place: int, fused: bool) -> None:
    nodes = step(kind, place)
    made = fuse(nodes, ["z"], {"number"})
    assert (len(made) == 1) == fused
    feeds = {"x": torch.randn(5, 3), "a": torch.randn(5, 3), "number": torch.tensor(0.3)}
    expected = Program(nodes, list(feeds), ["z"], {}, setting()).run(feeds, ["z"])["z"]
    program = Program(made, list(feeds), ["z"], {}, setting())
    torch.testing.assert_close(program.run(feeds, ["z"])["z"], expected)
    assert program.run(feeds, ["z"], {"z": feeds["x"]})["z"] is feeds["x"]
    torch.testing.assert_close(feeds["x"], expected)


def test_what_is_read_twice_wanted_or_no_multiple_by_a_number_stays_apart() -> None:
    nodes = step("Add", 0)
    assert fuse(nodes, ["z", "y"], {"number"}) == nodes
    assert fuse(nodes, ["z"], ()) == nodes
    assert fuse(step("Sub", 1), ["z"], {"number"}) == step("Sub", 1)
    again = [*nodes, helper.make_node("Neg", ["y"], ["n"])]
    assert fuse(again, ["z", "n"], {"number"}) == again


@pytest.mark.parametrize("samples", [1, 3, 700])
def test_a_mask_is_multiplied_without_a_copy_of_it_in_numbers(samples: int) -> None:
    nodes = [
        helper.make_node("Cast", ["mask"], ["factor"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["x", "factor"], ["z"]),
    ]
    made = fuse(nodes, ["z"], ())
    assert [node.op_type for node in made] == ["MulCast"]
    x, mask = torch.randn(samples, 1000), torch.rand(samples, 1000) < 0.5
    for given in (mask, mask[:1], mask.to(torch.int32)):
        found = Program(made, ["x", "mask"], ["z"], {}, setting()).run({"x": x, "mask": given}, ["z"])["z"]
        assert torch.equal(found, x * given.float())


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ((2, 1, 6, 8, 5), (6, 5, 7)),
        ((1, 18, 5), (4, 1, 5, 9)),
        ((4, 1, 3, 6, 7), (1, 7, 6)),
        ((3, 4), (1, 8, 2, 4, 6)),
        ((1, 3, 1, 4, 5), (2, 1, 6, 5, 7)),
    ],
)
def test_a_product_broadcasts_as_matmul_does(a: tuple[int, ...], b: tuple[int, ...]) -> None:
    left, right = torch.randn(a), torch.randn(b)
    for one in (left, left.mT.contiguous().mT):
        torch.testing.assert_close(product(one, right), torch.matmul(left, right), rtol=1e-5, atol=1e-5)
