"""When training yields: to heat, to a weak battery, to another process, to the hours and power modes that are allowed.

Pure: it is told what there is, and answers with reasons. What was reached is left only with a margin, so that a value
at a limit does not make the agent stop and go. Knows settings and readings; nothing of how training stops.
"""

from __future__ import annotations

from dataclasses import dataclass

from edgetune.agent.service.config import ServiceConfig
from edgetune.agent.service.hours import Hours
from edgetune.agent.service.readings import Readings

COOLER_TO_RESUME_C, COOLER_TO_SPEED_UP_C = 5.0, 3.0
FULLER_TO_RESUME_PERCENT = 5.0
LINGER_SECONDS = 5.0
"""A process that was there counts as there for so long after: one that is started every second is one that runs."""


@dataclass(frozen=True)
class Verdict:
    """``pause``: why training has to wait; ``slow``: why it has to rest after every step; "": it has not."""

    pause: str = ""
    slow: str = ""


class Yielding:
    """Judges for one agent. Reasons are worded by limits and names, so that they do not change while they hold."""

    def __init__(self, config: ServiceConfig) -> None:
        self.config = config
        self._hours = None if config.hours is None else Hours.parse(config.hours)
        self._hot = self._warm = self._empty = False
        self._process, self._linger_until = "", 0.0

    def look(self, now: Readings, seconds: float) -> Verdict:
        """Return what follows from the readings ``now``. ``seconds``: of a clock that never goes back."""
        config, slow = self.config, ""
        pauses = [self._heat(now), self._battery(now), self._other(now, seconds)]
        if self._hours is not None and not self._hours.contains(now.hour, now.minute):
            pauses.append(f"outside of the hours {config.hours}")
        if config.power_modes and now.mode is not None:
            number, name = now.mode
            if not {str(number), name} & set(config.power_modes):
                pauses.append(f"the power mode is {name or number}, not {' or '.join(config.power_modes)}")
        if config.slow_above_c is not None:
            self._warm = _beyond(now.celsius, config.slow_above_c, COOLER_TO_SPEED_UP_C, self._warm)
            slow = f"the board is hotter than {config.slow_above_c:g} °C" if self._warm else ""
        return Verdict("; ".join(filter(None, pauses)), slow)

    def _heat(self, now: Readings) -> str:
        limit = self.config.pause_above_c
        if limit is None:
            return ""
        self._hot = _beyond(now.celsius, limit, COOLER_TO_RESUME_C, self._hot)
        return f"the board is hotter than {limit:g} °C" if self._hot else ""

    def _battery(self, now: Readings) -> str:
        config = self.config
        if config.battery_file is None:
            return ""
        if now.battery is None:  # who names a battery wants it looked after
            return f"{config.battery_file} tells no charge in percent"
        least = config.least_battery_percent
        enough = min(100.0, least + FULLER_TO_RESUME_PERCENT) if self._empty else least
        self._empty = now.battery.percent < enough and not now.battery.charging
        return f"the battery holds less than {least:g} %" if self._empty else ""

    def _other(self, now: Readings, seconds: float) -> str:
        if now.process is not None:
            self._process, self._linger_until = now.process, seconds + LINGER_SECONDS
        if not self._process or seconds >= self._linger_until:
            self._process = ""
            return ""
        return f"'{self._process}' runs"


def _beyond(value: float | None, limit: float, margin: float, before: bool) -> bool:
    """Return whether ``value`` is beyond the limit, or has been and is not ``margin`` below it. Unknown: as before."""
    return before if value is None else value > (limit - margin if before else limit)


def blind(config: ServiceConfig, now: Readings) -> list[str]:
    """Return which settings are without effect because nobody tells what they need, a sentence each."""
    found = []
    if now.celsius is None and (config.slow_above_c is not None or config.pause_above_c is not None):
        found.append("no thermal zone can be read: service.slow_above_c and service.pause_above_c have no effect")
    if now.mode is None and config.power_modes:
        found.append("this machine has no nvpmodel: service.power_modes has no effect")
    return found
