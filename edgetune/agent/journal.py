"""Tells what happens: to the run log, to the view, to whoever listens, and in plain words to the console when the disk
fails. It also knows in which state the agent is, because a change of state is an event.

The journal never raises on a failing disk: lines that could not be written wait in memory and are tried again.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Mapping
from typing import Any, Protocol

from edgetune.agent.service.states import Standing, State
from edgetune.agent.view import View
from edgetune.errors import StorageError
from edgetune.telemetry.runlog import RunLog, plain

_MOST_WAITING_LINES = 1000


class Listener(Protocol):
    """Hears of everything that happens (``agent.service.service.Service``)."""

    def beside(self, fields: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return what is to be logged beside the event that ``fields`` describe."""
        ...

    def heard(self, record: Mapping[str, Any]) -> None:
        """Take a record of the run log."""
        ...

    def alive(self) -> None:
        """Take a sign of life; called often."""
        ...


class Journal:
    """Writes events; ``storage_failed`` is whether the disk is refusing at the moment, ``standing`` the agent's state
    (None: it has not begun)."""

    def __init__(self, log: RunLog, view: View) -> None:
        self.log, self.view = log, view
        self.listener: Listener | None = None
        self.storage_failed = False
        self.standing: Standing | None = None
        self._since = 0.0
        self._waiting: deque[dict[str, Any]] = deque(maxlen=_MOST_WAITING_LINES)

    def event(self, event: str, message: str = "", **fields: Any) -> None:
        """Record an event; with a ``message``, the view shows it."""
        if message:
            fields["message"] = message
            self.view.event(message)
        if self.listener is not None:
            fields |= self.listener.beside(fields)
        record = {"event": event, "time": round(time.time(), 3), **plain(fields)}
        self._waiting.append(record)
        self.drain()
        if self.listener is not None:
            self.listener.heard(record)

    def enter(self, state: State, reason: str = "") -> None:
        """Note that the agent is in ``state`` now; a change is an event."""
        found = Standing(state, reason)
        if found != self.standing:
            self.standing, self._since = found, round(time.time(), 3)
            self.event("state", state=state.value, reason=reason)

    def alive(self) -> None:
        """Give a sign of life. Cheap: whatever takes long may call it as often as it likes."""
        if self.listener is not None:
            self.listener.alive()

    def drain(self) -> None:
        """Write what waits, as far as the disk lets it."""
        try:
            while self._waiting:
                begun = self.log.begun
                self.log.write(self._waiting[0])
                self._waiting.popleft()
                if self.log.begun != begun and self.standing is not None:
                    # A state may last for longer than the log reaches back: a reader finds it at each file's beginning.
                    self._waiting.appendleft({
                        "event": "state", "time": round(time.time(), 3), "state": self.standing.state.value,
                        "reason": self.standing.reason, "since": self._since, "continued": True,
                    })  # fmt: skip
        except StorageError as error:
            self.storage_error(error)

    def storage_error(self, error: StorageError) -> None:
        """Say once per failure that the disk refuses; the record of it is written when the disk is back."""
        if self.storage_failed:
            return
        self.storage_failed = True
        text = f"edgetune: storage error: {error}. Training goes on in memory; the next checkpoint tries again."
        print(text, file=sys.stderr, flush=True)
        self._waiting.append({"event": "storage_error", "time": round(time.time(), 3), "message": str(error)})

    def storage_back(self) -> None:
        """Say that a checkpoint succeeded after a failure."""
        if self.storage_failed:
            self.storage_failed = False
            print("edgetune: storage works again; everything up to this checkpoint is stored.", file=sys.stderr)
            self.drain()
