"""Lifetimes and peaks against a recount that walks every node."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgetune.bundle import GraphSpec, TensorUse, Workspace
from edgetune.errors import BundleError
from edgetune.planning.memory import FIXED_KINDS, peak, timeline
from edgetune.planning.sizes import nbytes
from tests.planning.synthetic import graph, use

SYMBOLS = {"batch": 3}
KINDS = ("feature", "target", "gradient", "output", "saved", "transient", *FIXED_KINDS)


@st.composite
def graphs(draw: st.DrawFn) -> GraphSpec:
    count = draw(st.integers(1, 8))
    tensors = []
    for i in range(draw(st.integers(0, 12))):
        first = draw(st.integers(-1, count - 1))
        last = draw(st.integers(first, count))
        shape = draw(st.sampled_from(["batch", "batch 5", "7", "2*batch 3", "0"]))
        dtype = draw(st.sampled_from(["float32", "uint8", "float64"]))
        buffer = f"t{draw(st.integers(0, i))}"
        tensors.append(use(f"t{i}", shape, draw(st.sampled_from(KINDS)), first, last, buffer=buffer, dtype=dtype))
    works = draw(
        st.lists(st.builds(Workspace, st.integers(0, count - 1), st.sampled_from(["4", "batch*2"])), max_size=4)
    )
    return graph("g", count, tensors, tuple(works))


def recount(described: GraphSpec, node: int, without: tuple[str, ...]) -> int:
    """The definition, word by word: what is alive while ``node`` runs."""
    total = 0
    for buffer in {t.buffer for t in described.tensors}:
        inside: list[TensorUse] = [t for t in described.tensors if t.buffer == buffer]
        if any(t.kind in without for t in inside):
            continue
        if min(t.first for t in inside) <= node <= max(t.last for t in inside):
            total += max(nbytes(t, SYMBOLS) for t in inside)
    for work in described.workspaces:
        if work.node == node:
            total += 4 * {"4": 4, "batch*2": 6}[work.elements]
    return total


@given(graphs(), st.sampled_from([FIXED_KINDS, (), ("transient",)]))
def test_timeline_equals_a_recount(described: GraphSpec, without: tuple[str, ...]) -> None:
    expected = [recount(described, node, without) for node in range(len(described.nodes))]
    assert timeline(described, SYMBOLS, without=without) == expected


@given(graphs())
def test_peak_is_the_first_maximum_and_names_all_that_is_alive(described: GraphSpec) -> None:
    usage, found = timeline(described, SYMBOLS), peak(described, SYMBOLS)
    assert found.bytes == max(usage)
    assert found.node == usage.index(found.bytes)
    assert found.node_name == described.nodes[found.node]
    assert sum(tensor.bytes for tensor in found.live) == found.bytes
    assert [t.bytes for t in found.live] == sorted((t.bytes for t in found.live), reverse=True)


def test_a_view_of_a_parameter_costs_nothing() -> None:
    tensors = [use("w", "100", "parameter", -1, 2), use("w.flat", "100", "transient", 0, 1, buffer="w")]
    assert timeline(graph("g", 2, tensors), {}) == [0, 0]


def test_a_buffer_bears_its_most_lasting_kind() -> None:
    tensors = [use("x", "4", "transient", 0, 0), use("relu", "4", "saved", 0, 1, buffer="x")]
    (only,) = peak(graph("g", 2, tensors), {}).live
    assert (only.name, only.kind, only.bytes) == ("x", "saved", 16)


def test_a_graph_without_nodes_needs_nothing() -> None:
    found = peak(graph("g", 0, [use("x", "4", "feature", -1, 0)]), {})
    assert (found.bytes, found.node, found.live) == (0, -1, ())


def test_an_unknown_symbol_is_an_error() -> None:
    with pytest.raises(BundleError, match=r"rank\.x\.c"):
        timeline(graph("g", 1, [use("x", "rank.x.c", "saved", 0, 1)]), SYMBOLS)
