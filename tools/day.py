"""Does an agent stay the same size? A day of samples, drift, pauses and quiet times in minutes, with a real process.

    python tools/day.py [--hours 24] [--hour-seconds 15] [--svg docs/day.svg] [--json FILE]

Handwritten digits arrive in a folder, more by day than by night, and the oldest are deleted from it. Every day the
world changes twice: for eight hours the pictures are inverted, and each means the next digit. For an hour and a half a
program runs to which training yields. Log files and what the ledger remembers are made smaller in proportion. Sampled
from outside: resident memory (anonymous and all), open files, threads, and the state directory's parts. After the warm-
up a line is fitted through each; :func:`verdict` says what grows.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from edgetune.telemetry import runlog  # noqa: E402
from edgetune.units import MIB, format_bytes  # noqa: E402

GUEST = "a-guest-program"
NIGHT, OTHER_WORLD, GUEST_HOURS = (0.0, 6.0), (9.0, 17.0), (12.0, 13.5)
PER_HOUR, BY_NIGHT = 300, 40
KEPT_FILES = 1500
SEGMENT_BYTES, REMEMBERED = 32 << 10, 1000
PARTS = {"log.": "run log", "ledger.": "ledger", "checkpoint-": "checkpoints", "calibration-": "checkpoints",
         "replay": "replay", "promoted": "promoted", "history": "promoted"}  # fmt: skip
WARM_UP_SHARE = 1 / 3
ALLOWED = {
    "resident_bytes": 1.0 * MIB, "anonymous_bytes": 1.0 * MIB, "files": 1.0, "threads": 1.0, "disk_bytes": 1.0 * MIB,
}  # fmt: skip
"""By how much the fitted line may rise from the end of the warm-up to the end."""


@dataclass(frozen=True)
class Sample:
    """What was seen at ``hour``. ``parts``: bytes of the state directory, by part."""

    hour: float
    resident_bytes: int
    anonymous_bytes: int
    files: int
    threads: int
    disk_bytes: int
    parts: Mapping[str, int]


@dataclass(frozen=True)
class Fit:
    """A line through one quantity: its value at the end of the warm-up, how much it rises until the end, and the
    standard error of that."""

    name: str
    begin: float
    rise: float
    error: float

    @property
    def grows(self) -> bool:
        """Whether the rise is more than is allowed, and more than chance."""
        return self.rise > ALLOWED[self.name] and self.rise > 3 * self.error


def fitted(samples: Sequence[Sample], name: str, warm_up: float = WARM_UP_SHARE) -> Fit:
    """Return the least-squares line through ``name`` after the warm-up.

    Neighbours are alike, so the error is that of means over eight stretches, not of single samples.
    """
    begin = samples[0].hour + warm_up * (samples[-1].hour - samples[0].hour)
    late = [sample for sample in samples if sample.hour >= begin]
    count = max(1, len(late) // 8)
    stretches = [late[start : start + count] for start in range(0, len(late) - count + 1, count)]
    x = [sum(one.hour for one in part) / len(part) for part in stretches]
    y = [sum(float(getattr(one, name)) for one in part) / len(part) for part in stretches]
    middle_x, middle_y = sum(x) / len(x), sum(y) / len(y)
    spread = sum((value - middle_x) ** 2 for value in x)
    slope = sum((a - middle_x) * (b - middle_y) for a, b in zip(x, y, strict=True)) / spread
    rest = sum((b - middle_y - slope * (a - middle_x)) ** 2 for a, b in zip(x, y, strict=True))
    span = late[-1].hour - late[0].hour
    error = math.sqrt(rest / max(1, len(x) - 2) / spread)
    return Fit(name, middle_y + slope * (late[0].hour - middle_x), slope * span, error * span)


def verdict(samples: Sequence[Sample], events: Mapping[str, int], warm_up: float = WARM_UP_SHARE) -> list[str]:
    """Return what is wrong: what grows, and what should have happened and did not."""
    wrong = []
    for fit in (fitted(samples, name, warm_up) for name in ALLOWED):
        if fit.grows:
            wrong.append(f"{fit.name} grows by {fit.rise:.0f} (± {fit.error:.0f}) after the warm-up")
    for event in ("step", "drift", "yielded", "yield_ended", "checkpoint", "evaluated"):
        if not events.get(event):
            wrong.append(f"not one event '{event}' was logged")
    return wrong


def look(pid: int, state: Path, hour: float) -> Sample:
    """Return what the process and its state directory take now."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line)
    parts: dict[str, int] = {}
    for path in state.rglob("*"):
        try:
            if path.is_file():
                top = path.relative_to(state).parts[0]
                part = next((name for prefix, name in PARTS.items() if top.startswith(prefix)), "other")
                parts[part] = parts.get(part, 0) + path.stat().st_blocks * 512
        except FileNotFoundError:  # deleted meanwhile
            continue
    return Sample(
        hour, int(status["VmRSS"].split()[0]) * 1024, int(status["RssAnon"].split()[0]) * 1024,
        len(os.listdir(f"/proc/{pid}/fd")), int(status["Threads"]), sum(parts.values()), parts,
    )  # fmt: skip


class World:
    """What happens around the agent: pictures that come and go, and a program that runs for a while."""

    def __init__(self, data: Path, seed: int) -> None:
        from edgetune.commands import _digits

        self.data, self.dice = data, random.Random(seed)
        known = _digits.load(seed)
        self.images, self.labels = known.stream_images, known.stream_labels
        self.made, self.kept = 0, list[Path]()
        self.guest: subprocess.Popen[bytes] | None = None

    def live(self, hour: float, passed: float) -> None:
        """Let ``passed`` hours pass until ``hour``."""
        rate = BY_NIGHT if NIGHT[0] <= hour % 24 < NIGHT[1] else PER_HOUR
        turned = OTHER_WORLD[0] <= hour % 24 < OTHER_WORLD[1]
        wanted = rate * passed
        for _ in range(int(wanted) + (self.dice.random() < wanted % 1)):
            self._picture(turned)
        while len(self.kept) > KEPT_FILES:
            self.kept.pop(0).unlink(missing_ok=True)
        runs = GUEST_HOURS[0] <= hour % 24 < GUEST_HOURS[1]
        if runs and self.guest is None:
            program = self.data.parent / GUEST
            if not program.exists():
                shutil.copy("/bin/sleep", program)
            self.guest = subprocess.Popen([str(program), "100000"])
        elif not runs:
            self.end()

    def _picture(self, turned: bool) -> None:
        import numpy as np
        from PIL import Image

        index = self.dice.randrange(len(self.images))
        pixels = np.clip(self.images[index] * 255 + self.dice.gauss(0, 8), 0, 255)
        noise = np.random.default_rng(self.made).normal(0, 6, pixels.shape)
        pixels = np.clip((255 - pixels if turned else pixels) + noise, 0, 255).astype(np.uint8)
        folder = self.data / str((int(self.labels[index]) + turned) % 10)
        folder.mkdir(parents=True, exist_ok=True)
        path, hidden = folder / f"{self.made:07d}.png", folder / f".{self.made:07d}.part"
        Image.fromarray(pixels).save(hidden, format="PNG")
        os.replace(hidden, path)
        self.made += 1
        self.kept.append(path)

    def end(self) -> None:
        """End the guest, if it runs."""
        if self.guest is not None:
            self.guest.kill()
            self.guest.wait()
            self.guest = None


def export(folder: Path) -> Path:
    """Write a bundle of a small convolutional network for digits; return its path."""
    import torch
    from torch import nn

    import edgetune
    from edgetune.commands import _digits

    torch.manual_seed(0)
    side = _digits.load().stream_images.shape[-1]
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, stride=2), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(256, 10),
    ).eval()  # fmt: skip
    bundle = edgetune.export(
        model, torch.zeros(1, 1, side, side), folder / "bundle", last=2, codec="hosvd", classes=_digits.CLASSES,
        mean=_digits.PREPROCESS.mean, std=_digits.PREPROCESS.std,
    )  # fmt: skip
    return bundle.path


def day(folder: Path, hours: float, hour_seconds: float, extra: Sequence[str] = ()) -> tuple[list[Sample], Path]:
    """Run an agent for so many simulated hours; return what was seen, and its state directory."""
    bundle, data, state = export(folder), folder / "data", folder / "state"
    data.mkdir()
    world = World(data, 0)
    settings = [
        "drift.quiet_after=4", f"drift.quiet_interval_s={hour_seconds / 4}", "drift.quiet_backlog=12",
        f"service.yield_to={GUEST}", "replay.kind=raw", f"replay.limit_bytes={1 << 20}", f"remember={REMEMBERED}",
        "checkpoint_every=10", "rescan_seconds=0.5", "service.metrics_port=0", *extra,
    ]  # fmt: skip
    words = ["run", bundle, "--data", data, "--state", state, "--batch", 16, "--epsilon", 0.9, "--quiet"]
    words += ["--learning-rate", 0.02, "--no-supervise", *(word for text in settings for word in ("--set", text))]
    command = [sys.executable, str(Path(__file__).resolve()), "--as-agent", *map(str, words)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    world.live(8.0, 0.5)  # something to begin with
    process = subprocess.Popen(command, env=environment)
    samples: list[Sample] = []
    try:
        _started(process, state)
        began = last = time.monotonic()
        while (hour := (time.monotonic() - began) / hour_seconds) < hours:
            if process.poll() is not None:
                raise SystemExit(f"the agent ended with exit code {process.returncode}")
            now = time.monotonic()
            world.live(hour, (now - last) / hour_seconds)
            last = now
            samples.append(look(process.pid, state, hour))
            time.sleep(hour_seconds / 20)
    finally:
        world.end()
        if process.poll() is None:
            process.terminate()
            process.wait(120)
    return samples, state


def _started(process: subprocess.Popen[bytes], state: Path) -> None:
    until = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < until:
        if any(record["event"] == "step" for record in runlog.read(state / "log.jsonl")):
            return
        time.sleep(0.2)


def table(samples: Sequence[Sample], events: Mapping[str, int], warm_up: float = WARM_UP_SHARE) -> str:
    """Return the day as two tables."""
    lines = ["| | after the warm-up | rise until the end | ± | least | most |", "|---|---|---|---|---|---|"]
    begin = samples[0].hour + warm_up * (samples[-1].hour - samples[0].hour)
    for name in ALLOWED:
        fit = fitted(samples, name, warm_up)
        values = [float(getattr(sample, name)) for sample in samples if sample.hour >= begin]
        shown = [
            f"{value / MIB:.2f} MiB" if name.endswith("_bytes") else f"{value:.2f}"
            for value in (fit.begin, fit.rise, fit.error, min(values), max(values))
        ]
        lines.append(f"| {name.removesuffix('_bytes').replace('_', ' ')} | {' | '.join(shown)} |")
    names = sorted({name for sample in samples for name in sample.parts})
    first = next(sample for sample in samples if sample.hour >= begin)
    lines += ["", "| part of the state directory | after the warm-up | at the end |", "|---|---|---|"]
    for name in names:
        sizes = (format_bytes(sample.parts.get(name, 0)) for sample in (first, samples[-1]))
        lines.append(f"| {name} | {' | '.join(sizes)} |")
    told = ", ".join(f"{count} {name}" for name, count in sorted(events.items(), key=lambda item: -item[1]))
    return "\n".join([*lines, "", f"Events: {told}."])


def picture(samples: Sequence[Sample]) -> str:
    """Return the day as SVG: memory above, the state directory below."""
    from edgetune.commands._plot import Frame, document, evenly, line

    frame = Frame()
    series = {
        "resident": ([one.resident_bytes for one in samples], "#1f77b4"),
        "anonymous": ([one.anonymous_bytes for one in samples], "#2ca02c"),
        "state directory": ([one.disk_bytes for one in samples], "#d62728"),
    }
    most, end = max(max(values) for values, _ in series.values()), samples[-1].hour
    parts = frame.axes(evenly(0, end, "{:.0f}"), evenly(0, most, "{:.0f}", 1 / MIB), "simulated hours", "MiB")
    for row, (name, (values, color)) in enumerate(series.items()):
        places = [frame.at(one.hour / end, value / most) for one, value in zip(samples, values, strict=True)]
        parts += [line(places, color), *frame.legend(row, name, color)]
    return document(parts, 820, 440, "an agent through a day of drift, pauses and quiet times", frame.middle)


def main() -> int:
    """Do what the options say."""
    if sys.argv[1:2] == ["--as-agent"]:
        return _agent()
    parser = argparse.ArgumentParser(description="A simulated day, and what grows through it.")
    parser.add_argument("--hours", type=float, default=24.0)
    parser.add_argument("--hour-seconds", type=float, default=15.0, help="how long a simulated hour takes")
    parser.add_argument("--warm-up", type=float, default=WARM_UP_SHARE, help="the share of the time that is not judged")
    parser.add_argument("--svg", type=Path)
    parser.add_argument("--json", type=Path, help="write the samples here")
    parser.add_argument("--keep", type=Path, help="leave everything in this new folder")
    parser.add_argument("--set", action="append", default=[], help="another setting of the agent")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="edgetune-day-") as scratch:
        folder = args.keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        samples, state = day(folder, args.hours, args.hour_seconds, args.set)
        if args.json:
            args.json.write_text(json.dumps([vars(sample) for sample in samples]))
        events: dict[str, int] = json.loads((folder / "events.json").read_text())
        print(table(samples, events, args.warm_up))
        if args.svg:
            args.svg.write_text(picture(samples))
        wrong = verdict(samples, events, args.warm_up)
        log_bytes = sum(path.stat().st_size for path in state.glob("log.jsonl*"))
        print(f"\nThe run log ends with {format_bytes(log_bytes)} in {len(list(state.glob('log.jsonl*')))} files.")
    for text in wrong:
        print(f"wrong: {text}", file=sys.stderr)
    return 1 if wrong else 0


def _agent() -> int:
    """Run the agent with files of the run log that are small in proportion, and count its events."""
    from edgetune.agent.gate import history
    from edgetune.agent.journal import Journal
    from edgetune.commands import main as command_line

    counts: dict[str, int] = {}
    real = Journal.event

    def counted(self: Journal, event: str, message: str = "", **fields: object) -> None:
        counts[event] = counts.get(event, 0) + 1
        real(self, event, message, **fields)

    Journal.event = counted  # type: ignore[method-assign]
    defaults = runlog.RunLog.__init__.__kwdefaults__
    assert defaults is not None
    defaults["segment_bytes"] = SEGMENT_BYTES
    history.MOST_BYTES = SEGMENT_BYTES
    sys.argv[1:] = sys.argv[2:]
    state = Path(sys.argv[sys.argv.index("--state") + 1])
    try:
        command_line()
    finally:
        (state.parent / "events.json").write_text(json.dumps(counts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
