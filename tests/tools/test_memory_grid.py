"""The memory grid: what a cell comes to, the table, and one real cell from end to end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from edgetune.planning.plan import RESERVE_BYTES
from tools import memory_grid
from tools.memory_grid import BEGIN, END, MIB, PRESETS, Cell, figures, put_between_marks, table

CELL = Cell("tiny-32", "2", 8, "hosvd", "onnxruntime")


def found(*steps: int, predicted: int = 110) -> dict[str, Any]:
    """A cell's entry, in MiB: the train phase of its steps; 20 are resident before them."""
    return {
        "predicted": {"train": predicted * MIB, "update": 90 * MIB},
        "steps": [{"trunk": 30 * MIB, "train": size * MIB} for size in steps],
        "before_bytes": 20 * MIB,
    }


def test_the_first_steps_correct_and_the_worst_of_the_others_counts() -> None:
    row = figures(found(99, 100, 101, 98), "onnxruntime")
    assert (row.predicted, row.measured, row.warm) == (110 * MIB, 101 * MIB, 100 * MIB)
    assert row.corrected == 100 * MIB + RESERVE_BYTES
    assert row.error == pytest.approx(110 / 101 - 1) and row.step_error == pytest.approx(9 / 81)


def test_the_table_says_how_many_cells_are_above_the_corrected_prediction() -> None:
    other = Cell("tiny-32", "2", 16, "dense", "onnxruntime")
    store = {CELL.key: found(99, 100, 101), other.key: found(100, 99, 104, predicted=130), "x": {"error": "no"}}
    text = table(store, [CELL, other, Cell("tiny-32", "2", 1, "dense", "onnxruntime")])
    assert text.count("\n| tiny-32") == 2 and "| +8.9% |" in text
    assert "2 cells" in text and "worst 25.0%" in text and "corrected prediction: 1" in text
    assert "at most 4.0 MiB" in text
    assert table({}, [CELL]).count("\n") == 1


def test_the_table_goes_between_the_marks_of_a_page(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    put_between_marks(page, "new")
    assert page.read_text() == f"before\n{BEGIN}\nnew\n{END}\nafter\n"
    page.write_text("no marks")
    with pytest.raises(SystemExit, match="lacks the marks"):
        put_between_marks(page, "new")


def test_the_full_grid_is_large_and_every_cell_has_a_name_of_its_own() -> None:
    cells = PRESETS["full"]
    assert len(cells) == len({cell.key for cell in cells}) >= 40
    assert {cell.engine for cell in cells} == {"onnxruntime", "torch"} and len({cell.codec for cell in cells}) >= 4


def test_one_cell_is_measured_in_processes_of_its_own_and_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = tmp_path / "store.json"
    line = ["--preset", "tiny", "--store", str(store), "--work", str(tmp_path / "work")]
    memory_grid.main(line)
    first = capsys.readouterr().out
    entry = json.loads(store.read_text())[CELL.key]
    assert "error" not in entry, entry
    if not entry["resettable"]:
        pytest.skip("this kernel does not reset a process's high-water mark (/proc/self/clear_refs)")
    row = figures(entry, "onnxruntime")
    assert len(entry["steps"]) == memory_grid.WARM_UP + memory_grid.STEPS and row.measured <= row.corrected
    assert abs(row.error) < 0.08
    assert set(entry["steps"][0]) == {"trunk", "train", "update"} and entry["measured"]["calibrate"] > 0
    memory_grid.main(line)
    assert capsys.readouterr().out == first, "a second run measures nothing"
