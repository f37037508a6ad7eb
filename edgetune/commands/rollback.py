"""``edgetune rollback``: the promoted model of before is in use again, from one instant to the next."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def rollback(
    state: Annotated[Path, typer.Argument(help="The state directory of a run; an agent may be at work on it.")],
) -> None:
    """Go back to the promoted model before, and hold automatic promotion until 'edgetune promote'."""
    from edgetune.agent.gate.manual import rollback as go_back

    left, taken = go_back(state)
    print(f"version {taken.number} (step {taken.step}) is in use again in the place of version {left.number}.")
    print(f"The agent promotes nothing by itself until 'edgetune promote {state}' did, or with --automatic.")
