"""The command line: one file per subcommand, and the list of them. A command imports heavy things when it is called."""

from __future__ import annotations

import sys

import typer

from edgetune.commands.budget import budget
from edgetune.commands.config import config
from edgetune.commands.demo import demo
from edgetune.commands.doctor import doctor
from edgetune.commands.eval import eval_
from edgetune.commands.export import export
from edgetune.commands.history import history
from edgetune.commands.inspect import inspect
from edgetune.commands.plan import plan
from edgetune.commands.promote import promote
from edgetune.commands.report import report
from edgetune.commands.rollback import rollback
from edgetune.commands.run import run
from edgetune.commands.status import status
from edgetune.errors import EdgeTuneError
from edgetune.version import __version__

COMMANDS = (export, inspect, plan, config, run, budget, status, report, eval_, promote, rollback, history, doctor, demo)

app = typer.Typer(
    name="edgetune",
    help="Keep training a model on a small device, inside a memory budget that its owner sets.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback(invoke_without_command=True)
def _front(version: bool = typer.Option(False, "--version", help="Print the version.", is_eager=True)) -> None:
    if version:
        print(f"edgetune {__version__}")
        raise typer.Exit


for _command in COMMANDS:
    app.command(_command.__name__.rstrip("_"))(_command)


def main() -> None:
    """Run the command line; an error meant for a user is one line on stderr and its own exit code."""
    try:
        app()
    except EdgeTuneError as error:
        print(f"edgetune: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
