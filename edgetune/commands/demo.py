"""``edgetune demo``: the main job on data that ships with scikit-learn, from a fresh model to the table.

Everything that a device would do runs in processes of its own, through the same commands that a user types: the peaks
in the table are those of a process that never saw torch.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from edgetune.bundle import Array, Bundle
    from edgetune.commands._digits import Digits

LAST, BATCH, STEPS, SIDE = 14, 160, 60, 32
LEARNING_RATE, CLIP_NORM = 5e-4, 1.0
EPSILON = 0.9  # of the run whose peak, together with that of dense training, sets the budget


def demo(
    keep: Annotated[
        Path | None, typer.Option("--keep", help="Keep bundles, data and state in this new directory.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of the data, the model and the order.")] = 0,
) -> None:
    """Let handwritten digits drift, and adapt a model to that under a budget that rules out dense training."""
    from edgetune.errors import UsageError

    if keep is not None and keep.exists():
        raise UsageError(f"'{keep}' exists; give --keep a directory that does not")
    root = Path(tempfile.mkdtemp(prefix="edgetune-demo-")) if keep is None else keep
    root.mkdir(parents=True, exist_ok=True)
    try:
        _Demo(root, seed).run()
    finally:
        if keep is None:
            shutil.rmtree(root, ignore_errors=True)


@dataclass
class _Demo:
    """One demonstration in the directory ``root``."""

    root: Path
    seed: int

    def run(self) -> None:
        import numpy as np

        from edgetune.commands import _digits
        from edgetune.errors import BudgetError

        started = time.perf_counter()
        digits = _digits.load(self.seed)
        rng = np.random.default_rng(self.seed)
        stream = _digits.drift(digits.stream_images, rng)
        test = _digits.drift(digits.test_images, rng)
        bundles = self._export(digits)
        self._say("the same few steps twice, without a budget: dense, and compressed at ε = 0.9")
        first = self.root / "first"
        _digits.write_stream(first, stream[:240], digits.stream_labels[:240])
        few = ("--once", "--epochs", "9", "--max-steps", "4", "--quiet")
        dense = self._train(bundles["dense"], first, "dense", *few)
        compressed = self._train(bundles["hosvd"], first, "fixed", *few, "--epsilon", str(EPSILON))
        budget_bytes = (dense["measured_peak_bytes"] + compressed["measured_peak_bytes"]) // 2
        self._say(
            f"budget for the whole process from here on: {budget_bytes / 2**20:.1f} MiB, half way between the two"
        )
        whole = ("--tail-micro-batch", BATCH, "--trained", LAST)  # else the batch would be trained in pieces
        options = self._run_options("refused", "--budget", budget_bytes, *whole, *few)
        refusal = self._command("run", bundles["dense"].path, "--data", first, *options)
        if refusal.returncode != BudgetError.exit_code:
            raise SystemExit(f"the budget was meant to rule out dense training, and does not\n{refusal.stderr}")
        print(f"     dense training under it is refused: {refusal.stderr.strip().removeprefix('edgetune: ')}")
        self._say("the agent watches a folder; the drifted digits arrive in it")
        self._stream(bundles["hosvd"], stream, digits.stream_labels, budget_bytes)
        accuracies = self._accuracies(bundles["hosvd"], test, digits.test_labels)
        self._table(accuracies, time.perf_counter() - started)

    def _export(self, digits: Digits) -> dict[str, Bundle]:
        import edgetune
        from edgetune.commands import _digits

        self._say("a small residual network learns 800 clean handwritten digits (torch)")
        large = _digits.enlarge(digits.pretrain_images, SIDE)
        model = _digits.pretrain(large, digits.pretrain_labels, seed=self.seed)
        clean = _digits.accuracy(model, _digits.enlarge(digits.test_images, SIDE), digits.test_labels)
        print(f"     accuracy on clean digits that it has not seen: {clean:.1%}")
        self._say(f"export: the last {LAST} layers and the head become trainable, once dense and once compressed")
        bundles = {}
        for codec in ("dense", "hosvd"):
            bundles[codec] = edgetune.export(
                model,
                _digits.to_input(large[:2]),
                self.root / f"digits-{codec}.edgetune",
                last=LAST,
                codec=codec,
                optimizer="adamw",
                classes=_digits.CLASSES,
                mean=_digits.PREPROCESS.mean,
                std=_digits.PREPROCESS.std,
            )
        return bundles

    def _stream(self, bundle: Bundle, images: Array, labels: Array, budget_bytes: int) -> None:
        from edgetune.commands import _digits

        folder = self.root / "stream"
        folder.mkdir()
        options = ["--budget", budget_bytes, "--epochs", 1000, "--max-steps", STEPS]
        process = subprocess.Popen(
            self._line("run", bundle.path, "--data", folder, *self._run_options("hosvd", *options))
        )
        try:
            for first in range(0, len(labels), 100):
                _digits.write_stream(folder, images[first : first + 100], labels[first : first + 100], first=first)
                time.sleep(0.5)
            if process.wait(timeout=280) != 0:
                raise SystemExit(process.returncode)
        finally:
            process.kill()
            process.wait()

    def _train(self, bundle: Bundle, data: Path, state: str, *options: str) -> dict[str, Any]:
        done = self._command("run", bundle.path, "--data", data, *self._run_options(state, *options))
        if done.returncode != 0:
            raise SystemExit(done.stderr)
        return self._json("report", self.root / state)

    def _run_options(self, state: str, *options: object) -> list[object]:
        common = ["--batch", BATCH, "--learning-rate", LEARNING_RATE, "--clip-norm", CLIP_NORM, "--seed", self.seed]
        return ["--state", self.root / state, *common, *options]

    def _accuracies(self, bundle: Bundle, images: Array, labels: Array) -> tuple[float, float]:
        """Return the accuracy on drifted digits that nobody trained on, before and after the run."""
        import edgetune
        from edgetune.agent import checkpoint as checkpoints
        from edgetune.commands import _digits

        session = edgetune.TrainingSession(bundle, edgetune.plan(bundle, batch=BATCH), verify=False)
        inputs = _digits.to_input(_digits.enlarge(images, SIDE))

        def accuracy() -> float:
            return float((session.predict(inputs).argmax(1) == labels).mean())

        before = accuracy()
        trained = checkpoints.load_newest(self.root / "hosvd", lambda path: print(f"     damaged: {path}"))
        assert trained is not None
        session.load_state(trained.tensors)
        return before, accuracy()

    def _table(self, accuracies: tuple[float, float], seconds: float) -> None:
        from rich.console import Console
        from rich.table import Table

        from edgetune.units import format_bytes

        reports = {name: self._json("report", self.root / name) for name in ("dense", "fixed", "hosvd")}
        plans = {name: self._json("status", self.root / name)["plan"] for name in reports}
        last = reports["hosvd"]
        title = f"drifted digits: {last['steps']} steps of {BATCH} samples, last {LAST} layers and the head"
        table = Table(title=f"\n{title}")
        for column in ("", "dense", f"hosvd, ε = {EPSILON}", f"hosvd, ε = {last['epsilon_last']:.3f}"):
            table.add_column(column, justify="right" if column else "left")
        table.add_row("who chose ε", "-", "given", "the budget")

        def sizes(label: str, values: dict[str, int]) -> None:
            table.add_row(label, *(format_bytes(values[name]) for name in ("dense", "fixed", "hosvd")))

        sizes("saved for the backward pass", {name: plan["saved_bytes"] for name, plan in plans.items()})
        sizes("peak of the process, predicted", {name: r["predicted_peak_bytes"] for name, r in reports.items()})
        sizes("peak of the process, measured", {name: r["measured_peak_bytes"] for name, r in reports.items()})
        verdict = "kept at every step" if last["budget_kept"] else f"exceeded at {last['over_budget_steps']} steps"
        table.add_row(f"budget {format_bytes(last['budget_bytes'])}", "refused", "", verdict)
        table.add_row("accuracy on drifted digits, before", "", "", f"{accuracies[0]:.1%}")
        table.add_row("accuracy on drifted digits, after", "", "", f"{accuracies[1]:.1%}")
        table.add_row("seconds, all of the demonstration", "", "", f"{seconds:.0f}")
        Console().print(table)

    # -- processes --------------------------------------------------------------------------------------------------

    def _line(self, *arguments: object) -> list[str]:
        return [sys.executable, "-m", "edgetune", *map(str, arguments)]

    def _command(self, *arguments: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(self._line(*arguments), capture_output=True, text=True, check=False)

    def _json(self, *arguments: object) -> dict[str, Any]:
        done = self._command(*arguments, "--json")
        if done.returncode != 0:
            raise SystemExit(done.stderr)
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    def _say(self, text: str) -> None:
        print(f"==>  {text}", flush=True)
