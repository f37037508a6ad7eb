"""What a manifest says of a model's parts: saved tensors and their codecs, layers, parameters, loss, adapter.

Knows numbers and names; nothing of files or graphs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from edgetune.errors import UsageError, choices

TRACED = "traced"
"""Kind of a loss that the user gave with the model."""


@dataclass(frozen=True)
class ModeSpec:
    """One choice that a codec leaves to the run: the rank of a mode, or how many elements are kept.

    Attributes:
        letter: ``b`` | ``c`` | ``z`` | ``h`` | ``w`` (the legend of DESIGN.md), ``k`` for a count, ``u`` for noise.
        size: extent of the mode (per group for ``c``); None for the batch. Of a count: the elements of one sample.
        groups: number of independent factors (the groups of a convolution); 1 otherwise.
        rank: symbol of its rank or count, such as ``rank.layer4.1.conv1.c``; empty for noise.
        input: the graph input that brings it.
        source: where that is from, and its shape: ``basis`` | ``sketch`` | ``carried`` | ``count`` | ``noise``, as in
            ``codecs.base.Source``.
        spectrum: the key under which calibration files what it learns of the mode; empty for noise.
    """

    letter: str
    size: int | None
    groups: int
    rank: str
    input: str
    source: str = "basis"
    spectrum: str = ""


@dataclass(frozen=True)
class OptionSpec:
    """One codec that may keep a saved tensor. ``stored`` are tensors of the train graph; ``label`` is the codec's
    shortest spelling."""

    label: str
    codec: str
    config: Mapping[str, Any]
    lossy: bool
    modes: tuple[ModeSpec, ...] = ()
    stored: tuple[str, ...] = ()


@dataclass(frozen=True)
class SavedSpec:
    """One tensor that the forward pass keeps through a codec, and the codecs from which a plan chooses.

    ``name`` is that of the first layer that reads it (of the tensor itself where it is kept for its value, not for
    weight gradients); ``shape`` excludes the batch; its channels are the first axis, or the last for a linear layer
    (``channels_last``). ``energy`` is the graph output with its captured energy (None where no option loses anything).
    """

    name: str
    layers: tuple[str, ...]
    options: tuple[OptionSpec, ...]
    shape: tuple[int, ...]
    groups: int = 1
    energy: str | None = None
    channels_last: bool = False

    @property
    def modes(self) -> tuple[ModeSpec, ...]:
        """The modes of all options, each graph input once."""
        return tuple({mode.input: mode for option in self.options for mode in option.modes}.values())

    @property
    def lossy(self) -> bool:
        """Whether some option loses something."""
        return any(option.lossy for option in self.options)

    def option(self, label: str) -> OptionSpec:
        """Return the option ``label``.

        Raises:
            UsageError: there is none; the message lists those that there are.
        """
        for option in self.options:
            if option.label == label:
                return option
        known = choices(option.label for option in self.options)
        raise UsageError(f"'{self.name}' cannot be kept as '{label}' in this bundle; choose one of: {known}")


@dataclass(frozen=True)
class LayerSpec:
    """One trained layer. ``input_shape`` excludes the batch; ``role`` is ``tail`` or ``head``; ``saved`` names the
    :class:`SavedSpec` that holds its input. ``weight`` is the trained tensor: the codes where an adapter computes the
    weight from them."""

    name: str
    op: str
    role: str
    input_shape: tuple[int, ...]
    weight: str
    bias: str | None
    saved: str

    def dense_bytes(self, batch: int) -> int:
        """Return the float32 bytes of this layer's input for ``batch`` samples: what the papers count."""
        return 4 * batch * int(np.prod(self.input_shape))


@dataclass(frozen=True)
class ParameterSpec:
    """One trained tensor, under the model's own name."""

    name: str
    shape: tuple[int, ...]
    layer: str
    role: str


@dataclass(frozen=True)
class TensorSpec:
    """A graph input or output that engines exchange with their callers. ``shape`` excludes the batch."""

    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"


@dataclass(frozen=True)
class PreprocessSpec:
    """How a decoded image becomes one sample: resized to the input size, scaled to [0, 1], then (v - mean) / std.

    ``color`` is ``L`` or ``RGB`` (or ``none`` where the input is not an image); ``mean`` and ``std`` hold one value
    per channel.
    """

    color: str
    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True)
class LossSpec:
    """``kind`` is a loss that the exporter knows, or ``traced``: one that the user gave with the model. ``config`` are
    its settings (label smoothing, class weights, ...), as far as they differ from their defaults.

    ``pieces`` says how the losses (and gradients) of the pieces of a batch make that of the whole: their ``mean``,
    each weighed by what counted in it, or their ``sum``; empty where the step cannot be made in pieces.
    """

    kind: str = "cross_entropy"
    config: Mapping[str, Any] = field(default_factory=dict)
    pieces: str = ""


@dataclass(frozen=True)
class OptimizerSpec:
    """``kind`` is ``sgd`` or ``adamw``; ``slots`` are the state tensors kept per parameter; ``scalars`` the inputs of
    update.onnx that hold the hyper-parameters, with their default values."""

    kind: str
    slots: tuple[str, ...]
    scalars: Mapping[str, float]


@dataclass(frozen=True)
class AdapterMapSpec:
    """One shared linear map [code, elements of a slice] that generates slices of the shape ``slice``.

    A ``trained`` map is a parameter called ``name``. A fixed one is the tensor ``name`` in the file of weights or,
    where ``bits`` is given, the binary map that the tensor ``bits`` holds packed (it follows from the adapter's seed).
    """

    name: str
    slice: tuple[int, ...]
    code: int
    trained: bool
    bits: str | None = None


@dataclass(frozen=True)
class AdaptedWeightSpec:
    """A weight that is computed from trained ``codes`` [slices, code] and the map called ``map``. ``weight`` is the
    model's own name, under which the file of weights holds the fixed part W₀ of a residual."""

    weight: str
    shape: tuple[int, ...]
    codes: str
    map: str


@dataclass(frozen=True)
class AdapterSpec:
    """How weights of the tail are computed from fewer trained numbers: W₀ + csg(codes) if ``residual``, or csg(codes).

    ``settings`` is the spelling that ``edgetune export --adapter`` takes, every setting written out.
    """

    settings: str
    residual: bool
    maps: tuple[AdapterMapSpec, ...]
    weights: tuple[AdaptedWeightSpec, ...]

    @property
    def fixed(self) -> frozenset[str]:
        """Names of the tensors in the file of weights that the weights are made of, besides what is trained."""
        maps = {spec.bits or spec.name for spec in self.maps if not spec.trained}
        return frozenset(maps | ({spec.weight for spec in self.weights} if self.residual else set()))
