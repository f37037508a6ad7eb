"""The feature cache: the trunk's outputs of samples that will be trained again, in a bounded number of bytes.

The trunk is frozen, so what it makes of a sample never changes; a sample that is found here is neither unpacked nor
run through the trunk. What was put in first stays: every pass meets all samples in another order, so nothing says which
of two comes again sooner. Knows the shapes of features; nothing of files, sessions or plans.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np

from edgetune.bundle import Array, TensorSpec
from edgetune.units import MIB

_CHUNK_BYTES = MIB


class FeatureCache:
    """Keeps features by the hash of a sample's content, in chunks of a MiB or one sample, made when they are needed.

    A chunk that is not needed any more goes back to the system as a whole, so the cache never takes more than its
    limit, and less again when that falls.
    """

    def __init__(self, features: Sequence[TensorSpec], limit_bytes: int = 0) -> None:
        self._features = tuple(features)
        sizes = [math.prod(spec.shape) * np.dtype(spec.dtype).itemsize for spec in self._features]
        self.sample_bytes = sum(sizes)
        self._per_chunk = max(1, _CHUNK_BYTES // max(1, self.sample_bytes))
        self._chunks: list[tuple[Array, ...]] = []
        self._places: dict[str, int] = {}
        self._free: list[int] = []
        self.hits = self.misses = 0
        self.limit_bytes = limit_bytes

    @property
    def bytes(self) -> int:
        """What the cache holds."""
        return len(self._chunks) * self._per_chunk * self.sample_bytes

    def __len__(self) -> int:
        return len(self._places)

    def resize(self, limit_bytes: int) -> None:
        """Take another limit; what no longer has room is forgotten."""
        self.limit_bytes = limit_bytes
        most = self._most_chunks()
        if len(self._chunks) > most:
            end = most * self._per_chunk
            del self._chunks[most:]
            self._places = {key: place for key, place in self._places.items() if place < end}
            self._free = [place for place in self._free if place < end]

    def get(self, key: str) -> tuple[Array, ...] | None:
        """Return the features of one sample, without a batch axis, to be read before the next change; None if they are
        not here."""
        place = self._places.get(key)
        if place is None:
            self.misses += 1
            return None
        self.hits += 1
        chunk, row = divmod(place, self._per_chunk)
        return tuple(values[row] for values in self._chunks[chunk])

    def put(self, key: str, features: Sequence[Array]) -> None:
        """Keep a copy of the features of one sample, without a batch axis, if there is room."""
        if key in self._places or not (self._free or self._grow()):
            return
        place = self._places[key] = self._free.pop()
        chunk, row = divmod(place, self._per_chunk)
        for values, one in zip(self._chunks[chunk], features, strict=True):
            values[row] = one

    def forget(self, keys: Iterable[str]) -> None:
        """Make room: these will not be trained again."""
        for key in keys:
            if (place := self._places.pop(key, None)) is not None:
                self._free.append(place)

    def _most_chunks(self) -> int:
        return self.limit_bytes // max(1, self._per_chunk * self.sample_bytes)

    def _grow(self) -> bool:
        if len(self._chunks) >= self._most_chunks():
            return False
        begin = len(self._chunks) * self._per_chunk
        self._chunks.append(tuple(np.empty((self._per_chunk, *f.shape), f.dtype) for f in self._features))
        self._free = list(reversed(range(begin, begin + self._per_chunk)))
        return True
