"""The figures of continual learning: matrices made by hand, the papers' formulas in another form, and a run."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from edgetune.agent.config import AgentConfig
from edgetune.agent.continual import average_accuracy, backward_transfer, forgetting, forward_transfer
from edgetune.agent.gate.config import GateConfig
from edgetune.agent.gate.tasks import MOST_TASKS, Tasks
from edgetune.agent.loop import run_agent
from edgetune.agent.view import QuietView
from edgetune.bundle import Array
from edgetune.commands import app
from tests.agent.fakes import CLASSES, Workshop, make_bundle, make_image

# Three tasks: the first is forgotten, the second gets better by the third, the third profits from the second.
HAND = [[0.9, 0.2, 0.1], [0.6, 0.8, 0.4], [0.5, 0.85, 0.7]]
BEFORE = [0.1, 0.1, 0.3]


def test_a_matrix_made_by_hand() -> None:
    assert average_accuracy(HAND) == pytest.approx((0.5 + 0.85 + 0.7) / 3)
    assert forgetting(HAND) == pytest.approx(((0.9 - 0.5) + (0.8 - 0.85)) / 2)
    assert backward_transfer(HAND) == pytest.approx(((0.5 - 0.9) + (0.85 - 0.8)) / 2)
    assert forward_transfer(HAND, BEFORE) == pytest.approx(((0.2 - 0.1) + (0.4 - 0.3)) / 2)


def test_the_best_may_be_another_row_than_its_own() -> None:
    """Chaudhry's forgetting looks for the best of all rows before the last, backward transfer at its own row alone."""
    matrix = [[0.5, 0.9, 0.0], [0.8, 0.6, 0.0], [0.4, 0.5, 1.0]]
    assert forgetting(matrix) == pytest.approx(((0.8 - 0.4) + (0.9 - 0.5)) / 2)
    assert backward_transfer(matrix) == pytest.approx(((0.4 - 0.5) + (0.5 - 0.6)) / 2)


squares = st.integers(2, 7).flatmap(
    lambda n: st.lists(st.lists(st.floats(0, 1), min_size=n, max_size=n), min_size=n + 1, max_size=n + 1)
)


@given(squares)
def test_the_papers_formulas_in_matrices(rows: list[list[float]]) -> None:
    matrix, before = rows[:-1], rows[-1]
    r, b = np.array(matrix), np.array(before)
    t = len(r)
    assert math.isclose(average_accuracy(matrix) or 0, np.trace(np.ones((t, 1)) @ r[-1:]) / t, abs_tol=1e-12)
    assert math.isclose(backward_transfer(matrix) or 0, (r[-1] - np.diag(r)).sum() / (t - 1), abs_tol=1e-12)
    assert math.isclose(forward_transfer(matrix, before) or 0, (np.diag(r, 1) - b[1:]).mean(), abs_tol=1e-12)
    assert math.isclose(forgetting(matrix) or 0, (r[:-1].max(0) - r[-1])[:-1].mean(), abs_tol=1e-12)
    assert (forgetting(matrix) or 0) >= -(backward_transfer(matrix) or 0) - 1e-12


def test_what_was_not_measured_is_left_out() -> None:
    matrix = [[0.9, None, None], [None, 0.8, None], [0.5, None, 0.7]]
    assert average_accuracy(matrix) == pytest.approx(0.6)
    assert forgetting(matrix) == pytest.approx(0.4) and backward_transfer(matrix) == pytest.approx(-0.4)
    assert forward_transfer(matrix, BEFORE) is None
    for measure in (average_accuracy, forgetting, backward_transfer):
        assert measure([]) is None
    assert average_accuracy([[0.5]]) == 0.5
    assert (
        forgetting([[0.5]]) is None and backward_transfer([[0.5]]) is None and forward_transfer([[0.5]], [0.1]) is None
    )


def test_months_of_tasks_stay_small() -> None:
    tasks = Tasks()
    for number in range(200):
        tasks.trained([_sample(f"t{number}")])
        tasks.judged({f"t{i}": (1, 2) for i in range(max(0, number - 3), number + 1)})
    assert tasks.order == [f"t{i}" for i in range(200 - MOST_TASKS, 200)] and set(tasks.reached) == set(tasks.order)
    assert Tasks.from_plain(json.loads(json.dumps(tasks.to_plain()))) == tasks


def _sample(task: str | None) -> Any:
    class Named:
        pass

    made = Named()
    made.task = task  # type: ignore[attr-defined]
    return made


def test_a_run_over_two_tasks_reports_its_matrix(tmp_path: Path) -> None:
    """Two classes first, the third afterwards, told apart by the metadata; the exported model is the baseline."""
    bundle, data, lines = make_bundle(tmp_path / "bundle"), tmp_path / "data", list[str]()
    config = AgentConfig(
        data=data, state=tmp_path / "state", batch=4, once=True, quiet=True, epsilon=0.9, settle_seconds=0.1,
        checkpoint_every=3, gate=GateConfig(least_heldout=3),
    )  # fmt: skip
    shop = Workshop()
    for task, labels in (("both", (0, 1)), ("owls", (2,))):
        for label in labels:
            for seed in range(20):
                make_image(data / f"{CLASSES[label]}{seed}.png", label, seed)
                entry = {"file_name": f"{CLASSES[label]}{seed}.png", "label": label, "task": task}
                lines.append(json.dumps(entry) + "\n")
        (data / "metadata.jsonl").write_text("".join(lines))
        run_agent(bundle, config, parts=shop.parts(), view=QuietView())
    told = json.loads(CliRunner().invoke(app, ["report", str(tmp_path / "state"), "--json"]).stdout)["tasks"]
    assert told["tasks"] == ["both", "owls"] and told["before"][1] is None
    assert told["matrix"][0][0] == 1.0 and told["matrix"][0][1] is None  # there was no owl to judge by
    last: Array = np.array(told["matrix"][1])
    assert told["average_accuracy"] == pytest.approx(last.mean())
    assert told["forgetting"] == pytest.approx(1.0 - last[0]) == -told["backward_transfer"]
    assert told["forward_transfer"] is None
    table = CliRunner().invoke(app, ["report", str(tmp_path / "state")]).stdout
    assert "held-out accuracy by task" in table and "forgetting: " in table
