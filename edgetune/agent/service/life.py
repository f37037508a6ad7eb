"""Is there an agent at work on a state directory, and what does it do? Looks from outside; changes nothing.

Knows the lock, its time, and the run log's events.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgetune.agent.service.states import State
from edgetune.agent.state import LOCK
from edgetune.errors import NotAliveError, StateError

STALE_SECONDS = 600.0
"""An agent gives a sign of life every minute, but a step, or loading a model, may take some."""
_TELLING = ("state", "stopped", "gave_up", "worker_died", "start")


@dataclass(frozen=True)
class Life:
    """Whether an agent works on a state directory, and for how long it has given no sign of life (in seconds; None: no
    agent ever worked on it)."""

    alive: bool
    silent_s: float | None


def life_of(path: Path) -> Life:
    """Return whether an agent works on the state directory ``path``: whether its lock is held.

    Raises:
        StateError: the lock cannot be looked at.
    """
    try:
        descriptor = os.open(path / LOCK, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return Life(False, None)
    except OSError as error:
        raise StateError(
            f"the lock of {path} cannot be read ({error.strerror}); run this as the agent's user"
        ) from None
    try:
        # A clock that was set back would make the sign one of the future.
        silent_s = max(0.0, time.time() - os.fstat(descriptor).st_mtime)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return Life(True, silent_s)
        return Life(False, silent_s)
    finally:
        os.close(descriptor)


class Standings:
    """Follows the run log: what the agent did last. Give it every record (:meth:`take`)."""

    def __init__(self) -> None:
        self._last: Mapping[str, Any] = {}
        self._state: Mapping[str, Any] = {}

    def take(self, record: Mapping[str, Any]) -> None:
        """Take in the next record."""
        if record["event"] in _TELLING:
            self._last = record
        if record["event"] == "state":
            self._state = record

    def standing(self, life: Life) -> dict[str, Any]:
        """Return how the agent stands: alive, silent_s, state (one of ``State``, or stopped; None: nothing is known),
        reason, since (seconds since the epoch)."""
        told = {"alive": life.alive, "silent_s": None if life.silent_s is None else round(life.silent_s, 1)}
        if life.alive:
            found = self._state
            return {**told, "state": found.get("state"), "reason": found.get("reason", ""), "since": _since(found)}
        last = self._last
        state: str | None = "stopped"
        reason = "it was killed, or the power failed: nothing that was stored is lost"
        if not last:
            state, reason = None, ""
        elif last["event"] == "state" and last["state"] == State.FAILED.value:
            state, reason = State.FAILED.value, last["reason"]
        elif last["event"] == "gave_up":
            state, reason = State.FAILED.value, last["message"]
        elif last["event"] == "worker_died":
            reason = f"{last['message']}; unless its supervisor was ended too, it is started again"
        elif last["event"] == "stopped":
            reason = last["reason"]
        return {**told, "state": state, "reason": reason, "since": _since(last)}


def require_alive(path: Path, standing: Mapping[str, Any]) -> None:
    """Return if the agent of ``path`` with this :meth:`Standings.standing` is alive and well.

    Raises:
        NotAliveError: it is not, or has given no sign of life for :data:`STALE_SECONDS`.
    """
    state, reason = standing["state"], standing["reason"]
    if not standing["alive"]:
        told = "no agent ever worked on it" if state is None else f"{state}: {reason}"
        raise NotAliveError(f"no agent works on {path} ({told}); 'edgetune run' starts one")
    if state == State.FAILED.value:
        raise NotAliveError(f"the agent of {path} has failed: {reason}")
    if standing["silent_s"] > STALE_SECONDS:
        raise NotAliveError(
            f"the agent of {path} has given no sign of life for {standing['silent_s']:.0f} s ({state}); it hangs, or "
            "its disk takes nothing"
        )


def _since(record: Mapping[str, Any]) -> float | None:
    found: float | None = record.get("since", record.get("time"))
    return found
