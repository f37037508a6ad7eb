"""The public functions that need several rooms at once. Imports them only when called."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from edgetune.bundle import Array, Bundle

if TYPE_CHECKING:
    from edgetune.planning.plan import Plan
    from edgetune.planning.spectra import Calibration


def plan_bundle(
    bundle: Bundle,
    *,
    batch: int,
    budget_bytes: int | None = None,
    activation_budget_bytes: int | None = None,
    epsilon: float | None = None,
    calibration: Iterable[tuple[Array, Array]] | None = None,
    engine: str = "auto",
) -> Plan:
    """Calibrate on the batches (inputs, targets) of ``calibration`` if given, then plan; see :func:`edgetune.plan`."""
    from edgetune.agent.baseline import measure_runtime, measure_runtime_apart
    from edgetune.errors import UsageError
    from edgetune.planning.plan import RESERVE_BYTES, make_plan

    limited = budget_bytes is not None or activation_budget_bytes is not None
    lossy = any(saved.modes for saved in bundle.manifest.saved)
    if lossy and calibration is None and epsilon != 1.0 and (limited or epsilon is not None):
        raise UsageError(
            "which ranks an ε needs depends on the data: give samples to calibrate on (--data FOLDER, or calibration= "
            "batches), or ε = 1 for full ranks"
        )
    # A budget is for the process on the device. This one may hold torch, a model and the caller's data.
    runtime_bytes = measure_runtime(bundle, engine) if budget_bytes is None else measure_runtime_apart(bundle, engine)
    spectra = None if calibration is None else calibrate_bundle(bundle, batch, calibration, engine)
    if not limited and epsilon is None:
        epsilon = 1.0
    return make_plan(
        bundle.manifest,
        batch=batch,
        calibration=spectra,
        budget_bytes=budget_bytes,
        activation_budget_bytes=activation_budget_bytes,
        epsilon=epsilon,
        runtime_bytes=runtime_bytes,
        reserve_bytes=RESERVE_BYTES,
    )


def calibrate_bundle(
    bundle: Bundle, batch: int, batches: Iterable[tuple[Array, Array]], engine: str = "auto"
) -> Calibration | None:
    """Return the spectra and bases of every compressed tensor over ``batches``; None where nothing is compressed.

    Raises:
        DataError: there is no batch.
    """
    from edgetune.engines.calibration import calibrate
    from edgetune.engines.session import TrainingSession
    from edgetune.errors import DataError
    from edgetune.planning.plan import make_plan

    if not any(saved.modes for saved in bundle.manifest.saved):
        return None
    plan = make_plan(bundle.manifest, batch=batch, calibration=None, epsilon=1.0, runtime_bytes=0)
    session = TrainingSession(bundle, plan, engine=engine, verify=False)
    found = calibrate(session, bundle.manifest, (session.features(x) for x, _ in batches))
    if found is None:
        raise DataError("there is no calibration data: give one batch of (inputs, targets) at least")
    return found
