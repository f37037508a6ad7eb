"""The settings of the agent as a service: when training yields to others, and who may look at its numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass

from edgetune.agent.service.hours import Hours
from edgetune.errors import UsageError


@dataclass(frozen=True)
class ServiceConfig:
    """When training yields, and where its numbers are shown.

    Attributes:
        slow_above_c: above this temperature (°C) of the hottest zone, rest as long as a step takes; none = never.
        pause_above_c: above this temperature pause until it is 5 °C cooler; none = never.
        power_modes: train only in these nvpmodel power modes (names or numbers); empty = in all.
        battery_file: file with the charge in percent, or a folder of /sys/class/power_supply; none = no battery.
        least_battery_percent: pause below this charge, until it is 5 higher or the battery is charged.
        yield_to: pause while a process of one of these names runs.
        hours: train only in these hours of local time, such as 22:00-06:00; none = always.
        metrics_port: serve Prometheus metrics at this port, 0 = any free one; none = do not.
        metrics_host: the address to serve them at; other than loopback opens them to the network.
    """

    slow_above_c: float | None = None
    pause_above_c: float | None = None
    power_modes: tuple[str, ...] = ()
    battery_file: str | None = None
    least_battery_percent: float = 20.0
    yield_to: tuple[str, ...] = ()
    hours: str | None = None
    metrics_port: int | None = None
    metrics_host: str = "127.0.0.1"

    def check(self) -> list[str]:
        """Return what is wrong with the settings, a sentence each."""
        wrong = []
        for name in ("slow_above_c", "pause_above_c"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and 0 < value < 150):
                wrong.append(f"service.{name} is {value}; it is a temperature in °C, between 0 and 150")
        if None not in (self.slow_above_c, self.pause_above_c) and self.slow_above_c >= self.pause_above_c:  # type: ignore[operator]
            wrong.append(
                f"service.slow_above_c is {self.slow_above_c}; it must be below service.pause_above_c, which is "
                f"{self.pause_above_c}"
            )
        if not 0 <= self.least_battery_percent <= 100:
            wrong.append(f"service.least_battery_percent is {self.least_battery_percent}; it lies between 0 and 100")
        if self.metrics_port is not None and not 0 <= self.metrics_port <= 65535:
            wrong.append(f"service.metrics_port is {self.metrics_port}; it lies between 0 and 65535")
        if not self.metrics_host:
            wrong.append("service.metrics_host is empty; 127.0.0.1 is for this machine alone")
        for name in self.yield_to:
            if not name or "/" in name:
                wrong.append(f"service.yield_to names '{name}'; give the name of a program without its folder")
        if self.hours is not None:
            try:
                Hours.parse(self.hours)
            except UsageError as error:
                wrong.append(f"service.hours: {error}")
        return wrong
