"""What runs say together: means over seeds, who lies above whom at equal memory, the table and the picture.

Pure: knows numbers and text only.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from edgetune.commands._plot import Frame, document, dots, evenly, line

KIB, MIB = 2**10, 2**20
MIX = "planner's mix"
SLACK = 0.01
"""Memory that differs by no more than this share is equal: peaks of one plan differ from run to run."""
_COLORS = (
    "#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22", "#17becf", "#aec7e8",
    "#ff9896", "#98df8a", "#c5b0d5", "#c49c94", "#393b79",
)  # fmt: skip
_MIX_COLOR = "#ff7f0e"


@dataclass(frozen=True)
class Run:
    """One plan, fine-tuned with one seed: what ``tools/accuracy.py`` writes to its JSON, line by line."""

    task: str
    seed: int
    series: str
    knob: str
    engine: str
    before: float
    after: float
    peak_bytes: int
    held_bytes: int
    codec_bytes: int
    mask_bytes: int
    other_bytes: int
    error: float | None
    energy: float | None
    refreshes: int
    choice: str
    seconds: float


@dataclass(frozen=True)
class Base:
    """What one task and seed is compared with: bytes that PyTorch keeps for the same training, measured."""

    task: str
    seed: int
    autograd_bytes: int


@dataclass(frozen=True)
class Point:
    """One plan over all seeds. ``after`` and ``seeds`` run in parallel; bytes are means over the seeds; ``error`` is
    the mean total gradient error as calibrated, over the seeds for which it was (None: for none)."""

    series: str
    knob: str
    engine: str
    seeds: tuple[int, ...]
    after: tuple[float, ...]
    peak_bytes: float
    held_bytes: float
    codec_bytes: float
    mask_bytes: float
    other_bytes: float
    error: float | None
    energy: float | None
    choice: str

    @property
    def mean(self) -> float:
        """Mean accuracy."""
        return statistics.fmean(self.after)

    @property
    def deviation(self) -> float:
        """Standard deviation of the accuracy over the seeds; NaN for one seed."""
        return statistics.stdev(self.after) if len(self.after) > 1 else math.nan


@dataclass(frozen=True)
class Contest:
    """A plan with one codec for all, and the mix that the planner offers at no more memory.

    ``difference`` is the mean over the seeds of accuracy of the mix minus that of the single codec, seed by seed;
    ``doubt`` twice its standard error (NaN for one seed). Both are None where no mix is that small.
    """

    single: Point
    mix: Point | None
    difference: float | None
    doubt: float | None

    @property
    def verdict(self) -> str:
        """``above`` (or on), ``within noise``, ``below``, or ``no mix so small``."""
        if self.difference is None or self.doubt is None:
            return "no mix so small"
        if self.difference >= -1e-9:  # equal means may differ in their last bit
            return "above"
        return "within noise" if self.difference + self.doubt >= 0 else "below"  # NaN: below


def points(runs: Iterable[Run]) -> list[Point]:
    """Return one point per plan, in the order of first appearance."""
    groups: dict[tuple[str, str, str], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.series, run.knob, run.engine), []).append(run)
    made = []
    for (series, knob, engine), some in groups.items():
        some.sort(key=lambda run: run.seed)

        def mean(name: str, some: Sequence[Run] = tuple(some)) -> float:
            return statistics.fmean(getattr(run, name) for run in some)

        errors = [run.error for run in some if run.error is not None]
        energies = [run.energy for run in some if run.energy is not None]
        made.append(
            Point(
                series, knob, engine, tuple(run.seed for run in some), tuple(run.after for run in some),
                mean("peak_bytes"), mean("held_bytes"), mean("codec_bytes"), mean("mask_bytes"), mean("other_bytes"),
                statistics.fmean(errors) if errors else None, statistics.fmean(energies) if energies else None,
                some[0].choice,
            )
        )  # fmt: skip
    return made


def contests(singles: Sequence[Point], mixes: Sequence[Point], axis: str) -> list[Contest]:
    """Return every single codec's plan against a mix of no more memory on ``axis`` (``peak_bytes``, ``held_bytes``).

    Of the mixes that are small enough, the one that the planner holds for the best stands for all: that with the least
    calibrated gradient error. Choosing by accuracy would be choosing on the test set.
    """
    made = []
    for single in singles:
        most = getattr(single, axis) * (1 + SLACK)
        small = [mix for mix in mixes if getattr(mix, axis) <= most and mix.error is not None]
        if not small:
            made.append(Contest(single, None, None, None))
            continue
        mix = min(small, key=lambda one: (one.error, getattr(one, axis)))
        difference, doubt = paired(mix, single)
        made.append(Contest(single, mix, difference, doubt))
    return made


def paired(one: Point, other: Point) -> tuple[float, float]:
    """Return the mean difference of accuracies, seed by seed, and twice its standard error (NaN for one seed).

    Raises:
        ValueError: they have no seed in common.
    """
    theirs = dict(zip(other.seeds, other.after, strict=True))
    found = [mine - theirs[seed] for seed, mine in zip(one.seeds, one.after, strict=True) if seed in theirs]
    if not found:
        raise ValueError(f"'{one.series}' and '{other.series}' have no seed in common")
    doubt = 2 * statistics.stdev(found) / math.sqrt(len(found)) if len(found) > 1 else math.nan
    return statistics.fmean(found), doubt


TARGETED = ("hosvd", "hosvd:storage=log8")

HEADS = (
    "codec", "rate", "saved, KiB", "codec + masks + other", "left by the forward pass, KiB", "× below PyTorch",
    "peak of a step, MiB", "accuracy, %", "± sd", "− dense", "energy", "seeds",
)  # fmt: skip


def table(every: Sequence[Point], autograd: float) -> list[str]:
    """Return the Markdown rows, head included; ``autograd`` are the bytes that PyTorch keeps."""
    dense = {p.engine: p for p in every if p.series == "dense"}
    lines = ["| " + " | ".join(HEADS) + " |", "|" + "---|" * len(HEADS)]
    for p in every:
        saved = p.codec_bytes + p.mask_bytes + p.other_bytes
        base = dense.get(p.engine)
        gap = "—" if base is None else f"{100 * paired(p, base)[0]:+.1f}"
        cells = (
            f"`{p.series}`" + ("" if p.engine == "onnxruntime" else f" ({p.engine} engine)"),
            p.knob,
            f"{saved / KIB:,.0f}",
            f"{p.codec_bytes / KIB:,.0f} + {p.mask_bytes / KIB:,.0f} + {p.other_bytes / KIB:,.0f}",
            f"{p.held_bytes / KIB:,.0f}",
            f"{autograd / max(p.held_bytes, 1):.1f}",
            f"{p.peak_bytes / MIB:.2f}",
            f"{100 * p.mean:.1f}",
            _percent(p.deviation),
            gap,
            "—" if p.energy is None else f"{p.energy:.2f}",
            str(len(p.seeds)),
        )
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def target_lines(every: Sequence[Point], autograd: float) -> list[str]:
    """Return whether hosvd at ε = 0.9, with numbers of four bytes and of one, is within a point of dense with a
    thirtieth of PyTorch's saved bytes, and what comes nearest."""
    dense = next((p for p in every if p.series == "dense" and p.engine == "onnxruntime"), None)
    compressed = [p for p in every if p.series in TARGETED and p.knob == "ε = 0.9"]
    if dense is None or not compressed:
        return ["- hosvd at ε = 0.9 or dense was not measured."]
    lines = [line for one in compressed for line in _targets(one, dense, autograd)]
    return [*lines, *_nearest(every, dense, autograd)]


def _targets(one: Point, dense: Point, autograd: float) -> list[str]:
    gap, doubt = paired(one, dense)
    whole = one.codec_bytes + one.mask_bytes + one.other_bytes
    words = {True: "met", False: "**not met**"}
    return [
        f"- `{one.series}` at ε = 0.9 within 1 point of dense: {words[gap >= -0.01]} ({100 * gap:+.1f} points ± "
        f"{_percent(doubt)}, twice the standard error over {len(one.seeds)} seeds).",
        f"- `{one.series}` at ε = 0.9, at least 30 times fewer saved bytes than ordinary PyTorch, masks included: "
        f"{words[autograd / one.held_bytes >= 30]} ({autograd / one.held_bytes:.1f} × by the allocator, "
        f"{autograd / whole:.1f} × as planned). Against the dense codec, whose inputs of batch-norms are gone already: "
        f"{dense.held_bytes / one.held_bytes:.1f} ×. Masks are {one.mask_bytes / whole:.0%} of what is left.",
    ]


def _nearest(every: Sequence[Point], dense: Point, autograd: float) -> list[str]:
    """Return the best plan with a thirtieth of PyTorch's saved bytes, and that within a point of dense which leaves the
    least."""
    small = [p for p in every if p.engine == dense.engine and autograd / p.held_bytes >= 30]
    lines = []
    if small:
        best = max(small, key=lambda p: p.mean)
        lines.append(
            f"- The best accuracy with at least 30 times fewer saved bytes: `{best.series}` {best.knob}, "
            f"{autograd / best.held_bytes:.1f} × below PyTorch, {100 * paired(best, dense)[0]:+.1f} points."
        )
    close = [p for p in every if p is not dense and p.engine == dense.engine and paired(p, dense)[0] >= -0.01]
    if not close:
        return [*lines, "- No plan other than dense came within 1 point of it."]
    best = min(close, key=lambda p: p.held_bytes)
    return [
        *lines,
        f"- The least that any plan within 1 point of dense leaves: `{best.series}` {best.knob}, "
        f"{autograd / best.held_bytes:.1f} × below PyTorch, {100 * paired(best, dense)[0]:+.1f} points.",
    ]


def contest_lines(found: Sequence[Contest], axis: str) -> list[str]:
    """Return the verdict over ``axis``, and one line for each plan that is not matched."""
    verdicts = [contest.verdict for contest in found]
    counts = ", ".join(f"{verdicts.count(word)} {word}" for word in dict.fromkeys(sorted(verdicts)))
    met = all(word in ("above", "no mix so small") for word in verdicts)
    lines = [f"- the mix on or above every single codec at equal or less {axis}: {'met' if met else '**not met**'} "
             f"(of {len(found)} plans: {counts})."]  # fmt: skip
    for c in found:
        if c.verdict == "above":
            continue
        if c.mix is None or c.difference is None or c.doubt is None:
            lines.append(f"  - `{c.single.series}` {c.single.knob}: no mix so small was planned.")
            continue
        lines.append(
            f"  - {c.verdict}: `{c.single.series}` {c.single.knob} {100 * c.single.mean:.1f} %, mix ({c.mix.knob}) "
            f"{100 * c.mix.mean:.1f} %: {100 * c.difference:+.1f} ± {_percent(c.doubt)} points. Calibrated gradient "
            f"error {_number(c.single.error)} and {_number(c.mix.error)}; the mix is {c.mix.choice}."
        )
    return lines


def _percent(value: float) -> str:
    return "—" if math.isnan(value) else f"{100 * value:.1f}"


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.2f}"


def svg(every: Sequence[Point], mix: str, title: str) -> str:
    """Return accuracy over the peak of a step as an SVG document; ``mix`` is the series drawn as a full line."""
    frame = Frame(height=380)

    def scaled(p: Point) -> float:
        return math.log2(max(p.peak_bytes, KIB) / MIB)

    xs = [scaled(p) for p in every]
    low, high = math.floor(2 * min(xs)) / 2, max(math.ceil(2 * max(xs)) / 2, math.floor(2 * min(xs)) / 2 + 0.5)
    least = math.floor(20 * min(p.mean for p in every)) / 20
    most = max(math.ceil(20 * max(p.mean for p in every)) / 20, least + 0.05)

    def at(p: Point) -> tuple[float, float]:
        return frame.at((scaled(p) - low) / (high - low), (p.mean - least) / (most - least))

    parts = frame.axes(
        [(step / 4, f"{2 ** (low + (high - low) * step / 4):.1f}") for step in range(5)],
        evenly(least, most, "{:.0f} %", 100),
        "measured peak of a train step, MiB (logarithmic)", "accuracy, held out",
    )  # fmt: skip
    names = list(dict.fromkeys((p.series, p.engine) for p in every))
    names.sort(key=lambda name: name[0] != mix)
    colors = iter(_COLORS * (1 + len(names) // len(_COLORS)))
    for row, name in enumerate(names):
        color = _MIX_COLOR if name[0] == mix else next(colors)
        style = ' stroke-width="2.5"' if name[0] == mix else ' stroke-dasharray="4 3"'
        some = sorted((p for p in every if (p.series, p.engine) == name), key=lambda p: p.peak_bytes)
        places = [at(p) for p in some]
        words = name[0] + ("" if name[1] == "onnxruntime" else f" ({name[1]})")
        parts += [line(places, color, style), *dots(places, color), *frame.legend(row, words, color)]
    return document(parts, 850, 480, title, frame.middle)
