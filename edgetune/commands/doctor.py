"""``edgetune doctor``: is this machine fit to train, and if not, what to do. The checks are in ``edgetune/doctor``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

_MARKS = {"ok": "ok     ", "warning": "WARNING", "error": "ERROR  "}


def doctor(
    state: Annotated[Path, typer.Option("--state", help="Where the agent's state will be.")] = Path("."),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of lines.")] = False,
    root: Annotated[Path, typer.Option("--root", hidden=True, help="Of /proc, /sys and /etc.")] = Path("/"),
) -> None:
    """Check board, runtime, memory, power, disk and clock. Exit code 1 if training cannot work as it is, else 0."""
    import json
    from dataclasses import asdict

    from edgetune.doctor.finding import ERROR, OK, WARNING
    from edgetune.doctor.hardware import hardware
    from edgetune.doctor.installed import inspect_installed
    from edgetune.doctor.software import software

    findings = [*software(root, inspect_installed()), *hardware(root, state)]
    counts = {level: sum(finding.level == level for finding in findings) for level in (OK, WARNING, ERROR)}
    if as_json:
        print(json.dumps({"counts": counts, "findings": [asdict(finding) for finding in findings]}, indent=1))
    else:
        for finding in findings:
            print(f"{_MARKS[finding.level]}  {finding.topic:<10}  {finding.text}")
            if finding.advice:
                print(f"{'':21}-> {finding.advice}")
        print(f"{counts[OK]} ok, {counts[WARNING]} warnings, {counts[ERROR]} errors")
    if counts[ERROR]:
        raise typer.Exit(1)
