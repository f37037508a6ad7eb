"""The block in which a runtime lays out the tensors of a run: its laws, and cases that were worked out by hand."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgetune.bundle import GraphSpec, StageSpec
from edgetune.planning.memory import HOLES, peak, timeline
from edgetune.planning.packing import ALIGNMENT_BYTES, Span, holes, layout, packed_peak, touched_bytes
from tests.planning.synthetic import graph, use
from tests.planning.test_planning_memory import SYMBOLS, graphs

K = 1024


@st.composite
def lives(draw: st.DrawFn) -> list[Span]:
    firsts = [draw(st.integers(0, 10)) for _ in range(draw(st.integers(0, 15)))]
    return [(first, draw(st.integers(first, 12)), draw(st.integers(0, 5000))) for first in sorted(firsts)]


@given(lives())
def test_no_two_that_are_alive_lie_in_one_place_and_each_has_its_size(spans: list[Span]) -> None:
    places = layout(spans)
    for index, ((first, last, size), (begin, end)) in enumerate(zip(spans, places, strict=True)):
        assert size <= end - begin < size + ALIGNMENT_BYTES and begin % ALIGNMENT_BYTES == 0
        for other in range(index):
            if first <= spans[other][1] and spans[other][0] <= last and size and spans[other][2]:
                assert end <= places[other][0] or places[other][1] <= begin


@given(lives())
def test_what_is_touched_never_falls_holds_what_is_alive_and_no_more_than_all(spans: list[Span]) -> None:
    usage = touched_bytes(spans, 13)
    ends = [0, *(end for _, end in layout(spans))]
    for node, touched in enumerate(usage):
        alive = sum(size for first, last, size in spans if first <= node <= last)
        assert alive <= touched <= max(ends) and touched >= usage[max(0, node - 1)]
        assert touched <= sum(size + ALIGNMENT_BYTES for first, _, size in spans if first <= node)


@pytest.mark.parametrize(
    ("spans", "expected", "touched"),
    [
        ([(0, 1, K), (2, 3, K)], [0, 0], K),  # one after the other, in the same place
        ([(0, 1, K), (0, 3, K), (2, 3, 2 * K)], [0, K, 2 * K], 4 * K),  # the first's hole is too small for the third
        ([(0, 1, 2 * K), (0, 3, K), (2, 3, 2 * K)], [0, 2 * K, 0], 3 * K),  # here it is large enough
        # holes of 3 and of 2 KiB: the one that fits better is taken, so that the other one fits the last
        (
            [(0, 1, 3 * K), (0, 9, K), (0, 1, 2 * K), (0, 9, K), (2, 9, 2 * K), (3, 9, 3 * K)],
            [0, 3 * K, 4 * K, 6 * K, 4 * K, 0], 7 * K,
        ),
        ([(0, 0, 1), (0, 0, 1)], [0, ALIGNMENT_BYTES], 2 * ALIGNMENT_BYTES),
    ],
)  # fmt: skip
def test_layouts_worked_out_by_hand(spans: list[Span], expected: list[int], touched: int) -> None:
    assert [begin for begin, _ in layout(spans)] == expected and touched_bytes(spans, 10)[-1] == touched


@given(graphs())
def test_holes_are_never_negative_and_make_the_peak_what_it_says(described: GraphSpec) -> None:
    more = holes(described, SYMBOLS)
    found, bare = packed_peak(described, SYMBOLS), peak(described, SYMBOLS)
    assert len(more) == len(described.nodes) and min(more, default=0) >= 0
    assert (
        sum(tensor.bytes for tensor in found.live)
        == found.bytes
        == max(size + hole for size, hole in zip(timeline(described, SYMBOLS), more, strict=True))
    )
    assert found.bytes >= bare.bytes


def test_each_stage_has_a_block_and_what_crosses_is_in_none() -> None:
    tensors = [
        use("a", str(K), "transient", 0, 1), use("b", str(K), "saved", 0, 3), use("c", str(2 * K), "transient", 1, 1),
        use("d", str(K), "transient", 2, 2), use("e", str(2 * K), "transient", 3, 3),
    ]  # fmt: skip
    whole = graph("g", 4, tensors)
    stages = (StageSpec("1", (), ("b",), 2), StageSpec("2", ("b",), (), 4))
    halves = dataclasses.replace(whole, stages=stages)
    four = 4 * K  # bytes of K elements
    # whole: a, b, c at 0, 1 and 2 to 4; d in a's place; e where c was. All 4 units are touched at the second node.
    assert holes(whole, {}) == [0, 0, 2 * four, four] and packed_peak(whole, {}).bytes == 4 * four
    # first stage: a, c in a block of 3 units, b beside it; second: d, then e over d, b beside it
    assert holes(halves, {}) == [0, 0, 0, 0] and packed_peak(halves, {}).bytes == 4 * four
    later = dataclasses.replace(whole, tensors=(*whole.tensors[:3], use("d", str(3 * K), "transient", 2, 2)))
    # d finds no gap of 3 units beside b, so it lies behind it: a's place is a hole from then on
    assert holes(later, {})[2] == four
    assert packed_peak(later, {}).bytes == 5 * four and HOLES in {one.name for one in packed_peak(later, {}).live}
