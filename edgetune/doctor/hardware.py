"""Findings on what the machine has to give: memory, power, heat, disk, clock, limits."""

from __future__ import annotations

import ctypes
import os
import resource
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from edgetune.doctor.finding import ERROR, OK, WARNING, Finding
from edgetune.telemetry.available import UNKNOWN_BYTES, available_bytes
from edgetune.telemetry.cgroup import read_groups
from edgetune.telemetry.files import text
from edgetune.telemetry.meminfo import read_meminfo, read_swaps, read_zram
from edgetune.telemetry.power import read_power_mode, read_rails, total_watts
from edgetune.telemetry.process import PeakMeter, proportional_bytes
from edgetune.telemetry.thermal import Zone, read_throttling, read_zones
from edgetune.units import MIB, format_bytes

LITTLE_MEMORY_BYTES = 512 * MIB
SWAPPED_BYTES = 64 * MIB
LITTLE_DISK_BYTES, NO_DISK_BYTES = 1024 * MIB, 64 * MIB
FEW_FILES = 256
LEAST_YEAR = 2025
NEAR_CELSIUS = 5.0
_FAR_AWAY = ("nfs", "cifs", "smb", "9p", "fuse", "ceph", "gluster", "vboxsf")
_UNSYNCHRONISED = 5  # TIME_ERROR, man 2 adjtimex


def hardware(root: Path, state: Path) -> Iterator[Finding]:
    """Yield what there is to say of memory, power, heat, disk, clock and limits, read below ``root``."""
    yield from _memory(root)
    yield from _swap(root)
    yield from _groups(root)
    yield from _meter(root)
    yield from _limits()
    yield from _power(root)
    yield from _heat(root)
    yield from _disk(root, state)
    yield from _clock(root)


def _memory(root: Path) -> Iterator[Finding]:
    memory, available = read_meminfo(root), available_bytes(root)
    if memory is None or available.bytes == UNKNOWN_BYTES:
        advice = "a budget can only be kept against what --budget says; is /proc mounted?"
        yield Finding("memory", WARNING, "how much memory is free is not known", advice)
        return
    words = f"{format_bytes(available.bytes)} may be taken ({available.source}) of {format_bytes(memory.total_bytes)}"
    if memory.nvmap_used_bytes:
        words += f"; GPU and other engines hold {format_bytes(memory.nvmap_used_bytes)}"
    if available.bytes < LITTLE_MEMORY_BYTES:
        advice = (
            "stop what is not needed: on a Jetson the desktop takes most (sudo systemctl isolate multi-user.target)"
        )
        yield Finding("memory", WARNING, words, advice)
    else:
        yield Finding("memory", OK, words)


def _swap(root: Path) -> Iterator[Finding]:
    swaps, devices = read_swaps(root), read_zram(root)
    if not swaps:
        yield Finding("swap", OK, "no swap")
        return
    by_kind: dict[str, tuple[int, int]] = {}
    for swap in swaps:
        kind = "zram (compressed memory)" if swap.kind == "zram" else "disk"
        size_bytes, used_bytes = by_kind.get(kind, (0, 0))
        by_kind[kind] = size_bytes + swap.size_bytes, used_bytes + swap.used_bytes
    words = ", ".join(
        f"{format_bytes(used)} of {format_bytes(size)} used on {kind}" for kind, (size, used) in by_kind.items()
    )
    if taken_bytes := sum(device.memory_bytes for device in devices):
        words += f"; zram itself takes {format_bytes(taken_bytes)} of the memory"
    if sum(used for _, used in by_kind.values()) > SWAPPED_BYTES:
        advice = (
            "memory is short already: swap does not count for a budget, and a training step must not be swapped out"
        )
        yield Finding("swap", WARNING, words, advice)
    else:
        yield Finding("swap", OK, words)


def _groups(root: Path) -> Iterator[Finding]:
    groups = read_groups(root)
    limited = [group for group in groups if group.room_bytes is not None]
    if not groups:
        yield Finding("cgroup", OK, "no control group accounts for this process's memory")
        return
    tightest = min(limited, key=lambda group: group.room_bytes or 0, default=None)
    words = "no limit"
    if tightest is not None:
        words = f"limit {format_bytes(tightest.limit_bytes or 0)} in {tightest.path} (version {tightest.version}), "
        words += f"{format_bytes(max(0, tightest.room_bytes or 0))} left"
    if kills := groups[0].oom_kills:
        advice = "raise the limit (MemoryMax= of the service, --memory of the container), or lower --budget below it"
        yield Finding("cgroup", WARNING, f"{words}; the kernel killed {kills} process(es) here for memory", advice)
    else:
        yield Finding("cgroup", OK, words)


def _meter(root: Path) -> Iterator[Finding]:
    meter = PeakMeter(root / "proc")
    meter.reset()
    if meter.resettable:
        words = "the kernel resets the high-water mark: every step's peak is measured"
        if proportional_bytes(root / "proc") is None:
            words += "; what processes share is not told apart"
        yield Finding("meter", OK, words)
    else:
        advice = (
            "a kernel with CONFIG_PROC_PAGE_MONITOR allows it; without, a plan is corrected by the first peaks only"
        )
        yield Finding("meter", WARNING, "the kernel does not reset the high-water mark (/proc/self/clear_refs)", advice)


def _limits() -> Iterator[Finding]:
    tight = []
    for name, kind in (("RLIMIT_AS", resource.RLIMIT_AS), ("RLIMIT_DATA", resource.RLIMIT_DATA)):
        soft, _ = resource.getrlimit(kind)
        if soft != resource.RLIM_INFINITY:
            tight.append(f"{name} is {format_bytes(soft)}")
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files != resource.RLIM_INFINITY and files < FEW_FILES:
        tight.append(f"only {files} files may be open")
    if tight:
        advice = "raise it (ulimit -v, -d, -n; LimitAS=, LimitDATA=, LimitNOFILE= of a service): a runtime may reserve "
        advice += "far more addresses than it uses"
        yield Finding("limits", WARNING, "; ".join(tight), advice)
    else:
        yield Finding("limits", OK, "no limit on addresses or data; enough files may be open")


def _power(root: Path) -> Iterator[Finding]:
    mode, rails = read_power_mode(root), read_rails(root)
    if mode is None and not rails:
        return
    words = "unknown mode" if mode is None else f"mode {mode.name or 'without a name'} ({mode.number})"
    if mode is not None and not mode.set:
        words += ", the one that the board starts with"
    fastest = {} if mode is None else {name: number for number, name in mode.modes.items() if name.startswith("MAXN")}
    if mode is not None and fastest and mode.name not in fastest:
        name, number = next(iter(fastest.items()))
        words += f"; the fastest is {name} (sudo nvpmodel -m {number})"
    if (watts := total_watts(rails)) is not None:
        words += f"; {watts:.1f} W"
    yield Finding("power", OK, words)


def _heat(root: Path) -> Iterator[Finding]:
    zones = [zone for zone in read_zones(root) if zone.celsius is not None]
    throttling = read_throttling(root)
    events = {kind: count for kind, count in throttling.over_current.items() if count}
    hottest = max(zones, key=lambda zone: zone.celsius or 0, default=None)
    words = "no temperature can be read" if hottest is None else f"hottest {hottest.name} at {hottest.celsius:.1f} °C"
    near = [zone.name for zone in zones if _is_near(zone)]
    if throttling.cooling:
        names = ", ".join(throttling.cooling)
        advice = (
            "it is too hot, or was told to be slow: check fan and air; a step takes longer, and nothing else changes"
        )
        yield Finding("throttling", WARNING, f"slowed down by {names}; {words}", advice)
    elif near:
        advice = "it will be slowed down soon: check fan and air, or choose a lower power mode"
        yield Finding("throttling", WARNING, f"{', '.join(near)} is near its limit; {words}", advice)
    elif hottest is not None:
        yield Finding("throttling", OK, f"nothing is slowed down; {words}")
    if events:
        told = ", ".join(f"{count} x {kind}" for kind, count in events.items())
        advice = "a stronger power supply, or a lower power mode; a few instantaneous events are normal in mode MAXN"
        yield Finding("supply", WARNING, f"the chip throttled for its power supply since the start: {told}", advice)


def _is_near(zone: Zone) -> bool:
    limits = [limit for limit in (zone.passive_celsius, zone.critical_celsius) if limit is not None]
    return bool(limits) and zone.celsius is not None and zone.celsius > min(limits) - NEAR_CELSIUS


def _disk(root: Path, state: Path) -> Iterator[Finding]:
    place = state.absolute()
    while not place.is_dir():
        place = place.parent
    kind = file_system(root, place)
    free_bytes = os.statvfs(place).f_bavail * os.statvfs(place).f_frsize
    words = f"{place} on {kind or 'an unknown file system'}, {format_bytes(free_bytes)} free"
    try:
        with tempfile.TemporaryFile(dir=place) as stream:
            stream.write(b"edgetune")
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        advice = "give --state a directory on a local disk that this user may write"
        yield Finding("disk", ERROR, f"{words}; writing and syncing fails: {error.strerror or error}", advice)
        return
    if free_bytes < NO_DISK_BYTES:
        yield Finding("disk", ERROR, words, "free space, or give --state another directory: checkpoints would not fit")
    elif kind in ("tmpfs", "ramfs"):
        advice = "it is memory: all progress is gone with the power, and it takes from the budget; use a disk"
        yield Finding("disk", WARNING, words, advice)
    elif kind == "overlay":
        advice = "all progress is gone with the container: mount a volume for the state"
        yield Finding("disk", WARNING, words, advice)
    elif kind is not None and kind.startswith(_FAR_AWAY):
        advice = "locks and syncs of a network file system cannot be relied on: use a local disk"
        yield Finding("disk", WARNING, words, advice)
    elif free_bytes < LITTLE_DISK_BYTES:
        yield Finding("disk", WARNING, words, "free some space: two checkpoints and the run log have to fit")
    else:
        yield Finding("disk", OK, f"{words}; syncing works")


def file_system(root: Path, place: Path) -> str | None:
    """Return the kind of the file system that ``place`` is on; None: ``/proc/self/mounts`` does not tell."""
    found: tuple[int, str] | None = None
    for line in (text(root / "proc" / "self" / "mounts") or "").splitlines():
        words = line.split()
        if len(words) < 3:
            continue
        mount = Path(words[1].replace("\\040", " "))
        # Of two on the same point, the later one hides the earlier.
        if place.is_relative_to(mount) and (found is None or len(mount.parts) >= found[0]):
            found = len(mount.parts), words[2]
    return None if found is None else found[1]


def _clock(root: Path) -> Iterator[Finding]:
    now = time.gmtime()
    today = time.strftime("%Y-%m-%d %H:%M UTC", now)
    if now.tm_year < LEAST_YEAR:
        advice = (
            "set it (sudo timedatectl set-ntp true, or sudo date -s ...): the run log and logs of others rely on it"
        )
        yield Finding("clock", WARNING, f"the clock says {today}", advice)
        return
    synchronised = _synchronised() if root == Path("/") else None
    if synchronised is False:
        advice = (
            "nothing depends on it but the times in the log; sudo timedatectl set-ntp true, where there is a network"
        )
        yield Finding("clock", WARNING, f"the clock says {today}, and is not synchronised", advice)
    else:
        yield Finding("clock", OK, f"the clock says {today}" + (", synchronised" if synchronised else ""))


def _synchronised() -> bool | None:
    """Return whether the kernel's clock is disciplined by anybody; None: it does not tell."""
    try:
        state = ctypes.CDLL(None).adjtimex(ctypes.create_string_buffer(1024))  # struct timex of zeros: only asks
    except (OSError, AttributeError):
        return None
    return None if state < 0 else bool(state != _UNSYNCHRONISED)
