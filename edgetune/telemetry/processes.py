"""Which processes run, by name, from ``/proc``. Source: man 5 proc (comm is cut to 15 characters; stat's third field
is the state)."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from pathlib import Path

ROOT = Path("/")
_COMM_LENGTH = 15
_INTERPRETERS = ("python", "node", "ruby", "perl", "bash", "sh")


def running(names: Collection[str], root: Path = ROOT) -> str | None:
    """Return the first of ``names`` of which a process runs; None: of none. Zombies, and this process, do not count.

    A process has the name that the kernel shows (``ps -o comm``, which is cut to 15 characters), that of the file it
    was started from, and where that is an interpreter, that of its script.
    """
    if not names:
        return None
    wanted = {name: name for name in names} | {name[:_COMM_LENGTH]: name for name in names}
    for folder in _processes(root / "proc"):
        for name in _names(folder):
            if name in wanted and not _ended(folder):
                return wanted[name]
    return None


def _processes(proc: Path) -> Iterator[str]:
    own = str(os.getpid())
    try:
        entries = os.listdir(proc)
    except OSError:
        return
    for entry in entries:
        if entry.isdigit() and entry != own:
            yield os.path.join(proc, entry)


def _names(folder: str) -> Iterator[str]:
    yield _read(os.path.join(folder, "comm")).strip()
    arguments = _read(os.path.join(folder, "cmdline")).split("\0")
    program = os.path.basename(arguments[0])
    if program:
        yield program
    if program.startswith(_INTERPRETERS) and len(arguments) > 1 and not arguments[1].startswith("-"):
        yield os.path.basename(arguments[1])


def _ended(folder: str) -> bool:
    # The name stands in parentheses, and may hold any character.
    return _read(os.path.join(folder, "stat")).rpartition(")")[2].split()[:1] in ([], ["Z"], ["X"])


def _read(path: str) -> str:
    """Return a file of /proc; "": the process is gone, or is not ours to look at."""
    try:
        with open(path, encoding="utf-8", errors="replace") as stream:
            return stream.read(4096)
    except OSError:
        return ""
