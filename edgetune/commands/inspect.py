"""``edgetune inspect``: what is in a bundle. Reads its manifest only."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def inspect(
    bundle: Annotated[Path, typer.Argument(help="The bundle that 'edgetune export' wrote.")],
    batch: Annotated[int, typer.Option("--batch", min=1, help="Samples per step, for the byte counts.")] = 32,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Show the trained layers of a bundle and what their inputs take uncompressed."""
    import json
    import math

    from edgetune.bundle import Bundle
    from edgetune.units import format_bytes

    manifest = Bundle.open(bundle).manifest
    trained = [spec.name for spec in manifest.parameters]
    layers: list[dict[str, Any]] = [
        {
            "name": layer.name,
            "op": layer.op,
            "role": layer.role,
            "input_shape": [batch, *layer.input_shape],
            "dense_bytes": layer.dense_bytes(batch),
            "parameters": [name for name in (layer.weight, layer.bias) if name in trained],
        }
        for layer in manifest.layers
    ]
    found: dict[str, Any] = {
        "model": manifest.model,
        "made_by": manifest.made_by,
        "format_version": manifest.format_version,
        "codec": manifest.codec,
        "adapter": manifest.adapter.settings if manifest.adapter else None,
        "loss": {"kind": manifest.loss.kind, **manifest.loss.config},
        "optimizer": manifest.optimizer.kind,
        "inputs": {spec.name: list(spec.shape) for spec in manifest.inputs},
        "features": {spec.name: list(spec.shape) for spec in manifest.features},
        "outputs": {spec.name: list(spec.shape) for spec in manifest.outputs},
        "targets": {"shape": list(manifest.targets.shape), "dtype": manifest.targets.dtype},
        "classes": list(manifest.classes),
        "parameters": {spec.name: list(spec.shape) for spec in manifest.parameters},
        "buffers": [spec.name for spec in manifest.buffers],
        "batch": batch,
        "layers": layers,
    }
    if as_json:
        print(json.dumps(found, indent=1))
        return
    from rich.console import Console
    from rich.table import Table

    title = f"{manifest.model}: codec {manifest.codec}, {manifest.loss.kind}, {manifest.optimizer.kind}"
    table = Table(title=title, caption="cut at " + ", ".join(f"{k} {v}" for k, v in found["features"].items()))
    for column in ("layer", "op", "role", "input", "dense"):
        table.add_column(column, justify="right" if column == "dense" else "left")
    for row in layers:
        shape = "×".join(map(str, row["input_shape"]))
        table.add_row(row["name"], row["op"], row["role"], shape, format_bytes(row["dense_bytes"]))
    total = sum(row["dense_bytes"] for row in layers if row["role"] == "tail")
    table.add_section()
    table.add_row("all of the tail", "", "", "", format_bytes(total))
    console = Console(markup=False, emoji=False)
    console.print(table)
    numbers = sum(math.prod(spec.shape) for spec in manifest.parameters)
    others = len(trained) - sum(len(row["parameters"]) for row in layers)
    beside = f", {others} of them in no layer above (norms, embeddings, ...)" if others else ""
    if manifest.adapter:
        console.print(f"adapter {manifest.adapter.settings}", highlight=False)
    console.print(f"trained: {len(trained)} tensors{beside}, {numbers:,} numbers; {manifest.made_by}", highlight=False)
