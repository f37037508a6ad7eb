"""Which Jetson this is and what software it was flashed with, from the device tree and ``/etc/nv_tegra_release``.

Releases: NVIDIA's JetPack archive (as of 2026-09). Chips and compute capabilities: NVIDIA's CUDA programming guide;
the device tree names a chip as jetson_stats' captures of real boards show it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from edgetune.telemetry.files import text

ROOT = Path("/")
CHIPS = {
    "tegra264": ("Thor", "11.0"),
    "tegra234": ("Orin", "8.7"),
    "tegra23x": ("Orin", "8.7"),  # as JetPack 5 writes it
    "tegra194": ("Xavier", "7.2"),
    "tegra186": ("TX2", "6.2"),
    "tegra210": ("Nano or TX1", "5.3"),
}
"""Family and compute capability of the GPU by the chip that the device tree names."""
JETPACKS = {
    "39.2.1": "7.2.1", "39.2.0": "7.2", "38.4.0": "7.1", "38.2.1": "7.0", "38.2.0": "7.0",
    "36.5.2": "6.2.3", "36.5.0": "6.2.2", "36.4.4": "6.2.1", "36.4.3": "6.2", "36.4.2": "6.1", "36.4.0": "6.1",
    "36.3.0": "6.0", "36.2.0": "6.0 DP",
    "35.6.0": "5.1.4", "35.5.0": "5.1.3", "35.4.1": "5.1.2", "35.3.1": "5.1.1", "35.2.1": "5.1", "35.1.0": "5.0.2",
    "34.1.1": "5.0.1 DP", "34.1.0": "5.0 DP",
    "32.7.6": "4.6.6", "32.7.5": "4.6.5", "32.7.4": "4.6.4", "32.7.3": "4.6.3", "32.7.2": "4.6.2", "32.7.1": "4.6.1",
}  # fmt: skip
"""JetPack by release of L4T."""
_MAJORS = {"39": "7", "38": "7", "36": "6", "35": "5", "34": "5", "32": "4"}


@dataclass(frozen=True)
class Board:
    """A Jetson. None: the board does not tell.

    ``l4t`` is like ``36.4.3``; ``jetpack`` like ``6.2``, or ``6.x`` for a release that is not in the table.
    ``capability`` is the GPU's compute capability, like ``8.7``.
    """

    model: str | None
    chip: str | None
    family: str | None
    capability: str | None
    l4t: str | None
    jetpack: str | None


def read_board(root: Path = ROOT) -> Board | None:
    """Return the Jetson that this is; None: the device tree names no Tegra chip, and there is no release file."""
    tree = root / "proc" / "device-tree"
    # Several names, each ended by a NUL byte, from the board's own to the chip's.
    names = (text(tree / "compatible") or "").split("\0")
    chip = next((name.removeprefix("nvidia,") for name in reversed(names) if name.startswith("nvidia,tegra")), None)
    l4t = read_l4t(root)
    if chip is None and l4t is None:
        return None
    family, capability = CHIPS.get(chip or "", (None, None))
    return Board(text(tree / "model"), chip, family, capability, l4t, None if l4t is None else jetpack_of(l4t))


def read_l4t(root: Path = ROOT) -> str | None:
    """Return the release of L4T (Jetson Linux) such as ``36.4.3``; None: there is no release file.

    A container shows the file of its own base image where the host's was not mounted over it.
    """
    match = re.search(r"R(\d+) \(release\), REVISION: (\d+(?:\.\d+)*)", text(root / "etc" / "nv_tegra_release") or "")
    if match is None:
        return None
    parts = [match[1], *match[2].split(".")]
    return ".".join([*parts, "0"] if len(parts) < 3 else parts)


def jetpack_of(l4t: str) -> str | None:
    """Return the JetPack that came with a release of L4T, only its first number (``6.x``) where the table has a gap."""
    major = _MAJORS.get(l4t.partition(".")[0])
    return JETPACKS.get(l4t, None if major is None else f"{major}.x")
