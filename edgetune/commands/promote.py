"""``edgetune promote``: the newest candidate goes into use, if the gate lets it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def promote(
    state: Annotated[Path, typer.Argument(help="The state directory of a run; an agent may be at work on it.")],
    force: Annotated[bool, typer.Option("--force", help="Promote it whatever the gate says.")] = False,
    automatic: Annotated[
        bool, typer.Option("--automatic", help="Promote nothing now; let the agent promote by itself again.")
    ] = False,
) -> None:
    """Put the newest candidate into use, and end the hold of a rollback. Refuses what the gate refuses."""
    from edgetune.agent.gate.manual import promote as put_into_use
    from edgetune.agent.gate.manual import release

    if automatic:
        print("The agent promotes by itself again." if release(state) else "Nothing was held.")
        return
    version = put_into_use(state, force=force)
    print(f"version {version.number} (step {version.step}) is in use: {version.reason}")
