"""Small files of ``/proc`` and ``/sys``: their text, or None where they are absent or refuse to be read.

A source that a board does not have is nothing unusual, so nothing here raises.
"""

from __future__ import annotations

from pathlib import Path


def text(path: Path) -> str | None:
    """Return what the file holds without the space and NUL bytes around it; None: absent, or it refuses (some nodes
    of drivers answer a read with an error)."""
    try:
        return path.read_bytes().decode("utf-8", errors="replace").strip(" \t\r\n\0")
    except OSError:
        return None


def integer(path: Path) -> int | None:
    """Return the decimal number that the file holds; None: absent, or something else."""
    found = text(path)
    try:
        return None if found is None else int(found)
    except ValueError:
        return None


def fields(path: Path) -> dict[str, int] | None:
    """Return the numbers of lines such as ``oom_kill 3``, by name; None: absent."""
    found = text(path)
    if found is None:
        return None
    words = (line.split() for line in found.splitlines())
    return {line[0]: int(line[1]) for line in words if len(line) == 2 and line[1].isdigit()}


def folders(path: Path, pattern: str) -> list[Path]:
    """Return what matches ``pattern`` below ``path``, sorted as a person would number it; empty where there is none."""
    try:
        found = list(path.glob(pattern))
    except OSError:
        return []
    return sorted(found, key=lambda item: (len(item.name), item.name))
