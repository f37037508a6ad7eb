"""The files in which the agent keeps its calibrations. Knows their names; nothing of what is in them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path


def file_name(step: int) -> str:
    """Return the name of the file that holds the calibration made before step ``step``."""
    return f"calibration-{step:08d}.safetensors"


def prune(directory: Path, wanted: Iterable[Mapping[str, object]]) -> None:
    """Delete every calibration that none of the checkpoint positions ``wanted`` names."""
    names = {position.get("calibration") for position in wanted}
    for path in directory.glob("calibration-*.safetensors"):
        if path.name not in names:
            path.unlink(missing_ok=True)
