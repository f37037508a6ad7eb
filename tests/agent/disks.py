"""Small disks for tests: a file system that is soon full."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def mounted(place: Path, size: str, *, otherwise: str = "") -> Iterator[Path]:
    """Within the block ``place`` is a tmpfs of ``size`` (as mount has it); the test is skipped where none can be had.

    Args:
        otherwise: what shows the same there.
    """
    place.mkdir()
    if shutil.which("mount") is None or os.getuid() != 0:
        pytest.skip("; ".join(filter(None, ("mounting a small tmpfs needs root", otherwise))))
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", place], capture_output=True).returncode:
        pytest.skip("; ".join(filter(None, ("a tmpfs cannot be mounted here", otherwise))))
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", place], check=True)


def fill(place: Path) -> None:
    """Take all the space that is left."""
    with (place / "filler").open("wb", buffering=0) as stream:
        try:
            while True:
                stream.write(b"\0" * 512)
        except OSError:
            pass
