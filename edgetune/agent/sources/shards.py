"""Tar shards with the names of webdataset: files that follow each other and share a name up to its first dot are one
sample, ``0001.jpg`` and ``0001.cls`` or ``0001.json``.

The label is in ``.cls`` (a class's name or index), or in ``.json`` (``label``, and perhaps ``task``), or it is the
first folder of the name (``cat/0001.jpg``). Entries are named as their image. A file that ends too early gives the
samples that are whole. Knows what members mean; ``tarindex.py`` knows where they are.
"""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Collection, Iterator, Sequence
from hashlib import blake2b
from pathlib import Path, PurePosixPath

from edgetune.agent.sources.archives import open_regular, read_at
from edgetune.agent.sources.base import MAX_FILE_BYTES, Found, labelled, valid_labels
from edgetune.agent.sources.tarindex import Member, TruncatedError, members
from edgetune.errors import DataError

_MOST_LABEL_BYTES = 1 << 20
_MOST_MEMBERS = 100  # of one sample; more are not looked at


class TarArchive:
    """The shard ``path``. ``suffixes``: lower-case endings of members that can be samples, with their dot.

    Raises:
        DataError: it cannot be read, or is compressed, which would make every sample cost the whole file.
    """

    def __init__(self, path: Path, classes: Sequence[str], suffixes: Collection[str]) -> None:
        self.path, self.classes, self.suffixes = path, classes, suffixes
        self._index = self._filling = _Index()
        descriptor = open_regular(path)
        try:
            self._end = os.fstat(descriptor).st_size
            begin = os.pread(descriptor, 6, 0)
        finally:
            os.close(descriptor)
        if begin.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")):
            raise DataError("refused: it is compressed, so no sample can be read alone; unpack it to a plain .tar")

    def entries(self) -> Iterator[Found]:
        self._filling = index = _Index()
        descriptor = open_regular(self.path)
        try:
            group, of = list[Member](), ""
            try:
                for member in members(descriptor, self._end):
                    key = _split(member.name)[0]
                    if group and (key != of or member.name in (one.name for one in group)):
                        yield from self._sample(descriptor, group, index)
                        group = []
                    of = key
                    if len(group) < _MOST_MEMBERS:
                        group.append(member)
            except TruncatedError as error:
                # The last sample may lack members that are still to come: it counts if it has all that it needs.
                whole = [found for found in self._sample(descriptor, group, None) if found.problem is None]
                yield from self._sample(descriptor, group, index) if whole else ()
                rest = error.offset if whole or not group else group[0].header
                text = f"{error}: what follows byte {rest} of {self._end} is taken up when the file has grown"
                yield Found(f"@{rest}", None, text, mending=True)
                group = []
            except DataError as error:
                yield Found(f"@{group[-1].offset if group else 0}", None, f"the rest is lost: {error}", mending=True)
            yield from self._sample(descriptor, group, index)
            self._index, index.complete = index, True
        finally:
            os.close(descriptor)

    def stat(self, path: str) -> tuple[int, int]:
        _, size_bytes, version = self._find(path)
        return size_bytes, version

    def read(self, path: str) -> bytes:
        offset, size_bytes, _ = self._find(path)
        descriptor = open_regular(self.path)
        try:
            return read_at(descriptor, size_bytes, offset)
        finally:
            os.close(descriptor)

    def close(self) -> None:
        """Do nothing: no file stays open."""

    def _find(self, path: str) -> tuple[int, int, int]:
        found = self._filling.find(path) or self._index.find(path)
        if found is None and not self._index.complete:  # nobody has looked through it yet
            for _ in self.entries():
                pass
            found = self._index.find(path)
        if found is None:
            raise DataError("missing")
        return found

    def _sample(self, descriptor: int, group: Sequence[Member], index: _Index | None) -> Iterator[Found]:
        """Yield the sample that ``group`` is, and what is wrong with its members."""
        images = [member for member in group if f".{_split(member.name)[1]}" in self.suffixes]
        for member in group:
            if member.problem is not None:
                yield Found(member.name, None, member.problem, final=True)
        image = next((member for member in images if member.problem is None), None)
        if image is None:
            return
        pure = PurePosixPath(image.name)
        if pure.is_absolute() or ".." in pure.parts or "\0" in image.name:
            yield Found(image.name, None, "refused: its name leaves the archive", final=True)
        elif image.size_bytes > MAX_FILE_BYTES:
            yield Found(image.name, None, f"larger than {MAX_FILE_BYTES} bytes", final=True)
        elif index is not None and not index.add(image):
            yield Found(f"@{image.header}", None, f"a second sample of the name {image.name}", final=True)
        else:
            yield self._labelled(descriptor, group, image)

    def _labelled(self, descriptor: int, group: Sequence[Member], image: Member) -> Found:
        by_ending = {_split(member.name)[1]: member for member in group if member.problem is None}
        label: object = None
        task = None
        try:
            if (member := by_ending.get("json")) is not None:
                told = json.loads(_content(descriptor, member))
                if isinstance(told, dict):
                    label = told.get("label")
                    task = told["task"] if isinstance(told.get("task"), str) else None
            if (member := by_ending.get("cls")) is not None:
                text = _content(descriptor, member).decode("utf-8").strip()
                label = int(text) if text.isascii() and text.isdigit() and text not in self.classes else text
        except (ValueError, RecursionError) as error:
            return Found(image.name, None, f"its label cannot be read ({error})", final=True)
        except DataError as error:
            return Found(image.name, None, f"its label {error}", final=True)
        parts = PurePosixPath(image.name).parts
        if label is None and len(parts) > 1:
            label = parts[0]
        if label is None:
            text = f"no label: expected it in {_split(image.name)[0]}.cls or .json, or as its first folder"
            return Found(image.name, None, f"{text} ({valid_labels(self.classes)})", final=True)
        return labelled(image.name, label, self.classes, task, final=True)


class _Index:
    """Where each sample lies, by a 64-bit hash of its name: a table with open addressing, 64 to 128 bytes for each."""

    _FIELDS = 4  # hash (0: nobody), offset, bytes, version

    def __init__(self) -> None:
        self.complete = False
        self._count, self._slots = 0, 64
        self._table = array("Q", bytes(8 * self._FIELDS * self._slots))

    def add(self, member: Member) -> bool:
        """Enter a sample; return False if there is one of its name."""
        place, there = self._place(_hash(member.name))
        if there:
            return False
        entry = array("Q", (_hash(member.name), member.offset, member.size_bytes, member.version))
        self._table[place : place + self._FIELDS] = entry
        self._count += 1
        if 2 * self._count > self._slots:
            self._grow()
        return True

    def find(self, name: str) -> tuple[int, int, int] | None:
        """Return (offset, bytes, version), or None."""
        place, there = self._place(_hash(name))
        if not there:
            return None
        _, offset, size_bytes, version = self._table[place : place + self._FIELDS]
        return offset, size_bytes, version

    def _place(self, key: int) -> tuple[int, bool]:
        place = key % self._slots * self._FIELDS
        while self._table[place] not in (0, key):
            place = (place + self._FIELDS) % len(self._table)
        return place, self._table[place] == key

    def _grow(self) -> None:
        old, self._slots = self._table, 2 * self._slots
        self._table = array("Q", bytes(8 * self._FIELDS * self._slots))
        for begin in range(0, len(old), self._FIELDS):
            if old[begin]:
                place, _ = self._place(old[begin])
                self._table[place : place + self._FIELDS] = old[begin : begin + self._FIELDS]


def _hash(name: str) -> int:
    return int.from_bytes(blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest(), "big") or 1


def _split(name: str) -> tuple[str, str]:
    """Return (key, ending): ``a.b/0001.seg.png`` is ``a.b/0001`` and ``seg.png``, the ending in lower case."""
    folder, slash, file = name.rpartition("/")
    stem, _, ending = file.partition(".")
    return folder + slash + stem, ending.lower()


def _content(descriptor: int, member: Member) -> bytes:
    if member.size_bytes > _MOST_LABEL_BYTES:
        raise DataError(f"has {member.size_bytes} bytes; expected at most {_MOST_LABEL_BYTES}")
    return read_at(descriptor, member.size_bytes, member.offset)
