"""From the bytes of one file to one sample, exactly as the manifest says.

Knows Pillow; nothing of folders or ledgers.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from edgetune.bundle import Array, Manifest, PreprocessSpec
from edgetune.errors import BundleError, DataError, choices

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"})
ARRAY_SUFFIXES = frozenset({".npy"})
_CHANNELS = {"L": 1, "RGB": 3}
_NPY = b"\x93NUMPY"


class Decoder:
    """Turns files into samples of shape ``manifest.inputs[0].shape``, float32.

    Images are converted to the manifest's colour, resized bilinearly to (H, W), scaled to [0, 1] and normalised per
    channel, in this order. A ``.npy`` array may stand for an image: uint8 of [h, w] or [h, w, 1, 3 or 4] (or of the
    exact shape) holds its pixels; floating point of the exact shape is taken as it is. For inputs that are no images
    (colour ``none``) a file is a ``.npy`` array of the exact shape, normalised if the manifest says how.

    Raises:
        BundleError: the manifest asks for something that a folder of files cannot give.
    """

    def __init__(self, manifest: Manifest) -> None:
        if len(manifest.inputs) != 1:
            raise BundleError(f"a folder gives one input per sample; this bundle has {len(manifest.inputs)}")
        if not manifest.classifies:
            raise BundleError(
                f"a folder gives one label per sample; this bundle's targets have the shape "
                f"{list(manifest.targets.shape)} and its loss is {manifest.loss.kind}; train it through "
                "edgetune.TrainingSession"
            )
        self._begin(manifest.inputs[0].shape, manifest.preprocess)

    @classmethod
    def of(cls, shape: tuple[int, ...], preprocess: PreprocessSpec) -> Decoder:
        """Return a decoder for samples of ``shape``, where there is a model but no manifest.

        Raises:
            BundleError: as the constructor.
        """
        made = cls.__new__(cls)
        made._begin(shape, preprocess)
        return made

    def _begin(self, shape: tuple[int, ...], preprocess: PreprocessSpec) -> None:
        self.shape = shape
        self.color = preprocess.color
        if self.color == "none":
            self.suffixes = ARRAY_SUFFIXES
        elif self.color in _CHANNELS:
            self.suffixes = IMAGE_SUFFIXES
            if len(self.shape) != 3 or self.shape[0] != _CHANNELS[self.color]:
                raise BundleError(
                    f"the bundle's input is {self.shape}, its colour {self.color}: expected "
                    f"({_CHANNELS[self.color]}, height, width); export it again with a fitting --input"
                )
        else:
            raise BundleError(
                f"the bundle's colour '{self.color}' is unknown; known are: {choices([*_CHANNELS, 'none'])}"
            )
        spread = (-1,) + (1,) * (len(self.shape) - 1)
        self._mean = np.asarray(preprocess.mean, np.float32).reshape(spread)
        self._std = np.asarray(preprocess.std, np.float32).reshape(spread)

    def decode(self, data: bytes, change: Callable[[Array], Array] | None = None) -> Array:
        """Return the sample that the file content ``data`` holds.

        Args:
            change: applied to the pixels of an image, [channels, height, width] in [0, 1], before they are normalised;
                never to what is taken as it is.

        Raises:
            DataError: not an image (or array), damaged, too large, or of the wrong shape; the message says which.
        """
        if self.color == "none":
            return self._normalised(self._array(data, self._as_it_is))
        if not data.startswith(_NPY):
            small = self._image(data)
        else:
            value = self._array(data, self._pixels_or_as_it_is)
            if value.dtype.kind == "f":
                return np.ascontiguousarray(value, np.float32)
            small = self._resized(Image.fromarray(value))
        pixels = np.asarray(small, dtype=np.float32) / np.float32(255)
        pixels = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
        return self._normalised(pixels if change is None else change(pixels))

    def _normalised(self, value: Array) -> Array:
        if self._mean.size:
            value = (value - self._mean) / self._std
        return np.ascontiguousarray(value, dtype=np.float32)

    def _resized(self, image: Image.Image) -> Image.Image:
        height, width = self.shape[1:]
        return image.convert(self.color).resize((width, height), Image.Resampling.BILINEAR)

    def _image(self, data: bytes) -> Image.Image:
        limit = Image.MAX_IMAGE_PIXELS
        try:
            with warnings.catch_warnings():
                # Pillow only warns between one and two times its limit; here the limit is one.
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                with Image.open(io.BytesIO(data)) as image:
                    if limit is not None and image.width * image.height > limit:
                        raise DataError(f"{image.width} x {image.height} pixels are more than the limit of {limit}")
                    return self._resized(image)
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise DataError(f"refused, it would unpack to too many pixels ({error})") from None
        except (DataError, MemoryError):
            raise
        except Exception as error:  # Pillow's plugins raise nearly anything on damaged input
            raise DataError(f"not a readable image ({type(error).__name__}: {error})") from None

    def _as_it_is(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        if dtype.kind not in "fiub":
            raise DataError(f"its type is {dtype}; expected numbers")
        if shape != self.shape:
            raise DataError(f"its shape is {shape}; expected {self.shape}")

    def _pixels_or_as_it_is(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        if dtype.kind == "f":
            return self._as_it_is(shape, dtype)
        if dtype != np.uint8:
            raise DataError(
                f"its type is {dtype}; expected uint8 (pixels), or floating point for {self.shape} as it is"
            )
        if shape != self.shape and not _is_picture(shape):
            raise DataError(f"its shape is {shape}; expected pixels, (height, width) or (height, width, 1, 3 or 4)")

    def _array(self, data: bytes, check: Callable[[tuple[int, ...], np.dtype[Any]], None]) -> Array:
        """Return the array that the ``.npy`` file ``data`` holds, its pixels as [h, w] or [h, w, c], once ``check`` has
        let its shape and type pass."""
        if not data.startswith(_NPY):
            raise DataError("not a .npy array")
        try:
            stream = io.BytesIO(data)
            version = np.lib.format.read_magic(stream)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, dtype = read(stream)
        except Exception as error:  # numpy raises nearly anything on a damaged header
            raise DataError(f"not a readable .npy array ({type(error).__name__}: {error})") from None
        check(shape, dtype)
        # Before any memory is taken for it: a header may promise anything.
        if math.prod(shape) * dtype.itemsize != len(data) - stream.tell():
            raise DataError(f"not a readable .npy array: {shape} of {dtype} is not what its {len(data)} bytes hold")
        try:
            value: Array = np.load(io.BytesIO(data), allow_pickle=False)
        except MemoryError:
            raise
        except Exception as error:  # numpy raises nearly anything on damaged data
            raise DataError(f"not a readable .npy array ({type(error).__name__}: {error})") from None
        if value.dtype.kind == "f" and not np.all(np.isfinite(value)):
            raise DataError("it holds numbers that are not finite")
        if self.color != "none" and value.dtype.kind != "f":
            value = value if _is_picture(shape) else value.transpose(1, 2, 0)
            return np.ascontiguousarray(value[..., 0] if value.ndim == 3 and value.shape[2] == 1 else value)
        return value


def _is_picture(shape: tuple[int, ...]) -> bool:
    return min(shape, default=0) > 0 and (len(shape) == 2 or (len(shape) == 3 and shape[2] in (1, 3, 4)))
