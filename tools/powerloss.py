"""Takes the power away at random moments of a recorded run, and compares what comes out with an undisturbed run.

    python tools/powerloss.py --points 60              (needs strace, and the host's and the demo's packages)
    python tools/powerloss.py --points 20 --bundle B --data D --replay raw

The agent runs once to its end under strace, which records every change below the state directory: data, sizes, names,
and what was synced. For each point drawn among these changes, the directory is rebuilt as a power loss at that instant
could have left it (``powerloss_disk``: nothing that was not synced; names in order, data in part; any part of both),
and the same command goes on from there to its end. Weights, ledger, losses and replay buffer must then be those of the
undisturbed run, no sample lost, none trained twice (as in ``kills``). Exit code 1 if anything differs.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from edgetune.agent.supervisor import newest_step
from tools.kills import LIMITS, Job, Result, differences, digits, place, result
from tools.powerloss_disk import MODES, Change, Data, Sync, after_power_loss
from tools.powerloss_trace import record

ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Tally:
    """What happened to the points of one mode. ``anew``: no checkpoint had become durable."""

    points: int = 0
    anew: int = 0
    different: list[str] = field(default_factory=list)


def command(job: Job, state: Path) -> list[str]:
    """Return the command that runs the agent in one process, without a supervisor."""
    return [*job.words(state), "--no-supervise"]


def recorded(job: Job, root: Path) -> tuple[Result, list[Change]]:
    """Run ``job`` under strace in ``root``; return what it left behind and what it changed on the way."""
    state = root / "recorded"
    state.mkdir()
    trace = root / "trace.txt"
    code, said, changes = record(command(job, state), state, trace, ROOT)
    trace.unlink()
    if code:
        raise RuntimeError(f"the recorded run failed with exit code {code}: {said}")
    return result(state, job), changes


def point(
    job: Job, changes: list[Change], mode: str, dice: random.Random, state: Path
) -> tuple[Result | None, bool, str]:
    """Rebuild ``state`` as the power loss leaves it and run to the end; return what that left behind (None: it
    failed), whether there was no checkpoint, and what the run said."""
    after_power_loss(changes, mode, dice).write(state)
    anew = newest_step(str(state)) < 0
    done = subprocess.run(command(job, state), cwd=ROOT, capture_output=True, text=True, check=False)
    return (result(state, job) if done.returncode == 0 else None), anew, done.stderr


def campaign(job: Job, root: Path, points: int, seed: int) -> tuple[dict[str, Tally], list[Change]]:
    """Take the power away ``points`` times; return what happened, by mode, and the recorded changes."""
    dice = random.Random(seed)
    reference, changes = recorded(job, root)
    if reference.wrong:
        raise RuntimeError(f"the undisturbed run contradicts itself: {', '.join(reference.wrong)}")
    tallies = {mode: Tally() for mode in MODES}
    for number in range(points):
        mode = MODES[number % len(MODES)]
        at, tally, state = dice.randint(1, len(changes)), tallies[mode], root / f"point-{number}"
        found, anew, said = point(job, changes[:at], mode, dice, state)
        wrong = ["ended with an error: " + said.strip()[-300:]] if found is None else differences(found, reference)
        tally.points, tally.anew = tally.points + 1, tally.anew + anew
        tally.different += [f"{what} (point {at}, seed {seed}, number {number})" for what in wrong]
        print(f"{number + 1}: {mode}, after {at} of {len(changes)}: {wrong or 'equal'}", file=sys.stderr, flush=True)
        if not wrong:
            shutil.rmtree(state)
    return tallies, changes


def table(tallies: dict[str, Tally]) -> str:
    """Return the Markdown table of what happened."""
    lines = ["| of what was not synced, there is | points | of them before a checkpoint | different from undisturbed |"]
    lines.append("|---|---|---|---|")
    for mode, found in tallies.items():
        lines.append(f"| {mode} | {found.points} | {found.anew} | {'; '.join(found.different) or 'none'} |")
    return "\n".join(lines)


def summary(changes: list[Change]) -> str:
    """Return in words what was recorded."""
    kinds = Counter(type(change).__name__ for change in changes)
    written = sum(len(change.content) for change in changes if isinstance(change, Data))
    syncs = sum(isinstance(change, Sync) for change in changes)
    return f"{len(changes)} changes ({dict(kinds)}), {written} bytes, {syncs} syncs"


def main() -> int:
    """Print the table; return 1 if a run differed from the undisturbed one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--samples", type=int, default=160)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--bundle", type=Path, help="instead of exporting digits; with --data")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--replay", choices=sorted(LIMITS), default="raw")
    parser.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="a setting, may be repeated")
    parser.add_argument("--keep", type=Path, help="keep what differs in this new directory")
    given = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with place(given.keep) as root:
        ready = (given.bundle, given.data) if given.bundle and given.data else digits(root, given.samples)
        job = Job(ready[0].resolve(), ready[1].resolve(), given.epochs, given.replay, tuple(given.set))
        tallies, changes = campaign(job, root, given.points, given.seed)
    print(summary(changes))
    print(table(tallies))
    return int(any(tally.different for tally in tallies.values()))


if __name__ == "__main__":
    sys.exit(main())
