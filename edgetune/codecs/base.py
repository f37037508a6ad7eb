"""What a codec is: how ONE saved activation is stored. Knows numpy; knows neither ONNX nor a runtime.

Legend of index letters, used in every formula of the project: b batch, c in-channel, o out-channel, h,w input position,
z depth, y,x output position, k,l kernel tap, g group, r* rank index of mode *; s stride, d dilation, p padding.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

POSITIONS = "zhw"
"""Letters of the position modes; a tensor with fewer of them has the last ones."""


class Use(enum.Enum):
    """Why a backward rule wants a tensor. It decides what may stand in for it.

    WEIGHT_GRAD: as the input of a weight gradient; a codec may lose some of it.
    SIGN: only whether each element lies strictly inside an open interval; one bit each.
    VALUE: every element exactly.
    """

    WEIGHT_GRAD = "weight_grad"
    SIGN = "sign"
    VALUE = "value"


class Emitter(Protocol):
    """What emits ONNX nodes, as far as a codec may know: names in, names out."""

    def op(self, op_type: str, *inputs: str, hint: str = "", outputs: int = 1, **attributes: Any) -> Any:
        """Append a standard operator; return its output name, or a tuple of names if ``outputs`` > 1."""

    def const(self, value: Array | Sequence[int] | float, hint: str = "") -> str:
        """Return the name of a constant."""

    def scan(
        self,
        body: Callable[[Emitter, Sequence[str], Sequence[str]], Sequence[str]],
        states: Sequence[tuple[str, int]],
        scanned: Sequence[tuple[str, int]],
        hint: str = "",
    ) -> tuple[str, ...]:
        """Append a Scan over axis 0 of ``scanned``; ``body`` maps (states, rows) to new states. Names come with the
        number of axes that the body sees."""


@dataclass(frozen=True)
class Saved:
    """A tensor to be saved: ``shape`` without the batch; ``groups`` of the layer that reads it.

    Inputs of convolutions have the channels first, [c, w], [c, h, w] or [c, z, h, w]; those of linear layers last,
    [c], [w, c], [h, w, c] or [z, h, w, c].
    """

    name: str
    shape: tuple[int, ...]
    groups: int = 1
    channels_last: bool = False

    @property
    def channels(self) -> int:
        """The extent of the channel axis, over all groups."""
        return self.shape[-1] if self.channels_last else self.shape[0]

    @property
    def positions(self) -> tuple[int, ...]:
        """The extents of the position axes, at most three."""
        return self.shape[:-1] if self.channels_last else self.shape[1:]

    @property
    def rows(self) -> bool:
        """Whether the channels are the last axis: a linear layer's input, or one without positions."""
        return self.channels_last or len(self.shape) == 1

    def extents(self) -> dict[str, int]:
        """Return the extent of every mode but the batch, by letter, in the order of the axes; ``c`` per group.

        Raises:
            ValueError: there are more position axes than letters.
        """
        if len(self.positions) > len(POSITIONS):
            raise ValueError(f"'{self.name}' of shape {self.shape} has more position axes than {len(POSITIONS)}")
        positions = dict(zip(POSITIONS[len(POSITIONS) - len(self.positions) :], self.positions, strict=True))
        channels = {"c": self.channels // self.groups}
        return {**positions, **channels} if self.channels_last else {**channels, **positions}


@dataclass(frozen=True)
class Encoded:
    """Names of what an emitted encoder stores, of the run-time bases by mode letter, and of its captured energy."""

    stored: tuple[str, ...]
    bases: Mapping[str, str]
    energy: str | None


class Codec(Protocol):
    """Laws, tested for every codec by one shared suite:

    1. ``decode(encode(x))`` has the shape of ``x``, and equals it when every rank is full (lossless codecs: always).
    2. ``captured_energy`` equals ‖decode(encode(x))‖² / ‖x‖².
    3. the emitted encoder and decoder compute what ``encode`` and ``decode`` do.
    """

    name: str
    lossy: bool

    def letters(self, saved: Saved) -> tuple[str, ...]:
        """Return the modes that get a rank at run time: b, then the others in the order of the tensor's axes."""

    def encode(self, x: Array, saved: Saved, bases: Mapping[str, Array]) -> dict[str, Array]:
        """Return what is stored for ``x`` [b, *saved.shape]; ``bases`` hold [g, n, r] per letter, the sketch [b, r]
        for ``b``."""

    def decode(self, stored: Mapping[str, Array], saved: Saved, bases: Mapping[str, Array]) -> Array:
        """Return the tensor [b, *saved.shape] that ``stored`` stands for."""

    def emit_encode(self, g: Emitter, x: str, saved: Saved, bases: Mapping[str, str]) -> Encoded:
        """Emit ``encode``."""

    def emit_decode(self, g: Emitter, encoded: Encoded, saved: Saved) -> str:
        """Emit ``decode``: the slow default for rules that have no arithmetic in the factors."""


def captured_energy(x: Array, decoded: Array) -> float:
    """Return ‖decoded‖² / ‖x‖²; 1 for a tensor of zeros."""
    total = float(np.sum(np.square(x, dtype=np.float64)))
    return 1.0 if total == 0.0 else float(np.sum(np.square(decoded, dtype=np.float64))) / total
