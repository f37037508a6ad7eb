"""What CSG saves and costs in a bundle: the measured tables of docs/adapters.md.

    python tools/csg_bench.py sizes      ResNet-18, last four layers: numbers, bytes, seconds per step
    python tools/csg_bench.py digits     accuracy on the demonstration's drifted digits, ordinary training beside it

The first takes a minute on two cores, the second a quarter of an hour. Both use the onnxruntime engine and AdamW.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import edgetune  # noqa: E402
from edgetune.bundle import Array, Bundle  # noqa: E402
from edgetune.commands import _digits  # noqa: E402
from edgetune.planning.prediction import predict  # noqa: E402
from tools import models  # noqa: E402

MIB = 2**20
SIZES: Mapping[str, str | None] = {
    "ordinary": None,
    "csg": "csg",
    "csg, 1×1 too": "csg:slice=16x16x3x3+16x16x1x1,code=128+16",
    "bcsg": "bcsg",
}
DIGITS: Mapping[str, tuple[int, str | None]] = {
    "ordinary": (14, None),
    "csg [8,8,3,3]-32": (14, "csg:slice=8x8x3x3,code=32"),
    "bcsg [16,16,3,3]-128": (14, "bcsg"),
    "bcsg [16,16,3,3]-512": (14, "bcsg:code=512"),
    "the head alone": (0, None),
}
"""Layers trained before the head, and the adapter."""
RATES = (5e-4, 2e-3, 5e-3, 1e-2, 2e-2)
SEEDS, BATCH, STEPS = (0, 1, 2), 60, 60


def numbers(bundle: Bundle) -> int:
    """Return how many numbers are trained: what a gradient is, and what a device sends."""
    return sum(math.prod(spec.shape) for spec in bundle.manifest.parameters)


def sizes(root: Path, rounds: int = 5) -> str:
    """Return the table for ResNet-18 with ten classes, the last four layers and the head, batches of 8 × 3 × 128²."""
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((8, 3, 128, 128)).astype(np.float32), np.arange(8) % 10
    model = models.resnet18()
    sessions = {}
    lines = [
        "| adapter | trained numbers | parameters, MiB | gradients, MiB | AdamW state, MiB | checkpoint, MiB "
        "| fixed weights, MiB | peak without the runtime, MiB | of it, train graph |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, adapter in SIZES.items():
        bundle = edgetune.export(
            model, x, root / name, last=4, codec="dense", optimizer="adamw", new_head=10, adapter=adapter
        )
        session = edgetune.TrainingSession(bundle, edgetune.plan(bundle, batch=8), engine="onnxruntime")
        found = predict(bundle.manifest, batch=8, micro_batch=8, ranks={}, runtime_bytes=0)
        held = found.ledger
        state_bytes = sum(value.nbytes for value in session.state().values())
        values = (
            held["parameters"], 4 * numbers(bundle), held["optimizer"], state_bytes, held["weights"], found.peak_bytes,
            found.peaks["train"].bytes,
        )  # fmt: skip
        sized = " | ".join(f"{value / MIB:.2f}" for value in values)
        lines.append(f"| {name} | {numbers(bundle):,} | {sized} |")
        sessions[name] = session
    features = sessions["ordinary"].features(x)
    seconds: dict[str, list[float]] = {name: [] for name in sessions}
    for turn in range(rounds + 1):  # in turn, so that whatever else runs meets all of them; the first warms up
        for name, session in sessions.items():
            begin = time.perf_counter()
            session.step_features(list(features), y)
            if turn:
                seconds[name].append(time.perf_counter() - begin)
    base = seconds["ordinary"]
    lines += ["", "| adapter | step, s (median) | ratio to ordinary (median of the rounds) |", "|---|---:|---:|"]
    for name, taken in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(taken, base, strict=True))
        lines.append(f"| {name} | {statistics.median(taken):.3f} | {ratio:.2f} |")
    return "\n".join(lines)


def digits(root: Path) -> str:
    """Return the table of accuracies, before and after 60 steps, of every adapter at the best of all learning rates."""
    found: dict[str, dict[float, list[float]]] = {name: {rate: [] for rate in RATES} for name in DIGITS}
    trained, before = {}, []
    for seed in SEEDS:
        data, rng = _digits.load(seed), np.random.default_rng(seed)
        model = _digits.pretrain(data.pretrain_images, data.pretrain_labels, seed=seed)
        stream = _digits.to_input(_digits.drift(data.stream_images, rng))
        test = _digits.to_input(_digits.drift(data.test_images, rng))
        for name, (last, adapter) in DIGITS.items():
            bundle = edgetune.export(
                model, test[:2], root / f"{name}{seed}", last=last, codec="dense", optimizer="adamw", adapter=adapter
            )
            trained[name] = numbers(bundle)
            plan = edgetune.plan(bundle, batch=BATCH)
            for rate in RATES:
                hyper = {"learning_rate": rate, "clip_norm": 1.0}
                session = edgetune.TrainingSession(bundle, plan, engine="onnxruntime", hyper=hyper, verify=False)
                if name == "ordinary" and rate == RATES[0]:
                    before.append(_accuracy(session, test, data.test_labels))
                order = np.random.default_rng(seed)
                for step in range(STEPS):
                    if step % (len(stream) // BATCH) == 0:
                        places = order.permutation(len(stream))
                    chosen = places[(step * BATCH) % len(stream) :][:BATCH]
                    session.step(stream[chosen], data.stream_labels[chosen])
                found[name][rate].append(_accuracy(session, test, data.test_labels))
            print(f"seed {seed}, {name}: {found[name]}", file=sys.stderr, flush=True)
    lines = [
        f"before: {_spread(before)}",
        "",
        f"| training | trained numbers | best learning rate | accuracy there | at {RATES[0]:g} |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, by_rate in found.items():
        best = max(by_rate, key=lambda rate: statistics.mean(by_rate[rate]))
        lines.append(
            f"| {name} | {trained[name]:,} | {best:g} | {_spread(by_rate[best])} | {_spread(by_rate[RATES[0]])} |"
        )
    return "\n".join(lines)


def _accuracy(session: edgetune.TrainingSession, images: Array, labels: Array) -> float:
    return float((session.predict(images).argmax(1) == labels).mean())


def _spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.1%} ({min(values):.1%} to {max(values):.1%})"


def main() -> None:
    """Print one of the tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    tables = {"sizes": sizes, "digits": digits}
    parser.add_argument("table", choices=tables)
    with tempfile.TemporaryDirectory() as folder:
        print(tables[parser.parse_args().table](Path(folder)))


if __name__ == "__main__":
    main()
