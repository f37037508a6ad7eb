"""The plan: the ranks and sample counts with which a bundle is trained, what they cost, and the search for them.

This module may know the manifest, spectra and predictions; it must not know engines, devices or how bytes are measured.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from edgetune.bundle import Manifest
from edgetune.errors import BudgetError, UsageError
from edgetune.plain import from_plain
from edgetune.planning.prediction import Prediction, dense_bytes, predict, saved_bytes_by_tensor
from edgetune.planning.selection import default_selection, settle
from edgetune.planning.sizes import rank_symbol
from edgetune.planning.spectra import (
    Calibration,
    Ranks,
    breakpoints,
    captured_energy_bound,
    check_epsilon,
    identity_calibration,
    ranks_at,
)
from edgetune.units import MIB, format_bytes

__all__ = ["Plan", "PlanRow", "Prediction", "make_plan", "predict"]

MOST_SAMPLES_PER_RUN = 32
"""The largest micro-batch: beyond it a trunk gains no speed worth its memory."""
USUAL_SAMPLES_PER_RUN = 8
"""The micro-batch where no budget decides."""
RESERVE_BYTES = 3 * MIB
"""What a real run leaves free of its budget: the peaks of one plan's steps differ by up to 1.5 MiB (measured), by small
blocks that the allocator keeps."""


@dataclass(frozen=True)
class PlanRow:
    """What a plan does with the input of one trained layer.

    Attributes:
        input_shape: excludes the batch.
        dense_bytes: the input in float32, for the plan's batch.
        ranks: by mode letter; empty where the codec truncates nothing.
        stored_bytes: what is kept of it. Layers that read the same tensor each show it; it is stored once.
        ratio: ``dense_bytes / stored_bytes``.
        captured_energy: a lower bound of the fraction of the input's energy that the ranks keep, predicted from the
            spectra (see ``spectra.captured_energy_bound``); None where it is lossless or nothing is known of the data.
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


@dataclass(frozen=True)
class Plan:
    """One way to train a bundle, and its predicted cost. A value: it compares, prints, and round-trips through JSON.

    Attributes:
        batch: samples per training step.
        micro_batch: samples per run of the trunk.
        codec: the bundle's codec, or its menu.
        epsilon: the ε of every truncated mode; None where the codec truncates nothing.
        ranks: by saved tensor and mode letter; those that truncate nothing have no entry.
        budget_bytes: what the whole process may take; None: not limited.
        activation_budget_bytes: what may be saved for the backward pass; None: not limited.
        ledger: as ``Prediction.ledger``; sums to ``predicted_peak_bytes``.
        predicted_peak_bytes: of the whole process.
        saved_bytes: what the forward pass keeps for weight gradients, each tensor once.
        dense_saved_bytes: the same saved tensors without any codec, in float32.
        bottleneck: ``<graph>/<node>`` at the predicted peak.
        correction_bytes: measured minus predicted peak of an earlier step, included in the prediction.
        rows: one per trained layer.
        selection: the label of the codec by saved tensor.
        calibration: the bases and spectra behind the ranks; neither compared nor in the JSON.
    """

    batch: int
    micro_batch: int
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
    calibration: Calibration | None = field(default=None, compare=False, repr=False)

    def symbols(self) -> dict[str, int]:
        """Return the values of all symbols in the bundle's shapes: ``batch`` and the ranks."""
        ranks = {
            rank_symbol(saved, letter): rank for saved, modes in self.ranks.items() for letter, rank in modes.items()
        }
        return {"batch": self.batch, **ranks}

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


@dataclass(frozen=True)
class _Candidate:
    """One ε with all that follows from it but the micro-batch."""

    epsilon: float | None
    ranks: Ranks
    saved: Mapping[str, Mapping[str, int]]

    @property
    def saved_bytes(self) -> int:
        merged = {name: size_bytes for tensors in self.saved.values() for name, size_bytes in tensors.items()}
        return sum(merged.values())


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
) -> Plan:
    """Return the plan that keeps most of the saved tensors' energy within the budgets.

    With ``epsilon``, exactly that ε. Otherwise the largest ε whose predicted peak is at most ``budget_bytes`` with a
    micro-batch of 1, and whose saved bytes are at most ``activation_budget_bytes``. Where the codec truncates nothing
    there is no ε to choose, and ``epsilon`` is ignored: any is satisfied. Then the micro-batch: the largest power of
    two, at most ``batch`` and 32, that stays within ``budget_bytes``; without one, 8 or ``batch``.

    Every saved tensor is kept by ``codec``, one of the bundle's menu (None: the first), where that applies.
    No ``calibration`` stands for :func:`identity_calibration`. ``runtime_bytes`` are resident before anything of the
    plan is allocated; ``correction_bytes`` is the measured minus the predicted peak of an earlier step, of either sign;
    ``reserve_bytes`` of the budget are left free, because no process repeats its peak to the byte.

    Raises:
        BudgetError: nothing fits. ``least_bytes`` is the least value of the budget that failed (of ``budget_bytes``
            where both did) that can be met: that and no byte less.
        StateError: the calibration belongs to another bundle.
        UsageError: a batch, a budget or ``epsilon`` out of range.
    """
    _check(batch, epsilon, budget_bytes, activation_budget_bytes)
    selection = default_selection(manifest, codec)
    manifest = settle(manifest, selection)
    truncates = any(mode.spectrum for spec in manifest.saved for mode in spec.modes)
    if truncates and calibration is None:
        calibration = identity_calibration(manifest, batch)

    def candidate(value: float | None) -> _Candidate:
        ranks: Ranks = {}
        if value is not None and calibration is not None:
            ranks = ranks_at(manifest, calibration, value, batch)
        return _Candidate(value, ranks, saved_bytes_by_tensor(manifest, batch=batch, ranks=ranks))

    def cost(tried: _Candidate, micro_batch: int) -> Prediction:
        return predict(
            manifest,
            batch=batch,
            micro_batch=micro_batch,
            ranks=tried.ranks,
            runtime_bytes=runtime_bytes,
            correction_bytes=correction_bytes,
        )

    def fits(tried: _Candidate, micro_batch: int = 1) -> bool:
        if activation_budget_bytes is not None and tried.saved_bytes > activation_budget_bytes:
            return False
        return budget_bytes is None or cost(tried, micro_batch).peak_bytes + reserve_bytes <= budget_bytes

    values: Sequence[float | None] = [None]
    if truncates and calibration is not None:
        values = [epsilon] if epsilon is not None else breakpoints(calibration).tolist()
    chosen = _last_that(lambda index: fits(candidate(values[index])), len(values))
    if chosen is None:
        least = candidate(values[0])
        peak = cost(least, 1)
        raise _infeasible(
            batch, least, peak, budget_bytes, activation_budget_bytes, given=epsilon, reserve_bytes=reserve_bytes
        )
    best = candidate(values[chosen])
    if budget_bytes is None:
        micro_batch = min(USUAL_SAMPLES_PER_RUN, batch)
    else:
        powers = [1 << k for k in range(min(batch, MOST_SAMPLES_PER_RUN).bit_length())]
        micro_batch = powers[_last_that(lambda index: fits(best, powers[index]), len(powers)) or 0]
    prediction = cost(best, micro_batch)
    return Plan(
        batch=batch,
        micro_batch=micro_batch,
        codec=manifest.codec,
        epsilon=best.epsilon,
        ranks=best.ranks,
        budget_bytes=budget_bytes,
        activation_budget_bytes=activation_budget_bytes,
        ledger=prediction.ledger,
        predicted_peak_bytes=prediction.peak_bytes,
        saved_bytes=best.saved_bytes,
        dense_saved_bytes=sum(dense_bytes(spec, batch) for spec in manifest.saved),
        bottleneck=prediction.bottleneck,
        correction_bytes=correction_bytes,
        rows=_rows(manifest, best, calibration, batch),
        selection=selection,
        calibration=calibration,
    )


def _last_that(holds: Callable[[int], bool], count: int) -> int | None:
    """Return the last index below ``count`` that ``holds``, which no index after a failing one may; None if none."""
    low, high = -1, count  # `low` holds, `high` fails; neither end is ever asked
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low if low >= 0 else None


def _rows(manifest: Manifest, best: _Candidate, calibration: Calibration | None, batch: int) -> tuple[PlanRow, ...]:
    specs = {spec.name: spec for spec in manifest.saved}
    rows = []
    for layer in manifest.layers:
        spec = specs[layer.saved]
        ranks = best.ranks.get(spec.name, {})
        dense, stored = layer.dense_bytes(batch), sum(best.saved[spec.name].values())
        energy = None if calibration is None else captured_energy_bound(spec, calibration, ranks, batch)
        ratio = dense / max(stored, 1)
        rows.append(
            PlanRow(layer.name, layer.op, layer.role, layer.input_shape, dense, dict(ranks), stored, ratio, energy)
        )
    return tuple(rows)


def _check(batch: int, epsilon: float | None, budget_bytes: int | None, activation_budget_bytes: int | None) -> None:
    if batch < 1:
        raise UsageError(f"the batch is {batch} samples; expected at least 1")
    if epsilon is not None:
        check_epsilon(epsilon)
    for name, value in (("budget", budget_bytes), ("activation budget", activation_budget_bytes)):
        if value is not None and value < 1:
            raise UsageError(f"the {name} is {value} bytes; expected at least 1")


def _infeasible(
    batch: int,
    least: _Candidate,
    prediction: Prediction,
    budget_bytes: int | None,
    activation_budget_bytes: int | None,
    *,
    given: float | None,
    reserve_bytes: int,
) -> BudgetError:
    """Return the error for budgets that not even ``least``, at a micro-batch of 1, fits."""
    setting = f"a batch of {batch} samples"
    if least.epsilon is not None:
        setting += f", epsilon = {given:g} as given" if given is not None else ", the least ranks"
    lower = "" if given is None or least.epsilon is None else "lower epsilon, "
    messages, least_bytes = [], 0
    if activation_budget_bytes is not None and least.saved_bytes > activation_budget_bytes:
        least_bytes = least.saved_bytes
        messages.append(
            f"the activation budget of {_exact(activation_budget_bytes)} is too small: the least is "
            f"{_exact(least_bytes)}, with {setting}"
        )
    if budget_bytes is not None and prediction.peak_bytes + reserve_bytes > budget_bytes:
        least_bytes = prediction.peak_bytes + reserve_bytes
        largest = sorted(prediction.ledger.items(), key=lambda line: -line[1])[:3]
        messages.append(
            f"the budget of {_exact(budget_bytes)} is too small: the least is {_exact(least_bytes)}, with {setting} "
            f"and a micro-batch of 1; its largest parts are "
            f"{', '.join(f'{name} {format_bytes(size)}' for name, size in largest)}; "
            f"the peak is at {prediction.bottleneck}"
        )
    advice = f"raise it, {lower}choose a smaller batch, or export with fewer trained layers"
    return BudgetError("; ".join(reversed(messages)) + f"; {advice}", least_bytes=least_bytes)


def _exact(size_bytes: int) -> str:
    return f"{format_bytes(size_bytes)} ({size_bytes} bytes)"
