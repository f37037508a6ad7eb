"""The page and its plots, made of the JSON file alone."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tools.bench import plots
from tools.bench.growth import Curve, curves
from tools.bench.targets import ORT_TRAINING, REFERENCE, fewer, targets

MIB = 2**20
PHASES = ("forward", "compress", "backward", "update")
Entry = Mapping[str, Any]
HEADS = (
    "contender", "trunk, s", "forward", "compress", "backward", "update", "step, s", "× PyTorch", "× processors",
    "saved, MiB", "PyTorch's over it", "peak, MiB", "PyTorch's over it", "process, MiB", "error", "energy", "ranks",
)  # fmt: skip


def write(data: Mapping[str, Any], page: Path) -> None:
    """Write ``page``, and the plots to a folder beside it that has its name."""
    folder = page.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    drawn = pictures(data["cells"])
    for name, text in drawn.items():
        (folder / f"{name}.svg").write_text(text)
    page.write_text(markdown(data, [f"{folder.name}/{name}.svg" for name in drawn]))


def markdown(data: Mapping[str, Any], images: Sequence[str]) -> str:
    """Return the page."""
    cells = data["cells"]
    dates = sorted({entry["date"][:10] for entry in cells.values()})
    loads = [load for entry in cells.values() for load in entry["load"]]
    lines = [
        "# Speed and memory, measured",
        "",
        f"Written by `python -m tools.bench` from figures of {' to '.join(dict.fromkeys((dates[0], dates[-1])))}: "
        f"{data['machine']}; load average {min(loads):.1f} to {max(loads):.1f} (it counts the run itself).",
        "",
        "## Targets",
        "",
        "| what | target | measured | |",
        "|---|---|---|---|",
        *(
            f"| {t.what} | {t.wanted} | {'—' if t.measured is None else format(t.measured, '.2f')} | {t.verdict} |"
            for t in targets(cells)
        ),
        "",
        *_LEGEND.splitlines(),
        "",
        *_trainings(cells),
    ]
    for entry in cells.values():
        lines += ["", *_table(entry)]
    lines += ["", *_growth(curves(cells))]
    lines += ["", "## Plots", "", *(f"![{Path(image).stem}]({image})" for image in images)]
    return "\n".join(lines).rstrip() + "\n"


def _title(cell: Mapping[str, Any]) -> str:
    last = "all layers" if cell["last"] == "all" else f"last {cell['last']}"
    return f"{cell['model']}, {last}, batch {cell['batch']}, {cell['side']} pixels, ε = {cell['epsilon']:g}"


def _table(entry: Entry) -> list[str]:
    lines = [f"## {_title(entry['cell'])}", "", "| " + " | ".join(HEADS) + " |", "|" + "---|" * len(HEADS)]
    failures = []
    for name, figures in entry["contenders"].items():
        if "seconds" in figures:
            lines.append("| " + " | ".join(_cells(name, figures, entry)) + " |")
        else:
            failures.append(f"- `{name}`: {figures.get('error', 'no figures')}")
    return [*lines, *([""] if failures else []), *failures]


def _cells(name: str, figures: Entry, entry: Entry) -> list[str]:
    seconds, peak = figures["seconds"], figures.get("peak", {})
    shown = [seconds.get(phase) for phase in ("trunk", *PHASES, "step")]
    energies = figures.get("gradients", {}).get("energy", {}).values()
    saved = [figures.get("saved"), fewer(entry, name, "saved")]
    error = figures.get("error", {}).get("mean")
    return [
        f"`{name}`",
        *("—" if value is None else f"{value:.3f}" for value in shown),
        f"{figures['ratio']:.2f}",
        f"{figures['processor_ratio']:.2f}",
        "—" if saved[0] is None else f"{saved[0] / MIB:.2f}",
        "—" if saved[1] is None else f"{saved[1]:.1f}",
        f"{peak['peak'] / MIB:.1f}" if peak else "—",
        "—" if (less := fewer(entry, name, "peak")) is None else f"{less:.2f}",
        f"{peak['process'] / MIB:.0f}" if peak else "—",
        "—" if error is None else f"{error:.2g}",
        f"{statistics.mean(energies):.3f}" if energies else "—",
        _ranks(figures),
    ]


def _ranks(figures: Entry) -> str:
    told = figures.get("gradients", {})
    by_letters = [" ".join(f"{k}{v}" for k, v in modes.items()) for modes in told.get("ranks", {}).values()]
    cores = ["×".join(map(str, shapes[0])) for shapes in told.get("shapes", {}).values()]
    found = by_letters or cores
    return "; ".join(found[:4]) + (" …" if len(found) > 4 else "") or "—"


def _trainings(cells: Mapping[str, Entry]) -> list[str]:
    lines = ["| model | steps × batch of pixels² | last loss | right |", "|---|---|---|---|"]
    told = {entry["cell"]["model"]: entry["training"] for entry in cells.values()}
    for model, t in told.items():
        lines.append(f"| {model} | {', then '.join(t['phases'])} | {t['loss']:.2f} | {t['accuracy']:.0%} |")
    return lines


def _growth(found: Sequence[Curve]) -> list[str]:
    if not found:
        return []
    lines = [
        "## How cost grows",
        "",
        "Exponents p of cost = a · xᵖ, by least squares of logarithms; in brackets the root of the mean square that is "
        "left. One thing changes, the rest is as told.",
        "",
        "| along | where | contender | points | " + " | ".join(COST_NAMES) + " |",
        "|---|---|---|---|" + "---|" * len(COST_NAMES),
    ]
    for curve in found:
        cells = []
        for cost in COST_NAMES:
            fit = curve.fits.get(cost)
            cells.append("—" if fit is None else f"{fit.exponent:.2f} ({fit.residual:.2f})")
        where = ", ".join(f"{key} {value}" for key, value in curve.place.items())
        span = f"{len(curve.x)}: {curve.x[0]:.3g} … {curve.x[-1]:.3g}"
        lines.append(f"| {curve.axis} | {where} | `{curve.contender}` | {span} | " + " | ".join(cells) + " |")
    return lines


COST_NAMES = ("seconds of a step", "seconds of processors", "saved bytes", "peak bytes")


def pictures(cells: Mapping[str, Entry]) -> dict[str, str]:
    """Return SVG documents by name: per cell the phases, and time over saved bytes; per axis how cost grows."""
    drawn: dict[str, str] = {}
    for key, entry in cells.items():
        known = {name: f for name, f in entry["contenders"].items() if "seconds" in f}
        rows = {}
        for name, figures in known.items():
            seconds = figures["seconds"]
            if "forward" in seconds and figures["ratio"] < 5:  # the slow ones would hide all others
                rows[name] = {phase: seconds[phase] for phase in PHASES}
        places = {n: [(f["saved"] / MIB, f["ratio"])] for n, f in known.items() if f.get("saved")}
        if len(known) < 6:
            continue
        if rows:
            drawn[f"{key}-phases"] = plots.bars(rows, f"{_title(entry['cell'])}: a step by phase", "seconds")
        if places:
            x, y = plots.Axis("saved for the backward pass, MiB"), plots.Axis("seconds of a step over PyTorch's")
            drawn[f"{key}-trade"] = plots.lines(places, _title(entry["cell"]), x, y, joined=False)
    sets: dict[tuple[str, str], list[Curve]] = {}
    for curve in curves(cells):
        sets.setdefault((curve.axis, curve.place["model"]), []).append(curve)
    for (axis, model), group in sets.items():
        for cost, unit in (("seconds of a step", "s"), ("saved bytes", "bytes")):
            series = {_name(c, group): list(zip(c.x, c.costs[cost], strict=True)) for c in group if cost in c.costs}
            if series:
                title = f"{model}: {cost} over {axis}"
                name = f"growth-{model}-{axis}-{cost}".replace(" ", "-")
                drawn[name] = plots.lines(series, title, plots.Axis(axis), plots.Axis(f"{cost}, {unit}"))
    return drawn


def _name(curve: Curve, group: Sequence[Curve]) -> str:
    alone = sum(other.contender == curve.contender for other in group) == 1
    where = ", ".join(f"{key} {value}" for key, value in curve.place.items() if key != "model")
    return curve.contender if alone else f"{curve.contender} ({where})"


_LEGEND = f"""\
## What the columns say

Each contender has a fresh process of its own, with the allocator's settings of its own, and all cores. The processes
live side by side; one does a step while the others sleep, in turn, so that the machine's mood meets all alike. A step
is tail forward + backward + update, from features that the frozen trunk made before. It has the same layers, the same
loss and SGD with momentum for everyone. The learning rate is 0, so that all steps are alike.

- **`{REFERENCE}`**: ordinary fine-tuning: autograd, batch-norm in evaluation mode, the frozen part under `no_grad`.
  **`-checkpoint`**: each block of the model kept by its inputs and run again (`torch.utils.checkpoint`). **`-bf16`**:
  forward under `torch.autocast`. **`-hosvd`**: the published method, `torch.linalg.svd` of every unfolding of every
  trained layer's input but the head's in every step. **`-asi`**: one warm subspace iteration per mode and step.
  **`-filter-r2`, `-r4`**: gradient filter, patches of 2 or 4. **`{ORT_TRAINING}`**: Microsoft's training API with the
  artifacts of `edgetune export --target ort-training`, of the tail alone. **`ENGINE/CODEC`**: EdgeTune.
- **asi**, ours and theirs, has ranks in proportion to those of `hosvd`, for each tensor such that it captures the
  energy that `hosvd` captures, as near as whole ranks get (bisection, on batches in turn).
- **trunk … update**: medians of seconds. EdgeTune's forward, compress and backward come from the time of every node in
  steps of their own, scaled to the median of the others. **compress** is what the forward pass does for the backward
  pass alone: encoders, masks of ReLU, measuring the captured energy.
- **× PyTorch**: the median over rounds of this step's seconds over those of `{REFERENCE}` in the same round. **×
  processors**: the same of the seconds that all threads together ran, which other load on the machine changes less.
- **saved**: everything that waits for the backward pass, features, masks and indices included. Of PyTorch: the storages
  that autograd holds (`saved_tensors_hooks`), weights and buffers excluded. Of EdgeTune: from the lifetimes in the
  manifest. The JSON also has `held`, what the allocator has in use after the forward pass: it agrees.
- **peak**: the high-water mark of the process during a step (`VmHWM`, reset), above what was resident before the
  features were loaded and after free memory was given back. **process**: the same, of the whole process.
- **error**: ‖dW̃ - dW‖ / ‖dW‖ of a layer's weight gradient against `{REFERENCE}` on the same batch, mean over the
  layers without the head. **energy**: captured, mean over the compressed tensors. **ranks**: by mode, or those of the
  core.

The models were trained for some hundred steps on digits drawn over crops of photographs (`tools/bench/subjects.py`),
most of them at a smaller size than they are measured at; *right* are twenty classes at the full size, of the U-Net
three for each pixel:"""
