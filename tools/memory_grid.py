"""Predicted against measured peak memory over a grid of models, batches, codecs and engines; a fresh process per cell.

    python tools/memory_grid.py                            measure what the store lacks, print the table
    python tools/memory_grid.py --only mcunet --again      measure some cells anew
    python tools/memory_grid.py --markdown docs/memory.md  put the table between the marks in that page
    python tools/memory_grid.py --preset tiny              one cell of a small network, for a look

A cell does what ``edgetune run`` does, with pictures instead of files: the runtime's own bytes as the product measures
and remembers them, a session on a first plan, a calibration on two batches, the plan for ε, an evaluation, two warm-up
steps by which the prediction is corrected, and then four more (trunk by the micro-batch, train, update). The process's
own high-water mark (``/proc/self/clear_refs``, VmHWM) is reset before each phase, so nothing is missed and nothing is
sampled. The store is a JSON file with one entry per cell, written as each ends: a run that was interrupted goes on.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tools.memory_subjects import SUBJECTS  # noqa: E402

MIB = 2**20
WARM_UP, STEPS = 2, 4
CALIBRATION_BATCHES = 2
MOST_SAMPLES = 64
PHASES = ("trunk", "train", "update")
BEGIN, END = "<!-- begin: tools/memory_grid.py -->", "<!-- end: tools/memory_grid.py -->"


@dataclass(frozen=True)
class Cell:
    """One place of the grid; ``subject`` is a key of ``memory_subjects.SUBJECTS``, ``last`` as for an export."""

    subject: str
    last: str
    batch: int
    codec: str
    engine: str
    micro_batch: int = 8
    epsilon: float = 0.9

    @property
    def key(self) -> str:
        """The cell's name in the store."""
        return f"{self.subject}-last{self.last}-b{self.batch}-{self.codec}-{self.engine}"


# subject, last, codec, batches: each on both engines
_PLACES = (
    ("unet-64", "all", "int8", (8, 16)),
    ("deeplabv3-96", "all", "hosvd", (8, 32)),
    ("mcunet-96", "8", "hosvd", (32, 64)),
    ("convnet1d-4096", "all", "dense", (32, 64)),
    ("unet-96", "4", "dense", (8, 32)),
    ("vit-64", "4", "hosvd", (16, 64)),
    ("segformer-128", "4", "dense", (8, 32)),
    ("convnext-96", "4", "hosvd", (16, 64)),
    ("mcunet-160", "6", "patch:size=2", (8, 32)),
    ("mobilenet_v2-96", "4", "hosvd", (32, 64)),
    ("resnet18-96", "4", "hosvd", (16, 64)),
    ("resnet18-160", "4", "int8", (8, 32)),
    ("resnet18-96", "6", "dense", (32, 64)),
    ("mobilenet_v2-128", "10", "dense", (8, 32)),
    ("unet3d-16", "all", "hosvd", (8, 16)),
    ("resnet18-224", "4", "hosvd", (16,)),
    ("mobilenet_v2-224", "6", "svd", (8,)),
)
PRESETS: dict[str, list[Cell]] = {
    "full": [
        Cell(subject, last, batch, codec, engine)
        for subject, last, codec, batches in _PLACES
        for batch in batches
        for engine in ("onnxruntime", "torch")
    ],
    "tiny": [Cell("tiny-32", "2", 8, "hosvd", "onnxruntime")],
}


# ---- in processes of their own -------------------------------------------------------------------------------------


def prepare(cell: Cell, folder: Path) -> None:
    """Export the cell's model to ``folder/bundle`` and leave the pictures and targets of two batches beside it."""
    import numpy as np

    import edgetune

    subject = SUBJECTS[cell.subject]
    model = subject.make()
    x, y = subject.draw(CALIBRATION_BATCHES * MOST_SAMPLES, 0)
    last = cell.last if cell.last == "all" else int(cell.last)
    edgetune.export(model, x[:2], folder / "bundle", last=last, codec=cell.codec, loss="cross_entropy")
    np.save(folder / "x.npy", x)
    np.save(folder / "y.npy", y)


def measure(cell: Cell, folder: Path) -> dict[str, Any]:
    """Do what an agent does, once, and return what was predicted and measured; needs a process that did nothing yet."""
    import numpy as np

    from edgetune.agent import baseline
    from edgetune.agent.budget import release_memory
    from edgetune.agent.feeder import Feeder
    from edgetune.agent.timeline import PhasePeaks, timeline_fields
    from edgetune.bundle import Bundle
    from edgetune.engines.calibration import calibrate
    from edgetune.engines.session import TrainingSession
    from edgetune.planning.plan import make_plan
    from edgetune.telemetry.process import PeakMeter, resident_bytes

    began = time.perf_counter()
    bundle = Bundle.open(folder / "bundle")
    runtime_bytes = baseline.runtime_bytes(bundle, cell.engine)
    baseline.load_agent(bundle.manifest)
    x = np.load(folder / "x.npy", mmap_mode="r")
    shape, offset = x.shape[1:], x.offset
    labels = np.load(folder / "y.npy", mmap_mode="r")
    y = np.array(labels[: cell.batch])
    size = int(np.prod(shape))
    del x, labels

    class Pictures(Feeder):
        """A feeder that reads sample number i from the array in the file, and nothing but that."""

        def load(self, sample: Any, *, to_train: bool = False) -> Any:
            return np.fromfile(folder / "x.npy", np.float32, size, offset=offset + 4 * size * sample.place).reshape(
                shape
            )

    @dataclass
    class Row:
        place: int
        label: int = 0
        replayed: bool = False

    @dataclass
    class Shape:
        shape: tuple[int, ...]

    feeder = Pictures(None, Shape(shape))  # type: ignore[arg-type]  # no files are decoded here
    rows = [Row(place) for place in range(CALIBRATION_BATCHES * MOST_SAMPLES)]
    manifest, meter, measured = bundle.manifest, PeakMeter(), dict[str, int]()

    def planned(batch_plan: Any) -> dict[str, int]:
        fields = timeline_fields(manifest, batch_plan, runtime_bytes, {})
        return {name: phase["predicted_bytes"] for name, phase in fields["phases"].items()}

    plan = make_plan(manifest, batch=cell.batch, calibration=None, runtime_bytes=runtime_bytes, epsilon=1.0)
    session = TrainingSession(bundle, plan, engine=cell.engine)
    release_memory()
    meter.reset()
    first = rows[: cell.batch * CALIBRATION_BATCHES]
    known = calibrate(session, manifest, feeder.batches(first, cell.batch, session, cell.micro_batch))  # type: ignore[arg-type]
    calibrated = known is not None
    if calibrated:
        measured["calibrate"] = meter.peak_bytes()
    plan = make_plan(manifest, batch=cell.batch, calibration=known, runtime_bytes=runtime_bytes, epsilon=cell.epsilon)
    del known
    session.set_plan(plan)
    release_memory()
    meter.reset()
    for fed in feeder.images(rows[:16], plan.micro_batch):  # type: ignore[arg-type]
        if fed.samples:
            session.predict(fed.features[0])
        del fed
    measured["predict"] = meter.peak_bytes()
    release_memory()
    before = resident_bytes()
    steps: list[dict[str, int]] = []
    peaks = PhasePeaks(meter)
    session.phase_ended = peaks.ended
    for _ in range(WARM_UP + STEPS):
        waiting = rows[: cell.batch]
        peaks.begin()
        fed = feeder.feed(waiting.pop, cell.batch, session, plan.micro_batch)  # type: ignore[arg-type]
        peaks.ended("trunk")
        features, fed.features = list(fed.features), ()
        session.step_features(features, y)
        steps.append(dict(peaks.measured_bytes))
    predicted = planned(plan)
    return {
        "resettable": meter.resettable,
        "runtime_bytes": runtime_bytes,
        "predicted": predicted,
        "others": _others(manifest, plan, runtime_bytes),
        "measured": measured,
        "steps": steps,
        "before_bytes": before,
        "micro_batch": plan.micro_batch,
        "saved_bytes": plan.saved_bytes,
        "ledger": dict(plan.ledger),
        "bottleneck": plan.bottleneck,
        "finite": bool(session.report.applied),
        "seconds": round(time.perf_counter() - began, 1),
    }


def _others(manifest: Any, plan: Any, runtime_bytes: int) -> dict[str, int]:
    """Return what is predicted for the phases that are no part of a step."""
    from edgetune.planning.prediction import predict
    from edgetune.planning.rebase import settled_for

    made = predict(
        settled_for(manifest, plan), batch=plan.batch, micro_batch=plan.micro_batch, ranks=plan.ranks,
        runtime_bytes=runtime_bytes, tail_micro_batch=plan.tail_micro_batch,
    )  # fmt: skip
    fixed = made.peak_bytes - max(peak.bytes for peak in made.peaks.values())
    return {name: fixed + made.peaks[name].bytes for name in ("calibrate", "predict") if name in made.peaks} | {
        "fixed": fixed
    }


# ---- what is found -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Figures:
    """One row of the table, in bytes: first prediction, warm-up, corrected prediction, the most of the later
    steps, and how much of that the step adds to what is resident before it."""

    predicted: int
    warm: int
    corrected: int
    measured: int
    step: int

    @property
    def error(self) -> float:
        """Of the first prediction of the process's peak."""
        return self.predicted / self.measured - 1

    @property
    def step_error(self) -> float:
        """The same difference over what the step adds to what is resident before it: no runtime hides it."""
        return (self.predicted - self.measured) / self.step


def figures(found: dict[str, Any], engine: str) -> Figures:
    """Return what a cell's entry in the store comes to: the first steps are the warm-up, all others are measured."""
    from edgetune.agent.timeline import corrected_bytes

    predicted = max(found["predicted"].values())
    peaks = [max(step.values()) for step in found["steps"]]
    warm, rest = max(peaks[:WARM_UP]), peaks[WARM_UP:]
    return Figures(predicted, warm, corrected_bytes(warm, engine), max(rest), max(rest) - found["before_bytes"])


def table(store: dict[str, Any], cells: Sequence[Cell]) -> str:
    """Return the cells of ``store`` as Markdown, and what they come to."""
    import statistics

    heads = ("model", "N", "batch", "codec", "engine", "predicted", "measured", "error", "of it the step",
             "error of the step", "corrected")  # fmt: skip
    lines = ["| " + " | ".join(heads) + " |", "|---|---|---:|---|---|" + "---:|" * 6]
    rows = [(cell, figures(store[cell.key], cell.engine)) for cell in cells if "steps" in store.get(cell.key, {})]
    for cell, row in rows:
        sizes = (row.predicted, row.measured, row.step, row.corrected)
        a, b, c, d = (f"{size / MIB:.1f}" for size in sizes)
        lines.append(
            f"| {cell.subject} | {cell.last} | {cell.batch} | {cell.codec} | {cell.engine} | {a} | {b} | "
            f"{row.error:+.1%} | {c} | {row.step_error:+.1%} | {d} |"
        )
    if rows:
        errors = sorted(abs(row.error) for _, row in rows)
        alone = sorted(abs(row.step_error) for _, row in rows)
        over = sum(row.measured > row.corrected for _, row in rows)
        later = max(row.measured - row.warm for _, row in rows)
        lines += [
            "",
            f"{len(rows)} cells, MiB. First prediction of the process's peak: median error "
            f"{statistics.median(errors):.1%}, worst {errors[-1]:.1%}. Of the step alone: median "
            f"{statistics.median(alone):.1%}, worst {alone[-1]:.1%}. "
            f"Measured above the corrected prediction: {over}; a later step took at most {later / MIB:.1f} MiB more "
            "than the warm-up.",
        ]
    return "\n".join(lines)


def put_between_marks(page: Path, text: str) -> None:
    """Replace what stands between the marks in ``page``.

    Raises:
        SystemExit: the page has no marks.
    """
    old = page.read_text("utf-8")
    if BEGIN not in old or END not in old:
        raise SystemExit(f"{page} lacks the marks '{BEGIN}' and '{END}', between which the table goes")
    head, rest = old.split(BEGIN, 1)
    page.write_text(f"{head}{BEGIN}\n{text}\n{END}{rest.split(END, 1)[1]}", "utf-8")


# ---- the parent ----------------------------------------------------------------------------------------------------


def run_cell(cell: Cell, work: Path) -> dict[str, Any]:
    """Measure one cell; where a process fails the entry is ``{"error": its last words}``."""
    name = f"{cell.subject}-last{cell.last}-{cell.codec}".replace(":", "_").replace("=", "_")
    folder = work / name
    told = json.dumps(asdict(cell))
    if not (folder / "y.npy").exists():
        folder.mkdir(parents=True, exist_ok=True)
        error = _child("prepare", told, folder, work)[1]
        if error:
            return {"error": error}
    found, error = _child("measure", told, folder, work)
    return {"error": error} if error else json.loads(found)


def _child(what: str, told: str, folder: Path, work: Path) -> tuple[str, str]:
    """Run this file in a new process; return its last line, and why it failed or an empty text."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(work / "cache"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(Path(__file__).resolve()), what, told, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    lines = (done.stderr if done.returncode else done.stdout).strip().splitlines() or [""]
    return ("", lines[-1] or f"status {done.returncode}") if done.returncode else (lines[-1], "")


def main(arguments: Sequence[str] | None = None, say: Callable[[str], None] = print) -> None:
    """Measure what is missing and show the table."""
    import argparse  # not in the processes that are measured

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="full")
    parser.add_argument("--only", default="", help="cells whose name contains this")
    parser.add_argument("--again", action="store_true", help="measure also what the store has")
    parser.add_argument("--store", type=Path, default=Path("memory_grid.json"))
    parser.add_argument("--work", type=Path, default=Path("memory_grid"), help="bundles, and what is remembered")
    parser.add_argument("--markdown", type=Path, help="the page that takes the table")
    args = parser.parse_args(arguments)
    store: dict[str, Any] = json.loads(args.store.read_text("utf-8")) if args.store.exists() else {}
    cells = [cell for cell in PRESETS[args.preset] if args.only in cell.key]
    for cell in cells:
        if args.again or "steps" not in store.get(cell.key, {}):
            store[cell.key] = run_cell(cell, args.work.resolve())
            args.store.write_text(json.dumps(store, indent=1), "utf-8")
            found = store[cell.key]
            row = None if "error" in found else figures(found, cell.engine)
            told = found["error"] if row is None else f"{row.error:+.1%}, step alone {row.step_error:+.1%}"
            print(f"{cell.key}: {told}", file=sys.stderr, flush=True)
    text = table(store, cells)
    if args.markdown:
        put_between_marks(args.markdown, text)
    else:
        say(text)


if __name__ == "__main__":
    if sys.argv[1:2] == ["prepare"]:
        prepare(Cell(**json.loads(sys.argv[2])), Path(sys.argv[3]))
    elif sys.argv[1:2] == ["measure"]:
        print(json.dumps(measure(Cell(**json.loads(sys.argv[2])), Path(sys.argv[3]))))
    else:
        main()
