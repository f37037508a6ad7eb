"""How full a battery is, from a file that its owner names: a number of percent, or a folder of the kernel's class.

Source: the kernel's ``ABI/testing/sysfs-class-power`` (capacity in percent; status Charging, Discharging, Not charging,
Full or Unknown).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from edgetune.telemetry.files import text

_CHARGED = ("Charging", "Full", "Not charging")


@dataclass(frozen=True)
class Battery:
    """``percent`` in [0, 100]; ``charging``: it does not run down now (False where nothing tells)."""

    percent: float
    charging: bool


def read_battery(place: Path) -> Battery | None:
    """Return what ``place`` tells: a folder with the files capacity and status, or a file that holds a number, with a
    file ``status`` beside it or none. None: it is absent, or holds no number of percent."""
    file, beside = (place / "capacity", place) if place.is_dir() else (place, place.parent)
    match = re.fullmatch(r"(\d{1,3}(?:\.\d+)?)\s*%?", text(file) or "")
    if match is None or not 0 <= float(match[1]) <= 100:
        return None
    return Battery(float(match[1]), text(beside / "status") in _CHARGED)
