"""What a power loss leaves of a directory, of which every change was recorded.

The disk is one that keeps no more than POSIX promises: what was written to a file is there for sure only after an fsync
(or fdatasync) of the file, a name only after one of its directory. Everything later may be there, or not, or in part;
in any combination, not only the first so many changes. Real file systems promise more. Pure: knows nothing of how the
changes were recorded.
"""

from __future__ import annotations

import os
import random
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

SECTOR_BYTES = 512
ROOT = 0
"""The number of the directory itself; every other file and directory has one of its own, whatever its name."""
MODES = ("nothing", "in order", "any")
"""Of what was not synced, there is: nothing; names in the order in which they were changed, up to some point (as
journals keep them), and any part of the data; any part of both."""


@dataclass(frozen=True)
class Data:
    """``content`` was written into the file ``node`` at ``offset``."""

    node: int
    offset: int
    content: bytes


@dataclass(frozen=True)
class Size:
    """The file ``node`` was cut, or grown with zeros, to ``size`` bytes."""

    node: int
    size: int


@dataclass(frozen=True)
class Names:
    """Entries (directory, name) were set to a node, or taken away (None), all at once."""

    changes: tuple[tuple[int, str, int | None], ...]


@dataclass(frozen=True)
class Made:
    """The directory ``node`` came into being; its name is told apart."""

    node: int


@dataclass(frozen=True)
class Sync:
    """The file or directory ``node`` is on the disk as it is now."""

    node: int


Change: TypeAlias = "Data | Size | Names | Made | Sync"


@dataclass
class Disk:
    """Files by number, and directories by number with the numbers behind their names."""

    files: dict[int, bytearray]
    directories: dict[int, dict[str, int]]

    def write(self, target: Path) -> None:
        """Make the new directory ``target`` like this one; files with several names keep them."""
        first: dict[int, Path] = {}

        def put(node: int, path: Path) -> None:
            if node in self.directories:
                path.mkdir()
                for name, other in sorted(self.directories[node].items()):
                    put(other, path / name)
            elif node in first:
                os.link(first[node], path)
            else:
                path.write_bytes(self.files.get(node, b""))
                first[node] = path

        put(ROOT, target)

    def content(self, path: str) -> bytes | None:
        """Return what is in the file ``path``; None: there is none."""
        node = ROOT
        for name in path.split("/"):
            if name not in self.directories.get(node, {}):
                return None
            node = self.directories[node][name]
        return bytes(self.files.get(node, b""))


def after_power_loss(changes: list[Change], mode: str, dice: random.Random) -> Disk:
    """Return what may be there when the power goes after ``changes``."""
    synced: dict[int, int] = {}
    for place, change in enumerate(changes):
        if isinstance(change, Sync):
            synced[change.node] = place
    open_names = [
        place
        for place, change in enumerate(changes)
        if isinstance(change, Names) and not _durable(change, place, synced)
    ]
    cut = dice.choice([*open_names, len(changes)]) if mode == "in order" else 0
    disk = Disk({}, {ROOT: {}})
    for place, change in enumerate(changes):
        sure = _durable(change, place, synced)
        if isinstance(change, Made):
            disk.directories[change.node] = {}
        elif isinstance(change, Names):
            if sure or (place < cut if mode == "in order" else mode == "any" and dice.random() < 0.5):
                _rename(disk, change)
        elif isinstance(change, Data | Size) and (sure or mode != "nothing"):
            _apply(disk.files.setdefault(change.node, bytearray()), change, sure, dice)
    return disk


def _durable(change: Change, place: int, synced: dict[int, int]) -> bool:
    if isinstance(change, Names):
        return all(synced.get(directory, -1) > place for directory, _, _ in change.changes)
    return isinstance(change, Data | Size) and synced.get(change.node, -1) > place


def _rename(disk: Disk, change: Names) -> None:
    for directory, name, node in change.changes:
        entries = disk.directories[directory]
        if node is None:
            entries.pop(name, None)
        else:
            entries[name] = node


def _apply(file: bytearray, change: Data | Size, sure: bool, dice: random.Random) -> None:
    kept = 1.0 if sure else dice.choice((0.0, 0.5, 1.0))
    if isinstance(change, Size):
        if kept:
            _resize(file, change.size)
        return
    begin, end = change.offset, change.offset + len(change.content)
    for sector in range(begin // SECTOR_BYTES, -(-end // SECTOR_BYTES)) if 0 < kept < 1 else ():
        first, last = max(begin, sector * SECTOR_BYTES), min(end, (sector + 1) * SECTOR_BYTES)
        if dice.random() < kept:
            _resize(file, max(len(file), last))
            file[first:last] = change.content[first - begin : last - begin]
    if kept == 1:
        _resize(file, max(len(file), end))
        file[begin:end] = change.content


def _resize(file: bytearray, size: int) -> None:
    if size < len(file):
        del file[size:]
    else:
        file.extend(bytes(size - len(file)))
