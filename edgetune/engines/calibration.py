"""Spectra from data, and a plan from spectra: what ``edgetune.plan`` does. Knows the session and the planner."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from edgetune.bundle import Array, Bundle
from edgetune.engines.session import TrainingSession, make_runtime
from edgetune.errors import DataError
from edgetune.planning.plan import Plan, make_plan
from edgetune.planning.spectra import Calibration, identity_calibration, spectrum_of
from edgetune.telemetry.process import resident_bytes


def measure_runtime(bundle: Bundle, engine: str = "auto") -> int:
    """Return the resident bytes of this process with the runtime loaded and every graph of ``bundle`` opened."""
    runtime = make_runtime(bundle, engine)
    for graph in bundle.manifest.graphs:
        runtime.load(graph)
    return resident_bytes()


def calibrate(session: TrainingSession, batches: Iterable[tuple[Array, Array]]) -> Calibration:
    """Return the spectra and bases of every compressed tensor over ``batches`` of (inputs, targets).

    Gram matrices of the modes c, h and w are summed over all batches. That of the batch mode has no meaning beyond its
    batch, so its spectrum is the mean of the batches' own; a shorter batch than the first is left out of it.

    Raises:
        DataError: there is no batch.
    """
    totals: dict[str, dict[str, Array]] = {}
    spectra: dict[str, list[Array]] = {}
    samples, batch = 0, 0
    for x, _ in batches:
        batch = batch or len(x)
        samples += len(x)
        for name, grams in session.grams(session.features(x)).items():
            for letter, gram in grams.items():
                if letter != "b":
                    kept = totals.setdefault(name, {})
                    kept[letter] = kept[letter] + gram if letter in kept else gram.astype(np.float64)
                elif len(x) == batch:
                    spectra.setdefault(name, []).append(spectrum_of(gram, with_basis=False).eigenvalues)
    if not samples:
        raise DataError("there is no calibration data: give one batch of (inputs, targets) at least")
    return _assemble(totals, spectra, samples, batch)


def _assemble(
    totals: dict[str, dict[str, Array]], spectra: dict[str, list[Array]], samples: int, batch: int
) -> Calibration:
    from edgetune.planning.spectra import Spectrum

    result = {
        name: {
            "b": Spectrum(np.mean(values, axis=0), None),
            **{letter: spectrum_of(gram) for letter, gram in totals.get(name, {}).items()},
        }
        for name, values in spectra.items()
    }
    return Calibration(result, samples, batch)


def plan_bundle(
    bundle: Bundle,
    *,
    batch: int,
    budget_bytes: int | None,
    activation_budget_bytes: int | None,
    epsilon: float | None,
    calibration: Iterable[tuple[Array, Array]] | None,
    engine: str = "auto",
) -> Plan:
    """Calibrate on ``calibration`` if given, then plan; see :func:`edgetune.plan`."""
    runtime_bytes = measure_runtime(bundle, engine)
    spectra: Calibration | None = None
    if calibration is not None and any(saved.modes for saved in bundle.manifest.saved):
        first = make_plan(
            bundle.manifest,
            batch=batch,
            calibration=identity_calibration(bundle.manifest, batch),
            epsilon=1.0,
            runtime_bytes=runtime_bytes,
        )
        spectra = calibrate(TrainingSession(bundle, first, engine=engine, verify=False), calibration)
    elif epsilon is None and budget_bytes is None and activation_budget_bytes is None:
        epsilon = 1.0
    return make_plan(
        bundle.manifest,
        batch=batch,
        calibration=spectra,
        budget_bytes=budget_bytes,
        activation_budget_bytes=activation_budget_bytes,
        epsilon=epsilon,
        runtime_bytes=runtime_bytes,
    )
