"""The tool from end to end, on a network and a task of no size."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

from tools import accuracy, accuracy_run, accuracy_study, accuracy_tasks
from tools.accuracy_run import Outcome, Schedule
from tools.accuracy_tasks import Task


def test_batches_are_whole_and_the_same_every_time() -> None:
    batches = accuracy_run.order(10, Schedule(5, 4, 0.1, 7))
    assert [len(batch) for batch in batches] == [4] * 5
    assert len(set(np.concatenate(batches[:2]).tolist())) == 8, "no sample twice in one pass"
    for one, same in zip(batches, accuracy_run.order(10, Schedule(5, 4, 0.1, 7)), strict=True):
        np.testing.assert_array_equal(one, same)


def tiny(name: str, seed: int) -> Task:
    rng = np.random.default_rng(seed)

    def part(count: int) -> tuple[Any, Any]:
        labels = np.arange(count) % 2
        return (rng.integers(0, 60, (count, 8, 8)) + 180 * labels[:, None, None]).astype(np.uint8), labels

    return Task("digits", 2, part(4), part(16), part(6), (np.arange(16), np.arange(16, 22)))


def tiny_network(task: Task, seed: int) -> Any:
    from torch import nn

    convolutions = nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU()
    return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(16, 2)).eval()


def in_this_process(folder: Path, plan: Path, engine: str, schedule: Schedule) -> Outcome:
    gc.freeze()  # rubbish is collected before every measurement, and torch and the exporter left much to look through
    try:
        return accuracy_run.fine_tune(folder, plan, engine, schedule)
    finally:
        gc.unfreeze()


def test_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accuracy, "make_task", tiny)
    monkeypatch.setattr(accuracy_tasks, "pretrained", tiny_network)
    monkeypatch.setattr(accuracy, "BATCH", 4)
    monkeypatch.setattr(accuracy, "LAST", 2)
    monkeypatch.setattr(accuracy_study, "CODECS", ("int8", "recompute", "dense"))
    monkeypatch.setattr(accuracy_study, "SHARES", (2,))
    monkeypatch.setattr(accuracy_study, "PEAKS", (0.0,))
    monkeypatch.setattr(accuracy_study, "measure_runtime_apart", lambda *_: 10**8)
    file, page = tmp_path / "runs.json", tmp_path / "accuracy.md"
    command = ["--task", "digits", "--seed", "0", "--steps", "3", "--json", str(file), "--markdown", str(page)]
    assert accuracy.main(command, in_this_process) == 0
    data = json.loads(file.read_text())
    runs = {run["series"]: run for run in data["runs"] if run["engine"] == "onnxruntime"}
    assert set(runs) == {"int8", "recompute", "dense", "planner's mix"}
    dense, lossy = runs["dense"], runs["int8"]
    assert lossy["codec_bytes"] < dense["codec_bytes"]
    assert lossy["mask_bytes"] == dense["mask_bytes"] > 0
    planned = dense["codec_bytes"] + dense["mask_bytes"] + dense["other_bytes"]
    assert planned <= dense["held_bytes"] <= planned + 8192, "small blocks of the engine come on top"
    mixes = {run["knob"]: run for run in data["runs"] if run["series"] == "planner's mix"}
    mix = mixes["saved ≤ 1/2"]
    assert mix["codec_bytes"] <= dense["codec_bytes"] // 2 and "recompute" not in mix["choice"]
    assert "recompute" in mixes["peak at 0%"]["choice"], "which an activation budget counts as nothing"
    assert data["bases"][0]["autograd_bytes"] > dense["codec_bytes"]
    assert all(run["peak_bytes"] >= 0 and 0 <= run["after"] <= 1 for run in data["runs"])
    assert dense["before"] == lossy["before"]
    text = page.read_text()
    assert "hosvd at ε = 0.9 or dense was not measured" in text and "`planner's mix`" in text
    assert (tmp_path / "accuracy-digits.svg").exists()

    def never(*given: Any) -> Outcome:
        raise AssertionError("what the file holds is not measured again")

    assert accuracy.main([*command, "--read-only"], never) == 0
    assert page.read_text() == text
