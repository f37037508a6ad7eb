"""How long the agent takes to start and what it holds by then, in fresh processes of ``edgetune run``.

    python tools/startup.py                                    ResNet-18, last 4: exported here, started five times
    python tools/startup.py --bundle DIR --python /opt/device/bin/python --json -

Four instants, each in processes of its own, counted from just before the process is made: ``version``, where
``edgetune --version`` has printed; ``imported``, where the agent's modules are there; ``ready``, where the bundle is
open and verified, the state directory made, the runtime chosen (hence imported) and the next thing would be to load
the model;
``loaded``, where the runtime has been measured and the session is made: with data, training would begin. Resident
memory is VmRSS at that instant. The processes are those of the command line, except that they stop there.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parent.parent
INSTANTS = ("version", "imported", "ready", "loaded")
MIB = 2**20


@dataclass(frozen=True)
class Start:
    """One process at one instant: seconds since it was asked for, resident bytes, names of the modules loaded."""

    seconds: float
    resident_bytes: int
    modules: frozenset[str]


@dataclass(frozen=True)
class Row:
    """Medians of several starts; ``least_seconds`` is the one that was disturbed least."""

    instant: str
    seconds: float
    least_seconds: float
    resident_bytes: int


def start(instant: str, bundle: Path | None = None, python: str = sys.executable) -> Start:
    """Start a process and return how it stands at ``instant``; all but ``version`` and ``imported`` need ``bundle``.

    Raises:
        RuntimeError: the process ended before; its own words are in the message.
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryDirectory(prefix="edgetune-startup-") as scratch:
        (Path(scratch) / "data").mkdir()
        command = [python, __file__, "--stop-at", instant, "--bundle", str(bundle), "--scratch", scratch]
        begin = time.monotonic()
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0 or not done.stdout.strip():
        raise RuntimeError(f"the process did not reach '{instant}':\n{done.stderr.strip() or done.stdout.strip()}")
    found = json.loads(done.stdout.splitlines()[-1])
    return Start(found["at"] - begin, found["resident_bytes"], frozenset(found["modules"]))


def measure(bundle: Path, repeats: int, python: str = sys.executable) -> list[Row]:
    """Return the medians of ``repeats`` starts per instant, taken in turn; one start before them is not counted."""
    start("loaded", bundle, python)
    found: dict[str, list[Start]] = {instant: [] for instant in INSTANTS}
    for _ in range(repeats):
        for instant, starts in found.items():
            starts.append(start(instant, bundle, python))
    return [
        Row(
            instant,
            statistics.median(s.seconds for s in starts),
            min(s.seconds for s in starts),
            round(statistics.median(s.resident_bytes for s in starts)),
        )
        for instant, starts in found.items()
    ]


def table(rows: Sequence[Row]) -> str:
    """Return the rows as Markdown."""
    lines = ["| instant | median, s | least, s | resident, MiB |", "|---|---|---|---|"]
    lines += [f"| {r.instant} | {r.seconds:.2f} | {r.least_seconds:.2f} | {r.resident_bytes / MIB:.0f} |" for r in rows]
    return "\n".join(lines)


def _tell() -> NoReturn:
    """Print how this process stands, and end it without further ado."""
    at = time.monotonic()
    with open("/proc/self/status", encoding="ascii") as status:
        resident = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmRSS:"))
    print(json.dumps({"at": at, "resident_bytes": resident, "modules": sorted(sys.modules)}), flush=True)
    os._exit(0)


def _run(instant: str, bundle: str, scratch: Path) -> None:
    """Run the command line in this process, up to ``instant``."""
    from edgetune.commands import main

    if instant == "version":
        sys.argv = ["edgetune", "--version"]
        try:
            main()
        except SystemExit:
            _tell()
    from edgetune.agent import loop, parts

    if instant == "imported":
        parts.real_parts()
        _tell()

    def stopped(*_args: Any, **_kwargs: Any) -> NoReturn:
        _tell()

    real = parts.real_parts

    def stopping(*, metrics: bool = False) -> parts.Parts:
        found = real(metrics=metrics)
        session = found.session_factory

        def made(*args: Any, **kwargs: Any) -> NoReturn:
            held = session(*args, **kwargs)
            _tell()
            del held

        if instant == "ready":
            return parts.Parts(session, found.meter, stopped, found.reserve_bytes, found.engine)
        return parts.Parts(made, found.meter, found.runtime_bytes, found.reserve_bytes, found.engine)

    loop.real_parts = stopping  # type: ignore[attr-defined]
    places = [bundle, "--data", str(scratch / "data"), "--state", str(scratch / "state")]
    sys.argv = ["edgetune", "run", *places, "--engine", "auto", "--batch", "8", "--epsilon", "1", "--no-supervise"]
    main()


def export(folder: Path) -> Path:
    """Export ResNet-18, of which the last 4 layers and a head for ten classes are trained; return the bundle."""
    import torch

    import edgetune
    from tools import models

    edgetune.export(models.resnet18(), torch.zeros(2, 3, 224, 224), folder, last=4, new_head=10)
    return folder


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", help="a bundle that is there already (default: one is exported; needs torch)")
    parser.add_argument("--python", default=sys.executable, help="the interpreter to start, such as a device's")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", help="write the figures to this file too; - prints them instead of the table")
    parser.add_argument("--stop-at", choices=INSTANTS, help=argparse.SUPPRESS)
    parser.add_argument("--scratch", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.stop_at:
        _run(args.stop_at, args.bundle, args.scratch)
        raise SystemExit(f"the command ended before '{args.stop_at}'")
    sys.path.insert(0, str(ROOT))
    with tempfile.TemporaryDirectory(prefix="edgetune-startup-") as scratch:
        rows = measure(Path(args.bundle or export(Path(scratch) / "bundle")).resolve(), args.repeats, args.python)
    text = json.dumps([asdict(row) for row in rows], indent=1)
    if args.json and args.json != "-":
        Path(args.json).write_text(text + "\n", "utf-8")
    print(text if args.json == "-" else table(rows))


if __name__ == "__main__":
    main()
