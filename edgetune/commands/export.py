"""``edgetune export``: parse the options, hand them to the export room."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgetune.commands import _ort_training
from edgetune.errors import UsageError, choices

if TYPE_CHECKING:
    from edgetune.bundle import Manifest

_MOST_NAMES = 8
TARGETS = ("onnxruntime", _ort_training.NAME)


def export(
    source: Annotated[
        str, typer.Argument(help="package.module:factory, file.py:factory, model.onnx, or model.pt2 (torch.export).")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The bundle: a directory to write.")],
    inputs: Annotated[
        list[str] | None,
        typer.Option(
            "--input",
            help="[NAME=]SHAPE[:DTYPE] of one sample, such as 3,224,224 or ids=16:int64; once per input.",
        ),
    ] = None,
    outputs: Annotated[
        list[str] | None, typer.Option("--output-name", help="Outputs to keep, the one for the loss first.")
    ] = None,
    last: Annotated[
        str, typer.Option("--last", help="Weight layers to train, counted back from the head; or 'all'.")
    ] = "4",
    train: Annotated[
        str | None, typer.Option("--train", help="Instead: train the parameters whose names this regex matches.")
    ] = None,
    freeze_head: Annotated[bool, typer.Option("--freeze-head", help="Do not train the classifier.")] = False,
    batch_norm: Annotated[
        str, typer.Option("--batch-norm", help="frozen, or trained (statistics of the batch in the trained part).")
    ] = "frozen",
    codec: Annotated[
        str,
        typer.Option("--codec", help="How inputs are kept (docs/codecs.md); several to choose from: hosvd+int8+dense."),
    ] = "hosvd",
    compress: Annotated[
        str, typer.Option("--compress", help="layers: the inputs of trained layers; all: whatever is kept.")
    ] = "layers",
    adapter: Annotated[
        str | None,
        typer.Option(
            "--adapter",
            help="Train convolutions through few numbers: csg or bcsg, with settings such as "
            "csg:slice=16x16x3x3,code=128,map=learned|binary|FILE,residual=yes|no (docs/adapters.md).",
        ),
    ] = None,
    loss: Annotated[
        str,
        typer.Option(
            "--loss",
            help="cross_entropy, binary_cross_entropy, mse, dice, or file.py:factory: (outputs, targets) -> scalar.",
        ),
    ] = "cross_entropy",
    target_shape: Annotated[
        str | None,
        typer.Option("--target-shape", help="SHAPE[:DTYPE] of one target of a loss of your own; ':int64' for a label."),
    ] = None,
    convolutions: Annotated[
        str, typer.Option("--convolutions", help="In the train graph: products (fast on a CPU), or direct (as Conv).")
    ] = "products",
    label_smoothing: Annotated[float, typer.Option("--label-smoothing", help="In [0, 1).")] = 0.0,
    class_weights: Annotated[
        str | None, typer.Option("--class-weights", help="One per class, separated by commas.")
    ] = None,
    ignore_index: Annotated[int | None, typer.Option("--ignore-index", help="The label that does not count.")] = None,
    optimizer: Annotated[str, typer.Option("--optimizer", help="sgd or adamw.")] = "sgd",
    new_head: Annotated[
        int | None, typer.Option("--new-head", help="Replace the classifier by a fresh one with this many classes.")
    ] = None,
    classes: Annotated[
        str | None, typer.Option("--classes", help="Class names in the order of the outputs, separated by commas.")
    ] = None,
    mean: Annotated[str | None, typer.Option("--mean", help="Per channel: 0.5,0.5,0.5")] = None,
    std: Annotated[str | None, typer.Option("--std", help="Per channel, of inputs in [0, 1].")] = None,
    target: Annotated[
        str,
        typer.Option(
            "--target", help="onnxruntime: a bundle. ort-training: artifacts for Microsoft's onnxruntime-training."
        ),
    ] = "onnxruntime",
    batch: Annotated[int, typer.Option("--batch", min=1, help="Samples per step (ort-training).")] = 32,
    epsilon: Annotated[float, typer.Option("--epsilon", help="Energy kept per mode, in (0, 1] (ort-training).")] = 0.9,
    calibrate: Annotated[
        Path | None, typer.Option("--calibrate", help="Folder of samples to measure the bases on (ort-training).")
    ] = None,
) -> None:
    """Turn a trained model into a bundle that a device can keep training."""
    from rich.console import Console

    from edgetune.commands._numbers import floats
    from edgetune.export.bundling import ExportOptions, export_bundle
    from edgetune.export.source import Signature
    from edgetune.units import format_bytes

    options = ExportOptions(
        last=int(last) if last.lstrip("-").isdigit() else last,
        train=train,
        codec=codec,
        compress=compress,
        convolutions=convolutions,
        adapter=adapter,
        loss=loss,
        label_smoothing=label_smoothing,
        class_weights=floats(class_weights, "--class-weights"),
        ignore_index=ignore_index,
        target=None if target_shape is None else Signature.parse(target_shape),
        outputs=tuple(outputs or ()),
        optimizer=optimizer,
        batch_norm=batch_norm,
        new_head=new_head,
        freeze_head=freeze_head,
        classes=tuple(name.strip() for name in classes.split(",")) if classes else (),
        mean=floats(mean, "--mean"),
        std=floats(std, "--std"),
    )
    if target not in TARGETS:
        raise UsageError(f"there is no target '{target}'; choose one of: {choices(TARGETS)}")
    signatures = [Signature.parse(text) for text in inputs or ()]
    with Console(stderr=True).status("capturing, splitting, differentiating"):
        if target == _ort_training.NAME:
            setting = _ort_training.Setting(batch, epsilon, calibrate)
            made = _ort_training.export_artifacts(source, output, options, signatures, setting)
        else:
            bundle = export_bundle(source, output, options, signatures)
    if target == _ort_training.NAME:
        print(made)
        return
    names = [layer.name for layer in bundle.manifest.layers]
    layers = ", ".join(names if len(names) <= _MOST_NAMES else [*names[:2], "...", *names[-2:]])
    tensors = f"{len(bundle.manifest.parameters)} tensors" + (f" ({layers})" if names else "")
    size_bytes = sum(file.stat().st_size for file in bundle.path.iterdir())
    method = bundle.manifest.made_by.partition("(")[2].rstrip(")")
    print(f"{bundle.path}: {format_bytes(size_bytes)}, captured by {method}; trained: {tensors}")
    if bundle.manifest.adapter is not None:
        print(_adapted(bundle.manifest))


def _adapted(manifest: Manifest) -> str:
    """Return one line on what the adapter did."""
    import math

    adapter = manifest.adapter
    assert adapter is not None
    shapes = {spec.name: spec.shape for spec in manifest.parameters}
    weights = sum(math.prod(spec.shape) for spec in adapter.weights)
    codes = sum(math.prod(shapes[spec.codes]) for spec in adapter.weights)
    maps = sum(math.prod(shapes[spec.name]) for spec in adapter.maps if spec.trained)
    beside = f" and {maps:,} of the shared map" if maps else ""
    return f"{adapter.settings}: {len(adapter.weights)} convolutions, {weights:,} weights from {codes:,} codes{beside}"
