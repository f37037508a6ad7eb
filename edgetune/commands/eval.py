"""``edgetune eval``: how good the promoted model, or the candidate, is on a source of samples."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def eval_(
    state: Annotated[Path, typer.Argument(help="The state directory of a run.")],
    data: Annotated[str, typer.Option("--data", help="Samples with labels, as 'edgetune run' takes them.")],
    version: Annotated[int | None, typer.Option("--version", help="A promoted version (default: that in use).")] = None,
    candidate: Annotated[
        bool, typer.Option("--candidate", help="The weights of the newest checkpoint, promoted or not.")
    ] = False,
    heldout: Annotated[bool, typer.Option("--heldout", help="Only samples that the run holds out.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Score a model on a source of samples, class by class, in stock onnxruntime."""
    import json

    from edgetune.agent.gate.scoring import score

    found = score(state, data, version=version, candidate=candidate, heldout=heldout)
    if as_json:
        print(json.dumps(found.plain(), indent=1))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{found.model} of {state} on {data}")
    for column in ("class", "right", "of", "accuracy"):
        table.add_column(column, justify="left" if column == "class" else "right")
    for label, (right, of) in found.score.classes.items():
        table.add_row(found.classes[label], str(right), str(of), f"{right / of:.1%}")
    table.add_section()
    total = found.score
    table.add_row("all", str(total.right), str(total.samples), f"{total.right / total.samples:.1%}")
    console = Console(markup=False, emoji=False)
    console.print(table)
    print("of these samples, in this run: " + ", ".join(f"{count} {name}" for name, count in found.statuses.items()))
    for reason, count in found.skipped.items():
        print(f"left out: {count} ({reason})")
