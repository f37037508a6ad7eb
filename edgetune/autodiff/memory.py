"""What is to be kept of every tensor, resolved from all that the rules want before anything is emitted.

Knows the rules' wants and the codecs; emits nothing.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from edgetune.autodiff.graph import ForwardGraph, Node
from edgetune.autodiff.rule import Want
from edgetune.codecs import Codec, Dense, Mode, Saved, Source, Use
from edgetune.codecs.base import POSITIONS, Encoded
from edgetune.codecs.sign import Interval

_FLOAT = 1  # onnx.TensorProto.FLOAT
LEAST_ELEMENTS = 256
"""Tensors with fewer elements per sample are kept as they are where a rule wants their values."""

SlotKey = tuple[str, int, bool]  # (tensor, groups, channels last): a convolution and a linear layer may read the same


@dataclass(frozen=True)
class TrainedLayer:
    """The name of a trained weight layer, and the codecs for its input: a plan chooses one of them."""

    name: str
    menu: tuple[Codec, ...]


@dataclass(frozen=True)
class Option:
    """One codec that may keep a slot: its modes with the graph inputs that bring them, and what was emitted."""

    codec: Codec
    inputs: tuple[tuple[Mode, str], ...] = ()
    encoded: Encoded | None = None

    @property
    def following(self) -> dict[str, str]:
        """What the emitted encoder makes for the next step, by the graph input that it is for."""
        made = self.encoded.carried if self.encoded is not None else {}
        return {name: made[mode.letter] for mode, name in self.inputs if mode.letter in made}


@dataclass(frozen=True)
class Slot:
    """One tensor that is kept through a codec, for the weight gradients of ``layers`` or for its value (no layers)."""

    tensor: str
    layers: tuple[str, ...]
    saved: Saved
    options: tuple[Option, ...]

    @property
    def only(self) -> Option:
        """The option of a slot that has one."""
        (option,) = self.options
        return option

    @property
    def inputs(self) -> dict[str, Mode]:
        """The run-time inputs of all options, each once, by the names of the graph's inputs."""
        return {name: mode for option in self.options for mode, name in option.inputs}


def input_name(saved: str, mode: Mode) -> str:
    """Return the name of the graph input that brings ``mode`` of the saved tensor ``saved``."""
    if mode.source is Source.COUNT:
        return f"{saved}.count"
    if mode.source is Source.NOISE:
        return f"{saved}.noise.{mode.size}"
    if mode.source is Source.SKETCH and mode.letter == "b":
        return f"{saved}.sketch"
    return f"{saved}.{mode.source.value}.{mode.letter}"


class Memory:
    """Collects wants, then decides: every tensor is kept once, in the cheapest form that serves all who want it.

    ``values`` is the menu for tensors whose values a rule wants; empty: those are kept exactly.
    """

    def __init__(self, graph: ForwardGraph, layers: Mapping[str, TrainedLayer], values: Sequence[Codec]) -> None:
        self.graph, self.layers, self.values = graph, layers, tuple(values)
        self.dense: set[str] = set()
        self.slots: dict[SlotKey, Slot] = {}
        self.intervals: dict[str, list[Interval]] = {}
        self._wants: list[tuple[Node, Want]] = []

    def add(self, node: Node, want: Want) -> None:
        """Note what the rule of ``node`` wants."""
        if want.tensor in self.graph.constants and want.use is not Use.WEIGHT_GRAD:
            return
        if want.use is Use.SIGN and not self._grows(want.tensor):
            want = dataclasses.replace(want, use=Use.VALUE)  # made of parameters alone
        self._wants.append((node, want))

    def resolve(self) -> None:
        """Decide. A tensor that somebody needs exactly is kept as it is, and serves every other use too."""
        readers: dict[SlotKey, list[TrainedLayer]] = {}
        loose: dict[str, tuple[Codec, ...]] = {}
        for node, want in self._wants:
            if want.use is Use.VALUE:
                menu = self._menu_for_values(want)
                if menu:
                    loose[want.tensor] = menu
                else:
                    self.dense.add(want.tensor)
            elif want.use is Use.WEIGHT_GRAD:
                # A weight that nobody listed (one inside an attention, say) is trained from its input as it is.
                layer = self.layers.get(node.name) or TrainedLayer(node.name, (Dense(),))
                readers.setdefault((want.tensor, want.groups, want.channels_last), []).append(layer)
                if all(codec.name == Dense.name for codec in layer.menu):
                    self.dense.add(want.tensor)
        for tensor, _, channels_last in readers:
            if not self._compressible(tensor, channels_last):
                self.dense.add(tensor)
        for (tensor, groups, channels_last), layers in readers.items():
            names = tuple(layer.name for layer in layers)
            saved = Saved(names[0], self._saved_shape(tensor, channels_last), groups, channels_last)
            self._add_slot((tensor, groups, channels_last), names, saved, layers[0].menu)
        served = {tensor for tensor, _, _ in self.slots}
        for tensor, menu in loose.items():
            if tensor not in served and tensor not in self.dense:
                shape = self.graph.shapes[tensor][1:]
                last = len(shape) == 2  # tokens; images and attention maps have their channels or heads first
                self._add_slot((tensor, 1, last), (), Saved(self._slot_name(tensor), shape, 1, last), menu)
        self.dense -= self.graph.constants.keys()  # these are there anyway
        for _, want in self._wants:
            if want.use is Use.SIGN and want.tensor not in self.dense:
                found = self.intervals.setdefault(want.tensor, [])
                if want.interval not in found:
                    found.append(want.interval)

    def slot_of(self, tensor: str) -> SlotKey | None:
        """Return the key of a slot that holds ``tensor``."""
        return next((key for key in self.slots if key[0] == tensor), None)

    def _add_slot(self, key: SlotKey, layers: tuple[str, ...], saved: Saved, menu: Sequence[Codec]) -> None:
        tensor = key[0]
        codecs = [codec for codec in menu if codec.applies(saved)] if tensor not in self.dense else []
        if all(codec.name == Dense.name for codec in codecs):  # or there is none
            self.dense.add(tensor)
            dense = Option(Dense(), (), Encoded((tensor,), {}, None))
            self.slots[key] = Slot(tensor, layers, saved, (dense,))
            return
        options = [Option(c, tuple((mode, input_name(saved.name, mode)) for mode in c.modes(saved))) for c in codecs]
        self.slots[key] = Slot(tensor, layers, saved, tuple(options))

    def _menu_for_values(self, want: Want) -> tuple[Codec, ...]:
        """Return the codecs that may answer a wish for a tensor's values; none where it is kept as it is."""
        menu = self.values or (self._layers_menu() if want.lossy else ())
        shape = self.graph.shapes[want.tensor]
        by_sample = len(shape) > 2 and shape[0] == 0 and all(extent > 0 for extent in shape[1:])
        if not menu or not by_sample or len(shape) - 2 > len(POSITIONS):
            return ()
        if self.graph.dtypes.get(want.tensor, _FLOAT) != _FLOAT or math.prod(shape[1:]) < LEAST_ELEMENTS:
            return ()
        return menu

    def _layers_menu(self) -> tuple[Codec, ...]:
        menus = [layer.menu for layer in self.layers.values()]
        return max(menus, key=len, default=())

    def _slot_name(self, tensor: str) -> str:
        taken = {slot.saved.name for slot in self.slots.values()}
        return f"{tensor}.value" if tensor in taken else tensor

    def _grows(self, tensor: str) -> bool:
        """Tell whether ``tensor`` has a batch axis."""
        return any(extent <= 0 for extent in self.graph.shapes[tensor])

    def _compressible(self, tensor: str, channels_last: bool) -> bool:
        """Where several images per sample pass through a convolution, their count is no mode of its input."""
        return self._grows(tensor) and (channels_last or self.graph.shapes[tensor][0] == 0)

    def _saved_shape(self, tensor: str, channels_last: bool) -> tuple[int, ...]:
        """Return what a slot of ``tensor`` says of one sample; of a linear layer's input [*positions, c].

        The order of the rows of a linear layer's input is free: its weight gradient is a sum over them. So where the
        batch does not lead, the rows are counted off in equal shares, and more than three axes of positions are
        joined to three.
        """
        if not self._grows(tensor):
            return self.graph.shapes[tensor]
        shape = self.graph.per_sample(tensor)
        if not channels_last:
            return shape
        channels = self.graph.shapes[tensor][-1]
        positions = shape[:-1]
        if not positions and shape != (channels,):
            positions = (shape[0] // channels,)
        if len(positions) > len(POSITIONS):
            joined = len(positions) - len(POSITIONS) + 1
            positions = (math.prod(positions[:joined]), *positions[joined:])
        return (*positions, channels)
