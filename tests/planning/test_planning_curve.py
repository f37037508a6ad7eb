"""A plan told in full: curves that add up to the prediction, and what is alive at the worst instant."""

from __future__ import annotations

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgetune.bundle import Manifest
from edgetune.errors import UsageError
from edgetune.planning.curve import BANDS, curve_of, explain
from edgetune.planning.memory import bands, timeline
from edgetune.planning.plan import Plan, make_plan
from tests.planning.synthetic import manifest

SHAPES = [(8, 6, 6), (16, 3, 3)]
shapes = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=3)


def planned(described: Manifest, batch: int = 8, micro_batch: int | None = None) -> Plan:
    return make_plan(described, batch=batch, calibration=None, epsilon=1.0, runtime_bytes=1000, micro_batch=micro_batch)


@given(shapes, st.sampled_from(["", "bchw", "ch"]), st.integers(1, 12), st.integers(0, 40), st.booleans())
def test_a_curve_adds_up_to_the_prediction(
    some: list[tuple[int, int, int]], letters: str, batch: int, scratch: int, trunk: bool
) -> None:
    described = manifest(some, letters=letters, trunk=trunk, workspace_elements=scratch)
    plan = planned(described, batch)
    curve = curve_of(described, plan)
    assert [stretch.phase for stretch in curve.stretches] == (["trunk"] if trunk else []) + ["train", "update"]
    for stretch in curve.stretches:
        found = explain(described, plan, stretch.phase)
        assert curve.fixed_bytes + max(stretch.total) == found.peak_bytes
        assert stretch.nodes[stretch.total.index(max(stretch.total))] == found.node
    worst = explain(described, plan)
    assert worst.peak_bytes == plan.predicted_peak_bytes >= curve.peak_bytes
    assert f"{worst.phase}/{worst.node}" == plan.bottleneck


@given(shapes, st.integers(1, 9))
def test_bands_sum_to_the_timeline(some: list[tuple[int, int, int]], batch: int) -> None:
    described = manifest(some, letters="", workspace_elements=7)
    for spec in described.graphs.values():
        by_kind = bands(spec, {"batch": batch})
        assert [sum(column) for column in zip(*by_kind.values(), strict=True)] == timeline(spec, {"batch": batch})


def test_what_is_alive_says_who_made_it_and_who_reads_it_last() -> None:
    described = manifest(SHAPES, letters="", trunk=True, workspace_elements=5000)
    plan = planned(described)
    found = explain(described, plan, "train")
    spec = described.graphs["train"]
    assert sum(found.fixed.values()) + sum(row.bytes for row in found.alive) == found.peak_bytes
    assert [row.bytes for row in found.alive] == sorted((row.bytes for row in found.alive), reverse=True)
    for row in found.alive:
        if row.kind == "workspace":
            assert row.made_by == row.last_read_by == found.node
            continue
        uses = [use for use in spec.tensors if use.buffer == row.name]
        first = min(use.first for use in uses)
        assert row.made_by == ("(given)" if first < 0 else spec.nodes[first])
    assert {row.kind for row in found.alive} >= {"feature", "workspace"}
    beside = [row for row in explain(described, plan, "trunk").alive if row.made_by == "(held beside the graph)"]
    assert [row.name for row in beside] == ["l0.x"]
    assert json.dumps(dataclasses.asdict(found))


def test_the_kinds_are_told_apart_and_pieces_are_counted() -> None:
    described = manifest(SHAPES, letters="bchw", trunk=True)
    curve = curve_of(described, planned(described, batch=8, micro_batch=2))
    runs = {stretch.phase: stretch.runs for stretch in curve.stretches}
    assert runs == {"trunk": 4, "train": 1, "update": 1}
    train = next(stretch for stretch in curve.stretches if stretch.phase == "train")
    assert set(train.bands) == set(BANDS) and any(train.bands["saved"]) and any(train.bands["features"])


def test_an_unknown_phase_is_refused_with_those_that_there_are() -> None:
    described = manifest(SHAPES, letters="", trunk=True)
    with pytest.raises(UsageError, match=r"no phase 'train2'; choose one of: .*trunk"):
        explain(described, planned(described), "train2")
