"""The bundle: the one thing that passes from the host to the device, and all that both know of it.

A bundle is a directory of plain files::

    manifest.json         everything below, versioned; the sha256 of every other file
    weights.safetensors   all weights; the graphs' constants point into it as ONNX external data
    trunk.onnx            frozen prefix: inputs -> features
    train.onnx            features, targets, parameters, bases -> loss, gradients, captured energy (readable: one
                          model-local function per idea)
    train.flat.onnx       the same with every function inlined, in the order in which it must be executed
    calibrate.onnx        features, parameters -> Gram matrices of every tensor that will be compressed
    update.onnx           parameters, gradients, optimizer state -> new parameters, new state
    accumulate.onnx       the mean (or sum) of gradients so far, those of the next piece of a batch -> that of both
    predict.onnx          features, parameters -> the model's outputs

This module may know numpy, safetensors and the errors; it must not know onnx, a runtime, or how a graph was made.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from edgetune.errors import BundleError, UsageError, choices
from edgetune.plain import from_plain

FORMAT_VERSION = 4
TRACED = "traced"
"""Kind of a loss that the user gave with the model."""
MANIFEST = "manifest.json"
WEIGHTS = "weights.safetensors"

Array = np.ndarray[Any, np.dtype[Any]]


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


@dataclass(frozen=True)
class Manifest:
    """All that a device needs to know of a bundle beyond its weights.

    Attributes:
        outputs: what the predict graph returns; the loss is computed from the first.
        targets: what the train graph compares the outputs with.
        classes: their names, where the model is a classifier; else empty.
        buffers: what a training step changes besides the parameters (the running statistics of trained batch-norm);
            shapes without a batch. The train graph reads ``<name>`` and returns ``new/<name>``.
        adapter: what made weights of the tail computed ones, None if nothing did.
    """

    format_version: int
    model: str
    made_by: str
    opset: int
    inputs: tuple[TensorSpec, ...]
    features: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    targets: TensorSpec
    classes: tuple[str, ...]
    preprocess: PreprocessSpec
    loss: LossSpec
    optimizer: OptimizerSpec
    codec: str
    layers: tuple[LayerSpec, ...]
    saved: tuple[SavedSpec, ...]
    parameters: tuple[ParameterSpec, ...]
    graphs: Mapping[str, GraphSpec]
    buffers: tuple[TensorSpec, ...] = ()
    adapter: AdapterSpec | None = None
    files: Mapping[str, str] = field(default_factory=dict)

    @property
    def classifies(self) -> bool:
        """Whether a sample's target is one of ``classes``."""
        return bool(self.classes) and not self.targets.shape

    def to_json(self) -> str:
        """Return the manifest as JSON text; :meth:`from_json` reads it back equal."""
        return json.dumps(dataclasses.asdict(self), indent=1)

    @staticmethod
    def from_json(text: str) -> Manifest:
        """Return the manifest that ``text`` holds.

        Raises:
            BundleError: not JSON, another format version, or a field missing, unknown or of the wrong type.
        """
        try:
            data = json.loads(text)
        except ValueError as error:
            raise BundleError(f"{MANIFEST} is not JSON ({error}); export the bundle again") from None
        version = data.get("format_version") if isinstance(data, dict) else None
        if version != FORMAT_VERSION:
            raise BundleError(
                f"the bundle's format version is {version!r}; this EdgeTune reads version {FORMAT_VERSION}: export the "
                "bundle again with this version, or install the version that wrote it"
            )
        manifest: Manifest = from_plain(Manifest, data, "manifest")
        return manifest


def sha256_of(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while piece := stream.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def sync_directory(path: Path) -> None:
    """Flush a directory's entries to disk, so that a rename in it survives a power loss."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@dataclass(frozen=True)
class Bundle:
    """An opened bundle: its directory and its manifest."""

    path: Path
    manifest: Manifest

    @staticmethod
    def open(path: str | Path, *, verify: bool = True) -> Bundle:
        """Open the bundle in the directory ``path``; with ``verify``, check the hash of every file it lists.

        Raises:
            BundleError: missing, of another version, incomplete, or changed since it was written.
        """
        root = Path(path)
        if not (root / MANIFEST).is_file():
            raise BundleError(f"'{root}' is not a bundle: it holds no {MANIFEST}; make one with 'edgetune export'")
        manifest = Manifest.from_json((root / MANIFEST).read_text("utf-8"))
        for name, expected in manifest.files.items():
            if Path(name).name != name:
                raise BundleError(f"{MANIFEST} names '{name}', which is not a plain file name inside the bundle")
            file = root / name
            if not file.is_file():
                raise BundleError(f"the bundle '{root}' lacks its file {name}; copy or export it again")
            if verify and sha256_of(file) != expected:
                raise BundleError(
                    f"{file} is not the file that was exported (its SHA-256 differs); copy or export the bundle again"
                )
        listed = set(manifest.files)
        for graph in manifest.graphs.values():
            if not {graph.file, graph.flat_file, *(stage.file for stage in graph.stages)} <= listed:
                raise BundleError(f"{MANIFEST} names a graph without a hash: {graph.file}; export the bundle again")
        return Bundle(root, manifest)

    @property
    def digest(self) -> str:
        """The SHA-256 of the manifest, which itself holds the hash of every file: the bundle's identity."""
        return sha256_of(self.path / MANIFEST)

    def initial_parameters(self) -> dict[str, Array]:
        """Return copies of the exported values of all trained tensors, keyed by the model's own names."""
        return dict(self._read([spec.name for spec in self.manifest.parameters]))

    def initial_buffers(self) -> dict[str, Array]:
        """Return copies of the exported values of all buffers."""
        return dict(self._read([spec.name for spec in self.manifest.buffers]))

    def _read(self, names: list[str]) -> Iterator[tuple[str, Array]]:
        with safe_open(self.path / WEIGHTS, framework="numpy") as stream:
            for name in names:
                yield name, stream.get_tensor(name)


def write_manifest(root: Path, manifest: Manifest) -> Bundle:
    """Hash every file in ``root``, write the manifest last, and return the opened bundle.

    The manifest is written to a temporary name and renamed, so a directory with a manifest is a complete bundle.
    """
    files = {p.name: sha256_of(p) for p in sorted(root.iterdir()) if p.name not in (MANIFEST, MANIFEST + ".tmp")}
    complete = dataclasses.replace(manifest, files=files)
    temporary = root / (MANIFEST + ".tmp")
    with temporary.open("w", encoding="utf-8") as stream:
        stream.write(complete.to_json())
        stream.flush()
        os.fsync(stream.fileno())
    temporary.rename(root / MANIFEST)
    sync_directory(root)
    return Bundle(root, complete)
