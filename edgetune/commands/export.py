"""``edgetune export``: parse the options, hand them to the export room."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def export(
    source: Annotated[str, typer.Argument(help="package.module:factory, file.py:factory, or model.onnx.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The bundle: a directory to write.")],
    shape: Annotated[
        str | None, typer.Option("--input", help="Shape of one sample, such as 3,224,224 (torch models).")
    ] = None,
    last: Annotated[int, typer.Option("--last", help="Weight layers to train, counted back from the head.")] = 4,
    codec: Annotated[str, typer.Option("--codec", help="How inputs are kept: dense, hosvd or svd.")] = "hosvd",
    loss: Annotated[str, typer.Option("--loss", help="cross_entropy.")] = "cross_entropy",
    label_smoothing: Annotated[float, typer.Option("--label-smoothing", help="In [0, 1).")] = 0.0,
    optimizer: Annotated[str, typer.Option("--optimizer", help="sgd or adamw.")] = "sgd",
    new_head: Annotated[
        int | None, typer.Option("--new-head", help="Replace the classifier by a fresh one with this many classes.")
    ] = None,
    freeze_head: Annotated[bool, typer.Option("--freeze-head", help="Do not train the classifier.")] = False,
    classes: Annotated[
        str | None, typer.Option("--classes", help="Class names in the order of the outputs, separated by commas.")
    ] = None,
    mean: Annotated[str | None, typer.Option("--mean", help="Per channel: 0.5,0.5,0.5")] = None,
    std: Annotated[str | None, typer.Option("--std", help="Per channel, of inputs in [0, 1].")] = None,
) -> None:
    """Turn a trained model into a bundle that a device can keep training."""
    from rich.console import Console

    from edgetune.commands._numbers import floats, integers
    from edgetune.export.bundling import ExportOptions, export_bundle
    from edgetune.units import format_bytes

    options = ExportOptions(
        last=last,
        codec=codec,
        loss=loss,
        label_smoothing=label_smoothing,
        optimizer=optimizer,
        new_head=new_head,
        freeze_head=freeze_head,
        classes=tuple(name.strip() for name in classes.split(",")) if classes else (),
        mean=floats(mean, "--mean"),
        std=floats(std, "--std"),
    )
    with Console(stderr=True).status("capturing, splitting, differentiating"):
        bundle = export_bundle(source, output, options, integers(shape, "--input") or None)
    layers = ", ".join(layer.name for layer in bundle.manifest.layers)
    size_bytes = sum(file.stat().st_size for file in bundle.path.iterdir())
    print(f"{bundle.path}: {format_bytes(size_bytes)}; trained: {layers}")
