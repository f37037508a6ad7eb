"""From the bytes of one file to one sample, exactly as the manifest says.

Knows Pillow; nothing of folders or ledgers.
"""

from __future__ import annotations

import io
import warnings

import numpy as np
from PIL import Image

from edgetune.bundle import Array, Manifest
from edgetune.errors import BundleError, DataError, choices

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"})
ARRAY_SUFFIXES = frozenset({".npy"})
_CHANNELS = {"L": 1, "RGB": 3}
_NPY = b"\x93NUMPY"


class Decoder:
    """Turns files into samples of shape ``manifest.inputs[0].shape``, float32.

    Images are converted to the manifest's colour, resized bilinearly to (H, W), scaled to [0, 1] and normalised per
    channel, in this order. For inputs that are no images (colour ``none``) a file is a ``.npy`` array of the exact
    shape, normalised if the manifest says how.

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
        self.shape = manifest.inputs[0].shape
        self.color = manifest.preprocess.color
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
        self._mean = np.asarray(manifest.preprocess.mean, np.float32).reshape(spread)
        self._std = np.asarray(manifest.preprocess.std, np.float32).reshape(spread)

    def decode(self, data: bytes) -> Array:
        """Return the sample that the file content ``data`` holds.

        Raises:
            DataError: not an image (or array), damaged, too large, or of the wrong shape; the message says which.
        """
        value = self._array(data) if self.color == "none" else self._image(data)
        if self._mean.size:
            value = (value - self._mean) / self._std
        return np.ascontiguousarray(value, dtype=np.float32)

    def _image(self, data: bytes) -> Array:
        height, width = self.shape[1:]
        limit = Image.MAX_IMAGE_PIXELS
        try:
            with warnings.catch_warnings():
                # Pillow only warns between one and two times its limit; here the limit is one.
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                with Image.open(io.BytesIO(data)) as image:
                    if limit is not None and image.width * image.height > limit:
                        raise DataError(f"{image.width} x {image.height} pixels are more than the limit of {limit}")
                    small = image.convert(self.color).resize((width, height), Image.Resampling.BILINEAR)
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise DataError(f"refused, it would unpack to too many pixels ({error})") from None
        except (DataError, MemoryError):
            raise
        except Exception as error:  # Pillow's plugins raise nearly anything on damaged input
            raise DataError(f"not a readable image ({type(error).__name__}: {error})") from None
        pixels = np.asarray(small, dtype=np.float32) / np.float32(255)
        return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)

    def _array(self, data: bytes) -> Array:
        if not data.startswith(_NPY):
            raise DataError("not a .npy array")
        try:
            stream = io.BytesIO(data)
            version = np.lib.format.read_magic(stream)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, dtype = read(stream)
        except Exception as error:  # numpy raises nearly anything on a damaged header
            raise DataError(f"not a readable .npy array ({type(error).__name__}: {error})") from None
        # Before any memory is taken for it: a header may promise anything.
        if dtype.kind not in "fiub":
            raise DataError(f"its type is {dtype}; expected numbers")
        if shape != self.shape:
            raise DataError(f"its shape is {shape}; expected {self.shape}")
        try:
            value: Array = np.load(io.BytesIO(data), allow_pickle=False)
        except MemoryError:
            raise
        except Exception as error:  # numpy raises nearly anything on damaged data
            raise DataError(f"not a readable .npy array ({type(error).__name__}: {error})") from None
        if not np.all(np.isfinite(value)):
            raise DataError("it holds numbers that are not finite")
        return value.astype(np.float32)
