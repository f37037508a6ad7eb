"""Does an agent forget? Five tasks, one after the other: replay against none, dense against hosvd, three budgets.

    python tools/continual.py --work DIR [--seeds 0,1] [--pictures docs]

Every cell is a run of the real agent in a process of its own (``continual_run.py``); what it found is in a file of DIR,
and a cell whose file is there is not run again. Needs torch, scikit-learn and matplotlib (for its fonts).
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import edgetune
from edgetune.agent.continual import average_accuracy, backward_transfer, forgetting, forward_transfer
from edgetune.commands import _digits
from edgetune.commands._plot import Frame, document, dots, evenly, line
from edgetune.errors import UsageError
from edgetune.units import parse_bytes
from tools import continual_tasks as tasks

REPLAYS = ("none", "raw", "features")
CODECS = ("dense", "hosvd")
BUDGETS = ("320KiB", "160KiB", "80KiB")
"""For what a step keeps for its backward pass: all of it dense, half, a quarter."""
BATCH, EPOCHS, TRAIN, TEST = 16, 5, 120, 100
HYPER = {"learning_rate": 0.005, "clip_norm": 1.0}
_COLORS = {"none": "#7f7f7f", "raw": "#1f77b4", "features": "#d62728"}


@dataclass(frozen=True)
class Cell:
    """One run of the grid."""

    scenario: str
    seed: int
    replay: str
    codec: str
    budget: str

    @property
    def name(self) -> str:
        """The name of its file."""
        return "-".join((self.scenario, str(self.seed), self.replay, self.codec, self.budget))


def grid(scenarios: Sequence[str], seeds: Sequence[int], budgets: Sequence[str]) -> Iterator[Cell]:
    """Yield every cell, seed by seed, so that a grid that is broken off has whole seeds."""
    for seed, budget, scenario, codec, replay in itertools.product(seeds, budgets, scenarios, CODECS, REPLAYS):
        yield Cell(scenario, seed, replay, codec, budget)


def prepare(work: Path, scenario: str, seed: int, train: int, test: int) -> None:
    """Write the bundle and the tasks of a scenario, if they are not there."""
    folder = work / f"{scenario}-{seed}"
    if (folder / "tasks.npz").exists():
        return
    import torch

    folder.mkdir(parents=True, exist_ok=True)
    named: dict[str, Any] = {"classes": list(tasks.LETTERS)}
    if scenario == tasks.SCENARIOS[0]:
        named = {"classes": list(_digits.CLASSES), "new_head": len(_digits.CLASSES)}
    edgetune.export(
        tasks.pretrained(seed), torch.zeros(2, 1, tasks.SIDE, tasks.SIDE), folder / "bundle", last=5,
        codec="hosvd+dense", optimizer="adamw", mean=_digits.PREPROCESS.mean, std=_digits.PREPROCESS.std, **named,
    )  # fmt: skip
    parts = tasks.stream(scenario, seed, train, test)
    arrays: dict[str, Any] = {"names": np.array([part.name for part in parts])}
    for index, part in enumerate(parts):
        arrays |= {f"train_{index}": part.train[0], f"train_labels_{index}": part.train[1]}
        arrays |= {f"test_{index}": part.test[0], f"test_labels_{index}": part.test[1]}
    np.savez(folder / "tasks.npz", **arrays)


def run(work: Path, cell: Cell, epochs: int) -> None:
    """Run a cell in a process of its own, if its file is not there."""
    target, own = work / f"{cell.name}.json", work / cell.name
    if target.exists():
        return
    shutil.rmtree(own, ignore_errors=True)
    folder = work / f"{cell.scenario}-{cell.seed}"
    config = {
        "batch": BATCH, "epochs": epochs, "seed": cell.seed, "checkpoint_every": 1000, "codec": cell.codec,
        "activation_budget_bytes": parse_bytes(cell.budget), "tail_micro_batch": BATCH, "hyper": HYPER,
        "cache_bytes": 16 * 2**20,
        "replay": {"kind": cell.replay},
    }  # fmt: skip
    told = {"bundle": str(folder / "bundle"), "tasks": str(folder / "tasks.npz"), "work": str(own), "config": config}
    script = Path(__file__).with_name("continual_run.py")
    # One thread: the cells share the machine, and none may depend on how many there are.
    done = subprocess.run(
        [sys.executable, str(script), json.dumps(told)], capture_output=True, text=True, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{cell.name}: {done.stderr[-2000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    temporary = target.with_suffix(".tmp")
    temporary.write_text(json.dumps(found))
    temporary.rename(target)
    shutil.rmtree(own)
    print(cell.name, f"{found['seconds']:.0f} s", flush=True)


@dataclass(frozen=True)
class Row:
    """One line of the table: means over the seeds; ``spread`` is the standard deviation of the accuracy (None: one)."""

    accuracy: float
    spread: float | None
    forgetting: float
    backward: float
    forward: float
    promoted: float
    peak_mib: float | None
    saved_kib: float
    plan: str
    steps: int
    replay_kib: float


def row_of(found: Sequence[dict[str, Any]]) -> Row:
    """Return the line of the seeds of one cell."""

    def mean(values: Sequence[float | None]) -> float:
        return statistics.fmean(value for value in values if value is not None)

    accuracies = [average_accuracy(one["matrix"]) or 0.0 for one in found]
    peaks = [one["measured_peak_bytes"] for one in found if one["measured_peak_bytes"] is not None]
    plans = {
        f"{one['trained']} layers" + ("" if one["epsilon"] is None else f", ε {one['epsilon']:.2f}") for one in found
    }
    return Row(
        accuracy=mean(accuracies),
        spread=statistics.stdev(accuracies) if len(accuracies) > 1 else None,
        forgetting=mean([forgetting(one["matrix"]) for one in found]),
        backward=mean([backward_transfer(one["matrix"]) for one in found]),
        forward=mean([forward_transfer(one["matrix"], one["before"]) for one in found]),
        promoted=mean([average_accuracy(one["promoted"]) for one in found]),
        peak_mib=max(peaks) / 2**20 if peaks else None,
        saved_kib=mean([one["saved_bytes"] for one in found]) / 2**10,
        plan=" / ".join(sorted(plans)),
        steps=round(mean([one["steps"] for one in found])),
        replay_kib=mean([one["replay_bytes"] for one in found]) / 2**10,
    )


def collected(work: Path, cells: Sequence[Cell]) -> dict[tuple[str, str, str, str], list[dict[str, Any]]]:
    """Return what was found, by scenario, budget, codec and replay; over the seeds that are there."""
    found: dict[tuple[str, str, str, str], list[dict[str, Any]]] = {}
    for cell in cells:
        file = work / f"{cell.name}.json"
        if file.exists():
            key = (cell.scenario, cell.budget, cell.codec, cell.replay)
            found.setdefault(key, []).append(json.loads(file.read_text()))
    return found


def table(found: dict[tuple[str, str, str, str], list[dict[str, Any]]], scenario: str) -> list[str]:
    """Return the table of a scenario as Markdown."""
    lines = [
        "| budget | codec | trained | replay | accuracy | forgetting | backward | forward | promoted | kept | peak | "
        "steps | buffer |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (name, budget, codec, replay), ones in found.items():
        if name == scenario:
            row = row_of(ones)
            peak = "-" if row.peak_mib is None else f"{row.peak_mib:.1f} MiB"
            spread = "" if row.spread is None else f" ± {100 * row.spread:.1f}"
            lines.append(
                f"| {budget} | {codec} | {row.plan} | {replay} | {100 * row.accuracy:.1f}{spread} | "
                f"{100 * row.forgetting:.1f} | {100 * row.backward:+.1f} | {100 * row.forward:+.1f} | "
                f"{100 * row.promoted:.1f} | {row.saved_kib:.0f} KiB | {peak} | {row.steps} | "
                f"{row.replay_kib:.0f} KiB |"
            )
    return lines


def picture(found: dict[tuple[str, str, str, str], list[dict[str, Any]]], scenario: str) -> str:
    """Return how the mean accuracy on the tasks so far goes from task to task, for the largest budget, as SVG."""
    frame, chosen = Frame(), {key: ones for key, ones in found.items() if key[0] == scenario}
    budget = next(iter(chosen))[1]
    names = next(iter(chosen.values()))[0]["tasks"]
    ticks = [(index / (len(names) - 1), f"after {name}") for index, name in enumerate(names)]
    parts = frame.axes(ticks, evenly(0, 1, "{:.0f}", 100), "", "mean accuracy on the tasks so far, %")
    curves = [(key, ones) for key, ones in chosen.items() if key[1] == budget]
    for index, ((_, _, codec, replay), ones) in enumerate(curves):
        means = [statistics.fmean(_so_far(one["matrix"], task) for one in ones) for task in range(len(names))]
        places = [frame.at(task / (len(names) - 1), value) for task, value in enumerate(means)]
        style = ' stroke-width="1.5"' + (' stroke-dasharray="5 3"' if codec == "hosvd" else "")
        parts += [line(places, _COLORS[replay], style), *dots(places, _COLORS[replay], 3)]
        parts += frame.legend(index, f"{replay}, {codec}" + (" (dashed)" if codec == "hosvd" else ""), _COLORS[replay])
    return document(parts, 820, 440, f"{scenario}, {budget}", frame.middle)


def _so_far(matrix: Sequence[Sequence[float]], task: int) -> float:
    return statistics.fmean(matrix[task][: task + 1])


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing of the grid, print its tables, and write its pictures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--work", type=Path, required=True, help="folder for bundles, runs and what they found")
    parser.add_argument("--seeds", default="0", help="such as 0,1,2")
    parser.add_argument("--scenarios", default=",".join(tasks.SCENARIOS))
    parser.add_argument("--budgets", default=",".join(BUDGETS))
    parser.add_argument("--pictures", type=Path, help="folder for the pictures; none without")
    parser.add_argument("--jobs", type=int, default=1, help="cells at a time")
    parser.add_argument("--train", type=int, default=TRAIN)
    parser.add_argument("--test", type=int, default=TEST)
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--only-show", action="store_true", help="run nothing")
    told = parser.parse_args(arguments)
    scenarios, seeds = told.scenarios.split(","), [int(seed) for seed in told.seeds.split(",")]
    if unknown := set(scenarios) - set(tasks.SCENARIOS):
        raise UsageError(f"unknown: {', '.join(unknown)}; choose of: {', '.join(tasks.SCENARIOS)}")
    cells = list(grid(scenarios, seeds, told.budgets.split(",")))
    if not told.only_show:
        for seed, scenario in itertools.product(seeds, scenarios):
            prepare(told.work, scenario, seed, told.train, told.test)
        with ThreadPoolExecutor(told.jobs) as pool:
            list(pool.map(lambda cell: run(told.work, cell, told.epochs), cells))
    found = collected(told.work, cells)
    for scenario in scenarios:
        print(f"\n### {scenario}\n" + "\n".join(table(found, scenario)))
        if told.pictures is not None:
            file = told.pictures / f"continual-{scenario}.svg"
            file.write_text(picture(found, scenario), "utf-8")


if __name__ == "__main__":
    main()
