"""What the planner and the engines see of one graph: its tensors, how long each lives, where a plan chooses.

Knows numbers and names; nothing of files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class TensorUse:
    """One tensor of one graph: how large it is and how long it lives.

    Attributes:
        shape: one expression per axis: a product of integers and symbols joined by ``*``, such as ``"7"``,
            ``"batch"`` or ``"4*batch*rank.conv1.c"`` (see ``planning.sizes``).
        dtype: numpy name of the element type.
        kind: ``feature`` | ``target`` | ``parameter`` | ``buffer`` | ``basis`` | ``state`` | ``scalar`` (graph inputs),
            ``constant`` (weights in the graph), ``gradient`` | ``output`` (graph outputs), ``saved`` (kept by the
            forward pass for the backward pass), ``transient``.
        first: index of the node that allocates it; -1 for what exists before the graph runs.
        last: index of the last node that needs it; ``len(nodes)`` for what outlives the run.
        buffer: the tensor whose memory it occupies; its own name unless it is a view or computed in place.
    """

    name: str
    shape: tuple[str, ...]
    dtype: str
    kind: str
    first: int
    last: int
    buffer: str


@dataclass(frozen=True)
class Workspace:
    """Scratch memory that the kernel of one node takes beyond its inputs and outputs; ``elements`` as in a shape."""

    node: int
    elements: str
    dtype: str = "float32"


@dataclass(frozen=True)
class StageSpec:
    """One stretch of a graph in a file of its own: its nodes end before index ``end`` of the whole graph's.

    A runtime holds every input of a graph until the graph ends. So where the backward pass does not need the features,
    the train graph also comes as two stages, forward and backward, and the features are gone before the second.
    """

    file: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    end: int


@dataclass(frozen=True)
class WireSpec:
    """One node of a graph with choices: operator, all names that it reads (its subgraphs' included), what it makes."""

    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class ChoiceSpec:
    """A place where a plan's choice for the saved tensor ``saved`` decides which tensor ``output`` is.

    ``options`` maps the label of an option to a tensor; to ``""`` where that option has none (a lossless codec has no
    captured energy): then there is no such output.
    """

    saved: str
    output: str
    options: Mapping[str, str]


@dataclass(frozen=True)
class GraphSpec:
    """One graph: its readable file, the same with every function inlined, and what the planner sees of it.

    ``nodes`` are the node names of ``flat_file`` in the order in which they must be executed. Where there are
    ``stages``, an engine runs those, one after the other, instead of ``flat_file``. ``in_place`` maps outputs to the
    inputs whose buffers they are written to, in the order in which they are made; a buffer may hold several in turn.
    Every such output depends on all that reads what it replaces, so by the time it is written nothing is left to read.

    Where saved tensors have several options, the files hold the nodes of all of them and can not be run as they are:
    ``planning.selection`` makes of ``wires`` (one per node), ``choices`` and ``ends`` (the tensors that end the forward
    pass) the description of the graph that a plan has chosen, lifetimes and stages included.
    """

    file: str
    flat_file: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    nodes: tuple[str, ...]
    tensors: tuple[TensorUse, ...]
    workspaces: tuple[Workspace, ...] = ()
    stages: tuple[StageSpec, ...] = ()
    in_place: Mapping[str, str] = field(default_factory=dict)
    wires: tuple[WireSpec, ...] = ()
    choices: tuple[ChoiceSpec, ...] = ()
    ends: tuple[str, ...] = ()

    def run_stages(self) -> tuple[StageSpec, ...]:
        """Return what an engine runs: the stages, or the whole graph as the only one."""
        return self.stages or (StageSpec(self.flat_file, self.inputs, self.outputs, len(self.nodes)),)


@dataclass(frozen=True)
class InferenceSpec:
    """The model for use, as one ordinary graph in ``file`` from the manifest's inputs to ``outputs`` (in the order of
    the manifest's). The values of ``tensors`` are left out of the file: what is no parameter and no buffer among them
    is in the file of weights under the same name."""

    file: str
    outputs: tuple[str, ...]
    tensors: tuple[str, ...]
