"""How often the drift detector cries wolf, and how soon it sees a change: simulated streams, a table per setting.

python tools/drift_study.py [--streams 200] [--deviations 2 4 8]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from edgetune.agent.drift import detector
from edgetune.bundle import Array

Noise = Callable[[np.random.Generator, int], Array]
NOISES: dict[str, Noise] = {
    "normal": lambda dice, count: dice.normal(0, 1, count),
    "uniform": lambda dice, count: dice.uniform(-1.7, 1.7, count),
    "Laplace": lambda dice, count: dice.laplace(0, 0.7, count),
    "one-sided": lambda dice, count: dice.exponential(1.0, count),
}
"""Of a standard deviation near 1."""
STEPS = 2000
JUMPS = (2, 5, 10, 30)


def alarms(make: Noise, streams: int, delta: float) -> float:
    """Return the share of streams, level all along, in which a rise was found."""
    found = 0
    for seed in range(streams):
        watched = detector.Detector(delta)
        values = 1.0 + 0.05 * make(np.random.default_rng(seed), STEPS)
        changes = [watched.update(value) for value in values.tolist()]
        found += any(change is not None and change.after > change.before for change in changes)
    return found / streams


def delay(
    make: Noise, streams: int, delta: float, jump: int, before: int = 200, within: int = 200
) -> tuple[float, float]:
    """Return after how many steps on average a rise by ``jump`` deviations was found, and in what share of streams."""
    seen = []
    for seed in range(streams):
        watched = detector.Detector(delta)
        values = 1.0 + 0.05 * make(np.random.default_rng(seed), before + within)
        values[before:] += 0.05 * jump
        for number, value in enumerate(values.tolist()):
            change = watched.update(value)
            if change is not None and number >= before:
                seen.append(number - before + 1)
                break
    return (float(np.mean(seen)) if seen else float("nan")), len(seen) / streams


def table(streams: int, deviations: list[float], delta: float) -> list[str]:
    """Return the table's lines."""
    head = " | ".join(f"{jump} σ" for jump in JUMPS)
    lines = [f"| range | noise | false alarms in {STEPS} steps | steps until a rise by {head} |"]
    lines += ["|---|---|---|" + "---|" * len(JUMPS)]
    usual = detector.DEVIATIONS
    for number in deviations:
        detector.DEVIATIONS = number
        for name, make in NOISES.items():
            cells = []
            for jump in JUMPS:
                mean, share = delay(make, streams, delta, jump)
                cells.append(f"{mean:.1f}" + ("" if share == 1 else f" ({share:.0%} seen)"))
            lines.append(f"| {number:g} σ | {name} | {alarms(make, streams, delta):.1%} | {' | '.join(cells)} |")
    detector.DEVIATIONS = usual
    return lines


def main() -> None:
    """Do what the options say."""
    parser = argparse.ArgumentParser(description="False alarms and delays of the drift detector.")
    parser.add_argument("--streams", type=int, default=200)
    parser.add_argument("--deviations", type=float, nargs="+", default=[1.0, 2.0, 4.0, 8.0])
    parser.add_argument("--delta", type=float, default=0.002)
    args = parser.parse_args()
    print("\n".join(table(args.streams, args.deviations, args.delta)))


if __name__ == "__main__":
    main()
