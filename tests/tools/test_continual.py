"""The continual study: tasks share no image, one run gives what the table needs, the table says what runs found."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from edgetune.errors import UsageError
from tests.engines.workshop import CLASSES, bundle_of, samples
from tools import accuracy_tasks, continual, continual_run, continual_tasks
from tools.accuracy_tasks import PILLOWS_OWN, Font


def test_a_run_judges_every_task_after_every_task(tmp_path: Path) -> None:
    """The real agent on two tasks of two classes each, with replay; judged on images that it never saw."""
    bundle, arrays = bundle_of("hosvd"), {"names": np.array(["first", "second"])}
    for part, seed in (("train", 0), ("test", 1)):
        x, y = samples(64, seed=seed)
        images = np.clip((x[:, 0] + 1) * 127.5, 0, 255).astype(np.uint8)
        for task in range(2):
            own = np.flatnonzero(y // 2 == task)[:12]
            arrays |= {f"{part}_{task}": images[own], f"{part}_labels_{task}": y[own]}
    np.savez(tmp_path / "tasks.npz", **arrays)  # type: ignore[arg-type]
    told = {
        "bundle": str(bundle.path), "tasks": str(tmp_path / "tasks.npz"), "work": str(tmp_path / "work"),
        "config": {"batch": 4, "epsilon": 0.9, "hyper": {"learning_rate": 0.01}, "replay": {"kind": "raw"}},
    }  # fmt: skip
    found = continual_run.run(told)
    assert found["tasks"] == ["first", "second"] and np.shape(found["matrix"]) == (2, 2) == np.shape(found["promoted"])
    assert all(0 <= value <= 1 for row in [*found["matrix"], found["before"]] for value in row)
    assert found["steps"] > 4 and found["measured_peak_bytes"] > 2**20 and found["saved_bytes"] > 0
    assert len(bundle.manifest.classes) == CLASSES
    assert json.loads(json.dumps(found)) == found


def test_tasks_are_the_same_every_time_and_share_no_image(monkeypatch: pytest.MonkeyPatch) -> None:
    own = Font(PILLOWS_OWN, None)
    monkeypatch.setattr(accuracy_tasks, "found", lambda: ([own], [own]))
    for scenario in continual_tasks.SCENARIOS:
        parts, again = (continual_tasks.stream(scenario, 3, 20, 10) for _ in range(2))
        assert len(parts) == len({part.name for part in parts}) == 5
        seen: set[bytes] = set()
        for part, same in zip(parts, again, strict=True):
            np.testing.assert_array_equal(part.train[0], same.train[0])
            assert len(part.train[1]) == 20 and len(part.test[1]) == 10
            images = [image.tobytes() for images, _ in (part.train, part.test) for image in images]
            assert not seen & set(images) and len(set(images)) == 30
            seen |= set(images)
        labels = [set(part.train[1].tolist()) for part in parts]
        expected = (
            [{a, a + 1} for a in range(0, 10, 2)] if scenario == continual_tasks.SCENARIOS[0] else [set(range(10))] * 5
        )
        assert labels == expected


def outcome(last: float) -> dict[str, object]:
    return {
        "tasks": ["a", "b"], "matrix": [[1.0, 0.25], [last, 0.75]], "before": [0.5, 0.125],
        "promoted": [[1.0, 0.0], [1.0, 0.5]], "steps": 10, "measured_peak_bytes": 3 * 2**20, "saved_bytes": 2048,
        "epsilon": None, "trained": 5, "energy": None, "train_seconds": 1.0, "seconds": 2.0, "replay_bytes": 1024,
    }  # fmt: skip


def test_the_table_and_the_picture_say_what_runs_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed, last in ((0, 0.5), (1, 0.25)):
        cell = continual.Cell("class-incremental", seed, "none", "dense", "1KiB")
        (tmp_path / f"{cell.name}.json").write_text(json.dumps(outcome(last)))
    shown = ["--work", str(tmp_path), "--seeds", "0,1", "--scenarios", "class-incremental", "--budgets", "1KiB"]
    continual.main([*shown, "--pictures", str(tmp_path), "--only-show"])
    line = capsys.readouterr().out.splitlines()[-1]
    # Accuracy: (0.625 + 0.5) / 2; forgetting: (0.5 + 0.75) / 2; forward: 0.25 - 0.125.
    assert line == (
        "| 1KiB | dense | 5 layers | none | 56.2 ± 8.8 | 62.5 | -62.5 | +12.5 | 75.0 | 2 KiB | 3.0 MiB | 10 | 1 KiB |"
    )
    picture = (tmp_path / "continual-class-incremental.svg").read_text()
    assert picture.count("<polyline") == 1 and "after b" in picture
    with pytest.raises(UsageError, match="choose of: class-incremental, domain-incremental"):
        continual.main(["--work", str(tmp_path), "--scenarios", "x"])
