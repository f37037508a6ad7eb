"""Which GPU architectures a library has kernels for, read from the file itself: what ``cuobjdump`` would list.

A CUDA library keeps its device code in the ELF section ``.nv_fatbin``: one container after the other, each a header
(magic, version, header size, size) and entries (kind 1: PTX, 2: machine code; their own header and size; the
architecture as a number such as 87). NVIDIA does not document the layout; it is that which the project *cricket* (RWTH
Aachen) found, and every number is checked: what does not fit ends the walk, and the answer is then "unknown".
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path

MAGIC = b"\x50\xed\x55\xba"
PTX, CUBIN = 1, 2
_SECTION = ".nv_fatbin"


@dataclass(frozen=True)
class Architectures:
    """``cubin``: machine code for these, such as ``87``; ``ptx``: code that a driver can translate for these and
    later ones."""

    cubin: frozenset[int]
    ptx: frozenset[int]

    def suits(self, capability: str, *, tegra: bool) -> bool:
        """Return whether the kernels run as they are on a GPU of this compute capability, such as ``8.7``.

        Machine code of one major version serves its later minor ones, but not between Tegra and other chips, nor among
        Tegras (CUDA C++ Programming Guide, "Binary Compatibility"). Thor is 11.0, and was 10.1 before CUDA 13.
        """
        wanted = _number(capability)
        if tegra:
            return bool(self.cubin & ({wanted, 101} if wanted == 110 else {wanted}))
        return any(found // 10 == wanted // 10 and found <= wanted for found in self.cubin)

    def translates(self, capability: str) -> bool:
        """Return whether the driver could translate the kernels for such a GPU, at the first start."""
        return any(found <= _number(capability) for found in self.ptx)


def _number(capability: str) -> int:
    major, _, minor = capability.partition(".")
    return int(major) * 10 + int(minor or 0)


def architectures(library: Path) -> Architectures | None:
    """Return what ``library`` has kernels for; None: it has no device code, or one in a form that is not known.

    Only headers are read, so a library of some hundred MB takes a moment.
    """
    found: dict[int, set[int]] = {PTX: set(), CUBIN: set()}
    try:
        with library.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            place = _section(data)
            if place is None:
                return None
            start, end = place
            while (start := data.find(MAGIC, start, end)) >= 0:
                start = _container(data, start, end, found)
    except (OSError, ValueError, struct.error):
        return None
    if not any(found.values()):
        return None
    return Architectures(frozenset(found[CUBIN]), frozenset(found[PTX]))


def _section(data: mmap.mmap) -> tuple[int, int] | None:
    """Return begin and end of ``.nv_fatbin`` in a 64-bit little-endian ELF file."""
    if data[:6] != b"\x7fELF\x02\x01":
        return None
    (table,) = struct.unpack_from("<Q", data, 0x28)
    size, count, names = struct.unpack_from("<HHH", data, 0x3A)
    sections = [struct.unpack_from("<IIQQQQ", data, table + size * number) for number in range(count)]
    strings = sections[names][4]
    for section in sections:
        begin = strings + section[0]
        if data[begin : begin + len(_SECTION) + 1] == _SECTION.encode() + b"\0":
            return section[4], section[4] + section[5]
    return None


def _container(data: mmap.mmap, start: int, end: int, found: dict[int, set[int]]) -> int:
    """Note the architectures in the container at ``start``; return where to look for the next one."""
    _, version, header_size, size = struct.unpack_from("<IHHQ", data, start)
    stop: int = start + header_size + size
    if version != 1 or header_size != 16 or stop > end:
        return start + len(MAGIC)  # four bytes that look alike
    entry = start + header_size
    while entry + 32 <= stop:
        kind, _, own_size, content_size = struct.unpack_from("<HHIQ", data, entry)
        (architecture,) = struct.unpack_from("<I", data, entry + 28)
        if kind not in found or not 32 <= own_size <= 4096 or not 20 <= architecture < 1000:
            break
        found[kind].add(architecture)
        entry += own_size + content_size
    return stop
