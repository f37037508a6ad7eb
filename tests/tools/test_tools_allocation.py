"""The page on allocations says what was measured."""

from __future__ import annotations

import dataclasses

from edgetune.units import MIB
from tools.allocation import Comparison, Measured, line, markdown

WORSE = Measured("3 int8", 0.5, 90 * MIB, 80 * MIB, 0.4, 0.5)
BETTER = Measured("2 dense, 1 int8", None, 95 * MIB, 85 * MIB, 0.1, 0.125)


def test_what_holds() -> None:
    one = Comparison("a", 8, 100 * MIB, WORSE, BETTER, 1.0)
    assert (one.holds, one.ratio) == (True, 0.25)
    assert not dataclasses.replace(one, mixed=WORSE, uniform=BETTER).holds
    assert not dataclasses.replace(one, budget_bytes=84 * MIB).holds
    assert "FAILS" in line(dataclasses.replace(one, budget_bytes=84 * MIB))
    exact = dataclasses.replace(WORSE, error=0.0)
    assert dataclasses.replace(one, uniform=exact).ratio == float("inf")
    assert dataclasses.replace(one, uniform=exact, mixed=exact).ratio == 1.0


def test_the_page() -> None:
    page = markdown([Comparison("a", 8, 100 * MIB, WORSE, BETTER, 1.0)], "int8+dense", "all")
    assert (
        "| a | 8 | 100.0 | 3 int8, ε = 0.500 | 80.0 | 0.5000 | 2 dense, 1 int8 | 85.0 | 0.1250 | 0.250 | 1.0 |" in page
    )
    assert "Of 1 comparisons, 1 have an error that is no larger" in page
