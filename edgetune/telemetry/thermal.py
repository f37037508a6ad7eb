"""How hot a board is, and what is slowed down because of it, or because of its power supply.

Zones and cooling devices are the kernel's ``driver-api/thermal/sysfs-api.rst``. On Jetsons some zones refuse to be read
while their engine is switched off, and ``PMIC`` always reads 100 °C. Over-current events are counted by the chip itself
(``soctherm_oc``; NVIDIA's developer guide, "Over-current Throttling": 1 under-voltage, 2 average, 3 instantaneous).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from edgetune.telemetry.files import folders, integer, text

ROOT = Path("/")
OVER_CURRENT = {1: "under-voltage", 2: "average over-current", 3: "instantaneous over-current"}
_SLOWS_NOTHING = ("fan", "hot-surface-alert")


@dataclass(frozen=True)
class Zone:
    """A thermal zone in °C. ``celsius`` None: it cannot be read now. ``critical_celsius``: the system stops there;
    ``passive_celsius``: the highest trip from which on something is slowed down (a lower one may only warn)."""

    name: str
    celsius: float | None
    passive_celsius: float | None
    critical_celsius: float | None


@dataclass(frozen=True)
class Throttling:
    """``cooling``: the devices that slow something down now, by name and state (1 up to the device's own most).
    ``over_current``: events since the system started, by kind; empty: this chip does not count them."""

    cooling: dict[str, int]
    over_current: dict[str, int]


def read_zones(root: Path = ROOT) -> tuple[Zone, ...]:
    """Return the thermal zones; empty: the system has none."""
    zones = []
    for folder in folders(root / "sys" / "class" / "thermal", "thermal_zone*"):
        name = text(folder / "type")
        if name is None or name.startswith("PMIC"):
            continue
        trips: dict[str, list[int]] = {"passive": [], "critical": []}
        for trip in folders(folder, "trip_point_*_type"):
            kind, millidegrees = text(trip), integer(folder / trip.name.replace("_type", "_temp"))
            if kind in trips and millidegrees is not None and millidegrees > 0:
                trips[kind].append(millidegrees)
        zones.append(
            Zone(
                name,
                _celsius(integer(folder / "temp")),
                _celsius(max(trips["passive"], default=None)),
                _celsius(min(trips["critical"], default=None)),
            )
        )
    return tuple(zones)


def hottest_celsius(root: Path = ROOT) -> float | None:
    """Return the temperature of the hottest zone; None: no zone can be read. Cheaper than :func:`read_zones`."""
    found = []
    for folder in folders(root / "sys" / "class" / "thermal", "thermal_zone*"):
        name, celsius = text(folder / "type"), _celsius(integer(folder / "temp"))
        if celsius is not None and name is not None and not name.startswith("PMIC"):
            found.append(celsius)
    return max(found, default=None)


def read_throttling(root: Path = ROOT) -> Throttling:
    """Return what is slowed down now, and how often the power supply was not enough."""
    cooling = {}
    for folder in folders(root / "sys" / "class" / "thermal", "cooling_device*"):
        name, state = text(folder / "type") or folder.name, integer(folder / "cur_state")
        if state and not any(word in name.lower() for word in _SLOWS_NOTHING):
            cooling[name] = state
    events = {}
    for monitor in folders(root / "sys" / "class" / "hwmon", "hwmon*"):
        if text(monitor / "name") == "soctherm_oc":
            counts = {kind: integer(monitor / f"oc{number}_event_cnt") for number, kind in OVER_CURRENT.items()}
            events.update({kind: count for kind, count in counts.items() if count is not None})
    return Throttling(cooling, events)


def _celsius(millidegrees: int | None) -> float | None:
    return None if millidegrees is None else millidegrees / 1000
