"""``edgetune report``: what a run was like from its first step to its last. Reads the run log only."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def report(
    state: Annotated[Path, typer.Argument(help="The state directory of a run.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Show peaks, budget, loss, accuracy and time per phase of a run."""
    import json

    from edgetune.agent.summary import report as summarize

    found = summarize(state)
    if as_json:
        print(json.dumps(found, indent=1))
        return
    from rich.console import Console
    from rich.table import Table

    from edgetune.units import format_bytes

    def size(value: int | None) -> str:
        return "-" if value is None else format_bytes(value)

    def number(value: Any, form: str) -> str:
        return "-" if value is None else format(value, form)

    table = Table(title=f"{found['model']} in {found['state']}", show_header=False)
    table.add_row("steps", f"{found['steps']} ({found['samples']} samples, {found['epochs']} passes)")
    table.add_row("peak measured", size(found["measured_peak_bytes"]))
    table.add_row("peak predicted", size(found["predicted_peak_bytes"]))
    kept = {True: "kept at every step", False: f"exceeded at {found['over_budget_steps']} steps", None: "none given"}
    table.add_row("budget", f"{size(found['budget_bytes'])} ({kept[found['budget_kept']]})")
    table.add_row("loss", f"{number(found['loss_first'], '.4f')} first, {number(found['loss_last'], '.4f')} last")
    table.add_row(
        "held-out accuracy",
        f"{number(found['accuracy_before'], '.1%')} before, {number(found['accuracy'], '.1%')} after",
    )
    table.add_row("codecs", "-" if found["codecs"] is None else f"{found['codecs']} ({found['allocation']})")
    table.add_row("ε", f"{number(found['epsilon_least'], '.4f')} least, {number(found['epsilon_last'], '.4f')} last")
    table.add_row("captured energy", f"{number(found['energy_least'], '.4f')} least")
    refreshes = found["refreshes"]
    table.add_row("refreshes", f"{refreshes['made']}: {refreshes['mended']} mended, {refreshes['short']} fell short")
    for name, value in found["seconds"].items():
        table.add_row(f"seconds: {name}", f"{value:.3f}")
    table.add_row("events", ", ".join(f"{count} {name}" for name, count in found["events"].items()))
    console = Console(markup=False, emoji=False)
    console.print(table)
    if (tasks := found["tasks"]) is None:
        return
    matrix = Table(title="held-out accuracy by task")
    matrix.add_column("after learning")
    for name in tasks["tasks"]:
        matrix.add_column(name, justify="right")
    matrix.add_row("nothing", *(number(value, ".1%") for value in tasks["before"]))
    for name, row in zip(tasks["tasks"], tasks["matrix"], strict=True):
        matrix.add_row(name, *(number(value, ".1%") for value in row))
    console.print(matrix)
    for name in ("average_accuracy", "forgetting", "backward_transfer", "forward_transfer"):
        print(f"{name.replace('_', ' ')}: {number(tasks[name], '.1%')}")
