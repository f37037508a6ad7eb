"""What each knob of a plan costs: CPU time, memory and gradient error of a step, knob by knob, as a Markdown table.

    python tools/knobs.py                                             ResNet-18, last 4, batch 64, pictures of 96 x 96
    python tools/knobs.py --model mobilenet_v2
    python tools/knobs.py --cache                                     the feature cache, in runs of the agent
    python tools/knobs.py --accuracy                                  ε against trained layers, on drifted digits

Photographs as in tools/peak.py. Every setting is run once per round, the rounds one after the other, so that whatever
else the machine does meets all of them; the least CPU time of the process over the rounds counts (one thread). Memory
is what is predicted of the graphs that make a gradient. The error is that of the whole gradient against the exact one
of the whole batch.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
MIB = 2**20


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--last", type=int, default=4)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--side", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cache", action="store_true")
    parser.add_argument("--accuracy", action="store_true")
    args = parser.parse_args()
    os.sched_setaffinity(0, {next(iter(os.sched_getaffinity(0)))})
    sys.path.insert(0, str(ROOT))
    with tempfile.TemporaryDirectory() as scratch:
        chosen = report_cache if args.cache else report_accuracy if args.accuracy else report
        chosen(args, Path(scratch))


def report(args: argparse.Namespace, folder: Path) -> None:
    """Export, calibrate, and run all settings."""
    import edgetune
    from edgetune.bundle import Array
    from edgetune.engines.calibration import calibrate
    from edgetune.planning.plan import Plan, make_plan
    from tools import models
    from tools.peak import photographs

    x = photographs(args.batch, args.side, 0)
    model = getattr(models, args.model)()
    bundle = edgetune.export(model, x[:1], folder / "bundle", last=args.last, codec="hosvd+dense")
    y = np.random.default_rng(0).integers(0, len(bundle.manifest.classes), args.batch)
    whole = make_plan(bundle.manifest, batch=args.batch, calibration=None, codec="dense", runtime_bytes=0)
    session = edgetune.TrainingSession(bundle, whole, verify=False)
    features = session.features(x)
    known = calibrate(session, bundle.manifest, [features])
    exact = session.gradients_from(features, y)[1]

    def plan(codec: str, epsilon: float | None, piece: int) -> Plan:
        return make_plan(
            bundle.manifest, batch=args.batch, epsilon=epsilon, codec=codec, calibration=known, runtime_bytes=0,
            tail_micro_batch=piece,
        )  # fmt: skip

    def work() -> None:
        for begin in range(0, args.batch, session.plan.tail_micro_batch):
            piece = slice(begin, begin + session.plan.tail_micro_batch)
            session.add([values[piece] for values in features], y[piece])
        session.discard()

    def norm(values: dict[str, Array]) -> float:
        return float(np.sqrt(sum(np.sum(np.square(v, dtype=np.float64)) for v in values.values())))

    pieces = [args.batch >> k for k in range(args.batch.bit_length())]
    settings: dict[str, Plan] = {f"dense | - | {m}": plan("dense", None, m) for m in pieces}
    few = [m for m in dict.fromkeys((args.batch, 16, 8)) if m <= args.batch]
    settings |= {f"hosvd | 0.97 | {m}": plan("hosvd", 0.97, m) for m in few}
    settings |= {f"hosvd | 0.9 | {m}": plan("hosvd", 0.9, m) for m in pieces[:5]}
    settings |= {f"hosvd | {e} | {args.batch}": plan("hosvd", e, args.batch) for e in (0.8, 0.5)}
    seconds = dict.fromkeys(settings, np.inf)
    errors = dict.fromkeys(settings, 0.0)
    for turn in range(args.rounds + 1):
        for name, one in settings.items():
            session.set_plan(one)
            if not turn:
                found = session.gradients_from(features, y)[1]
                errors[name] = norm({n: found[n] - exact[n] for n in exact}) / norm(exact)
            else:
                seconds[name] = min(seconds[name], cpu_seconds(work))
    sizes, trunk = [1 << k for k in range(6)], dict[int, float]()
    for _ in range(args.rounds):
        for size in sizes:
            session.set_plan(dataclasses.replace(settings[f"dense | - | {args.batch}"], micro_batch=size))
            trunk[size] = min(trunk.get(size, np.inf), cpu_seconds(lambda: session.features(x)))
    base = seconds[f"dense | - | {args.batch}"]
    title = f"{args.model}, last {args.last}, batch {args.batch}, {args.side} x {args.side}"
    print(
        f"{title}: {base:.2f} s of CPU time for one gradient, whole and dense, and {trunk[8]:.2f} s for its features\n"
    )
    print("| codec | ε | tail micro-batch | gradient | with features | memory, MiB | error |")
    print("|---|---|---|---|---|---|---|")
    for name, one in settings.items():
        predicted, step = predicted_bytes(bundle, one) / MIB, (seconds[name] + trunk[8]) / (base + trunk[8])
        times = f"{seconds[name] / base:.2f} | {step:.2f}"
        print(f"| {name} | {times} | {predicted:.1f} | {errors[name]:.3f} |")
    print("\n| micro-batch of the trunk | its time |\n|---|---|")
    for size in sizes:
        print(f"| {size} | {trunk[size] / trunk[8]:.2f} |")


def report_cache(args: argparse.Namespace, folder: Path) -> None:
    """Run the agent without and with a cache for all samples, in turn, over four passes; print the CPU times."""
    from PIL import Image

    import edgetune
    from edgetune.agent.config import AgentConfig
    from edgetune.agent.loop import run_agent
    from edgetune.agent.view import QuietView
    from edgetune.telemetry import runlog
    from tools import models
    from tools.peak import photographs

    x = photographs(64, args.side, 0)
    bundle = edgetune.export(
        getattr(models, args.model)(), x[:1], folder / "bundle", last=args.last, codec="dense",
    )  # fmt: skip
    for index, image in enumerate(x):
        name = bundle.manifest.classes[index % len(bundle.manifest.classes)]
        pixels = np.clip((image.transpose(1, 2, 0) - image.min()) / np.ptp(image) * 255, 0, 255).astype(np.uint8)
        (folder / "data" / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / "data" / name / f"{index}.png")
    seconds: dict[str, list[float]] = {}
    for turn in range(args.rounds):
        for name, cache_bytes in (("without", None), ("with", 256 * MIB)):
            state = folder / f"{name}{turn}"
            config = AgentConfig(
                data=folder / "data", state=state, once=True, quiet=True, batch=16, epochs=4, holdout=0, epsilon=1.0,
                settle_seconds=0.0, cache_bytes=cache_bytes, engine="onnxruntime",
            )  # fmt: skip
            took = cpu_seconds(functools.partial(run_agent, bundle, config, view=QuietView()))
            seconds.setdefault(name, []).append(took)
            phases: dict[str, float] = {}
            for record in runlog.steps(state / "log.jsonl"):
                for phase, one in record["seconds"].items():
                    phases[phase] = phases.get(phase, 0.0) + one
            told = ", ".join(f"{phase} {one:.2f}" for phase, one in phases.items())
            print(f"{name} a cache: {took:.2f} s of CPU time; seconds of the clock by phase of the steps: {told}")
    ratio = min(seconds["with"]) / min(seconds["without"])
    print(f"with over without, the least of each: {ratio:.2f}")


def report_accuracy(args: argparse.Namespace, folder: Path) -> None:
    """Adapt a digits model (14 trained layers) in 60 steps of 64 drifted digits, with less ε or fewer layers; print the
    accuracies on drifted digits that it has not seen."""
    import edgetune
    from edgetune.commands import _digits
    from edgetune.engines.calibration import calibrate
    from edgetune.planning.plan import Plan, make_plan
    from edgetune.planning.spectra import Calibration

    side, batch, layers = 16, 64, 14
    digits, rng = _digits.load(0), np.random.default_rng(0)
    drifted = [_digits.drift(images, rng) for images in (digits.stream_images, digits.test_images)]
    x, test = (_digits.to_input(_digits.enlarge(images, side)) for images in drifted)
    clean = _digits.enlarge(digits.pretrain_images, side)
    bundle = edgetune.export(
        _digits.pretrain(clean, digits.pretrain_labels, seed=0), _digits.to_input(clean[:2]), folder / "bundle",
        last=layers, codec="hosvd+dense", optimizer="adamw", classes=_digits.CLASSES,
    )  # fmt: skip

    def plan(epsilon: float, trained: int, known: Calibration | None) -> Plan:
        codec = "dense" if epsilon == 1.0 else "hosvd"
        return make_plan(
            bundle.manifest, batch=batch, calibration=known, epsilon=epsilon, codec=codec, trained=trained,
            runtime_bytes=0,
        )  # fmt: skip

    hyper = {"learning_rate": 5e-4, "clip_norm": 1.0}
    session = edgetune.TrainingSession(bundle, plan(1.0, layers, None), hyper=hyper, verify=False)
    known = calibrate(session, bundle.manifest, [session.features(x[i : i + batch]) for i in (0, batch)])
    start, features = session.state(), session.features(x)
    print("| ε | trained layers | accuracy |\n|---|---|---|")
    for epsilon, trained in [(1.0, 14), (0.97, 14), (0.9, 14), (0.8, 14), (0.6, 14), (1.0, 11), (1.0, 7), (1.0, 3)]:
        session.load_state(start)
        session.set_plan(plan(epsilon, trained, known))
        order = np.random.default_rng(5)
        for _ in range(60):
            rows = order.permutation(len(x))[:batch]
            session.step_features([values[rows] for values in features], digits.stream_labels[rows])
        accuracy = float((session.predict(test).argmax(1) == digits.test_labels).mean())
        print(f"| {epsilon:g} | {trained} | {accuracy:.1%} |", flush=True)


def predicted_bytes(bundle: object, plan: object) -> int:
    """Return the predicted peak of the graphs that make a gradient, without what is resident all the time."""
    from edgetune.bundle import Bundle
    from edgetune.planning.plan import Plan, predict
    from edgetune.planning.rebase import settled_for

    assert isinstance(bundle, Bundle) and isinstance(plan, Plan)
    prediction = predict(
        settled_for(bundle.manifest, plan), batch=plan.batch, micro_batch=plan.micro_batch, ranks=plan.ranks,
        runtime_bytes=0, tail_micro_batch=plan.tail_micro_batch,
    )  # fmt: skip
    return max(prediction.peaks[name].bytes for name in ("train", "accumulate") if name in prediction.peaks)


def cpu_seconds(work: Callable[[], object]) -> float:
    """Return the CPU time of this process for ``work``."""
    begin = time.process_time()
    work()
    return time.process_time() - begin


if __name__ == "__main__":
    main()
