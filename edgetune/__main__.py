"""``python -m edgetune``: the command line."""

from edgetune.commands import main

main()
