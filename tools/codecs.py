"""Every codec on a ResNet, a MobileNet, a vision transformer and a U-Net: memory, gradient error, time.

    python tools/codecs.py                                     all of it; writes docs/codecs-measured.md
    python tools/codecs.py --model unet --codec dct --codec hosvd --markdown - --json figures.json

A bundle per model has all codecs in its menu. Gradient errors are found here; memory and time by a process of its own
for every plan and engine, in which nothing was measured before.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import multiprocessing
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from tools.codec_memory import Memory, measure  # noqa: E402 - the path comes first

if TYPE_CHECKING:
    from tools.codec_study import Export, Rate
    from tools.codec_subjects import Subject

ENGINES = ("onnxruntime", "torch")
RATES = (10.0, 4.0)
PAGE = ROOT / "docs" / "codecs-measured.md"
_KIB = 1024

Measure = Callable[[Path, Path, Path, str, float], Memory]


@dataclass(frozen=True)
class Row:
    """A codec: what was found at each rate (the first is the one that was measured), and by engine its memory."""

    rates: tuple[Rate, ...]
    memory: dict[str, Memory]


@dataclass(frozen=True)
class Table:
    """One model. ``failures`` tell what could not be measured, and why."""

    subject: Subject
    export: Export
    dense_bytes: int
    rows: tuple[Row, ...]
    failures: tuple[str, ...]


def study(
    subject: Subject,
    codecs: Sequence[str],
    rates: Sequence[float],
    engines: Sequence[str],
    seconds: float,
    run: Measure,
    tell: Callable[[Table], None],
) -> Table:
    """Return the figures of ``subject``; ``run`` measures one plan, ``tell`` gets what there is after each codec."""
    from edgetune.errors import EdgeTuneError
    from tools.codec_study import Study

    with tempfile.TemporaryDirectory(prefix="edgetune-codecs-") as scratch:
        made = Study(subject, codecs, Path(scratch))
        dense = made.write("dense-baseline", made.dense)
        table = Table(subject, made.export, made.dense.dense_saved_bytes, (), ())
        for codec in dict.fromkeys(("dense", *codecs)):
            plans = made.plans(codec, rates)
            found = tuple(made.rate(codec, wanted, knob, plan) for wanted, knob, plan in plans)
            folder, memory, failures = made.write(codec, plans[0][2]), dict[str, Memory](), []
            for engine in engines:
                try:
                    memory[engine] = run(made.folder, folder, dense, engine, seconds)
                except EdgeTuneError as error:
                    failures.append(f"{codec}, {engine}: {error}")
            table = dataclasses.replace(
                table, rows=(*table.rows, Row(found, memory)), failures=(*table.failures, *failures)
            )
            tell(table)
        return table


def eta(memory: Memory, dense: Memory) -> float:
    """Return η in percent (DCT/WT/ST paper, eq. 34): (M - M_BL) / (M_BL - M_O) x 100.

    M is what is in use after the forward pass, M_BL that of dense. M_O is what was in use before: the paper counts
    parameters and the like; here also the bases and constants of the codec itself, which have a column of their own.
    """
    return 100.0 * (memory.held - dense.held) / dense.held


def in_a_fresh_process(folder: Path, plan: Path, dense: Path, engine: str, seconds: float) -> Memory:
    """Run ``measure`` in a process that starts from imported modules alone."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tools.codec_memory", "torch", "onnx", "onnxruntime"])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(measure, folder, plan, dense, engine, seconds).result()


HEADS = (
    "codec", "knob", "planned, KiB", "of dense", "η, onnxruntime", "η, torch", "held, KiB", "standing, KiB",
    "peak of a step, KiB", "error", "at another rate", "in all", "× s, onnxruntime", "× s, torch",
)  # fmt: skip


def cells(row: Row, table: Table) -> tuple[str, ...]:
    """Return the cells of a codec's line, in the order of ``HEADS``."""
    first, base = row.rates[0], table.rows[0].memory
    rate_knob = "—" if first.knob is None else f"ε {first.knob:.2f}" if first.knob <= 1 else f"λ {first.knob:.1f}"
    memory = [row.memory.get(engine) for engine in ENGINES]
    before = [base.get(engine) for engine in ENGINES]
    pairs = list(zip(memory, before, strict=True))
    shown = next(((m, b) for m, b in pairs if m and b), None)
    held = f"{shown[0].held / _KIB:,.0f}" if shown else "—"
    standing = f"{(shown[0].resident - shown[1].resident) / _KIB:+,.0f}" if shown else "—"
    peak = f"{shown[0].peak / _KIB:,.0f}" if shown else "—"
    others = ", ".join(f"{r.mean_error:.2g} (1/{r.wanted:g})" for r in row.rates[1:]) or "—"
    return (
        f"`{first.codec}`",
        rate_knob,
        f"{first.saved_bytes / _KIB:,.0f}",
        f"1/{table.dense_bytes / max(first.saved_bytes, 1):.1f}",
        *(f"{eta(m, b):.0f} %" if m and b else "—" for m, b in pairs),
        held,
        standing,
        peak,
        f"{first.mean_error:.2g}",
        others,
        f"{first.total_error:.2g}",
        *(f"{m.seconds / m.dense_seconds:.2f}" if m else "—" for m in memory),
    )


def markdown(tables: Sequence[Table], origins: Sequence[str]) -> str:
    """Return the page; ``origins`` tell how, when and where the figures were found."""
    lines = ["# Codecs, measured", "", *origins, "", *_LEGEND.splitlines()]
    for table in tables:
        s, e = table.subject, table.export
        trained = "all layers" if s.last == "all" else f"the last {s.last} layers"
        shape = f"{s.batch} × 3 × {s.side} × {s.side}"
        lines += [
            "",
            f"## {s.name}",
            "",
            f"Batch {shape}; {trained} and the head are trained, `--compress {s.compress}`. Dense: "
            f"{table.dense_bytes / _KIB:,.0f} KiB in {_tensors(table)}. The bundle with the whole menu took "
            f"{e.seconds:.0f} s to export; its train graph has {e.nodes:,} nodes, its manifest "
            f"{e.manifest_bytes / 2**20:.1f} MiB.",
            "",
            "| " + " | ".join(HEADS) + " |",
            "|" + "---|" * len(HEADS),
            *("| " + " | ".join(cells(row, table)) + " |" for row in table.rows),
            *_missing(table),
            *("" if not table.failures else "\n" + "\n".join(f"- {text}" for text in table.failures),),
        ]
    return "\n".join(lines).rstrip() + "\n"


def _missing(table: Table) -> list[str]:
    from tools.codec_study import CODECS

    found = {row.rates[0].codec for row in table.rows}
    names = ", ".join(f"`{codec}`" for codec in CODECS if codec not in found)
    return ["", f"Not measured: {names}."] if names else []


def _tensors(table: Table) -> str:
    count = table.export.saved
    return f"{count} saved tensor{'s' if count != 1 else ''}"


_LEGEND = """\
Real activations, of models that were not trained: the weights are drawn, batch-norms are set to the data, and the data
are random crops of scikit-learn's two photographs. Bases and ranks come from two other batches of crops. Errors of a
trained model will be others; take from here what costs what, and the order of the codecs with care.

- **knob**: ε of every mode, or the λ of which each one element is kept. It was chosen such that all saved tensors but
  those of the head, which are never compressed, take at most a tenth of dense; codecs without a knob have their own
  rate. Where a codec cannot go so low (`svd` keeps one singular vector of the batch at least) it has its least.
- **planned**: what the plan says that the saved tensors take, head included. **of dense**: its share.
- **η** of the DCT/WT/ST paper, eq. 34, (M - M_BL) / (M_BL - M_O): -100 % would be that nothing is left after the
  forward pass, 0 % that nothing is saved. M is what the allocator (glibc, `mallinfo2`) has in use when the forward pass
  has ended, in a fresh process; M_BL that of dense; M_O what was in use before, with the targets alone. All that the
  forward pass leaves counts: stored tensors, ReLU masks, pooling indices, the features where they are read again.
- **held**: M - M_O. **standing**: what the process has in use between two steps, above what dense has then: bases,
  matrices of transforms, and the engine's own memory for the nodes of encoders and decoders. **peak**: the high-water
  mark of the process over a whole step above what was resident before it (`VmHWM`, reset). These three are of
  onnxruntime, the default engine.
- **error**: ‖dW̃ - dW‖ / ‖dW‖ of a layer's weight gradient, mean over the layers whose input the codec keeps; dW is
  that of dense on the same batch. **at another rate**: the same where another share is kept. **in all**: of all trained
  tensors as one vector.
- **× s**: seconds of a step (forward, encode, backward with decode, update) over those of dense, run in turn in the
  same process; medians. The line of `dense` compares dense with itself: what it is off by is noise.
"""


def machine() -> str:
    """Return versions and processor."""
    import onnxruntime
    import torch

    import edgetune

    cpu = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            cpu = line.partition(":")[2].strip()
            break
    cores, load = len(os.sched_getaffinity(0)), os.getloadavg()[1]
    return (
        f"EdgeTune {edgetune.__version__}, onnxruntime {onnxruntime.__version__}, torch {torch.__version__}, Python "
        f"{platform.python_version()}, {cores} cores of {cpu} ({platform.system()}), load average {load:.1f}"
    )


def main(arguments: Sequence[str] | None = None, run: Measure = in_a_fresh_process) -> int:
    """Measure, and write the page."""
    from tools.codec_study import CODECS
    from tools.codec_subjects import SUBJECTS

    names = [subject.name for subject in SUBJECTS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", choices=names, help="may be repeated; default: all")
    parser.add_argument("--codec", action="append", help="a codec's label; may be repeated; default: all")
    parser.add_argument("--engine", action="append", choices=ENGINES, help="may be repeated; default: both")
    parser.add_argument("--batch", type=int, help="samples per step, for every model")
    parser.add_argument("--last", help="trained layers besides the head, for every model: a number or 'all'")
    parser.add_argument("--rate", type=float, action="append", help=f"dense over kept; the first is measured; {RATES}")
    parser.add_argument("--seconds", type=float, default=1.0, help="for the timing of one codec on one engine")
    parser.add_argument("--markdown", default=str(PAGE), help="where the page goes; '-' for standard output")
    parser.add_argument("--json", type=Path, help="write the figures to this file, too")
    parser.add_argument("--read", type=Path, action="append", help="measure nothing: take figures that --json wrote")
    args = parser.parse_args(arguments)
    begin = time.perf_counter()
    tables, origins = list[Table](), list[str]()
    for file in args.read or ():
        data = json.loads(file.read_text())
        tables += [_table(entry) for entry in data["tables"]]
        origins.append(data["origin"])
    for subject in () if args.read else SUBJECTS:
        if args.model and subject.name not in args.model:
            continue
        last = subject.last if args.last is None else int(args.last) if args.last.isdigit() else args.last
        chosen = dataclasses.replace(subject, batch=args.batch or subject.batch, last=last)

        def tell(table: Table, done: tuple[Table, ...] = tuple(tables)) -> None:
            codec = table.rows[-1].rates[0].codec
            print(f"{table.subject.name}: {codec}, {time.perf_counter() - begin:.0f} s", file=sys.stderr, flush=True)
            origins[:] = [_origin(arguments, time.perf_counter() - begin)]
            if args.json:
                data = {"origin": origins[0], "tables": [_plain(each) for each in (*done, table)]}
                args.json.write_text(json.dumps(data, indent=1))

        rates, engines = args.rate or RATES, args.engine or ENGINES
        tables.append(study(chosen, args.codec or CODECS, rates, engines, args.seconds, run, tell))
    page = markdown(sorted(tables, key=lambda table: names.index(table.subject.name)), origins)
    if args.markdown == "-":
        print(page)
    else:
        Path(args.markdown).write_text(page)
    return 1 if any(table.failures for table in tables) else 0


def _origin(arguments: Sequence[str] | None, seconds: float) -> str:
    given = list(arguments if arguments is not None else sys.argv[1:])
    for place in ("--json", "--markdown"):  # where things were written to is nobody's business
        if place in given:
            del given[given.index(place) : given.index(place) + 2]
    command = " ".join(["python tools/codecs.py", *given])
    return f"Written by `{command}` on {datetime.date.today().isoformat()} in {seconds / 60:.0f} minutes: {machine()}."


def _plain(table: Table) -> dict[str, object]:
    s = table.subject
    return {
        "model": s.name, "side": s.side, "batch": s.batch, "last": s.last, "compress": s.compress,
        "dense_bytes": table.dense_bytes, "export": dataclasses.asdict(table.export),
        "rows": [dataclasses.asdict(row) for row in table.rows], "failures": list(table.failures),
    }  # fmt: skip


def _table(data: dict[str, Any]) -> Table:
    from tools.codec_study import Export, Rate
    from tools.codec_subjects import SUBJECTS

    subject = next(subject for subject in SUBJECTS if subject.name == data["model"])
    subject = dataclasses.replace(subject, **{key: data[key] for key in ("side", "batch", "last", "compress")})
    rows = tuple(
        Row(tuple(Rate(**rate) for rate in row["rates"]), {e: Memory(**m) for e, m in row["memory"].items()})
        for row in data["rows"]
    )
    return Table(subject, Export(**data["export"]), data["dense_bytes"], rows, tuple(data["failures"]))


if __name__ == "__main__":
    sys.exit(main())
