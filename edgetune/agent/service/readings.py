"""What board and system say of heat, power, battery, other processes and the time, read at most once a second.

Knows telemetry; nothing of what follows from it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from edgetune.agent.service.config import ServiceConfig
from edgetune.telemetry.battery import Battery, read_battery
from edgetune.telemetry.power import read_power_mode, read_rails, total_watts
from edgetune.telemetry.processes import running
from edgetune.telemetry.thermal import hottest_celsius

ROOT = Path("/")
INTERVAL_SECONDS = 1.0


@dataclass(frozen=True)
class Readings:
    """What is known now. None: nobody tells.

    Attributes:
        celsius: of the hottest zone. watts: what the board takes. mode: number and name of the power mode.
        battery: of the file that was named. process: the first of the named ones that runs.
        hour, minute: local time.
    """

    celsius: float | None = None
    watts: float | None = None
    mode: tuple[int, str | None] | None = None
    battery: Battery | None = None
    process: str | None = None
    hour: int = 0
    minute: int = 0


class Reader:
    """Reads for one agent, and of what only decides whether to yield, no more than ``config`` asks for.

    Args:
        root: of /proc, /sys and /etc. clock: in seconds. local: hour and minute now.
    """

    def __init__(
        self,
        config: ServiceConfig,
        root: Path = ROOT,
        clock: Callable[[], float] = time.monotonic,
        local: Callable[[], time.struct_time] = time.localtime,
    ) -> None:
        self.config, self.root, self._clock, self._local = config, root, clock, local
        self._known: Readings | None = None
        self._until = 0.0

    def read(self) -> Readings:
        """Return what is known now, or was a second ago."""
        now = self._clock()
        if self._known is None or now >= self._until:
            self._known, self._until = self._fresh(), now + INTERVAL_SECONDS
        return self._known

    def _fresh(self) -> Readings:
        config, local = self.config, self._local()
        mode = read_power_mode(self.root) if config.power_modes else None
        return Readings(
            hottest_celsius(self.root),
            total_watts(read_rails(self.root)),
            None if mode is None else (mode.number, mode.name),
            None if config.battery_file is None else read_battery(Path(config.battery_file)),
            running(config.yield_to, self.root),
            local.tm_hour,
            local.tm_min,
        )
