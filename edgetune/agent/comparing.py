"""Compares the codecs of a menu on a run's first batches, inside the budget: gradient errors of all options that fit.

The exact gradients need more memory than most codecs do, perhaps more than the budget. So as many samples are compared
at once as fit with all saved tensors exact, and an option that needs still more is not measured: no plan uses it.
Knows limits, the planner's candidates and a session; nothing of folders or files.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from edgetune.agent.parts import Meter, Session
from edgetune.bundle import Manifest
from edgetune.engines.gradient_error import Batch, exact_rates, with_errors
from edgetune.planning.calibration import Calibration
from edgetune.planning.candidates import Candidate, Limits, Workbench
from edgetune.planning.rates import ranked
from edgetune.planning.sizes import itemsize

BATCHES = 2
"""Errors are means over so many batches."""


@dataclass(frozen=True)
class Compared:
    """``calibration`` with the errors; ``samples`` per batch (0: not even one fits, and nothing was measured); the
    highest peak; by option that was not measured, of how many tensors."""

    calibration: Calibration
    samples: int
    measured_peak_bytes: int
    left_out: dict[str, int]

    def __str__(self) -> str:
        if not self.samples:
            return "the budget leaves no room to compare codecs, not even on one sample: one codec keeps all"
        options = sum(len(table) for table in self.calibration.errors.values())
        text = f"compared {options} options on {BATCHES} batches of {self.samples} samples"
        if self.left_out:
            names = ", ".join(f"{label} of {count} tensors" for label, count in self.left_out.items())
            text += f"; not used, because they need more than the budget to be compared: {names}"
        return text


def chooses(manifest: Manifest) -> bool:
    """Tell whether there is anything to choose per layer: options, or ranks."""
    return any(len(spec.options) > 1 or ranked(spec.options[0]) for spec in manifest.saved)


def compare(
    session: Session,
    manifest: Manifest,
    calibration: Calibration,
    feed: Callable[[int], Sequence[Batch]],
    limits: Callable[[int, int], Limits],
    meter: Meter,
) -> Compared:
    """Return ``calibration`` with the gradient errors of the options that fit.

    The session is left with another plan in force.

    Args:
        feed: returns ``BATCHES`` batches of the number of samples given.
        limits: returns the limits for that number of samples, with so many bytes held besides.

    Raises:
        DataError: a gradient is not finite.
        BundleError: a saved tensor has no option that keeps it exactly.
    """
    samples = calibration.batch
    while samples and not _exact(manifest, calibration, limits(samples, _held_bytes(manifest, samples))).fits():
        samples //= 2
    if not samples or not (batches := feed(samples)):
        return Compared(calibration, 0, 0, {})
    allowed = limits(samples, _held_bytes(manifest, samples))
    bench = Workbench(manifest, calibration, allowed)
    guard = _Guard(bench, meter)
    guard.watch(_exact(manifest, calibration, allowed))
    found = with_errors(session, manifest, calibration, batches, fits=guard.fits)
    guard.look()
    left_out: dict[str, int] = {}
    for spec in manifest.saved:
        for option in spec.options:
            if option.lossy and option.label not in found.errors.get(spec.name, {}):
                left_out[option.label] = left_out.get(option.label, 0) + 1
    return Compared(found, samples, guard.most_bytes, left_out)


class _Guard:
    """Lets candidates run that fit, as far as the meter confirms what was predicted of those before."""

    def __init__(self, bench: Workbench, meter: Meter) -> None:
        self._bench, self._meter = bench, meter
        self._excess_bytes = self._predicted_bytes = self.most_bytes = 0

    def fits(self, candidate: Candidate) -> bool:
        """Tell whether ``candidate`` may run."""
        self.look()
        limited = self._bench.mixed(candidate.rates)
        budget_bytes = limited.limits.budget_bytes
        if not limited.fits() or (
            budget_bytes is not None and limited.needed_bytes() + self._excess_bytes > budget_bytes
        ):
            return False
        self.watch(limited)
        return True

    def watch(self, candidate: Candidate) -> None:
        """Begin to measure a run of ``candidate``."""
        self._predicted_bytes = candidate.cost().peak_bytes
        self._meter.reset()

    def look(self) -> None:
        """Learn from what ran last."""
        measured_bytes = self._meter.peak_bytes()
        self.most_bytes = max(self.most_bytes, measured_bytes)
        if self._meter.resettable is not False:
            self._excess_bytes = max(self._excess_bytes, measured_bytes - self._predicted_bytes)


def _exact(manifest: Manifest, calibration: Calibration, limits: Limits) -> Candidate:
    return Workbench(manifest, calibration, limits).mixed(exact_rates(manifest, calibration, limits.batch))


def _held_bytes(manifest: Manifest, samples: int) -> int:
    """Return what is held besides a training step: the features of all batches; the exact gradients of each, those
    that are compared, and their differences in float64."""
    features = sum(samples * math.prod(spec.shape) * itemsize(spec.dtype) for spec in manifest.features)
    sizes = [4 * math.prod(spec.shape) for spec in manifest.parameters]
    return BATCHES * features + (BATCHES + 2) * sum(sizes) + 6 * max(sizes, default=0)
