"""The members of a ``.tar`` file: where each lies and how long it is, without taking anything out.

Of the formats (POSIX.1-1988 ustar, POSIX.1-2001 pax, GNU's long names) it knows what names and sizes need. Written by
hand because the standard library's reader takes as much memory as a header tells it to. Knows bytes, not samples.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass

from edgetune.agent.sources.archives import read_at
from edgetune.errors import DataError

BLOCK_BYTES = 512
_MOST_NAME_BYTES = 1 << 16  # of a header that holds nothing but a name, or pax records
_REGULAR = (b"0", b"\0", b"7")
_WITHOUT_CONTENT = (b"1", b"2", b"3", b"4", b"5", b"6")
_EXTENSIONS = (b"L", b"K", b"x", b"g")  # they say more of the member that follows
_KINDS = {b"1": "a hard link", b"2": "a symbolic link", b"3": "a device", b"4": "a device", b"6": "a pipe"}


class TruncatedError(DataError):
    """The file ends before its end mark; ``offset`` is where what is missing begins."""

    def __init__(self, message: str, offset: int) -> None:
        super().__init__(message)
        self.offset = offset


@dataclass(frozen=True)
class Member:
    """One member: its header block begins at ``header``, its ``size_bytes`` bytes of content at ``offset``.

    ``version`` is a number that changes with its header (time, size, mode). ``problem`` says why it is no file.
    """

    name: str
    header: int
    offset: int
    size_bytes: int
    version: int
    problem: str | None = None


def members(descriptor: int, end: int) -> Iterator[Member]:
    """Yield the members of the open file, of which ``end`` bytes are there, directories left out.

    Raises:
        TruncatedError: after the last whole member: the file ends in the midst of one, or without an end mark.
        DataError: something that is no header stands where one should.
    """
    at = begin = 0  # begin: of the headers that belong to the next member
    long_name, told = None, dict[str, str]()
    while at + BLOCK_BYTES <= end:
        block = read_at(descriptor, BLOCK_BYTES, at)
        if block == bytes(BLOCK_BYTES):
            return
        if not _sum_is_right(block):
            raise DataError(f"what stands at byte {at} is no header of a tar archive")
        kind, size_bytes, offset = block[156:157], _number(block[124:136], at), at + BLOCK_BYTES
        if kind in _EXTENSIONS:
            if size_bytes > _MOST_NAME_BYTES:
                raise DataError(f"the header at byte {at} has {size_bytes} bytes of names; expected {_MOST_NAME_BYTES}")
            if offset + size_bytes > end:
                break
            text = read_at(descriptor, size_bytes, offset)
            if kind == b"L":
                long_name = text.rstrip(b"\0").decode("utf-8", "surrogateescape")
            elif kind == b"x":
                told = _records(text, at)
            at = offset + _padded(size_bytes)
            continue
        name = told.get("path") or long_name or _name(block)
        if "size" in told:
            if not (told["size"].isascii() and told["size"].isdigit()) or len(told["size"]) > 18:
                raise DataError(f"the header at byte {at} has a size that is no number")
            size_bytes = int(told["size"])
        if kind in _WITHOUT_CONTENT:
            size_bytes = 0
        elif kind == b"S":
            offset = _after_sparse_map(descriptor, block, offset)
        if offset + size_bytes > end:
            raise TruncatedError(f"it ends in the midst of {name}", begin)
        if kind != b"5" and not name.endswith("/"):
            sparse = kind == b"S" or any(key.startswith("GNU.sparse") for key in told)
            what = "a sparse file" if sparse else None if kind in _REGULAR else _KINDS.get(kind, "of an unknown kind")
            problem = None if what is None else f"refused: it is {what}; only files are read"
            yield Member(name, at, offset, size_bytes, zlib.crc32(block), problem)
        at = begin = offset + _padded(size_bytes)
        long_name, told = None, {}
    raise TruncatedError("it ends without an end mark", begin)


def _padded(size_bytes: int) -> int:
    return -(-size_bytes // BLOCK_BYTES) * BLOCK_BYTES


def _sum_is_right(block: bytes) -> bool:
    """Return whether the header's checksum holds: the sum of its bytes, those of the checksum counted as blanks."""
    total = sum(block[:148]) + 8 * 32 + sum(block[156:])
    try:
        return int(block[148:156].split(b"\0")[0].strip() or b"-1", 8) == total
    except ValueError:
        return False


def _number(field: bytes, at: int) -> int:
    """Return a number of a header: octal digits, or GNU's binary form for what does not fit."""
    try:
        found = int.from_bytes(field[1:], "big") if field[0] == 0x80 else int(field.split(b"\0")[0].strip() or b"0", 8)
    except ValueError:
        found = -1
    if not 0 <= found < 1 << 62:
        raise DataError(f"the header at byte {at} has a size that is no number")
    return found


def _name(block: bytes) -> str:
    name, prefix = (part.split(b"\0")[0].decode("utf-8", "surrogateescape") for part in (block[:100], block[345:500]))
    return f"{prefix}/{name}" if prefix and block[257:263] == b"ustar\0" else name


def _records(text: bytes, at: int) -> dict[str, str]:
    """Return the pax records in ``text``: each is its own length, a blank, key=value and a line feed."""
    found, begin = dict[str, str](), 0
    while begin < len(text) and text[begin] != 0:
        length, blank, _ = text[begin : begin + 20].partition(b" ")
        size_bytes = int(length) if length.isdigit() else 0
        record = text[begin + len(length) + 1 : begin + size_bytes]
        if not blank or begin + size_bytes > len(text) or not record.endswith(b"\n"):
            raise DataError(f"the header at byte {at} has pax records that cannot be read")
        key, _, value = record[:-1].partition(b"=")
        found[key.decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
        begin += size_bytes
    return found


def _after_sparse_map(descriptor: int, block: bytes, offset: int) -> int:
    """Return where the content of an old GNU sparse file begins: behind as many more blocks as its map has."""
    more = block[482]
    while more:
        more = read_at(descriptor, BLOCK_BYTES, offset)[504]
        offset += BLOCK_BYTES
    return offset
