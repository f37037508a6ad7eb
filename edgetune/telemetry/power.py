"""What a board draws, rail by rail, and the power mode it was put into.

Rails come from INA3221 monitors (and, on Thor's carrier board, an INA238): through hwmon since JetPack 5, through iio
before. The power mode is what ``nvpmodel`` itself writes down. Sources: jetson_stats ``core/power.py`` and
``core/nvpmodel.py``; the kernel's ``hwmon/ina3221.rst`` and ``hwmon/ina238.rst``; NVIDIA's developer guide, "Platform
Power and Performance".
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from edgetune.telemetry.files import folders, integer, text

ROOT = Path("/")
TOTALS = ("VIN", "VDD_IN", "POM_5V_IN")
"""Names of rails that measure all that the module or the board takes."""


@dataclass(frozen=True)
class Rail:
    """One power rail. ``alarm``: it has drawn more than its limit allows; None: the driver does not tell."""

    name: str
    watts: float
    alarm: bool | None


@dataclass(frozen=True)
class PowerMode:
    """``number`` and ``name`` of the nvpmodel power mode, and ``modes``, the names of all by number.

    ``set``: nvpmodel has recorded it; else it is the default that the board starts with.
    """

    number: int
    name: str | None
    modes: dict[int, str]
    set: bool


def read_rails(root: Path = ROOT) -> tuple[Rail, ...]:
    """Return every rail that is connected; empty: this board has no monitor that we know."""
    rails = []
    for monitor in folders(root / "sys" / "class" / "hwmon", "hwmon*"):
        name = text(monitor / "name") or ""
        if name.startswith("ina"):
            rails += _hwmon(monitor)
    for monitor in folders(root / "sys" / "bus" / "i2c" / "devices", "*/iio:device*"):
        rails += _iio(monitor)
    return tuple(rails)


def total_watts(rails: tuple[Rail, ...]) -> float | None:
    """Return what all takes: the rail that measures just that, else the sum of all; None without rails."""
    by_name = {rail.name: rail.watts for rail in rails}
    total = next((by_name[name] for name in TOTALS if name in by_name), None)
    return total if total is not None or not rails else sum(by_name.values())


def _hwmon(monitor: Path) -> list[Rail]:
    rails = []
    for label in folders(monitor, "in*_label"):
        name, port = text(label) or "", label.name.removeprefix("in").removesuffix("_label")
        if not name or name == "NC" or name.startswith("sum of"):  # not connected; the sum of shunt voltages
            continue
        microwatts = integer(monitor / f"power{port}_input")
        millivolts, milliamperes = integer(monitor / f"in{port}_input"), integer(monitor / f"curr{port}_input")
        if microwatts is not None:
            watts = microwatts / 1e6
        elif millivolts is not None and milliamperes is not None:
            watts = millivolts * milliamperes / 1e6
        else:
            continue
        alarms = [integer(monitor / f"curr{port}_{kind}_alarm") for kind in ("max", "crit")]
        rails.append(Rail(name, watts, None if alarms == [None, None] else any(alarms)))
    return rails


def _iio(monitor: Path) -> list[Rail]:
    rails = []
    for label in folders(monitor, "rail_name_*"):
        milliwatts = integer(monitor / f"in_power{label.name.removeprefix('rail_name_')}_input")
        if milliwatts is not None:
            rails.append(Rail(text(label) or label.name, milliwatts / 1e3, None))
    return rails


def read_power_mode(root: Path = ROOT) -> PowerMode | None:
    """Return the power mode; None: this board has no nvpmodel."""
    conf = text(root / "etc" / "nvpmodel.conf") or ""
    modes = {int(number): name for number, name in re.findall(r"^< *POWER_MODEL +ID=(\d+) +NAME=(\S+)", conf, re.M)}
    recorded = re.search(r"pmode:(\d+)", text(root / "var" / "lib" / "nvpmodel" / "status") or "")
    chosen = recorded or re.search(r"^< *PM_CONFIG +DEFAULT=(\d+)", conf, re.M)
    if chosen is None:
        return None
    return PowerMode(int(chosen[1]), modes.get(int(chosen[1])), modes, recorded is not None)
