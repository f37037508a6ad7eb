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
    from edgetune.engines.certificate import Certificate
    from edgetune.engines.session import TrainingSession
    from edgetune.planning.plan import Plan
    from edgetune.planning.spectra import Calibration

__all__ = ["Certificate", "TrainingSession", "__version__", "export", "open_bundle", "plan"]


def export(
    model: Any,
    example_input: Any,
    output: str | Path,
    *,
    last: int | str = 4,
    train: str | None = None,
    codec: str = "hosvd",
    compress: str = "layers",
    convolutions: str = "products",
    loss: Any = "cross_entropy",
    label_smoothing: float = 0.0,
    class_weights: Sequence[float] = (),
    ignore_index: int | None = None,
    example_target: Any = None,
    outputs: Sequence[str] = (),
    optimizer: str = "sgd",
    batch_norm: str = "frozen",
    new_head: int | None = None,
    freeze_head: bool = False,
    classes: Sequence[str] = (),
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
    adapter: str | None = None,
) -> Bundle:
    """Write the bundle of ``model`` to the directory ``output`` and return it opened.

    Args:
        model: an ``nn.Module``, a ``torch.export.ExportedProgram``, an ``onnx.ModelProto``, or a source as text
            (``file.py:factory``, ``model.onnx``, ``model.pt2``).
        example_input: a batch of inputs (anything with ``shape`` and ``dtype``; the leading axis is the batch), a
            sequence of them, or a mapping by the names of the inputs; None for ONNX and exported programs.
        last: how many weight layers before the head are trained, counted from the output; ``"all"``: every parameter.
        train: a regular expression instead: the parameters whose names it is found in.
        codec: how their inputs are kept for the backward pass (``edgetune.codecs.CODECS``); joined by ``+``, several
            from which a plan chooses for every tensor.
        compress: ``layers`` (their inputs), or ``all``: besides, whatever else the backward pass keeps (smooth
            nonlinearities, attention); the error then travels to earlier layers.
        convolutions: how the train graph computes them: ``products`` (large matrix products where those are faster on
            a CPU) or ``direct``.
        loss: the name of a loss, or a torch module ``(outputs, targets) -> scalar`` that is traced with the model;
            ``example_target`` is then a batch of its targets.
        class_weights: per class, for ``cross_entropy`` (``binary_cross_entropy``: weights of the positive answers).
        ignore_index: the label that does not count.
        outputs: names of the outputs to keep, the one for the loss first; by default the usual one.
        batch_norm: ``frozen`` (its statistics are constants), or ``trained`` (statistics of the batch, γ and β learn).
        adapter: compute trained convolutions from fewer numbers, such as ``"csg"`` (``edgetune.adapters.parse``).

    Raises:
        EdgeTuneError: one of its kinds; nothing is left behind in ``output``.
    """
    from edgetune.export.bundling import ExportOptions, export_bundle
    from edgetune.export.source import Signature, signatures_of

    options = ExportOptions(
        last=last,
        train=train,
        codec=codec,
        compress=compress,
        convolutions=convolutions,
        loss=loss,
        label_smoothing=label_smoothing,
        class_weights=tuple(class_weights),
        ignore_index=ignore_index,
        target=None if example_target is None else Signature.of(example_target),
        outputs=tuple(outputs),
        optimizer=optimizer,
        batch_norm=batch_norm,
        new_head=new_head,
        freeze_head=freeze_head,
        classes=tuple(classes),
        mean=tuple(mean),
        std=tuple(std),
        adapter=adapter,
    )
    return export_bundle(model, output, options, signatures_of(example_input))


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
    calibration: Iterable[tuple[Array, Array]] | Calibration | None = None,
    engine: str = "auto",
    codec: str | None = None,
    allocation: str = "uniform",
    rate: float | None = None,
    micro_batch: int | None = None,
    tail_micro_batch: int | None = None,
    trained: int | None = None,
    cache: str | int | None = None,
    memory: str = "lean",
) -> Plan:
    """Return the plan for ``bundle``: codecs and ranks, and what they take, at the largest ε that fits the budget.

    Args:
        budget: what the whole process may take, such as ``"512MiB"``; None: no limit.
        activation_budget: what may be kept for the backward pass.
        epsilon: fix ε instead of letting the budget pick it.
        calibration: batches of (inputs, targets) to measure the spectra on, or what was measured before
            (``plan.calibration``). Without any, only ε = 1 is meaningful.
        codec: the codec of the bundle's menu that keeps all; None: its first.
        allocation: ``uniform``, one codec and one ε for all; ``per-layer``, for each tensor those with which the total
            gradient error is the least that the budget allows.
        rate: fix how much codecs that count elements keep: one of ``rate``.
        micro_batch: fix the samples per run of the trunk; None: the planner chooses (docs/budget.md has the order).
        tail_micro_batch: fix the samples per run of the train graph; fewer than ``batch``: the gradient is accumulated.
        trained: fix how many weight layers before the head are trained, counted from the output.
        cache: what features that are kept from pass to pass may take; None: nothing.
        memory: ``lean`` | ``fast``, the tensors of a run in one block: a faster step, and more memory | ``auto``, that
            where it fits the budget. Of onnxruntime on a CPU; elsewhere it is ``lean``.

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
        codec=codec,
        allocation=allocation,
        rate=rate,
        micro_batch=micro_batch,
        tail_micro_batch=tail_micro_batch,
        trained=trained,
        cache_bytes=None if cache is None else parse_bytes(cache),
        memory=memory,
    )


def __getattr__(name: str) -> Any:
    if name == "Certificate":
        from edgetune.engines.certificate import Certificate

        return Certificate
    if name == "TrainingSession":
        from edgetune.engines.session import TrainingSession

        return TrainingSession
    raise AttributeError(f"module 'edgetune' has no attribute '{name}'")
