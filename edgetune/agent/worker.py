"""The agent in a process of its own, ``python -m edgetune.agent.worker``: what the supervisor starts, and starts again.

The only argument is JSON: ``bundle``, the path, and ``config``, the fields of :class:`AgentConfig`. The exit code is
that of the command line. Whatever ends this process is nobody's loss: the next one goes on from the last checkpoint.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from pathlib import Path

from edgetune.agent.config import AgentConfig
from edgetune.agent.settings import configured, plain
from edgetune.errors import EdgeTuneError

_PR_SET_PDEATHSIG = 1  # man 2 prctl


def command(bundle: Path, config: AgentConfig) -> list[str]:
    """Return the command line that runs the agent with ``config`` on ``bundle`` in a process of its own."""
    told = {"bundle": str(bundle), "config": plain(config)}
    return [sys.executable, "-m", "edgetune.agent.worker", json.dumps(told)]


def settings(text: str) -> tuple[Path, AgentConfig]:
    """Return the bundle's path and the config that :func:`command` was given."""
    told = json.loads(text)
    return Path(told["bundle"]), configured(told["config"])


def stop_with_the_supervisor() -> None:
    """Have the kernel send SIGTERM to this process when its supervisor is gone: nobody else would end it, and the next
    agent could not have the state directory. Without a supervisor, or on another kernel than Linux, do nothing."""
    expected = os.environ.get("EDGETUNE_SUPERVISOR")
    if expected is None:
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != int(expected):  # it was gone before we asked
        os.kill(os.getpid(), signal.SIGTERM)


def main(text: str) -> int:
    """Run the agent as told; return the exit code."""
    from edgetune.agent.loop import run_agent
    from edgetune.bundle import Bundle

    bundle, config = settings(text)
    try:
        run_agent(Bundle.open(bundle), config)
    except EdgeTuneError as error:
        sys.stderr.write(f"edgetune: {error}\n")
        return error.exit_code
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return 0


if __name__ == "__main__":
    stop_with_the_supervisor()
    sys.exit(main(sys.argv[1]))
