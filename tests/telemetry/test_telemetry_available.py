"""What may still be taken: MemAvailable, control groups of both versions, swap and zram told apart."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgetune.telemetry.available import UNKNOWN_BYTES, Available, available_bytes
from edgetune.telemetry.cgroup import read_groups
from edgetune.telemetry.meminfo import Swap, Zram, read_meminfo, read_swaps, read_zram
from edgetune.units import MIB

MEMINFO = """MemTotal:        7990156 kB
MemFree:          312776 kB
MemAvailable:    2048000 kB
SwapTotal:       8189376 kB
SwapFree:        8189000 kB
NvMapMemFree:     524288 kB
NvMapMemUsed:     131072 kB
"""


def write(root: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return root


def nested(root: Path) -> Path:
    """A service with a limit of 512 MiB below a slice with one of 300 MiB; the rest of the system has none."""
    return write(
        root,
        {
            "proc/meminfo": MEMINFO,
            "proc/self/cgroup": "0::/system.slice/edgetune.service\n",
            "sys/fs/cgroup/system.slice/edgetune.service/memory.current": f"{200 * MIB}\n",
            "sys/fs/cgroup/system.slice/edgetune.service/memory.max": f"{512 * MIB}\n",
            "sys/fs/cgroup/system.slice/edgetune.service/memory.high": "max\n",
            "sys/fs/cgroup/system.slice/edgetune.service/memory.peak": f"{230 * MIB}\n",
            "sys/fs/cgroup/system.slice/edgetune.service/memory.stat": f"anon 100\ninactive_file {8 * MIB}\n",
            "sys/fs/cgroup/system.slice/edgetune.service/memory.events": "low 0\nhigh 0\nmax 12\noom 2\noom_kill 1\n",
            "sys/fs/cgroup/system.slice/memory.current": f"{250 * MIB}\n",
            "sys/fs/cgroup/system.slice/memory.max": f"{400 * MIB}\n",
            "sys/fs/cgroup/system.slice/memory.high": f"{300 * MIB}\n",
            "sys/fs/cgroup/system.slice/memory.stat": f"inactive_file {10 * MIB}\nslab_reclaimable {4 * MIB}\n",
            "sys/fs/cgroup/cgroup.procs": "",
        },
    )


def test_every_group_up_to_the_root_holds(tmp_path: Path) -> None:
    own, around = read_groups(nested(tmp_path))
    assert (own.version, own.limit_bytes, own.peak_bytes, own.oom_kills) == (2, 512 * MIB, 230 * MIB, 1)
    assert own.room_bytes == 320 * MIB and around.room_bytes == 64 * MIB and around.oom_kills is None
    assert available_bytes(tmp_path) == Available(64 * MIB, "cgroup /system.slice")
    (tmp_path / "sys/fs/cgroup/system.slice/memory.current").write_text(f"{330 * MIB}\n")
    assert available_bytes(tmp_path).bytes == 0, "over the limit is no room, not a negative one"
    for name in ("memory.max", "memory.high"):
        (tmp_path / "sys/fs/cgroup/system.slice" / name).write_text("max\n")
    assert available_bytes(tmp_path) == Available(320 * MIB, "cgroup /system.slice/edgetune.service")


def test_swap_is_nothing_that_may_be_taken(tmp_path: Path) -> None:
    memory = read_meminfo(write(tmp_path, {"proc/meminfo": MEMINFO}))
    assert memory is not None and memory.nvmap_used_bytes == 128 * MIB and memory.nvmap_free_bytes == 512 * MIB
    assert memory.swap_total_bytes == 8189376 * 1024
    assert available_bytes(tmp_path) == Available(2000 * MIB, "MemAvailable")


@pytest.mark.parametrize(("limit", "room"), [(f"{300 * MIB}", 110 * MIB), ("9223372036854771712", None)])
def test_the_older_version_in_a_container(tmp_path: Path, limit: str, room: int | None) -> None:
    """The path in /proc/self/cgroup is the host's; the mount shows the container's own group as its root."""
    files = {"usage_in_bytes": f"{200 * MIB}", "limit_in_bytes": limit, "stat": f"total_inactive_file {10 * MIB}",
             "oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 3\n"}  # fmt: skip
    write(tmp_path, {f"sys/fs/cgroup/memory/memory.{name}": content for name, content in files.items()})
    write(tmp_path, {"proc/self/cgroup": "4:memory:/docker/0a1b2c\n1:name=systemd:/docker/0a1b2c\n0::/\n"})
    (group,) = read_groups(tmp_path)
    assert (group.version, group.path, group.room_bytes, group.oom_kills) == (1, "/", room, 3)
    assert available_bytes(tmp_path).bytes == (UNKNOWN_BYTES if room is None else room)


def test_zram_and_disk_are_told_apart(tmp_path: Path) -> None:
    table = (
        "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n"
        "/dev/zram0                              partition\t665812\t\t1024\t\t5\n"
        "/ssd/16GB.swap                          file\t\t16777212\t0\t\t-2\n"
    )
    write(tmp_path, {"proc/swaps": table, "sys/block/zram0/disksize": "681791488\n"})
    write(tmp_path, {"sys/block/zram0/mm_stat": "  1048576   262144   524288        0   524288        0        0\n"})
    write(tmp_path, {"sys/block/zram1/disksize": "0\n", "sys/block/zram1/mm_stat": "0 0 0 0 0 0 0\n"})
    assert read_swaps(tmp_path) == (
        Swap("/dev/zram0", "zram", 665812 * 1024, MIB),
        Swap("/ssd/16GB.swap", "file", 16777212 * 1024, 0),
    )
    assert read_zram(tmp_path) == (Zram("zram0", 681791488, stored_bytes=MIB, memory_bytes=MIB // 2),)


def test_what_is_absent_is_none(tmp_path: Path) -> None:
    assert read_meminfo(tmp_path) is None and read_swaps(tmp_path) is None
    assert read_groups(tmp_path) == () and read_zram(tmp_path) == ()
    assert available_bytes(tmp_path).bytes == UNKNOWN_BYTES


def test_this_machine_has_memory() -> None:
    assert 0 < available_bytes().bytes < UNKNOWN_BYTES
