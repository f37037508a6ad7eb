"""Measured against predicted peak memory of one train step, a fresh process per codec.

    python tools/peak.py                                    ResNet-18, last 4, batch 64, ε = 0.9, dense against hosvd
    python tools/peak.py --model mobilenet_v2 --codec svd   another model, another codec

The activations come from photographs (scikit-learn's two sample images, cropped at random), because the spectra of
noise are those of nothing. The measured peak is the process's own high-water mark over one whole step (train and update
graphs), reset just before it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
MIB = 2**20


def photographs(count: int, side: int, seed: int) -> np.ndarray:
    """Return ``count`` random square crops [count, 3, side, side] of real photographs, normalised as ImageNet is."""
    from sklearn.datasets import load_sample_images

    rng = np.random.default_rng(seed)
    images = [np.asarray(image, np.float32) / 255.0 for image in load_sample_images().images]
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    crops = np.empty((count, 3, side, side), np.float32)
    for i in range(count):
        image = images[rng.integers(len(images))]
        top, left = (int(rng.integers(extent - side + 1)) for extent in image.shape[:2])
        crop = image[top : top + side, left : left + side]
        crops[i] = ((crop[:, :: rng.choice((-1, 1))] - mean) / std).transpose(2, 0, 1)
    return crops


def prepare(args: argparse.Namespace, codec: str, folder: Path) -> None:
    """Export, compute the features once, calibrate and plan; leave all of it in ``folder`` for a fresh process."""
    import edgetune
    from edgetune.planning.spectra import Calibration

    sys.path.insert(0, str(ROOT))
    from tools import models

    model = getattr(models, args.model)()
    x = photographs(args.batch, args.side, args.seed)
    bundle = edgetune.export(model, x, folder / "bundle", last=args.last, codec=codec)
    y = np.random.default_rng(args.seed).integers(0, len(bundle.manifest.classes), args.batch)
    plan = edgetune.plan(bundle, batch=args.batch, epsilon=args.epsilon, calibration=[(x, y)])
    session = edgetune.TrainingSession(bundle, plan, verify=False)
    features = session.features(x)
    np.savez(folder / "features.npz", y, *features)
    (folder / "plan.json").write_text(plan.to_json())
    (plan.calibration or Calibration({}, 0, args.batch)).save(folder / "calibration.safetensors")


def measure(folder: Path) -> None:
    """Run in a fresh process: predict, then measure, one step; print one JSON line."""
    import dataclasses

    import edgetune
    from edgetune.agent import baseline
    from edgetune.planning.plan import Plan, predict
    from edgetune.planning.spectra import Calibration
    from edgetune.telemetry.process import PeakMeter, resident_bytes

    bundle = edgetune.open_bundle(folder / "bundle")
    runtime_bytes = baseline.runtime_bytes(bundle)
    baseline.load_agent(bundle.manifest)  # the figure is that of an agent's process
    plan = Plan.from_json((folder / "plan.json").read_text())
    plan = dataclasses.replace(plan, calibration=Calibration.load(folder / "calibration.safetensors"))
    prediction = predict(
        bundle.manifest, batch=plan.batch, micro_batch=plan.micro_batch, ranks=plan.ranks, runtime_bytes=runtime_bytes
    )
    session = edgetune.TrainingSession(bundle, plan)
    # One run of the trunk brings its weights into memory, where they are in any real step.
    session.features(np.zeros((1, *bundle.manifest.inputs[0].shape), np.float32))
    before = resident_bytes()
    meter = PeakMeter()
    peaks = []
    for _ in range(3):
        with np.load(folder / "features.npz") as stored:
            y, *features = (stored[f"arr_{i}"] for i in range(1 + len(bundle.manifest.features)))
        meter.reset()
        session.step_features(features, y)
        peaks.append(meter.peak_bytes())
    step_bytes = max(peak.bytes for graph, peak in prediction.peaks.items() if graph in ("train", "update"))
    fixed = sum(prediction.ledger[line] for line in ("runtime", "weights", "parameters", "optimizer", "bases"))
    result = {
        "measured_bytes": max(peaks),
        "predicted_bytes": fixed + step_bytes,
        "before_bytes": before,
        "runtime_bytes": runtime_bytes,
        "fixed_bytes": fixed,
        "step_bytes": step_bytes,
        "saved_bytes": plan.saved_bytes,
        "dense_saved_bytes": plan.dense_saved_bytes,
        "ledger": dict(prediction.ledger),
        "peaks": {graph: peak.bytes for graph, peak in prediction.peaks.items()},
        "live": [[t.name, t.kind, t.bytes] for t in prediction.peaks["train"].live[:14]],
        "energy": session.report.energy,
        "seconds": session.report.seconds,
        "ranks": {name: dict(ranks) for name, ranks in plan.ranks.items()},
        "all": peaks,
    }
    print(json.dumps(result))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--last", type=int, default=4)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--side", type=int, default=224)
    parser.add_argument("--epsilon", type=float, default=0.9)
    parser.add_argument("--codec", action="append", default=[], help="beside dense; may be repeated (default hosvd)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure(args.measure)
        return
    results = {}
    for codec in ["dense", *(args.codec or ["hosvd"])]:
        with tempfile.TemporaryDirectory() as scratch:
            prepare(args, codec, Path(scratch))
            command = [sys.executable, __file__, "--measure", scratch]
            done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
            results[codec] = json.loads(done.stdout.splitlines()[-1])
    if args.json:
        print(json.dumps(results, indent=1))
        return
    print(f"{args.model}, last {args.last}, batch {args.batch}, ε = {args.epsilon}: peak of one train step, MiB")
    heads = ("predicted", "measured", "error", "step alone", "predicted", "saved", "seconds")
    print(f"{'codec':8}" + "".join(f"{head:>12}" for head in heads))
    for codec, r in results.items():
        error = r["measured_bytes"] / r["predicted_bytes"] - 1
        alone = r["measured_bytes"] - r["before_bytes"]
        print(
            f"{codec:8}{r['predicted_bytes'] / MIB:12.1f}{r['measured_bytes'] / MIB:12.1f}{error:12.1%}"
            f"{alone / MIB:12.1f}{r['step_bytes'] / MIB:12.1f}{r['saved_bytes'] / MIB:12.2f}"
            f"{sum(r['seconds'].values()):12.2f}"
        )
    print("step alone: above what was resident before its features were loaded; saved: for weight gradients")


if __name__ == "__main__":
    main()
