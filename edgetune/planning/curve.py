"""Live bytes over the nodes of one iteration, and what is alive at its worst instant: a plan, told in full.

This module may know plans, phases and lifetimes; it must not know how anything is drawn or measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from edgetune.bundle import GraphSpec, Manifest
from edgetune.errors import UsageError, choices
from edgetune.planning.memory import Peak, bands
from edgetune.planning.packing import holes
from edgetune.planning.plan import Plan
from edgetune.planning.prediction import Phase, Prediction, phases_of, predict
from edgetune.planning.rebase import settled_for

ITERATION = ("trunk", "train", "accumulate", "update")
"""The phases of one training step, in their order."""
BANDS = ("saved", "features", "gradients", "transient", "workspace")
"""What comes and goes, as a curve tells it apart; the names are those of a ledger's lines."""
_BAND_OF = {"saved": "saved", "feature": "features", "gradient": "gradients", "workspace": "workspace"}
_BEFORE, _TO_THE_END, _BESIDE = "(given)", "(held to the end)", "(held beside the graph)"


@dataclass(frozen=True)
class Stretch:
    """One run of a graph: bytes alive during each of ``nodes``, by band. It runs ``runs`` times in an iteration."""

    phase: str
    nodes: tuple[str, ...]
    bands: Mapping[str, tuple[int, ...]]
    runs: int

    @property
    def total(self) -> tuple[int, ...]:
        """All bands together, per node."""
        return tuple(sum(column) for column in zip(*self.bands.values(), strict=True))


@dataclass(frozen=True)
class Curve:
    """One iteration. ``fixed_bytes`` are resident all the time; ``correction_bytes`` is what a measured step added to
    the prediction."""

    fixed_bytes: int
    correction_bytes: int
    stretches: tuple[Stretch, ...]

    @property
    def peak_bytes(self) -> int:
        """The predicted peak of the iteration, of the whole process."""
        most = max((max(stretch.total, default=0) for stretch in self.stretches), default=0)
        return self.fixed_bytes + self.correction_bytes + most


@dataclass(frozen=True)
class Alive:
    """One buffer that is alive at an instant: the node that makes it, and the last that needs it (in parentheses where
    that is no node)."""

    name: str
    kind: str
    bytes: int
    made_by: str
    last_read_by: str


@dataclass(frozen=True)
class Explanation:
    """The worst instant of a phase. ``fixed`` are the ledger's lines that are always there, the correction among them;
    they and ``alive`` (largest first) sum to ``peak_bytes``."""

    phase: str
    node: str
    peak_bytes: int
    fixed: Mapping[str, int]
    alive: tuple[Alive, ...]


def curve_of(manifest: Manifest, plan: Plan) -> Curve:
    """Return the live bytes over one iteration of ``plan``: one run of the trunk, of the train graph, of the update.

    ``manifest`` is the bundle's, not settled.
    """
    phases, prediction = _told(manifest, plan)
    stretches = []
    for name in ITERATION:
        if name not in phases:
            continue
        phase = phases[name]
        by_band = {band: [0] * len(phase.graph.nodes) for band in BANDS}
        for kind, usage in bands(phase.graph, phase.symbols).items():
            _add(by_band[_BAND_OF.get(kind, "transient")], usage)
        if plan.memory == "fast":
            _add(by_band["transient"], holes(phase.graph, phase.symbols))
        for tensor in phase.held:
            _add(by_band[_BAND_OF.get(tensor.kind, "transient")], [tensor.bytes] * len(phase.graph.nodes))
        runs = {"trunk": -(-plan.batch // plan.micro_batch), "update": 1}.get(
            name, -(-plan.batch // plan.tail_micro_batch)
        )
        stretches.append(Stretch(name, phase.graph.nodes, {k: tuple(v) for k, v in by_band.items()}, runs))
    return Curve(sum(_fixed(prediction).values()), plan.correction_bytes, tuple(stretches))


def explain(manifest: Manifest, plan: Plan, phase: str | None = None) -> Explanation:
    """Return what is alive at the worst instant of ``phase``; None: of the phase in which the process peaks.

    Raises:
        UsageError: the bundle has no such phase.
    """
    phases, prediction = _told(manifest, plan)
    peaks = prediction.peaks
    name = max(peaks, key=lambda one: peaks[one].bytes) if phase is None else phase
    if name not in peaks:
        raise UsageError(f"a step of this plan has no phase '{name}'; choose one of: {choices(peaks)}")
    fixed = _fixed(prediction)
    if plan.correction_bytes:
        fixed["correction"] = plan.correction_bytes
    alive = _alive(phases[name], peaks[name])
    return Explanation(name, peaks[name].node_name, sum(fixed.values()) + peaks[name].bytes, fixed, alive)


def _told(manifest: Manifest, plan: Plan) -> tuple[dict[str, Phase], Prediction]:
    settled = settled_for(manifest, plan)
    how = {"batch": plan.batch, "micro_batch": plan.micro_batch, "tail_micro_batch": plan.tail_micro_batch}
    phases = phases_of(settled, ranks=plan.ranks, **how)
    prediction = predict(
        settled, ranks=plan.ranks, runtime_bytes=plan.ledger["runtime"], cache_bytes=plan.cache_bytes,
        memory=plan.memory, **how,
    )  # fmt: skip
    return phases, prediction


def _fixed(prediction: Prediction) -> dict[str, int]:
    """Return the lines of the ledger that are resident in every phase."""
    return {line: size for line, size in prediction.ledger.items() if line not in BANDS}


def _add(total: list[int], more: list[int]) -> None:
    total[:] = [one + other for one, other in zip(total, more, strict=True)]


def _alive(phase: Phase, found: Peak) -> tuple[Alive, ...]:
    graph = phase.graph
    spans = _spans(graph)
    beside = {tensor.name for tensor in phase.held}
    rows = []
    for tensor in found.live:
        made_by, last = _BESIDE, _BESIDE
        if tensor.kind == "workspace":
            made_by = last = found.node_name
        elif tensor.name in spans and tensor.name not in beside:
            first, end = spans[tensor.name]
            made_by = graph.nodes[first] if first >= 0 else _BEFORE
            last = graph.nodes[end] if end < len(graph.nodes) else _TO_THE_END
        rows.append(Alive(tensor.name, tensor.kind, tensor.bytes, made_by, last))
    return tuple(rows)


def _spans(graph: GraphSpec) -> dict[str, tuple[int, int]]:
    """Return the first and the last node of every buffer."""
    found: dict[str, tuple[int, int]] = {}
    for use in graph.tensors:
        first, last = found.get(use.buffer, (use.first, use.last))
        found[use.buffer] = min(first, use.first), max(last, use.last)
    return found
