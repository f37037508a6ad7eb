"""The shared maps and the first codes: drawn from a seed, or read from a file. Knows numpy and safetensors.

A row of a map has the norm 1 or nearly so: then a step of gradient descent on the codes moves W by the ordinary step,
projected on the rows, and the learning rate keeps its meaning. So a learned map begins with elements N(0, 1/s), and a
binary one is -1/√s and +1/√s; the paper's -1 and +1 differ by a factor that the codes absorb.
"""

from __future__ import annotations

import hashlib
import math
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from edgetune.adapters.settings import BINARY, LEARNED, AdapterSettings
from edgetune.adapters.slices import Slicing
from edgetune.bundle import Array
from edgetune.errors import UsageError, choices

BITS = np.array([1, 2, 4, 8, 16, 32, 64, 128], np.uint8)


def dims(shape: Iterable[int]) -> str:
    """Return ``16x16x3x3``: how settings, files and names spell a shape."""
    return "x".join(map(str, shape))


def map_name(slice_shape: Iterable[int]) -> str:
    """Return the name of the map of slices of this shape, as a tensor of a bundle or model."""
    return f"csg.{dims(slice_shape)}.map"


def draw_bits(seed: int, code: int, elements: int) -> Array:
    """Return the bits of a binary map, uint8 [n_c, ⌈s/8⌉]; bit j of byte i of a row is element j·⌈s/8⌉ + i.

    SHAKE-256 (FIPS 202) of seed and shape: the same on every machine and in every language, at any time.
    """
    width = -(-elements // 8)
    digest = hashlib.shake_256(f"edgetune csg {code}x{elements} {seed}".encode()).digest(code * width)
    return np.frombuffer(digest, np.uint8).reshape(code, width).copy()


def unpack_bits(bits: Array, elements: int) -> Array:
    """Return the map [n_c, s] of -1/√s (bit 0) and +1/√s (bit 1) that ``bits`` holds."""
    ones = (bits[:, None, :] & BITS[None, :, None]).astype(bool).reshape(len(bits), -1)[:, :elements]
    return np.where(ones, 1.0, -1.0).astype(np.float32) * np.float32(elements**-0.5)


def first_map(settings: AdapterSettings, index: int) -> Array:
    """Return the map [n_c, s] of slice ``index`` as it is before any training.

    Raises:
        UsageError: the file of a pre-trained map cannot be read, or holds none of this shape.
    """
    slice_shape, code = settings.slices[index], settings.codes[index]
    elements = math.prod(slice_shape)
    if settings.map == BINARY:
        return unpack_bits(draw_bits(settings.seed, code, elements), elements)
    if settings.map == LEARNED:
        rng = np.random.default_rng([settings.seed, *slice_shape, code])
        return (rng.standard_normal((code, elements)) / math.sqrt(elements)).astype(np.float32)
    return _read_map(Path(settings.map), slice_shape, code)


def first_codes(settings: AdapterSettings, weight: str, cut: Slicing, code: int) -> Array:
    """Return the codes [n, n_c] of the filters ``weight`` as they are before any training.

    Zeros beside a residual. Otherwise normal, such that W has the variance 2/fan-in (He et al. 2015, eq. 10) under a
    map whose rows have the norm 1.
    """
    if settings.residual:
        return np.zeros((cut.slices, code), np.float32)
    variance = 2.0 / math.prod(cut.shape[1:]) * math.prod(cut.slice) / code
    rng = np.random.default_rng([settings.seed, zlib.crc32(weight.encode())])
    return (rng.standard_normal((cut.slices, code)) * math.sqrt(variance)).astype(np.float32)


def save_maps(path: str | Path, maps: Mapping[tuple[int, ...], Array]) -> None:
    """Write maps [n_c, s], by the shape of their slices, for ``map=FILE``."""
    tensors = {dims(shape): np.ascontiguousarray(value, np.float32) for shape, value in maps.items()}
    save_file(tensors, path, {"adapter": "csg"})


def _read_map(path: Path, slice_shape: tuple[int, ...], code: int) -> Array:
    try:
        with safe_open(path, framework="numpy") as stream:
            names = set(stream.keys())
            found = stream.get_tensor(dims(slice_shape)) if dims(slice_shape) in names else None
    except (OSError, SafetensorError) as error:
        raise UsageError(
            f"adapter: map={path} is no .safetensors file that can be read ({error}); give one, or choose one of: "
            f"{choices((BINARY, LEARNED))}"
        ) from None
    expected = (code, math.prod(slice_shape))
    if found is None:
        raise UsageError(f"adapter: '{path}' holds no map of {dims(slice_shape)} slices; it holds: {choices(names)}")
    if found.shape != expected or found.dtype.kind != "f":
        raise UsageError(
            f"adapter: the map of {dims(slice_shape)} slices in '{path}' is {found.dtype} {list(found.shape)}; "
            f"expected floats {list(expected)}: [elements of a code, elements of a slice]"
        )
    return np.asarray(found, np.float32)
