"""Accuracy against memory: every codec and the planner's mix, fine-tuned on data that drifted.

    python tools/accuracy.py                                   both tasks, three seeds; writes docs/accuracy.md
    python tools/accuracy.py --task digits --seed 0 --codec dense --codec hosvd --markdown -

A small residual network for digits, and one of inverted residuals (depthwise) for glyphs, are pretrained on clean data;
then the last four layers and the head are trained on drifted data, once per codec, rate and seed. Each plan runs in a
process of its own, which reports accuracy on held-out drifted data, what the forward pass left, and the high-water mark
of its steps. Runs that --json holds already are not repeated, so what was interrupted goes on. Glyphs need the fonts
of matplotlib (pip install matplotlib); what was found is said. Needs Linux with glibc.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from tools import accuracy_curves as curves  # noqa: E402 - the path comes first

if TYPE_CHECKING:
    from tools.accuracy_run import Outcome
    from tools.accuracy_study import Arm, Study
    from tools.accuracy_tasks import Task

TASKS = ("digits", "glyphs")
SEEDS = (0, 1, 2)
BATCH, LAST = 64, 4
STEPS = {"digits": 200, "glyphs": 200}
LEARNING_RATE = {"digits": 0.003, "glyphs": 0.01}
PAGE = ROOT / "docs" / "accuracy.md"
_MARK = "outcome: "

Measure = Callable[[Path, Path, str, Any], "Outcome"]


def in_a_fresh_process(folder: Path, plan: Path, engine: str, schedule: Any) -> Outcome:
    """Run ``accuracy_run.fine_tune`` in a process that starts from nothing.

    Raises:
        RuntimeError: it failed.
    """
    from tools.accuracy_run import Outcome

    job = json.dumps([str(folder), str(plan), engine, dataclasses.asdict(schedule)])
    command = [sys.executable, str(Path(__file__).resolve()), "--measure", job]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT)
    found = [line for line in done.stdout.splitlines() if line.startswith(_MARK)]
    if done.returncode or not found:
        raise RuntimeError(f"a run failed: {done.stderr[-2000:]}")
    return Outcome(**json.loads(found[-1].removeprefix(_MARK)))


def measure(job: str) -> None:
    """Run in the fresh process: print the outcome as one line."""
    from tools.accuracy_run import Schedule, fine_tune

    folder, plan, engine, schedule = json.loads(job)
    outcome = fine_tune(Path(folder), Path(plan), engine, Schedule(**schedule))
    print(_MARK + json.dumps(dataclasses.asdict(outcome)))


def make_task(name: str, seed: int) -> Task:
    """Return the task's data.

    Raises:
        UsageError: scikit-learn or the fonts are missing.
    """
    from tools import accuracy_tasks

    return accuracy_tasks.digits(seed) if name == "digits" else accuracy_tasks.glyphs(seed, accuracy_tasks.found())


def run_seed(
    study: Study, arms: Sequence[Arm], seed: int, steps: int, known: Sequence[curves.Run], run: Measure
) -> Iterator[curves.Run]:
    """Fine-tune with every plan that ``known`` lacks, and yield those runs one by one."""
    from tools.accuracy_run import Schedule

    schedule = Schedule(steps, study.batch, LEARNING_RATE[study.task.name], seed)
    name = study.task.name
    held = {(one.series, one.knob, one.engine) for one in known if (one.task, one.seed) == (name, seed)}
    for arm in arms:
        if (arm.series, arm.knob, arm.engine) in held:
            continue
        begin = time.perf_counter()
        outcome = run(study.folder / arm.bundle, study.write(arm), arm.engine, schedule)
        saved, labels = study.saved(arm), list(arm.plan.selection.values())
        choice = ", ".join(f"{labels.count(label)} {label}" for label in dict.fromkeys(labels))
        one = curves.Run(
            name, seed, arm.series, arm.knob, arm.engine, outcome.before, outcome.after, outcome.peak_bytes,
            outcome.held_bytes, saved.codecs, saved.masks, saved.other, arm.plan.error, outcome.energy,
            outcome.refreshes, choice, round(time.perf_counter() - begin, 2),
        )  # fmt: skip
        print(
            f"{name} {seed}: {arm.key}: {100 * one.before:.1f} -> {100 * one.after:.1f} %, held "
            f"{one.held_bytes / curves.KIB:.0f} KiB, peak {one.peak_bytes / curves.MIB:.2f} MiB, {one.seconds:.1f} s",
            file=sys.stderr, flush=True,
        )  # fmt: skip
        yield one


def page(runs: Sequence[curves.Run], bases: Sequence[curves.Base], origin: str, about: dict[str, str]) -> str:
    """Return the Markdown page."""
    lines = ["# Accuracy against memory", "", origin, "", *_LEGEND.splitlines()]
    for task in dict.fromkeys(run.task for run in runs):
        some = [run for run in runs if run.task == task]
        every = curves.points(some)
        autograd = statistics.fmean(base.autograd_bytes for base in bases if base.task == task)
        before = statistics.fmean(run.before for run in some)
        seeds = sorted({run.seed for run in some})
        complete = all(len(point.seeds) == len(seeds) for point in every)
        lines += [
            "",
            f"## {task.capitalize()}",
            "",
            f"{about.get(task, '')} Before fine-tuning {100 * before:.1f} % of the held-out drifted images are named "
            f"rightly. Ordinary PyTorch keeps {autograd / curves.KIB:,.0f} KiB for the backward pass of the same "
            f"layers (measured by its hooks, every storage once). Seeds: {', '.join(map(str, seeds))}."
            + ("" if complete else " **Not every plan ran with all of them; means are over those it ran with.**"),
            "",
            f"![accuracy over peak](accuracy-{task}.svg)",
            "",
            *curves.table(every, autograd),
            "",
            *verdicts(every, autograd),
        ]
    return "\n".join(lines).rstrip() + "\n"


def verdicts(every: Sequence[curves.Point], autograd: float) -> list[str]:
    """Return what is met and what is not, of one task."""
    mixes = [p for p in every if p.series == curves.MIX]
    singles = [p for p in every if p.series != curves.MIX and p.engine == "onnxruntime"]
    lines = curves.target_lines(every, autograd)
    for axis, words in (("peak_bytes", "measured peak"), ("held_bytes", "saved bytes, measured")):
        if mixes:
            lines += curves.contest_lines(curves.contests(singles, mixes, axis), words)
    return lines


_LEGEND = f"""\
A network is pretrained on clean data. Then its last layers and the head are trained on data that have drifted,
batch {BATCH}, with AdamW, gradients clipped at 1, batch-norm frozen. Bases, ranks and the errors by which the planner
chooses come from the first two batches of the drifted stream; where the energy certificate asks for it, bases are
measured anew. All plans of a seed see the same batches in the same order. How many layers are trained was set before
any accuracy was known; images, steps and learning rate were chosen with the dense codec on data of another seed, a part
of its stream standing for the test. No plan, rate or budget was chosen by what came out here.

- **saved**: what the plan says is alive after the forward pass for the backward pass. *codec*: inputs of the trained
  layers, the head's included, which stays whole. *masks*: signs of ReLU, one bit per element. *other*: the rest.
- **left by the forward pass**: the same, measured: bytes in use (glibc, `mallinfo2`) when it has ended, above those
  with the targets alone. **× below PyTorch** is by these bytes.
- **peak of a step**: forward, backward and update, above what was resident before the step's features were there: the
  high-water mark of a fresh process, reset for every step; the most of six steps, mean over the seeds.
- **accuracy**: on held-out drifted data, mean and standard deviation over the seeds; **- dense**: difference in points,
  seed by seed, from dense on the same engine. **energy**: captured, of the worst tensor, mean over the steps.
- The **planner's mix** is `--allocation per-layer` over a menu of all codecs but `hosvd-exact`: under a budget for
  the process, between the least possible peak and that of dense, or, without `recompute`, under an activation budget (a
  share of dense), which does not count what `recompute` starts from.
- It is compared with each single codec at equal or less memory (1 % is equal). Of the mixes that small, the one with
  the least calibrated gradient error stands for all. *within noise*: below by less than twice the standard error.
"""


def main(arguments: Sequence[str] | None = None, run: Measure = in_a_fresh_process) -> int:
    """Measure, and write the page, the pictures and the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", action="append", choices=TASKS, help="may be repeated; default: both")
    parser.add_argument("--seed", type=int, action="append", help="may be repeated; default: 0, 1, 2")
    parser.add_argument("--codec", action="append", help="a codec's label; may be repeated; default: all")
    parser.add_argument("--no-mix", action="store_true", help="leave out the planner's mix of these codecs")
    parser.add_argument("--last", type=int, default=LAST, help=f"trained layers besides the head; default: {LAST}")
    parser.add_argument("--steps", type=int, help=f"of fine-tuning; default: {STEPS}")
    parser.add_argument(
        "--markdown", default=str(PAGE), help="where the page goes, and beside it the pictures; '-': print"
    )
    parser.add_argument("--json", type=Path, help="read the runs that this file holds, and write all to it")
    parser.add_argument("--read-only", action="store_true", help="measure nothing: the page of what --json holds")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.measure:
        measure(args.measure)
        return 0
    from tools.accuracy_study import CODECS, Study
    from tools.accuracy_tasks import pretrained

    data = json.loads(args.json.read_text()) if args.json and args.json.exists() else {}
    runs = [curves.Run(**each) for each in data.get("runs", ())]
    bases = [curves.Base(**each) for each in data.get("bases", ())]
    about, origin = dict[str, str](data.get("about", {})), data.get("origin", "")
    for seed in () if args.read_only else args.seed or SEEDS:
        for name in args.task or TASKS:
            begin, task = time.perf_counter(), make_task(name, seed)
            steps = args.steps or STEPS[name]
            with tempfile.TemporaryDirectory(prefix="edgetune-accuracy-") as scratch:
                study = Study(
                    task, pretrained(task, seed), Path(scratch) / "study", BATCH, args.last, args.codec or CODECS,
                    mixes=not args.no_mix,
                )  # fmt: skip
                arms = study.arms()
                seconds = time.perf_counter() - begin
                print(f"{name} {seed}: {len(arms)} plans after {seconds:.0f} s", file=sys.stderr, flush=True)
                bases = [*(o for o in bases if (o.task, o.seed) != (name, seed))]
                bases.append(curves.Base(name, seed, study.autograd_bytes))
                about[name], origin = _about(study, steps), _origin()
                for one in run_seed(study, arms, seed, steps, tuple(runs), run):
                    runs.append(one)
                    if args.json:
                        _write(args.json, {"origin": origin, "about": about, "bases": bases, "runs": runs})
    text = page(runs, bases, origin, about)
    if args.markdown == "-":
        print(text)
        return 0
    target = Path(args.markdown)
    target.write_text(text)
    for name in dict.fromkeys(one.task for one in runs):
        every = curves.points(one for one in runs if one.task == name)
        picture = curves.svg(every, curves.MIX, f"{name}: batch {BATCH}, mean over the seeds")
        target.with_name(f"accuracy-{name}.svg").write_text(picture)
    return 0


def _write(file: Path, data: dict[str, Any]) -> None:
    text = json.dumps(data, default=dataclasses.asdict, ensure_ascii=False)
    file.write_text(text.replace('}, {"task"', '},\n{"task"') + "\n")


def _about(study: Study, steps: int) -> str:
    layers = ", ".join(
        f"`{layer.name}` {' × '.join(map(str, layer.input_shape))}" for layer in study.bundles["menu"].manifest.layers
    )
    task, rate = study.task, LEARNING_RATE[study.task.name]
    return (
        f"{len(task.pretrain[1])} clean images of {task.pretrain[0].shape[1]}² to pretrain on, {len(task.stream[1])} "
        f"drifted ones to train on for {steps} steps at a learning rate of {rate}, {len(task.test[1])} held out, "
        f"{task.classes} classes. Trained, with the shapes of their inputs: {layers}."
    )


def _origin() -> str:
    from tools.codecs import machine

    threads = f"{len(os.sched_getaffinity(0))} thread(s)"
    return f"Written by `python tools/accuracy.py` on {datetime.date.today().isoformat()} with {threads}: {machine()}."


if __name__ == "__main__":
    sys.exit(main())
