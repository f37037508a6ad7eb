"""Acts on the energy certificate: which tensors can be mended, what is logged, and when the bases are measured anew.

Knows the certificate, a session's Gram matrices and the planner's plans; nothing of folders or checkpoints.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Any

from edgetune.agent.journal import Journal
from edgetune.agent.parts import Meter
from edgetune.bundle import Array, Manifest
from edgetune.engines.calibration import Measures, calibrate
from edgetune.engines.certificate import Certificate, Finding, Kind
from edgetune.errors import DataError
from edgetune.planning.plan import Plan
from edgetune.planning.rebase import promises, settled_for
from edgetune.planning.selection import described
from edgetune.planning.spectra import Calibration

LEAST_SAMPLES = 64
"""Bases are measured on so many of the next samples at least. On drifted digits (batches of 8, ε = 0.8), bases of 8,
16, 32 and 64 samples captured 0.593, 0.612, 0.615 and 0.619 of the next batches' energy."""


class Refresher:
    """Watches the captured energies of a run for the agent."""

    def __init__(self, manifest: Manifest, journal: Journal) -> None:
        self._manifest, self._journal = manifest, journal
        self.certificate = Certificate()
        self._figures: dict[str, Any] = {}

    @property
    def due(self) -> bool:
        """Whether new bases are to be measured before the next step."""
        return bool(self.certificate.due)

    def batches(self, batch: int, least: int) -> int:
        """Return on how many batches of ``batch`` samples bases are measured, ``least`` or more."""
        return max(least, -(-LEAST_SAMPLES // batch))

    def observe(self, step: int, energy: Mapping[str, float], plan: Plan) -> None:
        """Judge the energies of a step on a full batch, and log what changed."""
        found = self.certificate.observe(energy)
        for kind in Kind:
            if findings := [finding for finding in found if finding.kind is kind]:
                self._log(step, kind, findings)
        if lost := [name for name in self.certificate.due if not self._mendable(plan, name)]:
            self.certificate.accept(lost)
            text = f"nothing is refreshed for {_names(lost)}: its codec takes neither bases nor ranks from the data"
            self._journal.event("energy_accepted", text, step=step, tensors=lost)

    def measure(
        self, step: int, session: Measures, meter: Meter, features: Iterable[tuple[Array, ...]]
    ) -> Calibration | None:
        """Return what new batches of ``features`` say of all tensors; None if they cannot tell, which is logged."""
        started = time.perf_counter()
        meter.reset()
        try:
            calibration = calibrate(session, self._manifest, features)
        except DataError as error:
            self.certificate.failed()
            self._journal.event("refresh_failed", f"the bases cannot be refreshed: {error}", step=step)
            return None
        self._figures = {
            "samples": 0 if calibration is None else calibration.samples,
            "measured_peak_bytes": meter.peak_bytes(),
            "seconds": {"refresh": round(time.perf_counter() - started, 6)},
        }
        return calibration

    def refreshed(self, old: Plan, plan: Plan) -> tuple[str, dict[str, Any]]:
        """Begin anew, with ``plan`` in place of ``old``; return the reason for people, and figures for the log."""
        fallen, tracks = dict(self.certificate.fallen), self.certificate.tracks
        tensors = {name: {"promised": promised, "measured": tracks[name].mean} for name, promised in fallen.items()}
        done = "the same ranks"
        if plan.ranks != old.ranks or plan.selection != old.selection:
            done = f"other ranks, ε {old.epsilon} -> {plan.epsilon}"
            if plan.epsilon is None:
                done = f"planned anew: {described(plan.selection)}"
        why = "the world changed"
        if fallen:
            worst = min(fallen, key=lambda name: tracks[name].mean - fallen[name])
            more = f" (and of {len(fallen) - 1} more)" if len(fallen) > 1 else ""
            why = f"the captured energy of {worst}{more} fell to {tracks[worst].mean:.4f} of {fallen[worst]:.4f}"
        reason = f"{why}; new bases, {done}"
        self.certificate.refreshed(promises(self._manifest, plan))
        return reason, {"tensors": tensors, **self._figures}

    def restart(self, plan: Plan) -> None:
        """Begin anew: ``plan`` has other ranks or codecs."""
        self.certificate.restart(promises(self._manifest, plan))

    def _mendable(self, plan: Plan, name: str) -> bool:
        """Return whether calibration decides anything of how the tensor is kept: bases, or ranks."""
        manifest = settled_for(self._manifest, plan)
        return any(mode.spectrum for spec in manifest.saved if spec.name == name for mode in spec.modes)

    def _log(self, step: int, kind: Kind, findings: list[Finding]) -> None:
        worst = min(findings, key=lambda finding: finding.measured - finding.promised)
        number = f"{worst.measured:.4f} of the promised {worst.promised:.4f}"
        tensors: dict[str, Any] = {f.tensor: {"promised": f.promised, "measured": f.measured} for f in findings}
        names = _names(tensors)
        if kind is Kind.FALLEN:
            text = f"captured energy of {names} fell to {number}"
        elif kind is Kind.MENDED:
            text = f"captured energy of {names} is back: {number}"
        else:
            text = (
                f"captured energy of {names} stays at {number} after a refresh: the ranks are too small for this "
                "data; a larger --budget or --epsilon would keep more"
            )
        self._journal.event(f"energy_{kind.value}", text, step=step, tensors=tensors)


def _names(names: Iterable[str]) -> str:
    known = list(names)
    return ", ".join(known[:3]) + (f" and {len(known) - 3} more" if len(known) > 3 else "")
