"""Load and clock of a Jetson's GPU, from the kernel's devfreq class.

The node is named after the device (``17000000.ga10b``, ``17000000.gv11b``; ``17000000.gpu`` since JetPack 6), and
``gpu-gpc-0`` on Thor, whose driver shows no load there (NVML does). Source: jetson_stats, ``core/gpu.py`` and
``core/thor_gpu.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from edgetune.telemetry.files import folders, integer, text

ROOT = Path("/")
_NAMES = ("ga10b", "gv11b", "gp10b", "gpu", "gpu-gpc-0")


@dataclass(frozen=True)
class Gpu:
    """``load`` in [0, 1]; clocks in Hz. None: the node does not tell (a GPU that is switched off while idle may not).

    ``max_hz`` is what the power mode allows now.
    """

    name: str
    load: float | None
    now_hz: int | None
    min_hz: int | None
    max_hz: int | None
    governor: str | None


def read_gpu(root: Path = ROOT) -> Gpu | None:
    """Return the integrated GPU's state; None: there is none."""
    for node in folders(root / "sys" / "class" / "devfreq", "*"):
        name = text(node / "device" / "of_node" / "name") or node.name.rpartition(".")[2]
        if name not in _NAMES and node.name not in _NAMES:
            continue
        thousandths = integer(node / "device" / "load")
        return Gpu(
            name,
            load=None if thousandths is None else thousandths / 1000,
            now_hz=integer(node / "cur_freq"),
            min_hz=integer(node / "min_freq"),
            max_hz=integer(node / "max_freq"),
            governor=text(node / "governor"),
        )
    return None
