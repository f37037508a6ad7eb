"""The public functions that need several rooms at once. Imports them only when called."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from edgetune.bundle import Array, Bundle

if TYPE_CHECKING:
    from edgetune.planning.per_layer import Front
    from edgetune.planning.plan import Plan
    from edgetune.planning.spectra import Calibration

    Samples = Iterable[tuple[Array, Array]] | Calibration | None


def plan_bundle(
    bundle: Bundle,
    *,
    batch: int,
    budget_bytes: int | None = None,
    activation_budget_bytes: int | None = None,
    epsilon: float | None = None,
    calibration: Samples = None,
    engine: str = "auto",
    codec: str | None = None,
    allocation: str = "uniform",
    rate: float | None = None,
    micro_batch: int | None = None,
    tail_micro_batch: int | None = None,
    trained: int | None = None,
    cache_bytes: int | None = None,
    memory: str = "lean",
) -> Plan:
    """Calibrate on the batches (inputs, targets) of ``calibration`` if given, then plan; see :func:`edgetune.plan`."""
    from edgetune.engines.choice import choose_engine, packs
    from edgetune.planning.plan import make_plan, reserve_bytes_of

    limited = budget_bytes is not None or activation_budget_bytes is not None
    if calibration is None and epsilon != 1.0 and (limited or epsilon is not None or allocation != "uniform"):
        _check_that_nothing_is_lost(bundle, codec, allocation)
    known = _calibration_of(bundle, batch, calibration, engine, errors=allocation != "uniform")
    if not limited and epsilon is None and rate is None and allocation == "uniform":
        epsilon = 1.0
    return make_plan(
        bundle.manifest,
        batch=batch,
        calibration=known,
        budget_bytes=budget_bytes,
        activation_budget_bytes=activation_budget_bytes,
        epsilon=epsilon,
        runtime_bytes=_runtime_bytes(bundle, engine, limited=budget_bytes is not None),
        reserve_bytes=reserve_bytes_of(choose_engine(engine).name),
        codec=codec,
        allocation=allocation,
        rate=rate,
        micro_batch=micro_batch,
        tail_micro_batch=tail_micro_batch,
        trained=trained,
        cache_bytes=cache_bytes,
        memory=memory if packs(engine) else "lean",
    )


def front_of(bundle: Bundle, *, batch: int, calibration: Samples, engine: str = "auto", points: int = 24) -> Front:
    """Return the plans that no other betters in predicted peak and total gradient error, and uniform ones beside them.

    Raises:
        UsageError: there is no calibration.
        DataError, StateError: as :func:`calibrate_bundle`; the calibration holds no errors.
    """
    from edgetune.planning.candidates import Limits, Workbench
    from edgetune.planning.per_layer import pareto_front

    if calibration is None:
        _check_that_nothing_is_lost(bundle, None, "per-layer")
    known = _calibration_of(bundle, batch, calibration, engine, errors=True)
    limits = Limits(batch, _runtime_bytes(bundle, engine, limited=True))
    return pareto_front(Workbench(bundle.manifest, known, limits), points)


def calibrate_bundle(
    bundle: Bundle,
    batch: int,
    batches: Iterable[tuple[Array, Array]],
    engine: str = "auto",
    *,
    errors: bool = False,
) -> Calibration | None:
    """Return the spectra and bases of every compressed tensor over ``batches``; None where nothing is compressed.

    With ``errors``, also what every lossy option costs in gradient error (``engines.gradient_error``), for which the
    trunk's outputs of all batches are held at once.

    Raises:
        DataError: there is no batch.
    """
    from edgetune.engines.calibration import calibrate
    from edgetune.engines.gradient_error import with_errors
    from edgetune.engines.session import TrainingSession
    from edgetune.errors import DataError
    from edgetune.planning.plan import make_plan
    from edgetune.planning.spectra import identity_calibration

    measures = any(mode.spectrum for saved in bundle.manifest.saved for o in saved.options for mode in o.modes)
    if not measures and not (errors and any(saved.lossy for saved in bundle.manifest.saved)):
        return None
    plan = make_plan(bundle.manifest, batch=batch, calibration=None, epsilon=1.0, runtime_bytes=0)
    session = TrainingSession(bundle, plan, engine=engine, verify=False)
    if not errors:
        found = calibrate(session, bundle.manifest, (session.features(x) for x, _ in batches))
    else:
        held = [(session.features(x), y) for x, y in batches]
        found = calibrate(session, bundle.manifest, (features for features, _ in held))
        if found is None and held:  # lossy, but with nothing to choose
            found = identity_calibration(bundle.manifest, batch)
        found = None if found is None else with_errors(session, bundle.manifest, found, held)
    if found is None:
        raise DataError("there is no calibration data: give one batch of (inputs, targets) at least")
    return found


def _calibration_of(bundle: Bundle, batch: int, given: Samples, engine: str, *, errors: bool) -> Calibration | None:
    from edgetune.planning.spectra import Calibration

    if given is None or isinstance(given, Calibration):
        return given
    return calibrate_bundle(bundle, batch, given, engine, errors=errors)


def _runtime_bytes(bundle: Bundle, engine: str, *, limited: bool) -> int:
    """Return what the runtime takes. A budget is for the process on the device: this one may hold torch, a model and
    the caller's data. Without one, what is remembered of such a process serves too; else this one is measured."""
    from edgetune.agent.baseline import measure_runtime, remembered_bytes, runtime_bytes

    if limited:
        return runtime_bytes(bundle, engine)
    known = remembered_bytes(bundle, engine)
    return measure_runtime(bundle, engine) if known is None else known


def _check_that_nothing_is_lost(bundle: Bundle, codec: str | None, allocation: str) -> None:
    """Raise UsageError where a choice of ranks, or of codecs, would need data."""
    from edgetune.errors import UsageError
    from edgetune.planning.selection import default_selection

    if allocation == "uniform":
        selection = default_selection(bundle.manifest, codec)
        needs = any(saved.option(selection[saved.name]).modes for saved in bundle.manifest.saved)
    else:
        needs = any(saved.lossy for saved in bundle.manifest.saved)
    if needs:
        raise UsageError(
            "which ranks an ε needs, and what a codec costs, depends on the data: give samples to calibrate on (--data "
            "FOLDER, or calibration= batches), or ε = 1 for full ranks"
        )
