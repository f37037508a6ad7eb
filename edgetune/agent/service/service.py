"""Speaks for one agent: signs of life and a line of status for the service manager, numbers for monitors. Listens for
it too: what board and system say, and whether training has to yield.

Hears of everything through the journal. Knows what to tell to whom; nothing of training.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from edgetune.agent.journal import Journal
from edgetune.agent.service.config import ServiceConfig
from edgetune.agent.service.exporter import Exporter
from edgetune.agent.service.notify import Notifier
from edgetune.agent.service.numbers import Numbers
from edgetune.agent.service.readings import Reader
from edgetune.agent.service.states import Standing, State
from edgetune.agent.service.yielding import Verdict, Yielding, blind
from edgetune.units import format_bytes

LOOK_SECONDS = 0.5
"""Signs of life are asked for very often, and looked at so often."""
SIGN_SECONDS = 60.0
"""How often the state directory shows that its agent is alive (by the time of its lock file)."""
RETRY_SECONDS = 60.0
"""How often a port that somebody else has is tried again."""


class Service:
    """What others are told of one agent, from its beginning until :meth:`close`.

    Args:
        journal: where it listens from now on. sign: the file whose time is the sign of life.
        info: what runs, for monitors. notifier, reader: in tests, others than those of this environment and machine.

    Raises:
        UsageError: an endpoint is wanted, and its library is not installed.
    """

    def __init__(
        self,
        config: ServiceConfig,
        journal: Journal,
        sign: Path,
        info: dict[str, str],
        *,
        notifier: Notifier | None = None,
        reader: Reader | None = None,
    ) -> None:
        self.config, self.journal, self.sign, self.info = config, journal, sign, info
        self.notifier = Notifier() if notifier is None else notifier
        self.reader = Reader(config) if reader is None else reader
        self.yielding = Yielding(config)
        self.numbers = Numbers()
        self.exporter: Exporter | None = None
        self._standing = Standing(State.CALIBRATING)
        self._figures: dict[str, str] = {}
        self._look_at = self._sign_at = self._export_at = 0.0
        self._ready, self._refused = False, ""
        journal.listener = self
        self.alive()

    # ---- what the journal tells ---------------------------------------------------------------------------------
    def beside(self, fields: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return what is logged beside every peak: heat, and what the board takes; with what that comes to in the
        seconds that the event names (energy of the whole board, from one reading of its power)."""
        if "measured_peak_bytes" not in fields:
            return {}
        now = self.reader.read()
        found = {"celsius": now.celsius, "watts": None if now.watts is None else round(now.watts, 3)}
        if now.watts is not None and isinstance(seconds := fields.get("seconds"), Mapping):
            found["joules"] = round(now.watts * sum(seconds.values()), 6)
        return {name: value for name, value in found.items() if value is not None}

    def heard(self, record: Mapping[str, Any]) -> None:
        """Take a record of the run log."""
        self.numbers.take(record)
        if record["event"] == "state":
            self._standing = Standing(State(record["state"]), str(record["reason"]))
            if not self._ready and self._standing.state not in (State.CALIBRATING, State.FAILED):
                self._ready = True
                self.notifier.ready()
        elif record["event"] == "step":
            loss, peak = record["loss"], format_bytes(record["measured_peak_bytes"])
            self._figures["step"] = f"step {record['step']}"
            self._figures["loss"] = "loss not finite" if loss is None else f"loss {loss:.4f}"
            self._figures["peak"] = f"peak {peak}"
        elif record["event"] == "evaluated" and record["accuracy"] is not None:
            self._figures["heldout"] = f"held-out accuracy {record['accuracy']:.1%}"
        self.notifier.status(self.line(), now=record["event"] in ("state", "stopped"))
        self.alive()

    def verdict(self) -> Verdict:
        """Return whether training has to yield now, or to go slowly, and to what."""
        return self.yielding.look(self.reader.read(), time.monotonic())

    def figures(self) -> dict[str, Any]:
        """Return what a pause is judged by, for the log."""
        now = self.reader.read()
        return {
            "celsius": now.celsius, "watts": now.watts, "power_mode": None if now.mode is None else list(now.mode),
            "battery_percent": None if now.battery is None else now.battery.percent, "process": now.process,
        }  # fmt: skip

    def tell_blindness(self) -> None:
        """Say which settings have no effect on this machine."""
        for text in blind(self.config, self.reader.read()):
            self.journal.event("without_effect", text, reason=text)

    def line(self) -> str:
        """Return how the agent stands, in one line."""
        figures = ", ".join(self._figures.values())
        return f"{self._standing} ({figures})" if figures else str(self._standing)

    def alive(self) -> None:
        """Give a sign of life wherever one is due."""
        now = time.monotonic()
        if now < self._look_at:
            return
        self._look_at = now + LOOK_SECONDS
        self.notifier.alive()
        if now >= self._sign_at:
            self._sign_at = now + SIGN_SECONDS
            try:
                os.utime(self.sign)
            except OSError:  # a disk that takes nothing: the journal says so, and 'status' shows how old the sign is
                pass
        if self.config.metrics_port is not None and self.exporter is None and now >= self._export_at:
            self._export_at = now + RETRY_SECONDS
            self._export(self.config.metrics_port)

    def counted(self, count: Callable[[], Mapping[str, int]]) -> None:
        """Have the ledger counted by ``count``, if anybody may want to know."""
        if self.exporter is not None:
            self.numbers.counted(count())

    def close(self) -> None:
        """Tell nobody anything more."""
        if self.exporter is not None:
            self.exporter.close()
        self.notifier.close()

    def _export(self, port: int) -> None:
        host = self.config.metrics_host
        try:
            self.exporter = Exporter(self.numbers, host, port, self.info)
        except OSError as error:
            # No reason to stop training, least of all one that is started again without anybody there.
            text = f"no metrics at {host}:{port}: {error.strerror or error}; it is tried again every minute"
            if text != self._refused:
                self._refused = text
                self.journal.event("metrics_refused", text, reason=text)
