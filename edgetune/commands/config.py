"""``edgetune config``: every setting of a run with its meaning and default, as a file; or the check of such a file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def config(
    check: Annotated[
        Path | None, typer.Option("--check", metavar="FILE", help="Say what is wrong with FILE, or that nothing is.")
    ] = None,
) -> None:
    """Print a configuration file for 'edgetune run --config', or check one."""
    from edgetune.agent.settings import annotated, configured, read
    from edgetune.bundle import Bundle

    if check is None:
        print(annotated(), end="")
        return
    given = read(check)
    bundle = given.pop("bundle", None)
    found = configured(given)
    scalars = found.hyper if bundle is None else Bundle.open(bundle, verify=False).manifest.optimizer.scalars
    found.check(scalars)
    print(f"{check}: in order" + ("" if bundle is None else f", and so is what it asks of {bundle}"))
