"""What a codec is: how ONE saved activation is stored. Knows numpy; knows neither ONNX nor a runtime.

Legend of index letters, used in every formula of the project: b batch, c in-channel, o out-channel, h,w input position,
z depth, y,x output position, k,l kernel tap, g group, r* rank index of mode *; s stride, d dilation, p padding.
"""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

import numpy as np

from edgetune.errors import DataError

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


class Source(str, enum.Enum):
    """Where the run-time input of a mode comes from, and its shape for a rank r.

    BASIS: [groups, size, r], columns of what calibration found; resident, read by encoder and decoder alike.
    SKETCH: [size, r], standard normal, drawn anew for every step.
    CARRIED: [size, r], the factor that the step before found (at first a sketch); the encoder returns the next one.
    COUNT: int64 [1], the number of elements that are kept of one sample.
    NOISE: [size], uniform in [0, 1), drawn anew for every step.
    """

    BASIS = "basis"
    SKETCH = "sketch"
    CARRIED = "carried"
    COUNT = "count"
    NOISE = "noise"


@dataclass(frozen=True)
class Mode:
    """One choice that a codec leaves to the run: a rank or a count, and the graph input that brings it.

    Attributes:
        letter: ``b``, ``c``, ``z``, ``h``, ``w`` for the rank of that mode; ``k`` for a count; ``u`` for noise.
        size: the extent of the mode, which is its full rank (of c: per group); None for the batch. Of a count: the
            number of elements of one sample. Of noise: its length.
        spectrum: under which key calibration files what it learns of this mode: codecs that share a key share it.
    """

    letter: str
    source: Source
    size: int | None
    groups: int = 1
    spectrum: str = ""

    @property
    def ranked(self) -> bool:
        """Whether a number (rank or count) is to be chosen for this mode."""
        return self.source is not Source.NOISE


Extent: TypeAlias = "int | str"


FACTOR = "factor"
"""How the name of a stored tensor begins that is an orthonormal factor."""


@dataclass(frozen=True)
class StoredTensor:
    """One tensor that an encoder stores. Of an extent that is a product, the factors are joined by ``*``: integers,
    ``batch``, and the letters of modes, which stand for their ranks or counts."""

    name: str
    shape: tuple[Extent, ...]
    dtype: str = "float32"

    def elements(self, symbols: Mapping[str, int]) -> int:
        """Return the number of elements, where ``symbols`` hold ``batch`` and the rank or count per letter."""
        factors = [factor for extent in self.shape for factor in str(extent).split("*")]
        return math.prod(int(factor) if factor.isdigit() else symbols[factor] for factor in factors)

    def bytes(self, symbols: Mapping[str, int]) -> int:
        """Return the bytes; see :meth:`elements`."""
        return self.elements(symbols) * np.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class Encoded:
    """Names of what an emitted encoder stores, in the order of ``Codec.stored``.

    ``bases`` are the resident run-time inputs that the decoder reads too, by mode letter; ``energy`` is the captured
    energy (None: lossless); ``carried`` are the factors for the next step, by mode letter.
    """

    stored: tuple[str, ...]
    bases: Mapping[str, str]
    energy: str | None
    carried: Mapping[str, str] = field(default_factory=dict)


class Codec(Protocol):
    """A frozen dataclass whose fields are its settings. Laws, which ``edgetune.testing`` holds every codec to:

    1. ``decode(encode(x))`` has the shape of ``x``, and equals it when every rank is full (lossless codecs: always).
    2. the emitted energy is :func:`captured_energy` of the decoded tensor, or a lower bound of it where the codec pads.
    3. the emitted encoder and decoder compute what ``encode`` and ``decode`` do.
    4. the arrays that ``encode`` returns are those that ``stored`` tells, to the byte.
    5. the same input and the same run-time inputs give the same result, bit for bit.
    6. ``encode`` refuses what is not finite; the emitted energy is then not finite either. It refuses an empty batch.

    Three class attributes may be there as well: ``energy_is_bound = True`` where law 2 gives a lower bound only,
    ``exact = False`` where even full ranks lose more than rounding does (one that quantises what it kept), and
    ``rounding``, by which part a stored number may be off, where it is more than a float16 may.
    """

    name: str
    lossy: bool

    def applies(self, saved: Saved) -> bool:
        """Tell whether this codec can do anything with ``saved``; where not, the tensor is stored dense."""

    def modes(self, saved: Saved) -> tuple[Mode, ...]:
        """Return what is decided at run time; ranks: b, then the others in the order of the tensor's axes."""

    def stored(self, saved: Saved) -> tuple[StoredTensor, ...]:
        """Return what is stored: all that a planner needs to know."""

    def encode(self, x: Array, saved: Saved, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Return what is stored for ``x`` [b, *saved.shape], by the names of ``stored``.

        ``inputs`` holds the run-time input per mode letter (:class:`Source`).

        Raises:
            DataError: ``x`` is not finite, or holds no sample.
        """

    def decode(self, stored: Mapping[str, Array], saved: Saved, inputs: Mapping[str, Array]) -> Array:
        """Return the tensor [b, *saved.shape] that ``stored`` stands for."""

    def emit_encode(self, g: Emitter, x: str, saved: Saved, inputs: Mapping[str, str]) -> Encoded:
        """Emit ``encode``; ``inputs`` are names by mode letter."""

    def emit_decode(self, g: Emitter, encoded: Encoded, saved: Saved) -> str:
        """Emit ``decode``: the slow default for rules that have no arithmetic in the factors."""


def config_of(codec: Any) -> dict[str, Any]:
    """Return the settings of a codec as plain JSON values: the fields of its dataclass.

    A codec that changes how another one stores holds it in its field ``inner``; the settings of both count as its own.
    """
    own = {field.name: getattr(codec, field.name) for field in dataclasses.fields(codec)}
    inner = own.pop("inner", None)
    return own if inner is None else {**config_of(inner), **own}


def check_finite(x: Array, saved: Saved) -> None:
    """Raise DataError unless ``x`` has samples and every element of it is finite."""
    if not len(x):
        raise DataError(f"the batch of the activation '{saved.name}' is empty; give it one sample or more")
    if not np.isfinite(x).all():
        raise DataError(f"the activation '{saved.name}' is not finite; look for NaN or infinity in the data")


def captured_energy(x: Array, decoded: Array) -> float:
    """Return 1 - ‖x - decoded‖² / ‖x‖²; 1 for a tensor of zeros that is decoded as such.

    For an orthogonal projection this is ‖decoded‖² / ‖x‖². It is negative where nothing would be better than this.
    """
    total = float(np.sum(np.square(x, dtype=np.float64)))
    lost = float(np.sum(np.square(x.astype(np.float64) - decoded)))
    return (1.0 if lost == 0.0 else -math.inf) if total == 0.0 else 1.0 - lost / total
