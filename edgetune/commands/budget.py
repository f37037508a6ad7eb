"""``edgetune budget``: change the budget of a run while it works. The agent reads it between two steps."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def budget(
    state: Annotated[Path, typer.Argument(help="The state directory of a run.")],
    size: Annotated[str, typer.Argument(help="What the whole process may take, such as 300MiB; none: no limit.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a sentence.")] = False,
) -> None:
    """Give a run another budget, now and for its next starts; it replaces --budget."""
    import json

    from edgetune.agent.allowance import write_budget
    from edgetune.agent.state import read_identity
    from edgetune.units import format_bytes

    read_identity(state)
    budget_bytes = write_budget(state, size)
    if as_json:
        print(json.dumps({"state": str(state), "budget_bytes": budget_bytes}))
        return
    said = "no budget" if budget_bytes is None else f"a budget of {format_bytes(budget_bytes)}"
    print(f"{state}: {said}; an agent that runs there follows between two steps")
