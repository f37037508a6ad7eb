"""What each phase of a step was predicted to take and took, for the run log: one event per plan that came into force.

Knows plans and predictions, and a meter; nothing of the loop.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgetune.agent.parts import Meter
from edgetune.bundle import Manifest
from edgetune.planning.curve import ITERATION
from edgetune.planning.plan import Plan, reserve_bytes_of
from edgetune.planning.prediction import predict
from edgetune.planning.rebase import settled_for


def corrected_bytes(measured_bytes: int, engine: str) -> int:
    """Return the prediction for later steps of a plan whose rehearsed ones took ``measured_bytes``: so much, and what a
    budget leaves free beside it."""
    return measured_bytes + reserve_bytes_of(engine)


class PhasePeaks:
    """The high-water mark of every phase of one step, read at its end; the meter starts anew for the next phase.

    Give :meth:`ended` to ``TrainingSession.phase_ended``, which calls it for all but ``trunk``, and call it
    oneself for ``trunk``. A meter that cannot start anew reads the most since the process began, in every phase.
    """

    def __init__(self, meter: Meter) -> None:
        self._meter = meter
        self.measured_bytes: dict[str, int] = {}

    def begin(self) -> None:
        """Forget the last step."""
        self.measured_bytes.clear()
        self._meter.reset()

    def ended(self, phase: str) -> None:
        """Note what ``phase`` took; of several runs of one the most."""
        most = max(self.measured_bytes.get(phase, 0), self._meter.peak_bytes())
        self.measured_bytes[phase] = most
        self._meter.reset()

    @property
    def resettable(self) -> bool:
        """Whether every phase has a peak of its own."""
        return self._meter.resettable is not False

    @property
    def step_bytes(self) -> int:
        """The most that any phase took."""
        return max(self.measured_bytes.values(), default=0)


def timeline_fields(
    manifest: Manifest, plan: Plan, runtime_bytes: int, measured_bytes: Mapping[str, int]
) -> dict[str, Any]:
    """Return the fields of the event ``timeline`` of a run log.

    ``fixed_bytes`` are resident in every phase; ``phases`` maps those of ``ITERATION`` to what is predicted for the
    whole process (``predicted_bytes``, the plan's correction included), to how much of that is saved and how much comes
    and goes (``saved_bytes``, ``transient_bytes``; features, gradients and workspace count to the latter), to the node
    at which it is most, and to ``measured_bytes``, None where the phase was not measured.

    Args:
        runtime_bytes: what the plan was made with.
        measured_bytes: by phase, as :class:`PhasePeaks` has it.
    """
    settled = settled_for(manifest, plan)
    made = predict(
        settled, batch=plan.batch, micro_batch=plan.micro_batch, ranks=plan.ranks, runtime_bytes=runtime_bytes,
        correction_bytes=plan.correction_bytes, tail_micro_batch=plan.tail_micro_batch, cache_bytes=plan.cache_bytes,
        memory=plan.memory,
    )  # fmt: skip
    fixed = made.peak_bytes - plan.correction_bytes - max((peak.bytes for peak in made.peaks.values()), default=0)
    phases: dict[str, Any] = {}
    for name in ITERATION:
        if name not in made.peaks:
            continue
        peak = made.peaks[name]
        saved = sum(tensor.bytes for tensor in peak.live if tensor.kind == "saved")
        phases[name] = {
            "predicted_bytes": fixed + peak.bytes + plan.correction_bytes,
            "saved_bytes": saved,
            "transient_bytes": peak.bytes - saved,
            "node": peak.node_name,
            "measured_bytes": measured_bytes.get(name),
        }
    return {"fixed_bytes": fixed, "correction_bytes": plan.correction_bytes, "phases": phases}
