"""``.npz`` archives: one array of samples, one of labels, and perhaps one that names tasks.

Row i is the entry ``#i`` and is handed out as a ``.npy`` file of its own. Of an archive that ``numpy.savez`` wrote,
rows are read where they lie. One that is compressed can only be read from its beginning, so its samples are unpacked
once, piece by piece, into a file that has no name and goes with the process. Sizes are checked before anything is
taken; pickled arrays are refused. The formats: zipfile's, and numpy.lib.format (NEP 1).
"""

from __future__ import annotations

import io
import os
import struct
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from edgetune.agent.sources.archives import open_regular, read_at
from edgetune.agent.sources.base import MAX_FILE_BYTES, Found, labelled
from edgetune.bundle import Array
from edgetune.errors import DataError
from edgetune.units import format_bytes

PAIRS = (
    ("x", "y"), ("images", "labels"), ("samples", "labels"), ("data", "labels"), ("data", "target"),
    ("inputs", "targets"), ("x_train", "y_train"),
)  # fmt: skip
TASK = "task"
_LOCAL_HEADER = struct.Struct("<4s5H3I2H")  # APPNOTE.TXT 4.3.7
_MOST_LABEL_BYTES = 256  # per row
_PIECE_BYTES = 1 << 20


@dataclass(frozen=True)
class _Member:
    """An array in the archive: its header, where its first row lies in the file, or None if it is compressed."""

    info: zipfile.ZipInfo
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    header_bytes: int
    offset: int | None

    @property
    def row_bytes(self) -> int:
        return int(np.prod(self.shape[1:], dtype=np.int64)) * self.dtype.itemsize


class NpzArchive:
    """The archive ``path``.

    Args:
        most_unpacked_bytes: a compressed archive that takes more is refused. scratch: folder in which it is unpacked.

    Raises:
        DataError: not an archive of arrays, or not of samples and labels; the message says what is missing.
    """

    def __init__(
        self, path: Path, classes: Sequence[str], *, most_unpacked_bytes: int, scratch: Path | None = None
    ) -> None:
        self.path, self.classes = path, classes
        self._unpacked: IO[bytes] | None = None
        with os.fdopen(open_regular(path), "rb") as stream:
            self._mtime_ns = os.fstat(stream.fileno()).st_mtime_ns
            try:
                archive = zipfile.ZipFile(stream)
            except Exception as error:  # zipfile raises nearly anything on a damaged directory
                raise DataError(f"not a readable .npz archive ({type(error).__name__}: {error})") from None
            members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
            pair = next((pair for pair in PAIRS if pair[0] in members and pair[1] in members), None)
            if pair is None:
                known = "; ".join(" and ".join(names) for names in PAIRS)
                raise DataError(f"it holds {', '.join(sorted(members)[:10])}; expected one of these pairs: {known}")
            self._samples = _member(archive, members[pair[0]], stream)
            self._check_samples(pair[0])
            self._labels = _column(archive, members[pair[1]], stream, len(self))
            self._tasks = _column(archive, members[TASK], stream, len(self)) if TASK in members else None
            if self._samples.offset is None:
                self._unpack(archive, most_unpacked_bytes, scratch)

    def __len__(self) -> int:
        return self._samples.shape[0]

    def entries(self) -> Iterator[Found]:
        for row in range(len(self)):
            task = None if self._tasks is None else _plain(self._tasks[row])
            label = _plain(self._labels[row])
            yield labelled(str(row), label, self.classes, None if task is None else str(task), final=True)

    def stat(self, path: str) -> tuple[int, int]:
        self._row(path)
        return self._samples.row_bytes, self._mtime_ns

    def read(self, path: str) -> bytes:
        row, member = self._row(path), self._samples
        if self._unpacked is not None:
            data = read_at(self._unpacked.fileno(), member.row_bytes, row * member.row_bytes)
        else:
            assert member.offset is not None
            descriptor = open_regular(self.path)
            try:
                data = read_at(descriptor, member.row_bytes, member.offset + row * member.row_bytes)
            finally:
                os.close(descriptor)
        return npy(np.frombuffer(data, member.dtype).reshape(member.shape[1:]))

    def close(self) -> None:
        if self._unpacked is not None:
            self._unpacked.close()

    def _row(self, path: str) -> int:
        if not (path.isascii() and path.isdigit()) or len(path) > 18 or int(path) >= len(self):
            raise DataError(f"missing: the archive has {len(self)} rows")
        return int(path)

    def _check_samples(self, name: str) -> None:
        member = self._samples
        if not member.shape:
            raise DataError(f"its array '{name}' is one number; expected one row per sample")
        if not 0 < member.row_bytes <= MAX_FILE_BYTES:
            raise DataError(f"a row of its array '{name}' has {member.row_bytes} bytes; expected 1 to {MAX_FILE_BYTES}")

    def _unpack(self, archive: zipfile.ZipFile, most_bytes: int, scratch: Path | None) -> None:
        size_bytes = self._samples.info.file_size
        if size_bytes > most_bytes:
            raise DataError(
                f"refused: its samples unpack to {format_bytes(size_bytes)}, more than intake.spool_bytes "
                f"({format_bytes(most_bytes)}); save it with numpy.savez, which needs no unpacking, or raise that"
            )
        try:
            self._unpacked = tempfile.TemporaryFile(dir=scratch)  # noqa: SIM115  (open as long as the archive)
            with archive.open(self._samples.info) as packed:
                packed.read(self._samples.header_bytes)
                while piece := packed.read(_PIECE_BYTES):
                    self._unpacked.write(piece)
            self._unpacked.flush()
        except OSError as error:
            self.close()
            raise DataError(f"cannot be read: no room to unpack it ({error.strerror or error})") from None
        except Exception as error:  # zipfile and zlib, each with errors of its own
            self.close()
            raise DataError(f"not a readable .npz archive ({type(error).__name__}: {error})") from None


def npy(value: Array) -> bytes:
    """Return ``value`` as the content of a ``.npy`` file."""
    stream = io.BytesIO()
    np.save(stream, value, allow_pickle=False)
    return stream.getvalue()


def _member(archive: zipfile.ZipFile, info: zipfile.ZipInfo, stream: IO[bytes]) -> _Member:
    """Return what the headers of one array say, after a check that zip and array agree on its size."""
    what = f"its array '{info.filename}'"
    if info.flag_bits & 1:
        raise DataError(f"{what} is encrypted")
    try:
        with archive.open(info) as packed:
            version = np.lib.format.read_magic(packed)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, fortran, dtype = read(packed)
            header_bytes = packed.tell()
    except Exception as error:  # numpy raises nearly anything on a damaged header
        raise DataError(f"{what} cannot be read ({type(error).__name__}: {error})") from None
    if dtype.kind not in "fiubUS" or dtype.hasobject:
        raise DataError(f"{what} has the type {dtype}; expected numbers (or text, for labels)")
    if fortran and len(shape) > 1:
        raise DataError(f"{what} is stored by columns; save numpy.ascontiguousarray(...) of it")
    # Python's integers, because a header may promise more than 64 bits hold.
    size_bytes = dtype.itemsize
    for extent in shape:
        size_bytes *= extent
    if size_bytes + header_bytes != info.file_size or min(shape, default=0) < 0:
        raise DataError(f"{what} says that it has the shape {shape}, which is not its size of {info.file_size} bytes")
    offset = None
    if info.compress_type == zipfile.ZIP_STORED:
        stream.seek(info.header_offset)
        fields = _LOCAL_HEADER.unpack(stream.read(_LOCAL_HEADER.size))
        offset = info.header_offset + _LOCAL_HEADER.size + fields[-2] + fields[-1] + header_bytes
    return _Member(info, shape, dtype, header_bytes, offset)


def _column(archive: zipfile.ZipFile, info: zipfile.ZipInfo, stream: IO[bytes], rows: int) -> Array:
    """Return an array of one integer or word per row."""
    member = _member(archive, info, stream)
    what = f"its array '{info.filename}'"
    if info.file_size > MAX_FILE_BYTES:
        raise DataError(f"{what} has {info.file_size} bytes; labels may have {MAX_FILE_BYTES}")
    if member.shape != (rows,) and member.shape != (rows, 1):
        raise DataError(f"{what} has the shape {member.shape}; expected one entry for each of {rows} rows")
    if member.dtype.kind not in "iuUS" or member.dtype.itemsize > _MOST_LABEL_BYTES:
        raise DataError(f"{what} has the type {member.dtype}; expected integers or short text")
    try:
        with archive.open(info) as packed:
            packed.read(member.header_bytes)
            data = packed.read(rows * member.dtype.itemsize)
    except Exception as error:  # zlib, zipfile and the disk, each with errors of its own
        raise DataError(f"{what} cannot be read ({type(error).__name__}: {error})") from None
    return np.frombuffer(data, member.dtype).reshape(rows)


def _plain(value: Any) -> int | str:
    """Return one entry of a column as Python's own kind."""
    found = value.item()
    return found.decode("utf-8", "replace") if isinstance(found, bytes) else found
