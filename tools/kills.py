"""Kills the agent's worker at random moments and compares what comes out with an undisturbed run, bit for bit.

    python tools/kills.py --kills 100                     (needs the host's and the demo's packages: it exports digits)
    python tools/kills.py --kills 20 --bundle B --data D  (a bundle and a folder that are there already)
    python tools/kills.py --replay raw --replay features --set drift.boost=2

Every run is the ordinary command line in processes of its own, with a fixed ε. Half of the kills hit the worker alone,
whose supervisor then starts the next one; half hit the whole process group, and the command is given again. A moment is
drawn evenly from the time in which an undisturbed worker starts and takes two checkpoints; a worker that follows two
which got nowhere is spared until its first checkpoint (three such deaths in a row are meant to change the plan). Runs
follow each other until there are enough kills; each one's final weights (SHA-256 over all tensors of its last
checkpoint), ledger, losses, replay buffer (its index, and every file of it) and promoted model are compared. Besides,
ledger and log are held against each other and against the folder: no sample lost, none trained twice. The kills are
shared evenly among the kinds of replay. Exit code 1 if anything differs.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from edgetune.agent import checkpoint
from edgetune.agent.ledger import Ledger, Sample
from edgetune.agent.replay.index import digests_of
from edgetune.agent.supervisor import newest_step
from edgetune.bundle import Array, sha256_of
from edgetune.telemetry import runlog

ROOT = Path(__file__).resolve().parents[1]
WORKER, GROUP = "worker", "process group"
EPSILON, BATCH, EVERY = 0.9, 32, 5
LIMITS = {"none": "0", "raw": "1MiB", "features": "2MiB"}
"""So small that the buffer drops samples in nearly every step."""
POLL_SECONDS = 0.005


@dataclass
class Result:
    """What a finished run left behind. ``promoted``: the SHA-256 of the promoted model, empty if there is none.
    ``wrong``: where ledger, log and folder contradict each other."""

    weights: str
    ledger: list[tuple[str, str, int | None, int, int]]
    losses: list[float]
    buffer: str = ""
    promoted: str = ""
    wrong: list[str] = field(default_factory=list)


@dataclass
class Tally:
    """What happened to the runs of one mode. ``steps``: of all runs together, each counted once."""

    runs: int = 0
    kills: int = 0
    before_first_step: int = 0
    steps: int = 0
    steps_repeated: int = 0
    different: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Job:
    """What is run: a bundle on a folder of samples, for so many passes over them, with so much replay."""

    bundle: Path
    data: Path
    epochs: int
    replay: str = "none"
    settings: tuple[str, ...] = ()

    def words(self, state: Path) -> list[str]:
        """Return the command."""
        options = ["--epsilon", EPSILON, "--batch", BATCH, "--epochs", self.epochs, "--checkpoint-every", EVERY]
        settings = (f"replay.kind={self.replay}", f"replay.limit_bytes={LIMITS[self.replay]}", *self.settings)
        options += [word for setting in settings for word in ("--set", setting)]
        line = ["run", self.bundle, "--data", self.data, "--state", state, *options, "--once", "--quiet"]
        return [sys.executable, "-m", "edgetune", *map(str, line)]

    def start(self, state: Path) -> subprocess.Popen[bytes]:
        """Start the command in a process group of its own."""
        return subprocess.Popen(self.words(state), cwd=ROOT, stderr=subprocess.PIPE, start_new_session=True)


def result(state: Path, job: Job) -> Result:
    """Return what the finished run of ``job`` in ``state`` left behind."""
    found = checkpoint.load_newest(state, lambda path: None)
    assert found is not None
    ledger = Ledger(state / "ledger.sqlite")
    try:
        samples = list(ledger.samples())
    finally:
        ledger.close()
    steps = runlog.steps(state / "log.jsonl")
    rows = [(s.path, s.status, s.step, s.passes, s.replays) for s in samples]
    index = found.parts.get("replay")
    kept = sorted(digest for digest, _ in digests_of(index)) if index is not None else []
    buffer = hashlib.sha256(_hash(found.parts).encode())
    for digest in kept:
        (file,) = (state / "replay").glob(f"{digest}.*")
        buffer.update(file.read_bytes())
    model = state / "promoted" / "model.onnx"
    return Result(
        _hash(found.tensors), rows, [float(record["loss"]) for record in steps], buffer.hexdigest(),
        sha256_of(model) if model.exists() else "",
        contradictions(samples, steps, kept, sorted(p.relative_to(job.data).as_posix() for p in job.data.rglob("*.*"))),
    )  # fmt: skip


def _hash(tensors: Mapping[str, Array]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name]
        digest.update(f"{name} {value.dtype} {value.shape}\n".encode() + value.tobytes())
    return digest.hexdigest()


def contradictions(samples: list[Sample], steps: list[dict[str, Any]], kept: list[str], files: list[str]) -> list[str]:
    """Return what ledger, log, replay buffer and folder do not agree in, in words: samples lost, or trained twice."""
    replayed = sum(step["replayed"] for step in steps)
    trained = sum(step["samples"] for step in steps) - replayed
    used = [sample for sample in samples if sample.status in ("trained", "replayable")]
    said = {
        "a sample lost": sorted(sample.path for sample in samples) == files,
        "a sample not trained": all(sample.status != "new" for sample in samples),
        "passes that differ": len({sample.passes for sample in used}) <= 1,
        "a sample trained twice": sum(sample.passes for sample in samples) == trained,
        "a sample replayed unknown to the ledger": sum(sample.replays for sample in samples) == replayed,
        "a buffer unknown to the ledger": sorted(s.sha256 for s in samples if s.status == "replayable") == kept,
    }
    return [text for text, true in said.items() if not true]


def differences(one: Result, other: Result) -> list[str]:
    """Return what is not the same in two results, and what is wrong in the first, in words."""
    found = {"weights": one.weights == other.weights, "ledger": one.ledger == other.ledger}
    found |= {"losses": one.losses == other.losses, "replay buffer": one.buffer == other.buffer}
    found["promoted model"] = one.promoted == other.promoted
    return [what for what, same in found.items() if not same] + one.wrong


def undisturbed(job: Job, state: Path) -> tuple[Result, float]:
    """Run without a kill; return the result and the seconds until the second checkpoint after that of step 0."""
    began = time.monotonic()
    process = job.start(state)
    while newest_step(str(state)) < 2 * EVERY and process.poll() is None:
        time.sleep(POLL_SECONDS)
    seconds = time.monotonic() - began
    _, said = process.communicate()
    if process.returncode != 0:
        raise RuntimeError(f"the undisturbed run failed with exit code {process.returncode}: {said.decode()}")
    found = result(state, job)
    if found.wrong:
        raise RuntimeError(f"the undisturbed run contradicts itself: {', '.join(found.wrong)}")
    return found, seconds


def disturbed(job: Job, state: Path, mode: str, kills: int, longest_seconds: float, rng: random.Random) -> Tally:
    """Run to the end with at most ``kills`` kills; return how many there were, and of what kind."""
    tally, process, fruitless = Tally(runs=1), job.start(state), 0
    while process.poll() is None:
        began, at_start = time.monotonic(), newest_step(str(state))
        steps_before = _steps_logged(state)
        worker = _worker(process)
        if worker is None or tally.kills == kills:
            process.wait()
            break
        spared = fruitless >= 2
        moment = began + rng.uniform(0, longest_seconds)
        while process.poll() is None and (
            time.monotonic() < moment or (spared and newest_step(str(state)) <= at_start)
        ):
            time.sleep(POLL_SECONDS)
        if process.poll() is not None:
            break
        with contextlib.suppress(ProcessLookupError):
            if mode == WORKER:
                os.kill(worker, signal.SIGKILL)
            else:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            tally.kills += 1
            tally.before_first_step += _steps_logged(state) == steps_before
            fruitless = fruitless + 1 if newest_step(str(state)) <= at_start else 0
        if mode == GROUP:
            process = job.start(state)
        else:
            _wait_for_another(process, worker)
    said = process.stderr.read().decode() if process.stderr is not None else ""
    if process.returncode != 0:
        raise RuntimeError(f"a run ended with exit code {process.returncode}: {said}")
    tally.steps = len(runlog.steps(state / "log.jsonl"))
    tally.steps_repeated = _steps_logged(state) - tally.steps
    return tally


def _steps_logged(state: Path) -> int:
    return sum(1 for record in runlog.read(state / "log.jsonl") if record["event"] == "step")


def _workers(process: subprocess.Popen[bytes]) -> list[int]:
    try:
        text = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    except OSError:
        return []
    return [int(word) for word in text.split()]


def _worker(process: subprocess.Popen[bytes]) -> int | None:
    """Return the worker that the supervisor has started, once it has; None: the run has ended."""
    while process.poll() is None:
        if workers := _workers(process):
            return workers[0]
        time.sleep(POLL_SECONDS)
    return None


def _wait_for_another(process: subprocess.Popen[bytes], killed: int) -> None:
    while process.poll() is None and _workers(process) in ([], [killed]):
        time.sleep(POLL_SECONDS)


@contextlib.contextmanager
def place(kept: Path | None) -> Iterator[Path]:
    """Yield a directory for everything, removed afterwards unless it is to be kept."""
    if kept is not None:
        kept.mkdir(parents=True)
        yield kept
        return
    found = Path(tempfile.mkdtemp(prefix="edgetune-kills-"))
    try:
        yield found
    finally:
        shutil.rmtree(found, ignore_errors=True)


def digits(root: Path, samples: int) -> tuple[Path, Path]:
    """Export the demonstration's small residual network and write handwritten digits; return bundle and folder."""
    import edgetune
    from edgetune.commands import _digits

    found = _digits.load(0)
    images = _digits.enlarge(found.pretrain_images, _digits.SIZE)
    model = _digits.pretrain(images, found.pretrain_labels, seed=0)
    bundle = edgetune.export(
        model, _digits.to_input(images[:2]), root / "digits.edgetune", last=4, optimizer="adamw",
        classes=_digits.CLASSES, mean=_digits.PREPROCESS.mean, std=_digits.PREPROCESS.std,
    )  # fmt: skip
    _digits.write_stream(root / "data", found.stream_images[:samples], found.stream_labels[:samples])
    return bundle.path, root / "data"


def table(tallies: dict[str, Tally]) -> str:
    """Return the Markdown table of what happened."""
    lines = [
        "| killed | kills | of them before a step | runs | steps | steps done twice | different from undisturbed |"
    ]
    lines.append("|---|---|---|---|---|---|---|")
    for mode, found in tallies.items():
        different = ", ".join(found.different) or "none"
        lines.append(
            f"| {mode} | {found.kills} | {found.before_first_step} | {found.runs} | {found.steps} | "
            f"{found.steps_repeated} | {different} |"
        )
    return "\n".join(lines)


def campaign(job: Job, root: Path, kills: int, seed: int) -> dict[str, Tally]:
    """Run until every mode has had its half of the kills; return what happened, by mode."""
    rng = random.Random(seed)
    reference, seconds = undisturbed(job, root / "undisturbed")
    tallies = {WORKER: Tally(), GROUP: Tally()}
    for mode, wanted in ((WORKER, kills - kills // 2), (GROUP, kills // 2)):
        total = tallies[mode]
        while total.kills < wanted:
            state = root / f"{mode.replace(' ', '-')}-{total.runs}"
            one = disturbed(job, state, mode, wanted - total.kills, seconds, rng)
            found = differences(result(state, job), reference)
            total.runs, total.kills = total.runs + 1, total.kills + one.kills
            total.before_first_step += one.before_first_step
            total.steps, total.steps_repeated = total.steps + one.steps, total.steps_repeated + one.steps_repeated
            total.different += [f"{what} of run {total.runs}" for what in found]
            said = f"{mode}, replay {job.replay}: {total.kills} kills in {total.runs} runs"
            print(said, "" if not found else f"DIFFERENT: {found}", file=sys.stderr, flush=True)
            shutil.rmtree(state)
    return tallies


def main() -> int:
    """Print the table; return 1 if a run differed from the undisturbed one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--samples", type=int, default=320)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--bundle", type=Path, help="instead of exporting digits; with --data")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--replay", choices=sorted(LIMITS), action="append", help="a kind, may be repeated (none)")
    parser.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="a setting, may be repeated")
    parser.add_argument("--keep", type=Path, help="keep bundle and data in this new directory")
    given = parser.parse_args()
    with place(given.keep) as root:
        ready = (given.bundle, given.data) if given.bundle and given.data else digits(root, given.samples)
        tallies: dict[str, Tally] = {}
        kinds = given.replay or ["none"]
        for number, kind in enumerate(kinds):
            job = Job(ready[0].resolve(), ready[1].resolve(), given.epochs, kind, tuple(given.set))
            share = given.kills * (number + 1) // len(kinds) - given.kills * number // len(kinds)
            found = campaign(job, root / kind, share, given.seed + number)
            tallies |= {f"{mode}, replay {kind}": tally for mode, tally in found.items()}
    print(table(tallies))
    return int(any(tally.different for tally in tallies.values()))


if __name__ == "__main__":
    sys.exit(main())
