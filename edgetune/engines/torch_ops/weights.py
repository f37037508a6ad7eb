"""The tensors that the graphs of a bundle hold or point to. Knows torch, onnx, and the bundle's directory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from onnx import TensorProto, numpy_helper
from torch import Tensor

from edgetune.bundle import Array
from edgetune.engines.torch_ops.base import torch_type
from edgetune.errors import BundleError


class Weights:
    """Reads initializers. External data is mapped into memory, not copied, and each stretch of it exists once.

    Only files that the manifest lists are opened: their hashes have been checked, and none lies outside the bundle.
    """

    def __init__(self, root: Path, listed: Mapping[str, str], device: torch.device, *, double: bool) -> None:
        self._root, self._listed, self._device, self._double = root, listed, device, double
        self._files: dict[str, Array] = {}
        self._known: dict[tuple[str, int, int, tuple[int, ...]], Tensor] = {}

    def read(self, tensor: TensorProto) -> Tensor:
        """Return the value of ``tensor``.

        Raises:
            BundleError: it points to a file that is not the bundle's, or beyond the end of one.
            EngineError: torch lacks its element type.
        """
        torch_type(tensor.data_type)
        if tensor.data_location != TensorProto.EXTERNAL:
            return self._placed(torch.from_numpy(np.array(numpy_helper.to_array(tensor))))
        entry = {item.key: item.value for item in tensor.external_data}
        location, offset = entry.get("location", ""), int(entry.get("offset", "0"))
        shape = tuple(int(extent) for extent in tensor.dims)
        key = (location, offset, tensor.data_type, shape)
        if key not in self._known:
            self._known[key] = self._placed(self._mapped(tensor, location, offset, shape, entry.get("length")))
        return self._known[key]

    def _placed(self, value: Tensor) -> Tensor:
        if self._double and value.dtype == torch.float32:
            value = value.double()
        return value.to(self._device)

    def _mapped(
        self, tensor: TensorProto, location: str, offset: int, shape: tuple[int, ...], length: str | None
    ) -> Tensor:
        if location not in self._listed:
            raise BundleError(
                f"the constant '{tensor.name}' lies in '{location}', which is no file of the bundle '{self._root}'; "
                "export the bundle again"
            )
        if location not in self._files:
            # copy on write: torch wants memory that it may write to, and the file must never change
            self._files[location] = np.memmap(self._root / location, np.uint8, "c")
        file = self._files[location]
        dtype = torch_type(tensor.data_type)
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        if offset < 0 or offset + size > len(file) or (length is not None and int(length) != size):
            raise BundleError(
                f"the constant '{tensor.name}' of {size} bytes at {offset} does not fit into {location} "
                f"({len(file)} bytes); copy or export the bundle again"
            )
        stretch = torch.from_numpy(file[offset : offset + size])
        if offset % dtype.itemsize:
            stretch = stretch.clone()
        return stretch.view(dtype).reshape(shape)
