"""Where the bytes of tensors lie in a safetensors file, for who cannot afford to have them in memory. Knows files."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgetune.bundle.files import Array
from edgetune.errors import BundleError

_PIECE_BYTES = 1 << 20
_MOST_HEADER_BYTES = 1 << 27
_NUMPY = {
    "F64": "float64", "F32": "float32", "F16": "float16", "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip


@dataclass(frozen=True)
class Place:
    """One tensor of a file: ``length`` bytes from ``offset`` on, little-endian, the last axis the fastest."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    length: int

    def read(self) -> Array:
        """Return the tensor.

        Raises:
            BundleError: the file ends too early.
        """
        values: Array = np.fromfile(self.path, self.dtype, math.prod(self.shape), offset=self.offset)
        if values.nbytes != self.length:
            raise BundleError(f"{self.path} ends too early; restore it from a copy")
        return values.reshape(self.shape)

    def pieces(self) -> Iterator[bytes]:
        """Yield the bytes, a MiB at most at a time.

        Raises:
            BundleError: the file ends too early.
        """
        with self.path.open("rb") as stream:
            stream.seek(self.offset)
            left = self.length
            while left:
                piece = stream.read(min(left, _PIECE_BYTES))
                if not piece:
                    raise BundleError(f"{self.path} ends too early; restore it from a copy")
                left -= len(piece)
                yield piece


def places_in(path: Path) -> dict[str, Place]:
    """Return where every tensor of the safetensors file ``path`` lies, by name.

    Raises:
        BundleError: it is no such file.
    """
    try:
        with path.open("rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            if size > _MOST_HEADER_BYTES:
                raise ValueError(f"a header of {size} bytes")
            header = json.loads(stream.read(size))
        found = {}
        for name, entry in header.items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                shape = tuple(int(extent) for extent in entry["shape"])
                dtype = _NUMPY[entry["dtype"]]
                if end - begin != math.prod(shape) * np.dtype(dtype).itemsize:
                    raise ValueError(f"'{name}' has {end - begin} bytes")
                found[name] = Place(path, dtype, shape, 8 + size + begin, end - begin)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BundleError(f"{path} is not a readable file of tensors ({error})") from None
    return found
