"""``edgetune history``: what became of every candidate, and which promoted models are on the disk."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer


def history(
    state: Annotated[Path, typer.Argument(help="The state directory of a run.")],
    last: Annotated[int, typer.Option("--last", help="Show so many entries; 0 = all.")] = 20,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Show which models were promoted, refused and rolled back, and why."""
    import json

    from edgetune.agent.gate.manual import listing

    found = listing(state)
    entries = found["history"][-last:] if last > 0 else found["history"]
    if as_json:
        print(json.dumps({**found, "history": entries}, indent=1))
        return
    from rich.console import Console
    from rich.table import Table

    console = Console(markup=False, emoji=False)
    table = Table(title=f"candidates in {state}")
    for column in ("when", "what", "version", "step", "accuracy", "promoted", "samples"):
        table.add_column(column, justify="left" if column in ("when", "what") else "right")
    table.add_column("why", overflow="fold")
    for entry in entries:
        score, against = entry.get("score") or {}, (entry.get("against") or {}).get("score") or {}
        what = entry["event"].replace("_", " ") + (", forced" if entry.get("forced") else "")
        table.add_row(
            time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(entry.get("time", 0))), what,
            _text(entry.get("version")), _text(entry.get("step")), _percent(score.get("accuracy")),
            _percent(against.get("accuracy")), _text(score.get("samples")), str(entry.get("reason", "")),
        )  # fmt: skip
    console.print(table)
    kept = ", ".join(str(version["version"]) for version in found["versions"])
    print(f"in use: version {found['in_use']}, {found['model']}; on the disk: {kept}")
    if found["held"] is not None:
        print(f"held: {found['held']}; 'edgetune promote' ends that")


def _text(value: Any) -> str:
    return "-" if value is None else str(value)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2%}"
