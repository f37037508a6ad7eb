"""``edgetune status``: where a run stands. Reads the state directory, also while an agent works on it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer


def status(
    state: Annotated[Path, typer.Argument(help="The state directory of a run.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    check: Annotated[
        bool, typer.Option("--check", help="One line; exit code 13 if no agent is alive and well there.")
    ] = False,
) -> None:
    """Show what the agent does; step, accuracy, samples, plan and last event of its run."""
    import json

    from edgetune.agent.service.life import require_alive
    from edgetune.agent.summary import standing
    from edgetune.agent.summary import status as summarize

    if check:
        stands = standing(state)
        require_alive(state, stands)
        print(json.dumps(stands, indent=1) if as_json else _told(stands))
        return
    found = summarize(state)
    if as_json:
        print(json.dumps(found, indent=1))
        return
    from rich.console import Console
    from rich.table import Table

    from edgetune.agent.enforcement import UNLIMITED_BYTES
    from edgetune.planning.selection import described
    from edgetune.units import format_bytes

    table = Table(title=f"{found['model']} in {found['state']}", show_header=False)
    table.add_row("agent", _told(found["agent"]))
    stored = "none yet" if found["step"] is None else str(found["step"])
    table.add_row("step", f"{stored} stored, {found['logged_step'] or 0} logged")
    table.add_row(
        "held-out accuracy", f"{_percent(found['accuracy_before'])} before, {_percent(found['accuracy'])} now"
    )
    table.add_row("samples", ", ".join(f"{count} {name}" for name, count in found["samples"].items()))
    if (plan := found["plan"]) is not None:
        budget = "none" if plan["budget_bytes"] is None else format_bytes(plan["budget_bytes"])
        table.add_row("plan", f"batch {plan['batch']}, micro-batch {plan['micro_batch']}, ε {plan['epsilon']}")
        table.add_row("codecs", f"{described(plan['selection'])} ({plan['allocation']})")
        table.add_row("memory", f"predicted {format_bytes(plan['predicted_peak_bytes'])}, budget {budget}")
    if (condition := found["condition"]) is not None:
        effective = condition.get("effective_budget_bytes")
        least = condition.get("least_bytes")
        told = condition["state"]
        if effective is not None and effective < UNLIMITED_BYTES:
            told += f", effective budget {format_bytes(effective)}"
        if told.startswith("paused") and least is not None:
            told += f", waiting for {format_bytes(least)}"
        table.add_row("condition", told)
        if condition["state"] != "running":
            table.add_row("because", str(condition.get("reason")))
    known = {name: e for name, e in found["energy"].items() if e["promised"] is not None}
    if known:
        worst = min(known, key=lambda name: known[name]["measured"] - known[name]["promised"])
        table.add_row(
            "captured energy",
            f"worst {worst}: {known[worst]['measured']:.4f} of {known[worst]['promised']:.4f} promised; "
            f"{found['refreshes']} refreshes",
        )
    for entry in found["quarantined"]:
        table.add_row("quarantined", f"{entry['path']}: {entry['reason']}")
    if (last := found["last_event"]) is not None:
        table.add_row("last event", str(last.get("message", last["event"])))
    Console(markup=False, emoji=False).print(table)


def _told(stands: dict[str, Any]) -> str:
    """Return in words how the agent stands."""
    if stands["state"] is None:
        return "is starting" if stands["alive"] else "none has run yet"
    reason = f": {stands['reason']}" if stands["reason"] else ""
    since = (
        ""
        if stands["since"] is None
        else f", since {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(stands['since']))}"
    )
    return f"{stands['state']}{reason}{since}"


def _percent(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.1%}"
