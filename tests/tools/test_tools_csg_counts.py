"""The paper's parameter counts, and the page that shows them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools import csg_counts

PAGE = Path(__file__).parents[2] / "docs" / "adapters.md"
# The paper's count of the unchanged ResNet-101 holds the running statistics of batch-norm, its other counts do not.
STATISTICS = 105_344


@pytest.mark.parametrize("row", csg_counts.rows(), ids=lambda row: f"{row.name} {row.paper}")
def test_counts_are_those_of_the_paper(row: csg_counts.Row) -> None:
    assert row.count() + (STATISTICS if row.name == "ResNet-101" else 0) == row.paper


def test_the_difference_is_the_running_statistics() -> None:
    network = csg_counts.resnet(csg_counts.RESNET101)
    channels = sum(shape[0] for shape in network.convolutions.values())
    assert 2 * channels == STATISTICS  # a mean and a variance per channel


def test_the_page_shows_what_the_tool_prints() -> None:
    assert csg_counts.markdown() in PAGE.read_text(encoding="utf-8"), (
        "docs/adapters.md is stale: put the table of python tools/csg_counts.py into it"
    )
