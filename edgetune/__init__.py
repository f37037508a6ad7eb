"""EdgeTune: keep training a model on a small device, inside a memory budget that its owner sets.

The public functions import what they need when they are called, so that the device side never sees the host's packages.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgetune.version import __version__

if TYPE_CHECKING:
    from edgetune.bundle import Array, Bundle
    from edgetune.engines.session import TrainingSession
    from edgetune.planning.plan import Plan

__all__ = ["TrainingSession", "__version__", "export", "open_bundle", "plan"]


def export(
    model: Any,
    example_input: Any,
    output: str | Path,
    *,
    last: int = 4,
    codec: str = "hosvd",
    loss: str = "cross_entropy",
    label_smoothing: float = 0.0,
    optimizer: str = "sgd",
    new_head: int | None = None,
    freeze_head: bool = False,
    classes: Sequence[str] = (),
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
) -> Bundle:
    """Write the bundle of ``model`` to the directory ``output`` and return it opened.

    Args:
        model: an ``nn.Module``, an ``onnx.ModelProto``, or a source as text (``file.py:factory``, ``model.onnx``).
        example_input: a batch of inputs (anything with a ``shape``; the leading axis is the batch), or None for ONNX.
        last: how many weight layers before the head are trained, counted from the output.
        codec: how their inputs are kept for the backward pass (``edgetune.codecs.CODECS``).

    Raises:
        EdgeTuneError: one of its kinds; nothing is left behind in ``output``.
    """
    from edgetune.export.bundling import ExportOptions, export_bundle

    options = ExportOptions(
        last, codec, loss, label_smoothing, optimizer, new_head, freeze_head, tuple(classes), tuple(mean), tuple(std)
    )
    shape = None if example_input is None else tuple(int(extent) for extent in example_input.shape[1:])
    return export_bundle(model, output, options, shape)


def open_bundle(path: str | Path) -> Bundle:
    """Open the bundle in the directory ``path``, every file's hash verified."""
    from edgetune.bundle import Bundle

    return Bundle.open(path)


def plan(
    bundle: Bundle,
    *,
    batch: int = 32,
    budget: str | int | None = None,
    activation_budget: str | int | None = None,
    epsilon: float | None = None,
    calibration: Iterable[tuple[Array, Array]] | None = None,
    engine: str = "auto",
) -> Plan:
    """Return the plan for ``bundle``: the ranks, and what they take, at the largest ε that fits the budget.

    Args:
        budget: what the whole process may take, such as ``"512MiB"``; None: no limit.
        activation_budget: what may be kept for the backward pass.
        epsilon: fix ε instead of letting the budget pick it.
        calibration: batches of (inputs, targets) to measure the spectra on. Without any, only ε = 1 is meaningful.

    Raises:
        BudgetError: nothing fits; the message names the least budget that does.
    """
    from edgetune.api import plan_bundle
    from edgetune.units import parse_bytes

    return plan_bundle(
        bundle,
        batch=batch,
        budget_bytes=None if budget is None else parse_bytes(budget),
        activation_budget_bytes=None if activation_budget is None else parse_bytes(activation_budget),
        epsilon=epsilon,
        calibration=calibration,
        engine=engine,
    )


def __getattr__(name: str) -> Any:
    if name == "TrainingSession":
        from edgetune.engines.session import TrainingSession

        return TrainingSession
    raise AttributeError(f"module 'edgetune' has no attribute '{name}'")
