"""The control groups of this process: what they may take, take, and lost to the kernel's out-of-memory killer.

Version 2 is read in full. Version 1, which Ubuntu 20.04 (JetPack 5) still mounts, has the same facts under other names;
``version`` tells which it was. Limits of all groups up to the root hold at once. In a container the path that
``/proc/self/cgroup`` names may lie outside of what is mounted: then the mounted root is the container's own group.
Sources: the kernel's ``admin-guide/cgroup-v2.rst`` and ``admin-guide/cgroup-v1/memory.rst``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from edgetune.telemetry.files import fields, integer, text

ROOT = Path("/")
_NO_LIMIT_BYTES = 1 << 62  # version 1 writes "no limit" as the largest multiple of a page


@dataclass(frozen=True)
class Group:
    """One control group with memory accounting; sizes in bytes.

    ``max_bytes`` is the hard limit, ``high_bytes`` the one from which on the kernel slows the group down and takes
    pages from it; None: no such limit. ``peak_bytes`` None: this kernel does not tell. ``reclaimable_bytes`` are pages
    of files that nobody used lately, and what the kernel itself can give back; they count as taken although nobody
    would miss them. ``oom_kills``: processes here and in the groups below that the kernel killed for want of memory.
    """

    path: str
    version: int
    current_bytes: int
    max_bytes: int | None
    high_bytes: int | None
    peak_bytes: int | None
    reclaimable_bytes: int
    oom_kills: int | None

    @property
    def limit_bytes(self) -> int | None:
        """The lower of both limits."""
        return min((size for size in (self.max_bytes, self.high_bytes) if size is not None), default=None)

    @property
    def room_bytes(self) -> int | None:
        """What the group may still take, negative where it is over a limit; None: it has no limit."""
        if self.limit_bytes is None:
            return None
        return self.limit_bytes - self.current_bytes + min(self.reclaimable_bytes, self.current_bytes)


def read_groups(root: Path = ROOT) -> tuple[Group, ...]:
    """Return the groups of this process that account for memory, its own first, then those around it.

    Empty: none does (the root group of a system has no limits, and no files that name any).
    """
    unified, legacy = _paths(root)
    # A kernel gives the memory controller to one version; where version 2 is mounted beside 1, it lies a level deeper.
    for mount in ("sys/fs/cgroup", "sys/fs/cgroup/unified"):
        if unified is not None and (found := _walk(root / mount, unified, 2)):
            return found
    return () if legacy is None else _walk(root / "sys/fs/cgroup/memory", legacy, 1)


def _paths(root: Path) -> tuple[str | None, str | None]:
    """Return the paths of this process's group in version 2 and in version 1's memory hierarchy."""
    unified = legacy = None
    for line in (text(root / "proc" / "self" / "cgroup") or "").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            unified = path
        elif "memory" in controllers.split(","):
            legacy = path
    return unified, legacy


def _walk(mount: Path, path: str, version: int) -> tuple[Group, ...]:
    read = _version_2 if version == 2 else _version_1
    # Names of groups outside of a container's namespace begin with "/..": nothing of them is mounted.
    parts = [part for part in path.split("/") if part not in ("", "..")]
    groups = []
    for depth in range(len(parts), -1, -1):
        folder = mount.joinpath(*parts[:depth])
        group = read(folder, "/" + "/".join(parts[:depth]))
        if group is not None:
            groups.append(group)
    return tuple(groups)


def _version_2(folder: Path, name: str) -> Group | None:
    current_bytes = integer(folder / "memory.current")
    if current_bytes is None:
        return None
    stat, events = fields(folder / "memory.stat") or {}, fields(folder / "memory.events") or {}
    return Group(
        name,
        2,
        current_bytes,
        max_bytes=integer(folder / "memory.max"),  # "max" is no number: no limit
        high_bytes=integer(folder / "memory.high"),
        peak_bytes=integer(folder / "memory.peak"),
        reclaimable_bytes=stat.get("inactive_file", 0) + stat.get("slab_reclaimable", 0),
        oom_kills=events.get("oom_kill"),
    )


def _version_1(folder: Path, name: str) -> Group | None:
    current_bytes = integer(folder / "memory.usage_in_bytes")
    if current_bytes is None:
        return None
    stat, control = fields(folder / "memory.stat") or {}, fields(folder / "memory.oom_control") or {}
    max_bytes = integer(folder / "memory.limit_in_bytes")
    return Group(
        name,
        1,
        current_bytes,
        max_bytes=None if max_bytes is None or max_bytes >= _NO_LIMIT_BYTES else max_bytes,
        high_bytes=None,
        peak_bytes=integer(folder / "memory.max_usage_in_bytes"),
        reclaimable_bytes=stat.get("total_inactive_file", 0),
        oom_kills=control.get("oom_kill"),
    )
