"""The target ``ort-training`` of ``edgetune export``: a bundle and a plan first, Microsoft's artifacts from both."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgetune.errors import UsageError

if TYPE_CHECKING:
    from edgetune.export.bundling import ExportOptions
    from edgetune.export.source import Signature

NAME = "ort-training"
_CALIBRATION_BATCHES = 2


@dataclass(frozen=True)
class Setting:
    """What the artifacts fix that a bundle leaves to the device: samples per step, ε, and the folder to measure on."""

    batch: int
    epsilon: float
    calibration: Path | None


def export_artifacts(
    source: str, output: Path, options: ExportOptions, inputs: Sequence[Signature], setting: Setting
) -> str:
    """Write the artifacts to ``output``; return what the user must know to train with them.

    Raises:
        UsageError: ε below 1 without samples to measure the bases on, or an optimizer that the target does not have.
    """
    from edgetune.agent.samples import labelled_batches
    from edgetune.api import plan_bundle
    from edgetune.export.bundling import export_bundle
    from edgetune.export.ort_training import FILES, write_ort_training

    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".export-") as scratch:
        bundle = export_bundle(source, Path(scratch) / "bundle", options, inputs)
        lossy = any(saved.modes for saved in bundle.manifest.saved)
        if lossy and setting.calibration is None and setting.epsilon != 1.0:
            raise UsageError(
                "the artifacts hold the bases of the compressed activations, which are measured on samples: "
                "--calibrate FOLDER, or --epsilon 1 for full ranks, or --codec dense"
            )
        folder = setting.calibration
        batches = None
        if folder is not None and lossy:
            batches = labelled_batches(bundle.manifest, folder, setting.batch, _CALIBRATION_BATCHES)
        plan = plan_bundle(bundle, batch=setting.batch, epsilon=setting.epsilon if lossy else None, calibration=batches)
        # Microsoft's SGD has no momentum; the bundle's default has, but a device may set it as it likes.
        hyper = {"momentum": 0.0} if options.optimizer == "sgd" else None
        write_ort_training(bundle, plan, output, hyper=hyper)
    made = ", ".join(name for name in FILES if (output / name).exists())
    remark = "; its SGD has no momentum" if hyper else ""
    return (
        f"{output}: {made}, for batches of up to {setting.batch} samples{remark}. onnxruntime-training starts its "
        'optimizer at a rate of its own: call optimizer.set_learning_rate(state.properties["edgetune.learning_rate"])'
    )
