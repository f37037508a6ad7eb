"""Our gradients against torch's autograd, tensor by tensor, for any torch model with one output for the loss.

    python tools/parity.py tools/models.py:digits_resnet --input 1,12,12 --last 4
    python tools/parity.py swin --last all --codec hosvd             a model of tools/zoo
    python tools/parity.py --zoo --markdown docs/parity.md           all of them, on every engine

The reference is torch in float64; ``error`` is ‖ours - torch‖ / ‖torch‖ per tensor, and ``torch float32`` the same of
torch's own float32 gradient: what any float32 implementation must expect of this model at this depth. A lossy codec is
used at full ranks, where it loses nothing but rounding. The batch is the first of some random ones that keeps away from
all kinks (``tools/kinks.py`` says why); where a model has too many kinks for that, the one with the fewest is taken and
the number of values near one is printed. Nothing is excused by it: the exit code is 1 where an error exceeds the
tolerance.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import platform
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import edgetune  # noqa: E402
from edgetune.engines.choice import ENGINES, choose_engine  # noqa: E402
from edgetune.errors import EdgeTuneError, UsageError  # noqa: E402
from edgetune.export.capture import capture  # noqa: E402
from edgetune.export.source import Signature, load_source  # noqa: E402
from tools.gradients import (  # noqa: E402
    SEEDS,
    TORCH_LOSSES,
    Comparison,
    Sample,
    Settings,
    Subject,
    choose_sample,
    compare,
    export,
    reached,
)
from tools.zoo import ZOO  # noqa: E402

TOLERANCE = 1e-4


def table(comparison: Comparison, tolerance: float) -> str:
    """Return the comparison as text, one line per tensor, the worst one marked."""
    width = max(len(row.name) for row in comparison.rows)
    lines = [f"{'tensor':{width}}  {'shape':>18}  {'error':>8}  torch float32"]
    for row in comparison.rows:
        shape = "x".join(map(str, row.shape)) or "scalar"
        mark = "  <- worst" if row is comparison.worst else ""
        lines.append(f"{row.name:{width}}  {shape:>18}  {row.error:8.1e}  {row.torch_error:13.1e}{mark}")
    verdict = "within" if comparison.holds(tolerance) else "ABOVE"
    lines.append(
        f"{comparison.engine}, codec {comparison.codec}: loss {comparison.loss_error:.1e}, worst gradient "
        f"{comparison.worst.error:.1e}, {verdict} the tolerance {tolerance:g}"
    )
    if comparison.near_kinks:
        lines.append(
            f"{comparison.near_kinks} values lie within rounding of a kink: there, two correct gradients may differ"
        )
    return "\n".join(lines)


def zoo_subjects() -> list[Subject]:
    """Return the models of tools/zoo."""
    return [
        Subject(
            model.name,
            model.factory,
            tuple(Signature(s, "int64" if model.tokens else "float32", n, True) for n, s in model.inputs.items()),
            model.tokens,
        )
        for model in ZOO.values()
    ]


@dataclass(frozen=True)
class ZooRow:
    """One model and choice of what is trained: per (engine, codec) the worst error, or why there is none.

    ``tensors`` are trained ``of`` all that the model has.
    """

    model: str
    last: int | str
    tensors: int
    of: int
    near_kinks: int
    torch_error: float
    cells: Mapping[tuple[str, str], float | str]
    seconds: float

    def holds(self, tolerance: float) -> bool:
        """Tell whether every cell is a number of at most ``tolerance``."""
        return all(isinstance(cell, float) and cell <= tolerance for cell in self.cells.values())


def run_zoo_model(
    subject: Subject, model: Any, captured: Any, settings: Settings, engines: Sequence[str], codecs: Sequence[str]
) -> ZooRow:
    """Export the model with every codec, run it on every engine; a failure is a cell, not the end."""
    begin = time.perf_counter()
    cells: dict[tuple[str, str], float | str] = {}
    sample: Sample | None = None
    torch_error = float("nan")
    for codec in codecs:
        with tempfile.TemporaryDirectory() as folder:
            try:
                bundle = export(subject, captured, settings, codec, Path(folder) / "bundle")
                trained = [spec.name for spec in bundle.manifest.parameters]
                left_out = reached(subject, model, settings) - set(trained)
                if settings.last == "all" and left_out:
                    raise EdgeTuneError(f"not trained: {', '.join(sorted(left_out))}")
                sample = sample or choose_sample(subject, model, trained, settings)
            except Exception as error:
                cells |= {(engine, codec): _reason(error) for engine in engines}
                continue
            for engine in engines:
                try:
                    made = compare(bundle, sample, engine)
                    cells[engine, codec] = made.worst.error
                    torch_error = max(row.torch_error for row in made.rows)
                except Exception as error:
                    cells[engine, codec] = _reason(error)
    seconds, of = time.perf_counter() - begin, len(list(model.parameters()))
    if sample is None:
        return ZooRow(subject.name, settings.last, 0, of, 0, torch_error, cells, seconds)
    return ZooRow(subject.name, settings.last, len(sample.exact), of, sample.near_kinks, torch_error, cells, seconds)


def _reason(error: Exception) -> str:
    """Return one line; an error that is not meant for users is a defect, and so its kind is told."""
    text = (str(error).splitlines() or [""])[0]
    return text if isinstance(error, EdgeTuneError) else f"{type(error).__name__}: {text}"


def markdown(rows: Sequence[ZooRow], tolerance: float) -> str:
    """Return the page for the documentation."""
    columns = list(rows[0].cells)
    versions = ", ".join(f"{name} {_version(name)}" for name in ("torch", "transformers", "onnx", "onnxruntime"))
    lines = [
        "# Gradients against torch, model by model",
        "",
        f"Written by `python tools/parity.py --zoo --markdown docs/parity.md` on {date.today().isoformat()}: EdgeTune "
        f"{edgetune.__version__}, {versions}, Python {platform.python_version()}, {platform.machine()} "
        f"({platform.system()}), CPU.",
        "",
        "Each cell is the largest relative error ‖ours - torch‖ / ‖torch‖ over all trained tensors, the reference "
        f"being torch's autograd in float64; the tolerance is {tolerance:g}. `torch float32` is the same of torch's "
        "own float32 gradient. `hosvd` runs at full ranks, where it loses nothing but rounding. `last` counts the "
        "trained weight layers besides the head; `all` trains every parameter but those of frozen batch-norms; "
        "`tensors` are those trained, of all that the model has. Inputs are random, and the first batch of "
        f"{SEEDS} is taken that keeps away from all kinks of ReLU and its kin; `near kinks` counts the values that do "
        "not where there is none. Models and sizes: `tools/zoo`; random weights.",
        "",
        "| model | last | tensors | " + " | ".join(f"{e}, {c}" for e, c in columns) + " | torch float32 | near kinks |",
        "|---|---|---|" + "---|" * (len(columns) + 2),
    ]
    for row in rows:
        cells = [_cell(cell, tolerance) for cell in row.cells.values()]
        lines.append(
            f"| {row.model} | {row.last} | {row.tensors} of {row.of} | {' | '.join(cells)} | {row.torch_error:.1e} | "
            f"{row.near_kinks} |"
        )
    failures = {f"- {r.model}, {r.last}: {c}" for r in rows for c in r.cells.values() if isinstance(c, str)}
    return "\n".join([*lines, *(["", "Failures:", "", *sorted(failures)] if failures else [])]) + "\n"


def _cell(cell: float | str, tolerance: float) -> str:
    """Return a cell of the table; what does not hold is bold."""
    if isinstance(cell, str):
        return "**fails**"
    return f"{cell:.1e}" if cell <= tolerance else f"**{cell:.1e}**"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def _parser() -> argparse.ArgumentParser:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("source", nargs="?", help="file.py:factory, package.module:factory, or a name of tools/zoo")
    parser.add_argument("--input", action="append", default=[], metavar="SHAPE", help="as for edgetune export")
    parser.add_argument("--output-name", default=None, metavar="NAME", help="the output for the loss (the usual one)")
    parser.add_argument("--tokens", type=int, default=2, help="integer inputs are drawn below this")
    parser.add_argument("--last", default=None, help="a number, or 'all' (4; with --zoo both)")
    parser.add_argument("--train", default=None, metavar="REGEX", help="instead: parameters whose names this matches")
    parser.add_argument("--batch-norm", default="frozen", choices=("frozen", "trained"))
    parser.add_argument("--codec", default=None, help="dense, hosvd, svd (hosvd; with --zoo dense and hosvd)")
    parser.add_argument("--engine", default=None, choices=ENGINES, help="(auto; with --zoo all)")
    parser.add_argument("--loss", default="cross_entropy", choices=sorted(TORCH_LOSSES))
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--tolerance", type=float, default=TOLERANCE)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--zoo", action="store_true", help="every model of tools/zoo")
    parser.add_argument("--only", action="append", default=[], metavar="MODEL", help="with --zoo: this model")
    parser.add_argument("--markdown", type=Path, default=None, metavar="FILE", help="with --zoo: write the table there")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return 1 where an error exceeds the tolerance."""
    parser = _parser()
    args = parser.parse_args(arguments)
    if bool(args.source) == args.zoo:
        parser.error("give a SOURCE, or --zoo")
    settings = Settings(4, args.train, args.batch_norm, args.loss, args.batch)
    lasts: list[int | str] = ["all" if args.last == "all" else int(args.last or 4)]
    if args.zoo and args.last is None:
        lasts = [4, "all"]
    return _zoo(args, settings, lasts) if args.zoo else _single(args, dataclasses.replace(settings, last=lasts[0]))


def _single(args: argparse.Namespace, settings: Settings) -> int:
    known = {subject.name: subject for subject in zoo_subjects()}
    subject = known.get(args.source) or Subject(
        args.source,
        lambda: load_source(args.source),
        tuple(map(Signature.parse, args.input)),
        args.tokens,
        args.output_name,
    )
    try:
        model = subject.make()
        if not isinstance(model, torch.nn.Module):
            raise UsageError(f"'{args.source}' is no torch module, and torch's gradients are what ours are held to")
        with tempfile.TemporaryDirectory() as folder:
            bundle = export(subject, model, settings, args.codec or "hosvd", Path(folder) / "bundle")
            sample = choose_sample(subject, model, [spec.name for spec in bundle.manifest.parameters], settings)
            made = compare(bundle, sample, choose_engine(args.engine or "auto").name)
    except EdgeTuneError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(json.dumps(dataclasses.asdict(made), indent=1) if args.json else table(made, args.tolerance))
    return 0 if made.holds(args.tolerance) else 1


def _zoo(args: argparse.Namespace, settings: Settings, lasts: Sequence[int | str]) -> int:
    engines = [args.engine] if args.engine else [engine for engine in ENGINES if engine != "auto"]
    codecs = [args.codec] if args.codec else ["dense", "hosvd"]
    rows = []
    for subject in zoo_subjects():
        if args.only and subject.name not in args.only:
            continue
        model = subject.make()
        try:
            captured: Any = capture(model, subject.inputs)
        except EdgeTuneError:
            captured = model  # every cell then says why
        for last in lasts:
            chosen = dataclasses.replace(settings, last=last)
            rows.append(run_zoo_model(subject, model, captured, chosen, engines, codecs))
            print(_line(rows[-1], args.tolerance), file=sys.stderr if args.json else sys.stdout, flush=True)
    if args.json:
        print(json.dumps([_as_json(row) for row in rows], indent=1))
    if args.markdown is not None:
        args.markdown.parent.mkdir(parents=True, exist_ok=True)
        args.markdown.write_text(markdown(rows, args.tolerance), encoding="utf-8")
    return 0 if rows and all(row.holds(args.tolerance) for row in rows) else 1


def _as_json(row: ZooRow) -> dict[str, Any]:
    cells = {f"{engine}/{codec}": cell for (engine, codec), cell in row.cells.items()}
    return {field.name: getattr(row, field.name) for field in dataclasses.fields(row)} | {"cells": cells}


def _line(row: ZooRow, tolerance: float) -> str:
    cells = "  ".join(
        f"{engine}/{codec} {f'{cell:.1e}' if isinstance(cell, float) else cell}"
        for (engine, codec), cell in row.cells.items()
    )
    mark = "ok  " if row.holds(tolerance) else "FAIL"
    near = f"  ({row.near_kinks} near kinks)" if row.near_kinks else ""
    trained = f"{row.tensors:3} of {row.of:3} tensors"
    return f"{mark} {row.model:22} {row.last!s:>3} {trained} {row.seconds:5.1f} s  {cells}{near}"


if __name__ == "__main__":
    sys.exit(main())
