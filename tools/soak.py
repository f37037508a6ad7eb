"""Trains under a budget that never stays the same, and holds every step of the run log to it.

    python tools/soak.py --steps 2000            the soak; exit code 1 on any violation
    python tools/soak.py --steps 200 --blind     the same with an agent that never looks: the checks must fail
    python tools/soak.py --least                 the least budget that the agent names works, one MiB less does not

A real agent process trains a small network on digits. Its budget changes at random through ``edgetune budget``, and
another process (tools/memory_thief.py) really takes the memory away that the agent's ``--reserve`` does not. What is
checked is in :func:`verdict`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from edgetune.telemetry import runlog  # noqa: E402
from edgetune.telemetry.available import available_bytes  # noqa: E402
from edgetune.units import MIB, format_bytes  # noqa: E402

BATCH, SIDE, SAMPLES = 16, 64, 400
CHANGES = ("planned", "degrade", "recover", "resumed", "refresh")
"""The events that put a plan into force."""
TAKEN_BYTES = 1536 * MIB
"""What the thief may take and give back in all: what other processes do meanwhile must be less."""
WAIT_SECONDS = 120.0


def export(folder: Path) -> tuple[Path, Path]:
    """Write the bundle and the data; return their paths."""
    import torch
    from torch import nn

    import edgetune
    from edgetune.commands import _digits

    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(1, 8, 3, padding=1), nn.ReLU()]
    for _ in range(4):  # large activations for little arithmetic
        layers += [nn.Conv2d(8, 8, 1), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)).eval()
    bundle = edgetune.export(
        model, torch.zeros(1, 1, SIDE, SIDE), folder / "bundle", last=4, codec="hosvd", classes=_digits.CLASSES,
        mean=_digits.PREPROCESS.mean, std=_digits.PREPROCESS.std,
    )  # fmt: skip
    digits = _digits.load()
    _digits.write_stream(
        folder / "data", _digits.enlarge(digits.stream_images[:SAMPLES], SIDE), digits.stream_labels[:SAMPLES]
    )
    return bundle.path, folder / "data"


def agent(bundle: Path, data: Path, state: Path, *options: object, blind: bool = False) -> list[str]:
    """Return the command that runs the agent."""
    program = [str(Path(__file__).resolve()), "--as-blind-agent"] if blind else ["-m", "edgetune"]
    words = ["run", bundle, "--data", data, "--state", state, "--batch", BATCH, "--once", "--quiet", *options]
    words += ["--no-supervise"] if blind else []
    return [sys.executable, *program, *map(str, words)]


def environment() -> dict[str, str]:
    """Return the environment of the processes: this source, one thread."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


# ---- the checks -----------------------------------------------------------------------------------------------------
@dataclass
class Verdict:
    """What a run log says of a soak; ``violations`` are sentences, none if all is well."""

    steps: int = 0
    over: int = 0
    graces: int = 0
    violations: list[str] = field(default_factory=list)
    events: dict[str, int] = field(default_factory=dict)
    plans: int = 0
    limits: int = 0
    tightest: float = 0.0
    largest_over_bytes: int = 0


def verdict(records: Sequence[Mapping[str, Any]], steps: int) -> Verdict:
    """Hold a run log to what is promised.

    - no step's measured peak is above the effective budget that was in force when it began; the one step after a
      change of the plan or the budget is its grace step, which is counted apart;
    - a step that follows another with a different plan has an event with its reason between them;
    - every step number from 1 to ``steps`` is there, once;
    - both a degrade and a recovery were seen.
    """
    found = Verdict()
    last: Mapping[str, Any] | None = None
    between: list[Mapping[str, Any]] = []
    for record in records:
        kind = str(record["event"])
        found.events[kind] = found.events.get(kind, 0) + 1
        if kind != "step":
            between.append(record)
            continue
        found.steps += 1
        limit, peak = int(record["effective_budget_bytes"]), int(record["measured_peak_bytes"])
        changes = [r for r in between if r["event"] in CHANGES and r.get("reason")]
        fresh = bool(changes) or last is None
        found.tightest = max(found.tightest, peak / limit)
        if peak > limit:
            found.over += 1
            found.largest_over_bytes = max(found.largest_over_bytes, peak - limit)
            if fresh:
                found.graces += 1
            else:
                found.violations.append(
                    f"step {record['step']}: {format_bytes(peak)} above {format_bytes(limit)}, and no grace step"
                )
        if last is not None:
            if record["step"] != last["step"] + 1:
                found.violations.append(f"step {record['step']} follows step {last['step']}")
            found.limits += int(limit != last["effective_budget_bytes"])
            if _plan_of(record) != _plan_of(last):
                found.plans += 1
                if not changes:
                    found.violations.append(f"step {record['step']} has another plan, and the log says nothing of it")
        last, between = record, []
    if found.steps != steps:
        found.violations.append(f"{found.steps} steps in the log, expected {steps}")
    for kind in ("degrade", "recover"):
        if not found.events.get(kind):
            found.violations.append(f"not one {kind} was seen")
    return found


def _plan_of(step: Mapping[str, Any]) -> tuple[Any, ...]:
    names = ("epsilon", "ranks", "planned_bytes", "predicted_peak_bytes")
    return tuple(json.dumps(step[name], sort_keys=True) for name in names)


def table(found: Verdict, seconds: float) -> str:
    """Return the verdict as a table."""
    rows = [
        ("steps", found.steps),
        ("seconds", f"{seconds:.0f}"),
        ("steps that began under another effective budget than the one before", found.limits),
        ("changes of plan, each with its reason in the log", found.plans),
        *((f"events: {kind}", found.events.get(kind, 0)) for kind in (
            "budget", "degrade", "recover", "paused", "resumed", "exhausted", "refresh", "rehearsed", "overrun",
        )),
        ("highest measured peak / effective budget", f"{found.tightest:.4f}"),
        ("steps above the effective budget", found.over),
        ("of these the one grace step after a change", found.graces),
        ("violations", len(found.violations)),
    ]  # fmt: skip
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])


# ---- the soak -------------------------------------------------------------------------------------------------------
class Log:
    """The run log of an agent at work, read as it grows."""

    def __init__(self, path: Path, process: subprocess.Popen[bytes]) -> None:
        self.path, self.process = path, process
        self.step, self.waiting = 0, False
        self._partial = b""
        self._offset = 0
        self.first_plan: Mapping[str, Any] = {}
        self.last_step: Mapping[str, Any] = {}

    def look(self) -> None:
        """Read what is new."""
        if not self.path.exists():
            return
        with self.path.open("rb") as stream:
            stream.seek(self._offset)
            text = self._partial + stream.read()
            self._offset = stream.tell()
        *lines, self._partial = text.split(b"\n")
        for record in map(json.loads, filter(None, lines)):
            if record["event"] == "step":
                self.step, self.last_step, self.waiting = record["step"], record, False
            elif record["event"] == "paused":
                self.waiting = True
            elif record["event"] == "planned":
                self.first_plan = record

    def reach(self, step: int, seconds: float = WAIT_SECONDS) -> None:
        """Wait for ``step``, for a pause, or for the end of the process."""
        until = time.monotonic() + seconds
        while self.process.poll() is None and time.monotonic() < until:
            self.look()
            if self.step >= step or self.waiting:
                return
            time.sleep(0.02)


def soak(steps: int, seed: int, folder: Path, *, blind: bool) -> tuple[list[Mapping[str, Any]], float, int]:
    """Run the soak; return its log, how long it took, and the agent's exit code."""
    bundle, data = export(folder)
    state, target = folder / "state", folder / "available"
    reserve_bytes = available_bytes().bytes - TAKEN_BYTES
    plenty = available_bytes().bytes
    target.write_text(str(plenty))
    began = time.monotonic()
    command = agent(
        bundle, data, state, "--reserve", reserve_bytes, "--epochs", 10**6, "--max-steps", steps,
        "--checkpoint-every", 50, "--holdout", 20, blind=blind,
    )  # fmt: skip
    process = subprocess.Popen(command, env=environment(), preexec_fn=_one_core)
    thief = subprocess.Popen([sys.executable, str(ROOT / "tools" / "memory_thief.py"), str(target)])
    log = Log(state / "log.jsonl", process)
    try:
        log.reach(5)
        full = int(log.first_plan["predicted_peak_bytes"])
        low, high = full - log.first_plan["saved_bytes"] // 2, full + 12 * MIB
        dice = random.Random(seed)
        while log.step < steps and process.poll() is None:
            turn = dice.random()
            if turn < 0.5:
                size = "none" if dice.random() < 0.15 else str(dice.randrange(low, high))
                budget = [sys.executable, "-m", "edgetune", "budget", str(state), size]
                subprocess.run(budget, env=environment(), check=True, stdout=subprocess.DEVNULL)
            elif turn < 0.85:
                room = dice.randrange(low, high)
                resident = int(log.last_step.get("resident_bytes", full))
                _replace(target, reserve_bytes + room - resident)
            else:
                _replace(target, plenty)
            log.reach(log.step + dice.randint(15, 60))
            if log.waiting:  # nothing fits: give back what was taken
                time.sleep(1.0)
                _replace(target, plenty)
                write = [sys.executable, "-m", "edgetune", "budget", str(state), "none"]
                subprocess.run(write, env=environment(), check=True, stdout=subprocess.DEVNULL)
                log.waiting = False
                log.reach(log.step + 1)
        process.wait(WAIT_SECONDS)
    finally:
        target.unlink(missing_ok=True)
        for one in (process, thief):
            if one.poll() is None:
                one.terminate()
                one.wait(30)
    return list(runlog.read(state / "log.jsonl")), time.monotonic() - began, process.returncode


def _one_core() -> None:
    """Give a process one core, so that its runtime has one thread."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-1:])


def _replace(file: Path, number: int) -> None:
    temporary = file.with_suffix(".tmp")
    temporary.write_text(str(number))
    os.replace(temporary, file)


# ---- the least budget -----------------------------------------------------------------------------------------------
def least(folder: Path) -> list[str]:
    """Return what is wrong with the least budget that the agent names; print what was found."""
    bundle, data = export(folder)

    def run(name: str, budget_bytes: int) -> tuple[int, str, list[Mapping[str, Any]]]:
        state = folder / name
        done = subprocess.run(
            agent(bundle, data, state, "--budget", budget_bytes, "--epochs", 2),
            env=environment(), capture_output=True, text=True, check=False, preexec_fn=_one_core,
        )  # fmt: skip
        return done.returncode, done.stderr, list(runlog.read(state / "log.jsonl"))

    code, words, _ = run("refused", MIB)
    named = [int(part.split(" bytes")[0]) for part in words.split("the least is")[1:] for part in part.split("(")[1:2]]
    if code != 6 or not named:
        return [f"a budget of 1 MiB ended with exit code {code}: {words}"]
    (named_bytes,) = named[:1]
    wrong = []
    code, words, records = run("least", named_bytes)
    peaks = [int(r["measured_peak_bytes"]) for r in records if "measured_peak_bytes" in r]
    highest = max(peaks, default=0)
    taken = sum(r["event"] == "step" for r in records)
    print(f"least budget named: {format_bytes(named_bytes)}; {taken} steps, highest peak {format_bytes(highest)}")
    if code != 0:
        wrong.append(f"the least budget ended with exit code {code}: {words}")
    if highest > named_bytes:
        wrong.append(f"the highest peak, {highest} bytes, is above the least budget, {named_bytes}")
    code, words, _ = run("less", named_bytes - MIB)
    print(f"one MiB less: exit code {code}")
    if code != 6:
        wrong.append(f"one MiB less ended with exit code {code}: {words}")
    return wrong


def main() -> int:
    """Do what the options say."""
    if sys.argv[1:2] == ["--as-blind-agent"]:
        return _blind_agent()
    parser = argparse.ArgumentParser(description="Hold a run to a budget that never stays the same.")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--blind", action="store_true", help="an agent that never looks: the checks must fail")
    parser.add_argument("--least", action="store_true", help="check the least budget that the agent names")
    parser.add_argument("--keep", type=Path, help="leave bundle, data and state in this new folder")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="edgetune-soak-") as scratch:
        folder = args.keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        if args.least:
            violations = least(folder)
        else:
            records, seconds, code = soak(args.steps, args.seed, folder, blind=args.blind)
            found = verdict(records, args.steps)
            violations = found.violations + ([f"the agent ended with exit code {code}"] if code else [])
            print(table(found, seconds))
    for violation in violations[:20]:
        print(f"violation: {violation}", file=sys.stderr)
    return 1 if violations else 0


def _blind_agent() -> int:
    """Run the agent with a governor that keeps every plan, and without a correction: it never lowers anything."""
    from edgetune.agent.budget import Budgeter
    from edgetune.agent.enforcement import Enforcer
    from edgetune.agent.governor import Action, Decision, Governor
    from edgetune.commands import main as command_line

    Governor.look = lambda self, now: Decision(Action.KEEP)  # type: ignore[method-assign]
    Budgeter.overrun = lambda self, measured_bytes, *, resettable: False  # type: ignore[method-assign]
    Enforcer._ask = lambda self, before, now: self.budgeter.ask(now.asked)  # type: ignore[method-assign]
    sys.argv[1:] = sys.argv[2:]
    command_line()
    return 0


if __name__ == "__main__":
    sys.exit(main())
