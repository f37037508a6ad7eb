"""One codec for all saved tensors against one for each: total gradient error at equal peak, measured.

    python tools/allocation.py                                  ten models of tools/zoo, two budgets each
    python tools/allocation.py resnet18 vit --batch 64          some of them
    python tools/allocation.py --markdown docs/allocation.md    with the table for the docs

Per model, a bundle with a menu is calibrated on some batches. Budgets lie between the least peak of a uniform plan (the
best codec of the menu, the largest ε that fits) and the peak of the dense one. At each budget the uniform plan with the
least calibrated error and the per-layer plan run in fresh processes, which measure the peak of whole training steps
(the process's own high-water mark) and then the total gradient error (``edgetune.engines.gradient_error``) on other
batches than those of the calibration. The exit code is 1 where a per-layer plan has a larger error than the uniform
one, or a measured peak above the budget.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import edgetune  # noqa: E402
from edgetune.bundle import Array, Bundle  # noqa: E402
from edgetune.errors import BudgetError  # noqa: E402
from edgetune.planning.plan import RESERVE_BYTES, Plan, make_plan  # noqa: E402
from edgetune.planning.spectra import Calibration  # noqa: E402
from edgetune.units import MIB  # noqa: E402

MODELS = (
    "mcunet", "convnet1d", "unet2d", "resnet18", "mixed_norms", "fcn", "vit", "pspnet", "deeplabv3", "unet3d",
)  # fmt: skip
MENU = "hosvd+svd+dct+int8+dense"
SHARES = (0.2, 0.6)
"""Where the budgets lie between the least peak of a uniform plan and the peak of the dense one."""
CALIBRATED_ON, MEASURED_ON = (1, 2), (101, 102)
"""Seeds of the batches."""


@dataclass(frozen=True)
class Measured:
    """What a fresh process found for one plan. ``error`` is the total gradient error."""

    codecs: str
    epsilon: float | None
    predicted_bytes: int
    peak_bytes: int
    calibrated_error: float
    error: float


@dataclass(frozen=True)
class Comparison:
    """Both plans of one model at one budget; ``seconds`` is what planning per layer took."""

    model: str
    batch: int
    budget_bytes: int
    uniform: Measured
    mixed: Measured
    seconds: float

    @property
    def ratio(self) -> float:
        """The error of the per-layer plan over that of the uniform one."""
        if self.uniform.error == 0.0:
            return 1.0 if self.mixed.error == 0.0 else float("inf")
        return self.mixed.error / self.uniform.error

    @property
    def holds(self) -> bool:
        """Whether the per-layer plan is no worse, and both kept the budget."""
        within = max(self.uniform.peak_bytes, self.mixed.peak_bytes) <= self.budget_bytes
        return self.mixed.error <= self.uniform.error and within


def samples(name: str, bundle: Bundle, batch: int, seed: int) -> tuple[dict[str, Array], Array]:
    """Return inputs and random targets for ``batch`` samples of a zoo model."""
    from tools.zoo import zoo_model

    spec = bundle.manifest.targets
    classes = bundle.manifest.outputs[0].shape[0]
    y = np.random.default_rng(seed).integers(0, classes, (batch, *spec.shape)).astype(spec.dtype)
    drawn = zoo_model(name).draw(batch, seed)
    return dict(zip((one.name for one in bundle.manifest.inputs), drawn.values(), strict=True)), y


def compare(
    name: str, batch: int, last: int | str, menu: str, shares: Sequence[float], folder: Path
) -> list[Comparison]:
    """Export, calibrate and plan one model; run every plan."""
    from edgetune.agent.baseline import measure_runtime_apart
    from edgetune.api import calibrate_bundle
    from tools.zoo import zoo_model

    model = zoo_model(name)
    example = model.draw(2, 0)
    bundle = edgetune.export(model.factory(), example, folder / "bundle", last=last, codec=menu)
    batches: Any = (samples(name, bundle, batch, seed) for seed in CALIBRATED_ON)  # arrays by input name
    calibration = calibrate_bundle(bundle, batch, batches, errors=True)
    assert calibration is not None
    calibration.save(folder / "calibration.safetensors")
    for seed in MEASURED_ON:
        x, y = samples(name, bundle, batch, seed)
        arrays: Any = {"y": y} | {f"x/{key}": value for key, value in x.items()}
        np.savez(folder / f"batch{seed}.npz", **arrays)
    runtime_bytes = measure_runtime_apart(bundle)

    def plan(budget_bytes: int | None, **how: Any) -> Plan:
        return make_plan(
            bundle.manifest, batch=batch, calibration=calibration, budget_bytes=budget_bytes,
            runtime_bytes=runtime_bytes, reserve_bytes=RESERVE_BYTES, **how,
        )  # fmt: skip

    labels = menu.split("+")
    dense_bytes = plan(None, codec="dense", epsilon=1.0).predicted_peak_bytes + RESERVE_BYTES
    least_bytes = min(_least(plan, label) for label in labels)
    found = []
    for share in shares:
        budget_bytes = int(least_bytes + share * (dense_bytes - least_bytes))
        uniform = [made for label in labels if (made := _attempt(plan, budget_bytes, label)) is not None]
        best = min(uniform, key=lambda made: (made.error, made.predicted_peak_bytes))
        begin = time.perf_counter()
        mixed = plan(budget_bytes, allocation="per-layer")
        seconds = time.perf_counter() - begin
        found.append(Comparison(name, batch, budget_bytes, _run(folder, best), _run(folder, mixed), seconds))
        print(line(found[-1]), flush=True)
    return found


def _least(plan: Any, label: str) -> int:
    """Return the least budget of a uniform plan."""
    try:
        plan(1, codec=label)
    except BudgetError as error:
        return error.least_bytes
    raise AssertionError("one byte is enough for nothing")


def _attempt(plan: Any, budget_bytes: int, label: str) -> Plan | None:
    try:
        made: Plan = plan(budget_bytes, codec=label)
    except BudgetError:
        return None
    return made


def _run(folder: Path, made: Plan) -> Measured:
    (folder / "plan.json").write_text(made.to_json())
    command = [sys.executable, str(Path(__file__).resolve()), "--measure", str(folder)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise RuntimeError(f"a measurement failed: {done.stderr[-2000:]}")
    peak_bytes, error = json.loads(done.stdout.splitlines()[-1])
    labels = list(made.selection.values())
    codecs = ", ".join(f"{labels.count(label)} {label}" for label in dict.fromkeys(labels))
    assert made.error is not None
    return Measured(codecs, made.epsilon, made.predicted_peak_bytes, peak_bytes, made.error, error)


def measure(folder: Path) -> None:
    """Run in a fresh process: print the measured peak in bytes and the total gradient error, as one JSON line."""
    from edgetune.telemetry.process import PeakMeter

    bundle = edgetune.open_bundle(folder / "bundle")
    plan = Plan.from_json((folder / "plan.json").read_text())
    plan = dataclasses.replace(plan, calibration=_needed(Calibration.load(folder / "calibration.safetensors"), plan))
    session = edgetune.TrainingSession(bundle, plan)
    meter = PeakMeter()
    peaks = []
    start = session.state()
    for seed in MEASURED_ON:
        x, y = _stored(folder, seed)
        session.features(x)
        meter.reset()
        session.step(x, y)
        peaks.append(meter.peak_bytes())
    session.load_state(start)
    batches = [_stored(folder, seed) for seed in MEASURED_ON]
    plan = dataclasses.replace(plan, calibration=Calibration.load(folder / "calibration.safetensors"))
    print(json.dumps([max(peaks), total_error(session, bundle, plan, batches)]))


def total_error(
    session: edgetune.TrainingSession, bundle: Bundle, plan: Plan, batches: Sequence[tuple[dict[str, Array], Array]]
) -> float:
    """Return the total gradient error of ``plan`` on ``batches``."""
    from edgetune.engines.gradient_error import GradientGauge
    from edgetune.planning.rates import Rated

    fed = [(session.features(x), y) for x, y in batches]
    gauge = GradientGauge(session, bundle.manifest, plan.calibration, fed)
    rates = {name: Rated(label, None, plan.ranks.get(name, {}), None) for name, label in plan.selection.items()}
    return sum(gauge.errors(rates).values())


def _needed(calibration: Calibration, plan: Plan) -> Calibration:
    """Return ``calibration`` without what the plan's codecs do not read, as it is on a device."""
    kept = {name: modes for name, modes in calibration.spectra.items() if plan.selection[name].split(":")[0] == "hosvd"}
    return dataclasses.replace(calibration, spectra=kept, counts={}, errors={})


def _stored(folder: Path, seed: int) -> tuple[dict[str, Array], Array]:
    with np.load(folder / f"batch{seed}.npz") as stored:
        return {name.removeprefix("x/"): stored[name] for name in stored.files if name != "y"}, stored["y"]


def line(c: Comparison) -> str:
    """Return one comparison as a line of text."""
    epsilon = "" if c.uniform.epsilon is None else f" ε={c.uniform.epsilon:.3f}"
    return (
        f"{c.model:14} {c.budget_bytes / MIB:8.1f} MiB | {c.uniform.codecs}{epsilon}: "
        f"{c.uniform.peak_bytes / MIB:.1f} MiB, {c.uniform.error:.4f} | {c.mixed.codecs}: "
        f"{c.mixed.peak_bytes / MIB:.1f} MiB, {c.mixed.error:.4f} | ratio {c.ratio:.2f}, "
        f"planned in {c.seconds:.1f} s{'' if c.holds else '  <- FAILS'}"
    )


def markdown(found: Sequence[Comparison], menu: str, last: int | str) -> str:
    """Return the page for the docs."""
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("onnxruntime", "numpy"))
    ratios = np.array([c.ratio for c in found])
    rows = [
        f"| {c.model} | {c.batch} | {c.budget_bytes / MIB:.1f} | {_cell(c.uniform)} | "
        f"{c.uniform.peak_bytes / MIB:.1f} | {c.uniform.error:.4f} | {_cell(c.mixed)} | "
        f"{c.mixed.peak_bytes / MIB:.1f} | {c.mixed.error:.4f} | {c.ratio:.3f} | {c.seconds:.1f} |"
        for c in found
    ]
    return "\n".join(
        (
            "# One codec for all, or one for each",
            "",
            f"Written by `python tools/allocation.py --markdown docs/allocation.md` on {date.today().isoformat()}: "
            f"EdgeTune {edgetune.__version__}, {versions}, Python {platform.python_version()}, {platform.machine()} "
            f"({platform.system()}), CPU.",
            "",
            f"Menu `{menu}`, last {last}. `uniform` is the codec of the menu, at the largest ε that the budget allows, "
            "with the least calibrated error; `per-layer` is `--allocation per-layer` at the same budget. Both ran in "
            "fresh processes. `peak` is the process's own high-water mark over whole training steps, MiB. `error` is "
            "the total gradient error, the sum over the saved tensors of the relative error of the weight gradients "
            "that they serve, measured on other batches than those of the calibration. `ratio` is per-layer over "
            "uniform; `plan s` is how long planning per layer took. Models: `tools/zoo`, random "
            "weights, smooth random inputs. Where both keep all tensors dense, the encoders need more memory at once "
            "than they save at this size, and no codec has a lower peak than none.",
            "",
            f"Of {len(found)} comparisons, {sum(c.holds for c in found)} have an error that is no larger, at measured "
            f"peaks within the budget; the geometric mean of the ratios above zero is "
            f"{np.exp(np.log(ratios[ratios > 0]).mean()) if (ratios > 0).any() else 0.0:.2f}.",
            "",
            "| model | batch | budget | uniform | peak | error | per-layer | peak | error | ratio | plan s |",
            "|---|---|---|---|---|---|---|---|---|---|---|",
            *rows,
            "",
        )
    )


def _cell(one: Measured) -> str:
    return one.codecs + ("" if one.epsilon is None else f", ε = {one.epsilon:.3f}")


def main() -> int:
    """Compare and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help=f"of tools/zoo (default: {' '.join(MODELS)})")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--last", default="all", help="how many layers are trained, or 'all'")
    parser.add_argument("--menu", default=MENU)
    parser.add_argument("--markdown", type=Path, help="write the page to this file")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure(args.measure)
        return 0
    last = args.last if args.last == "all" else int(args.last)
    found: list[Comparison] = []
    for name in args.models or MODELS:
        with tempfile.TemporaryDirectory() as scratch:
            found += compare(name, args.batch, last, args.menu, SHARES, Path(scratch))
    if args.markdown:
        args.markdown.write_text(markdown(found, args.menu, last), "utf-8")
    return 0 if all(c.holds for c in found) else 1


if __name__ == "__main__":
    sys.exit(main())
