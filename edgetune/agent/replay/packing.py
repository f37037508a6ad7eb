"""A sample's features as the bytes of a file, and back: float16, or int8 with a scale per channel; with a checksum.

The file is the SHA-256 of the rest, then each tensor in turn. ``int8`` rounds to the nearest of 255 values, symmetric
to zero: x ≈ s·q with s = max|x| / 127 over a channel (the first axis; all of a tensor that has but one), so the error
is at most s / 2. Numbers that are no floats are kept as they are. Knows numpy; nothing of files.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import numpy as np

from edgetune.bundle import Array, TensorSpec
from edgetune.errors import DataError

_DIGEST_BYTES = 32
_MOST_HALF = 65504.0  # the largest float16; beyond lies infinity


def packed_bytes(specs: Sequence[TensorSpec], precision: str) -> int:
    """Return the size of the file of one sample."""
    return _DIGEST_BYTES + sum(_tensor_bytes(spec, precision) for spec in specs)


def pack(features: Sequence[Array], precision: str) -> bytes:
    """Return the features of one sample (no batch axis) as the content of a file."""
    parts = []
    for value in features:
        if not np.issubdtype(value.dtype, np.floating):
            parts.append(np.ascontiguousarray(value).tobytes())
        elif precision == "float16":
            parts.append(np.clip(value, -_MOST_HALF, _MOST_HALF).astype("<f2").tobytes())
        else:
            rows = np.asarray(value, np.float32).reshape(_channels(value.shape), -1)
            scale = np.abs(rows).max(axis=1, keepdims=True) / np.float32(127)
            steps = np.divide(rows, scale, out=np.zeros_like(rows), where=scale > 0)
            parts += [scale.astype("<f4").tobytes(), np.rint(steps).astype(np.int8).tobytes()]
    content = b"".join(parts)
    return hashlib.sha256(content).digest() + content


def unpack(data: bytes, specs: Sequence[TensorSpec], precision: str) -> tuple[Array, ...]:
    """Return what :func:`pack` was given, as far as the precision kept it.

    Raises:
        DataError: the content is not what its checksum promises, or not of these shapes.
    """
    if len(data) != packed_bytes(specs, precision):
        raise DataError(f"it has {len(data)} bytes; expected {packed_bytes(specs, precision)}")
    if hashlib.sha256(memoryview(data)[_DIGEST_BYTES:]).digest() != data[:_DIGEST_BYTES]:
        raise DataError("its content is not what its checksum promises")
    found, begin = [], _DIGEST_BYTES
    for spec in specs:
        piece = memoryview(data)[begin : begin + _tensor_bytes(spec, precision)]
        begin += len(piece)
        if not np.issubdtype(np.dtype(spec.dtype), np.floating):
            value = np.frombuffer(piece, spec.dtype)
        elif precision == "float16":
            value = np.frombuffer(piece, "<f2").astype(spec.dtype)
        else:
            channels = _channels(spec.shape)
            scale = np.frombuffer(piece[: 4 * channels], "<f4").reshape(channels, 1)
            steps = np.frombuffer(piece[4 * channels :], np.int8).reshape(channels, -1)
            value = (steps * scale).astype(spec.dtype)
        found.append(value.reshape(spec.shape))
    return tuple(found)


def _channels(shape: Sequence[int]) -> int:
    return shape[0] if len(shape) > 1 else 1


def _tensor_bytes(spec: TensorSpec, precision: str) -> int:
    count = math.prod(spec.shape)
    if not np.issubdtype(np.dtype(spec.dtype), np.floating):
        return count * np.dtype(spec.dtype).itemsize
    return 2 * count if precision == "float16" else count + 4 * _channels(spec.shape)
