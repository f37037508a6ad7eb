"""The page of operators says what the code says."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgetune.autodiff.rules import RULES
from tools import operators

PAGE = Path(__file__).parents[2] / "docs" / "operators.md"


def test_the_page_is_what_the_tool_prints() -> None:
    assert PAGE.read_text(encoding="utf-8") == operators.markdown(), (
        "docs/operators.md is stale: python tools/operators.py > docs/operators.md"
    )


def test_every_rule_has_a_line_that_says_something() -> None:
    rows = [line.strip("| ").split(" | ") for line in operators.markdown().splitlines() if line.startswith("| ")]
    found = {cells[0]: cells[1:] for cells in rows}
    assert set(RULES) <= set(found)
    assert all(len(cells) == 2 and all(cells) for cells in found.values())


def test_a_new_rule_appears_and_an_operator_that_torch_lacks_says_no(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RULES, "LSTM", RULES["Relu"])
    assert f"| LSTM | {RULES['Relu'].doc} | no |" in operators.markdown()
    assert "| Relu | 1 bit per element | yes |" in operators.markdown()
    assert "| Linear | its input, through a codec | written out |" in operators.markdown()
