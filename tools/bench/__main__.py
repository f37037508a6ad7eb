"""The command line; see the package."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tools.bench import __doc__ as about
from tools.bench.grid import CONTENDERS, MODELS, PRESETS, side_of
from tools.bench.report import write
from tools.bench.run import Cell, Effort, Store, measure

ROOT = Path(__file__).resolve().parents[2]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what is missing, then write the page and the plots."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench", description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", choices=sorted(PRESETS), action="append", default=[], help="cells; may be repeated")
    parser.add_argument("--model", choices=MODELS, action="append", help="may be repeated")
    parser.add_argument("--last", action="append", help="a number of layers or 'all'; may be repeated (4)")
    parser.add_argument("--batch", type=int, action="append", help="may be repeated (64)")
    parser.add_argument("--side", type=int, help="of the pictures; default: the model's own")
    parser.add_argument("--epsilon", type=float, action="append", help="may be repeated (0.9)")
    parser.add_argument("--contender", action="append", help=f"may be repeated; default: {', '.join(CONTENDERS)}")
    parser.add_argument("--growth", action="store_true", help="the same as --preset growth")
    parser.add_argument(
        "--cache", type=Path, default=ROOT / "runs" / "bench", help="trained weights, and figures (runs/bench)"
    )
    parser.add_argument("--json", type=Path, help="the figures (CACHE/bench.json)")
    parser.add_argument("--markdown", type=Path, help="write the page here, and its plots beside it")
    parser.add_argument("--ort-training", metavar="PYTHON", help="an interpreter that has onnxruntime-training")
    parser.add_argument("--rounds", type=int, default=Effort.least, help="the least number of timed steps")
    parser.add_argument("--seconds", type=float, default=Effort.seconds, help="for the timing of one contender")
    args = parser.parse_args(arguments)
    jobs: list[tuple[Cell, tuple[str, ...]]] = []
    for preset in args.preset:
        jobs += PRESETS[preset]()
    for model in args.model or ():
        for last in args.last or ("4",):
            for batch in args.batch or (64,):
                for epsilon in args.epsilon or (0.9,):
                    cell = Cell(model, args.side or side_of(model), last, batch, epsilon)
                    jobs.append((cell, tuple(args.contender or CONTENDERS)))
    if args.growth:
        jobs += PRESETS["growth"]()
    store = Store(args.json or args.cache / "bench.json")
    effort = Effort(args.rounds, max(Effort.most, args.rounds), args.seconds)
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="edgetune-bundles-") as bundles:
        for index, (cell, contenders) in enumerate(jobs):
            missing = store.missing(cell, contenders)
            if not missing:
                continue
            print(f"{index + 1}/{len(jobs)} {cell.key}: {', '.join(missing)}", file=sys.stderr, flush=True)
            found = measure(
                cell, missing, effort, cache=args.cache, bundles=Path(bundles), ort_training=args.ort_training
            )
            store.add(cell, found)
            print(f"  {time.perf_counter() - begin:.0f} s", file=sys.stderr, flush=True)
    if args.markdown:
        write(store.data, args.markdown)
    return 0


if __name__ == "__main__":
    sys.exit(main())
