"""What a backward rule is, and what it may ask for. Knows the builder and the codecs' uses.

A rule never stores a tensor. Before anything is emitted it declares which tensors it will want and why (:class:`Want`);
afterwards it loads them through the context, which gives back whatever the codec kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from edgetune.autodiff.builder import GraphBuilder
from edgetune.autodiff.graph import ForwardGraph, Node
from edgetune.codecs.base import Codec, Encoded, Saved, Use
from edgetune.codecs.sign import POSITIVE, Interval

FLOATS = (1, 10, 11, 16)  # onnx.TensorProto: the element types FLOAT, FLOAT16, DOUBLE, BFLOAT16


@dataclass(frozen=True)
class Want:
    """A tensor that a rule needs in the backward pass, and for what.

    ``groups`` and ``channels_last`` matter to WEIGHT_GRAD (see ``codecs.base.Saved``), ``interval`` to SIGN. ``lossy``
    matters to VALUE: a codec may answer wherever layers' inputs are compressed, not only where everything is.
    """

    tensor: str
    use: Use
    groups: int = 1
    interval: Interval = POSITIVE
    channels_last: bool = False
    lossy: bool = False


@dataclass(frozen=True)
class Stored:
    """What one codec kept of a tensor."""

    codec: Codec
    saved: Saved
    encoded: Encoded


@dataclass(frozen=True)
class Kept:
    """What was kept of a tensor for a weight gradient: by one codec, or by several of which a plan chooses one.

    ``name`` is that of the saved tensor.
    """

    name: str
    saved: Saved
    options: tuple[Stored, ...]


class Context(Protocol):
    """What a rule may use while it emits."""

    g: GraphBuilder
    graph: ForwardGraph

    def value(self, tensor: str) -> str:
        """Return the name that holds ``tensor`` exactly; it was wanted with Use.VALUE, or is a constant."""

    def mask(self, tensor: str, interval: Interval) -> str:
        """Return a boolean mask of the elements of ``tensor`` inside ``interval``; it was wanted with Use.SIGN."""

    def stored(self, tensor: str, groups: int = 1, channels_last: bool = False) -> Kept:
        """Return what was kept of ``tensor``; it was wanted with Use.WEIGHT_GRAD and the same arguments."""

    def choose(self, kept: str, results: Sequence[str], hint: str) -> str:
        """Return one of ``results``, which belong to the options of the saved tensor ``kept``; a plan decides which."""

    def spread(self, gradient: str, shape: tuple[int, ...]) -> str:
        """Return ``gradient``, which broadcasts to ``shape`` and is spread only where its reader needs that."""

    def kept(self, node: Node) -> tuple[str, ...]:
        """Return what the rule's own ``forward`` kept of ``node``."""

    def function(self, name: str, inputs: Sequence[str], hint: str, body: FunctionBody) -> str:
        """Emit a call of the model-local function ``name``, whose body ``body`` emits once; return its output."""


WantRule = Callable[[ForwardGraph, Node, frozenset[int]], Sequence[Want]]
ForwardRule = Callable[["Context", Node], tuple[str, ...]]
FunctionBody = Callable[[GraphBuilder, Sequence[str]], str]
BackwardRule = Callable[["Context", Node, frozenset[int], str], Mapping[int, str]]
BackwardOfMany = Callable[["Context", Node, frozenset[int], Sequence[str | None]], Mapping[int, str]]


@dataclass(frozen=True)
class Rule:
    """Reverse mode of one operator.

    Attributes:
        wants: (graph, node, inputs that need a gradient) -> what to keep.
        backward: (context, node, inputs that need a gradient, gradient of the first output) -> gradient per input
            index; an input without an entry has none.
        doc: what it keeps, for the table of operators.
        forward: emits the operator itself where the backward pass needs more of it than its output, and returns the
            names of what it keeps; None: the operator is copied as it is.
        backward_of_many: instead of ``backward`` where several outputs are differentiable: it gets one gradient per
            output, None for an output that the loss does not depend on.
        broadcasts: the gradient may come with extents of 1 where the output has more: it is only multiplied.
    """

    wants: WantRule
    backward: BackwardRule
    doc: str = ""
    forward: ForwardRule | None = None
    backward_of_many: BackwardOfMany | None = None
    broadcasts: bool = False


def nothing(graph: ForwardGraph, node: Node, wrt: frozenset[int]) -> Sequence[Want]:
    """Keep nothing."""
    return ()


def unbroadcast(ctx: Context, gradient: str, tensor: str, result: str) -> str:
    """Sum ``gradient`` (shaped like ``result``) over the axes along which ``tensor`` was broadcast to it."""
    return sum_to(ctx.g, gradient, ctx.graph.shapes[result], ctx.graph.shapes[tensor])


def sum_to(g: GraphBuilder, gradient: str, large: Sequence[int], small: Sequence[int]) -> str:
    """Sum ``gradient`` of the shape ``large`` over the axes along which ``small`` was broadcast to it."""
    lead = len(large) - len(small)
    if lead:
        gradient = g.op("ReduceSum", gradient, g.const(list(range(lead))), keepdims=0, hint="summed")
    axes = [i for i, extent in enumerate(small) if extent == 1 and large[i + lead] != 1]
    if axes:
        gradient = g.op("ReduceSum", gradient, g.const(axes), keepdims=1, hint="summed")
    return gradient
