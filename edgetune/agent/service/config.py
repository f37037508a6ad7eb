"""The settings of yielding and of the metrics endpoint. Knows nothing of how it is done."""

from __future__ import annotations

import re
from dataclasses import dataclass

HOURS = re.compile(r"([01]\d|2[0-3]):([0-5]\d)-([01]\d|2[0-3]):([0-5]\d)")


@dataclass(frozen=True)
class ServiceConfig:
    """Settings of yielding and of the metrics endpoint.

    Attributes:
        slow_above_c: train more slowly while the board is hotter than so many degrees Celsius; none = never.
        pause_above_c: pause while it is hotter than this; none = never.
        power_modes: train only in these power modes of the board (names or numbers); empty = in all.
        battery_file: a file that holds the charge in percent, such as /sys/class/power_supply/BAT0/capacity.
        least_battery_percent: pause while it holds less.
        yield_to: pause while a process of one of these names runs.
        hours: train only within these hours of local time, such as 22:00-06:00; none = always.
        metrics_port: serve Prometheus metrics at this port; none = do not.
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
        if self.slow_above_c is not None and self.pause_above_c is not None and self.slow_above_c > self.pause_above_c:
            wrong.append(
                f"service.slow_above_c is {self.slow_above_c}, above service.pause_above_c {self.pause_above_c}: "
                "it would never slow down"
            )
        if not 0 <= self.least_battery_percent <= 100:
            wrong.append(f"service.least_battery_percent is {self.least_battery_percent}; it must lie in [0, 100]")
        if self.hours is not None and HOURS.fullmatch(self.hours) is None:
            wrong.append(f"service.hours is '{self.hours}'; it must look like 22:00-06:00")
        if self.metrics_port is not None and not 1 <= self.metrics_port <= 65535:
            wrong.append(f"service.metrics_port is {self.metrics_port}; it must lie in 1..65535")
        return wrong
