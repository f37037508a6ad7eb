"""What the whole process needs at its worst instant: the lines that are always there, and the largest phase.

This module may know the manifest, sizes and lifetimes; it must not know budgets, spectra or how a plan is chosen.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from edgetune.bundle import GraphSpec, Manifest, SavedSpec, TensorSpec
from edgetune.errors import BundleError, UsageError, choices
from edgetune.planning.memory import FIXED_KINDS, LiveTensor, Peak, peak
from edgetune.planning.packing import packed_peak
from edgetune.planning.selection import LOSSLESS
from edgetune.planning.sizes import itemsize, nbytes
from edgetune.planning.workspace import around_calibration

_FLOAT_BYTES = 4
_LINE_OF = {"feature": "features", "saved": "saved", "gradient": "gradients", "workspace": "workspace"}
_FIXED_LINES = ("runtime", "weights", "parameters", "optimizer", "bases")
ALWAYS_THERE = (*_FIXED_LINES, "replay")
"""The lines of a ledger that are resident in every phase."""
_PHASE_LINES = ("features", "saved", "gradients", "transient", "workspace")


@dataclass(frozen=True)
class Prediction:
    """The predicted worst instant of the process.

    Attributes:
        ledger: bytes by line (runtime, weights, parameters, optimizer, bases: always; features, saved, gradients,
            transient, workspace: at the peak of the worst phase; replay: of the feature cache, where there is one;
            correction: where a measurement gave one). They sum to ``peak_bytes``.
        peaks: by graph, the peak of the phase that runs it: all but the lines that are always there.
        bottleneck: ``<graph>/<node>`` at the peak of the worst phase; empty for a bundle without graphs.
    """

    ledger: Mapping[str, int]
    peak_bytes: int
    peaks: Mapping[str, Peak]
    bottleneck: str


def predict(
    manifest: Manifest,
    *,
    batch: int,
    micro_batch: int,
    ranks: Mapping[str, Mapping[str, int]],
    runtime_bytes: int,
    correction_bytes: int = 0,
    tail_micro_batch: int | None = None,
    cache_bytes: int = 0,
    memory: str = "lean",
) -> Prediction:
    """Return what training with batches of ``batch`` samples needs when the trunk runs on ``micro_batch`` at a time,
    and the train graph on ``tail_micro_batch`` (None: on the whole batch).

    ``manifest`` is settled (``planning.selection``): every saved tensor has one option, and what is frozen is gone.

    Always there: the runtime; the constants of all graphs, once per name (they point into one file); parameters and
    optimizer state (float32); the bases that the train graph reads, and the full ones of which they are columns.
    And ``cache_bytes`` of features that are kept from pass to pass.
    On top, the largest of these phases (a graph that the bundle lacks is skipped):

    - trunk and predict at ``micro_batch`` samples; besides the trunk, the features of one run of the train graph;
    - train and calibrate at ``tail_micro_batch`` samples: the features are their inputs; of a calibration, what is
      made of its results too (``planning.workspace``);
    - accumulate, where a batch is trained in pieces, with the gradients of the piece and those of all before it; the
      latter are there while trunk and train graph run, too;
    - update, with the gradients as its inputs (a session lets the features go before it).

    Inputs of a graph belong to the caller, so they are counted until it ends, wherever its last use is.
    With ``memory`` ``fast`` the tensors of a run lie in one block (``planning.packing``).

    ``correction_bytes`` (measured minus predicted, of either sign) is one more line. Monotone in ``batch``,
    ``micro_batch`` and every rank.

    Raises:
        UsageError: ``ranks`` lacks a mode of the bundle.
        BundleError: a shape holds a symbol that is neither ``batch`` nor a rank.
    """
    phases = phases_of(manifest, batch=batch, micro_batch=micro_batch, ranks=ranks, tail_micro_batch=tail_micro_batch)
    peaks = {name: _with(_run(phase, memory), phase.held) for name, phase in phases.items()}
    if "calibrate" in peaks:
        graph, values = phases["calibrate"].graph, phases["calibrate"].symbols
        peaks["calibrate"] = around_calibration(graph, values, peaks["calibrate"])
    symbols = _symbols(manifest, batch if tail_micro_batch is None else tail_micro_batch, ranks)
    ledger = dict.fromkeys(_FIXED_LINES + _PHASE_LINES, 0)
    parameter_bytes = sum(_FLOAT_BYTES * math.prod(spec.shape) for spec in manifest.parameters)
    ledger["runtime"] = runtime_bytes
    ledger["weights"] = _constant_bytes(manifest.graphs.values(), symbols)
    ledger["parameters"] = parameter_bytes + sum(_FLOAT_BYTES * math.prod(spec.shape) for spec in manifest.buffers)
    ledger["optimizer"] = len(manifest.optimizer.slots) * parameter_bytes
    ledger["bases"] = _basis_bytes(manifest, symbols)
    if cache_bytes:
        ledger["replay"] = cache_bytes
    bottleneck = ""
    if peaks:
        worst = max(peaks, key=lambda name: peaks[name].bytes)
        bottleneck = f"{worst}/{peaks[worst].node_name}"
        for tensor in peaks[worst].live:
            ledger[_LINE_OF.get(tensor.kind, "transient")] += tensor.bytes
    if correction_bytes:
        ledger["correction"] = correction_bytes
    return Prediction(ledger, sum(ledger.values()), peaks, bottleneck)


@dataclass(frozen=True)
class Phase:
    """The run of one graph in training: ``graph`` with its inputs held to the end, the values of its symbols, and what
    lies beside it all the time."""

    graph: GraphSpec
    symbols: Mapping[str, int]
    held: list[LiveTensor]


def phases_of(
    manifest: Manifest,
    *,
    batch: int,
    micro_batch: int,
    ranks: Mapping[str, Mapping[str, int]],
    tail_micro_batch: int | None = None,
) -> dict[str, Phase]:
    """Return the phases by graph, of the graphs that the bundle has; arguments and errors as of :func:`predict`."""
    piece = batch if tail_micro_batch is None else tail_micro_batch
    symbols = _symbols(manifest, piece, ranks)
    few = {**symbols, "batch": micro_batch}
    features = _whole_batch(manifest.features, piece)
    before = accumulated(manifest) if piece < batch else []
    held: dict[str, tuple[Mapping[str, int], list[LiveTensor]]] = {
        "trunk": (few, features + _absent(manifest, "trunk", manifest.inputs, micro_batch) + before),
        "train": (symbols, before),
        "update": (symbols, []),
        "calibrate": (symbols, []),
        "predict": (few, []),
    }
    if piece < batch:
        held["accumulate"] = (symbols, [])
    return {
        name: Phase(holding_inputs(manifest.graphs[name]), values, extra)
        for name, (values, extra) in held.items()
        if name in manifest.graphs
    }


def saved_bytes_by_tensor(
    manifest: Manifest, *, batch: int, ranks: Mapping[str, Mapping[str, int]]
) -> dict[str, dict[str, int]]:
    """Return, per saved tensor of a settled bundle, the tensors of the train graph that hold it, with their bytes.

    A tensor that two saved tensors share appears under both: merge the inner dictionaries before adding.

    Raises:
        BundleError: a saved tensor names one that the train graph lacks.
        UsageError: ``ranks`` lacks a mode of the bundle.
    """
    symbols = _symbols(manifest, batch, ranks)
    uses = {use.name: use for use in manifest.graphs["train"].tensors} if "train" in manifest.graphs else {}
    found: dict[str, dict[str, int]] = {}
    for spec in manifest.saved:
        (option,) = spec.options
        if not option.stored and option.codec == LOSSLESS:
            found[spec.name] = {spec.name: dense_bytes(spec, batch)}
            continue
        for name in option.stored:
            if name not in uses:
                raise BundleError(
                    f"'{spec.name}' is stored in '{name}', which the train graph lacks; export the bundle again"
                )
        found[spec.name] = {name: nbytes(uses[name], symbols) for name in option.stored}
    return found


def dense_bytes(spec: SavedSpec, batch: int) -> int:
    """Return the float32 bytes of a saved tensor as it is before any codec, for ``batch`` samples."""
    return _FLOAT_BYTES * batch * math.prod(spec.shape)


def _symbols(manifest: Manifest, batch: int, ranks: Mapping[str, Mapping[str, int]]) -> dict[str, int]:
    symbols = {"batch": batch}
    for spec in manifest.saved:
        for mode in spec.modes:
            if not mode.rank:
                continue
            try:
                symbols[mode.rank] = ranks[spec.name][mode.letter]
            except KeyError:
                raise UsageError(
                    f"the ranks lack mode '{mode.letter}' of '{spec.name}'; expected one for each of: "
                    f"{choices(f'{s.name}.{m.letter}' for s in manifest.saved for m in s.modes)}"
                ) from None
    return symbols


def holding_inputs(graph: GraphSpec) -> GraphSpec:
    """Return ``graph`` with every input alive until the end: no runtime can free what its caller holds.

    A graph in stages tells itself which inputs die with the first.
    """
    if graph.stages:
        return graph
    end = len(graph.nodes)
    tensors = tuple(
        dataclasses.replace(use, last=end) if use.first < 0 and use.kind not in FIXED_KINDS else use
        for use in graph.tensors
    )
    return dataclasses.replace(graph, tensors=tensors)


def _run(phase: Phase, memory: str) -> Peak:
    return packed_peak(phase.graph, phase.symbols) if memory == "fast" else peak(phase.graph, phase.symbols)


def _with(found: Peak, extra: list[LiveTensor]) -> Peak:
    """Return ``found`` with tensors that are alive all through the phase."""
    live = tuple(sorted((*found.live, *extra), key=lambda tensor: (-tensor.bytes, tensor.name)))
    return dataclasses.replace(found, bytes=found.bytes + sum(tensor.bytes for tensor in extra), live=live)


def _whole_batch(specs: tuple[TensorSpec, ...], batch: int) -> list[LiveTensor]:
    """Return what a caller holds of ``specs`` for ``batch`` samples."""
    return [LiveTensor(spec.name, "feature", batch * math.prod(spec.shape) * itemsize(spec.dtype)) for spec in specs]


def accumulated(manifest: Manifest) -> list[LiveTensor]:
    """Return the gradients of the pieces of a batch before the one that is trained."""
    uses = (use for use in manifest.graphs["train"].tensors if use.kind == "gradient")
    return [LiveTensor(f"accumulated/{use.name}", "gradient", nbytes(use, {})) for use in uses]


def _absent(manifest: Manifest, graph: str, specs: tuple[TensorSpec, ...], batch: int) -> list[LiveTensor]:
    """Return those of ``specs`` that the graph's own tensors do not hold, so that none counts twice."""
    listed = {use.name for use in manifest.graphs[graph].tensors} if graph in manifest.graphs else set()
    return _whole_batch(tuple(spec for spec in specs if spec.name not in listed), batch)


def _constant_bytes(graphs: Iterable[GraphSpec], symbols: Mapping[str, int]) -> int:
    """Return the bytes of the constants of all graphs, each buffer once: they point into one file of weights."""
    largest: dict[str, int] = {}
    for graph in graphs:
        for use in graph.tensors:
            if use.kind == "constant":
                largest[use.buffer] = max(largest.get(use.buffer, 0), nbytes(use, symbols))
    return sum(largest.values())


def _basis_bytes(manifest: Manifest, symbols: Mapping[str, int]) -> int:
    """Return the bytes of the bases that the train graph reads, and of the full ones that a calibration keeps."""
    read = 0
    if "train" in manifest.graphs:
        read = sum(nbytes(use, symbols) for use in manifest.graphs["train"].tensors if use.kind == "basis")
    return read + full_basis_bytes(manifest.saved)


def full_basis_bytes(saved: Iterable[SavedSpec]) -> int:
    """Return the bytes of the full bases of settled tensors, of which the train graph reads some columns."""
    modes = (mode for spec in saved for mode in spec.modes if mode.source == "basis")
    return sum(_FLOAT_BYTES * mode.groups * mode.size**2 for mode in modes if mode.size is not None)
