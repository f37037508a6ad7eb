"""The plan: the ranks and sample counts with which a bundle is trained, what they cost, and the search for them.

This module may know the manifest, spectra and predictions; it must not know engines, devices or how bytes are measured.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field

from edgetune.bundle import Manifest
from edgetune.errors import UsageError, choices
from edgetune.plain import from_plain
from edgetune.planning.candidates import Candidate, Limits
from edgetune.planning.cheapest import LEAST_EPSILON, Method, cheapest
from edgetune.planning.knobs import (
    check_samples,
    check_splits,
    check_trained,
    layers_before_head,
    pieces_of,
    trained_of,
)
from edgetune.planning.per_layer import PerLayer
from edgetune.planning.prediction import Prediction, dense_bytes, predict
from edgetune.planning.sizes import rank_symbol
from edgetune.planning.spectra import Calibration, captured_energy_bound, check_epsilon, identity_calibration
from edgetune.planning.uniform import Uniform, last_that
from edgetune.units import MIB

__all__ = ["ALLOCATIONS", "Plan", "PlanRow", "Prediction", "make_plan", "plan_of", "predict"]

MEMORY = ("auto", "lean", "fast")
"""Every tensor in memory of its own; those of a run in one block; or that where it fits."""
ALLOCATIONS = ("uniform", "per-layer")
"""One codec and one ε for all saved tensors, or for each its own."""
MOST_SAMPLES_PER_RUN = 32
"""The largest micro-batch: beyond it a trunk gains no speed worth its memory."""
USUAL_SAMPLES_PER_RUN = 8
"""The micro-batch where no budget decides."""
RESERVE_BYTES = 3 * MIB
"""What a real run leaves free of its budget: the peaks of one plan's steps differ by up to 1.5 MiB (measured), by small
blocks that the allocator keeps."""
TORCH_RESERVE_BYTES = 10 * MIB
"""The same for the torch engine, whose tensors of up to 4 MiB lie in the C library's heap, now here, now there: a later
step took up to 7.9 MiB more than the ones that were rehearsed (docs/memory.md)."""


@dataclass(frozen=True)
class PlanRow:
    """What a plan does with the input of one trained layer.

    Attributes:
        input_shape: excludes the batch.
        dense_bytes: the input in float32, for the samples of one run of the train graph.
        ranks: by mode letter; empty where the codec truncates nothing.
        stored_bytes: what is kept of it. Layers that read the same tensor each show it; it is stored once.
        ratio: ``dense_bytes / stored_bytes``.
        captured_energy: a lower bound of the fraction of the input's energy that the ranks keep, predicted from the
            spectra (see ``spectra.captured_energy_bound``); None where it is lossless or nothing is known of the data.
        codec: label of the option that keeps the input.
        epsilon: None where there is none.
        error: relative weight-gradient error, as calibrated (``Calibration.errors``); None where it was not measured.
            Layers that read the same tensor each show it; it counts once.
    """

    layer: str
    op: str
    role: str
    input_shape: tuple[int, ...]
    dense_bytes: int
    ranks: Mapping[str, int]
    stored_bytes: int
    ratio: float
    captured_energy: float | None
    codec: str = ""
    epsilon: float | None = None
    error: float | None = None


@dataclass(frozen=True)
class Plan:
    """One way to train a bundle, and its predicted cost. A value: it compares, prints, and round-trips through JSON.

    Attributes:
        batch: samples per training step.
        micro_batch: samples per run of the trunk.
        tail_micro_batch: samples per run of the train graph; less than ``batch`` where the gradient of a step is
            accumulated over the pieces of its batch.
        trained: how many of the bundle's trained weight layers before the head are trained, counted from the output as
            ``--last`` does; the head is trained besides, the rest of the tail frozen.
        cache_bytes: what the features that are kept from pass to pass may take; 0: none are kept.
        memory: ``fast`` where a runtime that can is to keep the tensors of a run in one block (``planning.packing``),
            which takes more memory and less time; else ``lean``.
        codec: the bundle's codec, or its menu.
        epsilon: the ε of every truncated mode; None where the codec truncates nothing, and where each tensor has its
            own (``rows`` have those).
        ranks: by saved tensor and mode letter; those that truncate nothing have no entry.
        budget_bytes: what the whole process may take; None: not limited.
        activation_budget_bytes: what may be saved for the backward pass; None: not limited.
        ledger: as ``Prediction.ledger``; sums to ``predicted_peak_bytes``.
        predicted_peak_bytes: of the whole process.
        saved_bytes: what the forward pass keeps for weight gradients, each tensor once: at once, so of one piece.
        dense_saved_bytes: the same saved tensors without any codec, in float32.
        bottleneck: ``<graph>/<node>`` at the predicted peak.
        correction_bytes: measured minus predicted peak of an earlier step, included in the prediction.
        rows: one per trained layer.
        selection: the label of the codec by saved tensor.
        allocation: one of ``ALLOCATIONS``.
        error: the total gradient error, as calibrated: the sum of the relative weight-gradient errors of all saved
            tensors; None where one was not measured.
        error_bound: no plan within the budgets has a lower error, as far as the calibration's rates and the sums of
            bytes go by which a mixed plan is found; None for a uniform plan. The gap is ``error - error_bound``.
        reasons: why the batch is trained in pieces, or fewer layers than there are, where the planner chose so.
        calibration: the bases and spectra behind the ranks; neither compared nor in the JSON.
    """

    batch: int
    micro_batch: int
    tail_micro_batch: int
    trained: int
    cache_bytes: int
    codec: str
    epsilon: float | None
    ranks: Mapping[str, Mapping[str, int]]
    budget_bytes: int | None
    activation_budget_bytes: int | None
    ledger: Mapping[str, int]
    predicted_peak_bytes: int
    saved_bytes: int
    dense_saved_bytes: int
    bottleneck: str
    correction_bytes: int = 0
    rows: tuple[PlanRow, ...] = ()
    selection: Mapping[str, str] = field(default_factory=dict)
    allocation: str = "uniform"
    error: float | None = None
    error_bound: float | None = None
    reasons: tuple[str, ...] = ()
    memory: str = "lean"
    calibration: Calibration | None = field(default=None, compare=False, repr=False)

    def symbols(self) -> dict[str, int]:
        """Return the values of all symbols in the train graph's shapes: ``batch`` and the ranks."""
        ranks = {
            rank_symbol(saved, letter): rank for saved, modes in self.ranks.items() for letter, rank in modes.items()
        }
        return {"batch": self.tail_micro_batch, **ranks}

    def to_json(self) -> str:
        """Return the plan, without its calibration, as JSON text; :meth:`from_json` reads it back equal."""
        plain = dataclasses.asdict(dataclasses.replace(self, calibration=None))
        del plain["calibration"]
        return json.dumps(plain, indent=1)

    @staticmethod
    def from_json(text: str) -> Plan:
        """Return the plan that ``text`` holds, without a calibration.

        Raises:
            UsageError: not JSON.
            BundleError: a field is missing, unknown or of the wrong type.
        """
        try:
            data = json.loads(text)
        except ValueError as error:
            raise UsageError(f"the plan is not JSON ({error}); make it again with 'edgetune plan --json'") from None
        plan: Plan = from_plain(Plan, data, "plan")
        return plan


def reserve_bytes_of(engine: str) -> int:
    """Return what a real run with ``engine`` (``onnxruntime`` or ``torch``) leaves free of its budget."""
    return TORCH_RESERVE_BYTES if engine == "torch" else RESERVE_BYTES


def make_plan(
    manifest: Manifest,
    *,
    batch: int,
    calibration: Calibration | None,
    budget_bytes: int | None = None,
    activation_budget_bytes: int | None = None,
    epsilon: float | None = None,
    runtime_bytes: int,
    correction_bytes: int = 0,
    reserve_bytes: int = 0,
    codec: str | None = None,
    allocation: str = "uniform",
    rate: float | None = None,
    micro_batch: int | None = None,
    tail_micro_batch: int | None = None,
    trained: int | None = None,
    cache_bytes: int | None = None,
    least_epsilon: float = LEAST_EPSILON,
    memory: str = "lean",
) -> Plan:
    """Return the plan that costs least within the budgets, in time and in what is lost of the gradient.

    ``uniform``: every saved tensor is kept by ``codec``, one of the bundle's menu (None: the first), where that
    applies. With ``epsilon``, at exactly that ε; with ``rate`` λ, one element of λ is kept wherever elements are
    counted. Otherwise at the largest ε whose predicted peak is at most ``budget_bytes``, and whose saved bytes are at
    most ``activation_budget_bytes``. Where the codec truncates nothing there is no ε to choose, and ``epsilon`` is
    ignored: any is satisfied.

    ``per-layer``: each saved tensor gets an option of its menu and an ε of its own, so that the sum of the gradient
    errors that ``calibration`` holds is the least within the budgets (``planning.per_layer``).

    ``micro_batch``, ``tail_micro_batch``, ``trained`` and ``cache_bytes`` are as in :class:`Plan`; what is given stays,
    and the others are chosen: ``planning.cheapest`` has the order in which they are given up, ``least_epsilon`` among
    it. No cache unless one is given. At last the micro-batch of the trunk: the largest power of two, at most that of
    the tail and 32, that stays within ``budget_bytes``; without one, 8 or that of the tail. Where ``memory`` is
    ``auto``, what the budget then still has room for goes to speed: ``fast`` if that fits.

    No ``calibration`` stands for :func:`identity_calibration`. ``runtime_bytes`` are resident before anything of the
    plan is allocated; ``correction_bytes`` is the measured minus the predicted peak of an earlier step, of either sign;
    ``reserve_bytes`` of the budget are left free, because no process repeats its peak to the byte.

    Raises:
        BudgetError: nothing fits. ``least_bytes`` is the least value of the budget that failed (of ``budget_bytes``
            where both did) that can be met: that and no byte less.
        StateError: the calibration belongs to another bundle, or holds no errors although the allocation needs them.
        UsageError: a batch, a budget, ``epsilon`` or ``rate`` out of range; choices that exclude each other.
    """
    _check(batch, epsilon, budget_bytes, activation_budget_bytes)
    _check_choices(allocation, codec, epsilon, rate)
    check_samples("--micro-batch", micro_batch, batch)
    check_samples("--tail-micro-batch", tail_micro_batch, batch)
    check_trained(manifest, trained)
    if cache_bytes is not None and cache_bytes < 0:
        raise UsageError(f"the cache is {cache_bytes} bytes; expected 0 or more")
    if memory not in MEMORY:
        raise UsageError(f"memory '{memory}' is unknown; choose one of: {choices(MEMORY)}")
    if tail_micro_batch is not None and tail_micro_batch < batch:
        check_splits(manifest)
    limits = Limits(
        batch, runtime_bytes, budget_bytes, activation_budget_bytes, correction_bytes, reserve_bytes,
        micro_batch, None, cache_bytes or 0, memory,
    )  # fmt: skip
    measured = calibration
    if calibration is None:
        calibration = identity_calibration(manifest, batch)
    uniform = Uniform(codec, epsilon, rate)
    uniform.check(manifest)
    method: Method = PerLayer() if allocation == "per-layer" else uniform
    found = cheapest(
        manifest, calibration, limits, method, pieces=pieces_of(manifest, batch, tail_micro_batch),
        trained=trained_of(manifest, trained), least_epsilon=least_epsilon,
    )  # fmt: skip
    best = found.candidate
    # Without any rank nothing of the calibration is used, and where none was given there is none to hold.
    held = measured or (calibration if best.ranks or allocation == "per-layer" else None)
    return plan_of(best, held, allocation=allocation, error_bound=found.bound, reasons=found.reasons)


def plan_of(
    chosen: Candidate,
    calibration: Calibration | None,
    *,
    allocation: str = "uniform",
    error_bound: float | None = None,
    reasons: tuple[str, ...] = (),
) -> Plan:
    """Return the plan of ``chosen``, with the largest micro-batch that fits."""
    limits, manifest = chosen.limits, chosen.manifest
    if limits.micro_batch is not None:
        micro_batch = limits.micro_batch
    elif limits.budget_bytes is None:
        micro_batch = min(USUAL_SAMPLES_PER_RUN, limits.piece)
    else:
        powers = [1 << k for k in range(min(limits.piece, MOST_SAMPLES_PER_RUN).bit_length())]
        micro_batch = powers[last_that(lambda index: chosen.fits(powers[index]), len(powers)) or 0]
    memory = limits.memory
    if memory == "auto":
        fast = Candidate(manifest, chosen.rates, dataclasses.replace(limits, memory="fast"), chosen.epsilon)
        memory = "fast" if fast.fits(micro_batch) else "lean"
        chosen = fast if memory == "fast" else chosen
    prediction = chosen.cost(micro_batch)
    return Plan(
        batch=limits.batch,
        micro_batch=micro_batch,
        tail_micro_batch=limits.piece,
        trained=layers_before_head(manifest),
        cache_bytes=limits.cache_bytes,
        codec=manifest.codec,
        epsilon=chosen.epsilon,
        ranks=chosen.ranks,
        budget_bytes=limits.budget_bytes,
        activation_budget_bytes=limits.activation_budget_bytes,
        ledger=prediction.ledger,
        predicted_peak_bytes=prediction.peak_bytes,
        saved_bytes=chosen.saved_bytes,
        dense_saved_bytes=sum(dense_bytes(spec, limits.piece) for spec in manifest.saved),
        bottleneck=prediction.bottleneck,
        correction_bytes=limits.correction_bytes,
        rows=_rows(chosen, calibration),
        selection=chosen.selection,
        allocation=allocation,
        error=chosen.error,
        error_bound=error_bound,
        reasons=reasons,
        memory=memory,
        calibration=calibration,
    )


def _rows(chosen: Candidate, calibration: Calibration | None) -> tuple[PlanRow, ...]:
    specs, batch = {spec.name: spec for spec in chosen.manifest.saved}, chosen.limits.piece
    rows = []
    for layer in chosen.manifest.layers:
        spec, one = specs[layer.saved], chosen.rates[layer.saved]
        dense, stored = layer.dense_bytes(batch), sum(chosen.saved[spec.name].values())
        energy = None if calibration is None else captured_energy_bound(spec, calibration, one.ranks, batch)
        ratio = dense / max(stored, 1)
        rows.append(
            PlanRow(
                layer.name, layer.op, layer.role, layer.input_shape, dense, dict(one.ranks), stored, ratio, energy,
                one.label, one.epsilon, one.error,
            )
        )  # fmt: skip
    return tuple(rows)


def _check(batch: int, epsilon: float | None, budget_bytes: int | None, activation_budget_bytes: int | None) -> None:
    if batch < 1:
        raise UsageError(f"the batch is {batch} samples; expected at least 1")
    if epsilon is not None:
        check_epsilon(epsilon)
    for name, value in (("budget", budget_bytes), ("activation budget", activation_budget_bytes)):
        if value is not None and value < 1:
            raise UsageError(f"the {name} is {value} bytes; expected at least 1")


def _check_choices(allocation: str, codec: str | None, epsilon: float | None, rate: float | None) -> None:
    if allocation not in ALLOCATIONS:
        raise UsageError(f"the allocation '{allocation}' is unknown; choose one of: {choices(ALLOCATIONS)}")
    given = {"codec": codec, "epsilon": epsilon, "rate": rate}
    named = [name for name, value in given.items() if value is not None]
    if allocation == "per-layer" and named:
        raise UsageError(f"a per-layer allocation chooses by itself: leave out {choices(named)}, or allocate uniformly")
    if epsilon is not None and rate is not None:
        raise UsageError("epsilon and rate both say how much is kept; give one of them")
