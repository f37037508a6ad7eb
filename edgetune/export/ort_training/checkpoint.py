"""The checkpoint file of onnxruntime-training: a flatbuffer of parameters and properties.

Schema: microsoft/onnxruntime, ``onnxruntime/core/flatbuffers/schema/ort_training_checkpoint.fbs`` and ``ort.fbs``, as
of release 1.19. The numbers below are the places of the fields in that schema's tables. Knows nothing of bundles.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from onnx import helper

from edgetune.bundle import Array
from edgetune.errors import ExportError, UsageError

IDENTIFIER = b"ODTC"
VERSION = 2
MOST_BYTES = 2**31 - 1  # a flatbuffer addresses by signed 32-bit offsets
_SLACK_BYTES = 1024  # per tensor: its name, shape and tables
_ALIGNMENT = 8


@dataclass(frozen=True)
class Checkpoint:
    """What the file holds. There is no optimizer state: without one the training API starts from zeros.

    Attributes:
        trained: parameters with a gradient, by name.
        frozen: parameters without one.
        properties: what the training API shows as ``CheckpointState.properties``.
    """

    trained: Mapping[str, Array]
    frozen: Mapping[str, Array]
    properties: Mapping[str, int | float | str] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """Return the file's contents.

        Raises:
            ExportError: more than the format's 2 GiB.
            UsageError: the package ``flatbuffers`` is not installed.
        """
        tensors = [*self.trained.values(), *self.frozen.values()]
        size = sum(t.nbytes + _SLACK_BYTES for t in tensors)
        if size > MOST_BYTES:
            raise ExportError(
                f"the checkpoint would take {size} bytes; onnxruntime-training's format ends at {MOST_BYTES}: train "
                "fewer layers (--last)"
            )
        try:
            import flatbuffers
        except ImportError:
            raise UsageError("the target ort-training needs the package 'flatbuffers'; install it with pip") from None
        # its final size at once: growing would copy everything that is there
        writer = _Writer(flatbuffers.Builder(size + _SLACK_BYTES))
        trained = writer.vector([writer.tensor(name, value) for name, value in self.trained.items()])
        frozen = writer.vector([writer.tensor(name, value) for name, value in self.frozen.items()])
        module = writer.table(4, {0: trained, 1: frozen})
        bags = [
            writer.vector([writer.property(name, v) for name, v in self.properties.items() if isinstance(v, kind)])
            for kind in (int, float, str)
        ]
        root = writer.table(4, {1: module, 3: writer.table(3, dict(enumerate(bags)))}, {0: VERSION})
        return writer.finish(root)


class _Writer:
    """Writes tables, strings and vectors; each method returns the offset of what it wrote."""

    def __init__(self, builder: Any) -> None:
        self._builder = builder

    def text(self, value: str) -> int:
        return int(self._builder.CreateString(value))

    def vector(self, offsets: Sequence[int]) -> int:
        self._builder.StartVector(4, len(offsets), 4)
        for offset in reversed(offsets):
            self._builder.PrependUOffsetTRelative(offset)
        return int(self._builder.EndVector())

    def table(self, fields: int, offsets: Mapping[int, int], numbers: Mapping[int, int] | None = None) -> int:
        """Write a table of ``fields`` fields: offsets and int32 numbers, keyed by the field's place in the schema."""
        self._builder.StartObject(fields)
        for slot, offset in offsets.items():
            self._builder.PrependUOffsetTRelativeSlot(slot, offset, 0)
        for slot, number in (numbers or {}).items():
            self._builder.PrependInt32Slot(slot, number, 0)
        return int(self._builder.EndObject())

    def property(self, name: str, value: int | float | str) -> int:
        """Write IntProperty (an int64), FloatProperty (a float32) or StringProperty: name 0, value 1."""
        title = self.text(name)
        if isinstance(value, str):
            return self.table(2, {0: title, 1: self.text(value)})
        self._builder.StartObject(2)
        self._builder.PrependUOffsetTRelativeSlot(0, title, 0)
        if isinstance(value, int):
            self._builder.PrependInt64Slot(1, value, 0)
        else:
            self._builder.PrependFloat32Slot(1, value, 0.0)
        return int(self._builder.EndObject())

    def tensor(self, name: str, value: Array) -> int:
        """Write ``ort.fbs``' Tensor: name 0, dims 2, data_type 3, raw_data 4."""
        title = self.text(name)
        self._builder.StartVector(8, value.ndim, 8)
        for extent in reversed(value.shape):
            self._builder.PrependInt64(extent)
        dims = int(self._builder.EndVector())
        raw = np.ascontiguousarray(value).tobytes()
        self._builder.Prep(_ALIGNMENT, len(raw))  # a vector of bytes would start anywhere
        data = int(self._builder.CreateByteVector(raw))
        # ort.fbs numbers element types as ONNX does
        kind = int(helper.np_dtype_to_tensor_dtype(value.dtype))
        return self.table(7, {0: title, 2: dims, 4: data}, {3: kind})

    def finish(self, root: int) -> bytes:
        self._builder.Finish(root, file_identifier=IDENTIFIER)
        return bytes(self._builder.Output())
