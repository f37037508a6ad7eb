"""One codec, run in one place: by its own numpy oracle, or as emitted nodes on an engine. Knows onnx and the engines.

Emitted encoders and decoders are model-local functions with the names that reverse mode gives them, so that native
kernels stand in for them as they do in training.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import onnx
from onnx import helper, numpy_helper

from edgetune.autodiff.builder import DOMAIN, IR_VERSION, OPSET, FunctionLibrary, GraphBuilder
from edgetune.autodiff.reverse import function_name
from edgetune.codecs.base import Array, Codec, Encoded, Mode, Saved, Source, StoredTensor, captured_energy
from edgetune.codecs.dense import Dense
from edgetune.errors import EngineError, choices

ENGINES = ("onnxruntime", "torch")
ORACLE = "oracle"

Run = Callable[[Mapping[str, Array]], "dict[str, Array]"]


@dataclass(frozen=True)
class Coded:
    """What an encoder returns: stored tensors by name, the energy (None: lossless), carried factors by letter."""

    stored: Mapping[str, Array]
    energy: float | None
    carried: Mapping[str, Array] = field(default_factory=dict)


class Coder(Protocol):
    """Encodes and decodes with one codec."""

    def encode(self, x: Array, saved: Saved, inputs: Mapping[str, Array]) -> Coded:
        """Encode ``x`` [b, *saved.shape] with the run-time inputs by letter."""

    def decode(self, stored: Mapping[str, Array], saved: Saved, inputs: Mapping[str, Array]) -> Array:
        """Return the tensor; of ``inputs`` a decoder gets the bases only."""


class Oracle:
    """The codec's own numpy code."""

    def __init__(self, codec: Codec) -> None:
        self._codec = codec

    def encode(self, x: Array, saved: Saved, inputs: Mapping[str, Array]) -> Coded:
        """Encode; the energy is computed from the decoded tensor."""
        stored = self._codec.encode(x, saved, inputs)
        if not self._codec.lossy or not stored:
            return Coded(stored, None)
        return Coded(stored, captured_energy(x, self.decode(stored, saved, inputs)))

    def decode(self, stored: Mapping[str, Array], saved: Saved, inputs: Mapping[str, Array]) -> Array:
        """Decode."""
        return self._codec.decode(stored, saved, _bases(self._codec, saved, inputs))


def _bases(codec: Codec, saved: Saved, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """A decoder runs in the backward pass: there only what is resident is left."""
    return {mode.letter: inputs[mode.letter] for mode in codec.modes(saved) if mode.source is Source.BASIS}


class Emitted:
    """The codec's nodes, as two models, on one engine. Models are made once per :class:`Saved`, for every batch."""

    def __init__(self, codec: Codec, engine: str) -> None:
        """Compile nothing yet.

        Raises:
            EngineError: there is no such engine.
        """
        if engine not in _COMPILERS:
            raise EngineError(f"there is no engine '{engine}'; choose one of: {choices(ENGINES)}")
        self._codec, self._compile = codec, _COMPILERS[engine]
        self._encoders: dict[Saved, Run] = {}
        self._decoders: dict[Saved, Run] = {}

    def encode(self, x: Array, saved: Saved, inputs: Mapping[str, Array]) -> Coded:
        """Run the encoder."""
        names = [tensor.name for tensor in self._codec.stored(saved)]
        if _is_dense(self._codec):
            return Coded({names[0]: x}, None)
        if not names:
            return Coded({}, None)
        if saved not in self._encoders:
            self._encoders[saved] = self._compile(encoder_model(self._codec, saved))
        found = self._encoders[saved]({"x": x, **{f"input_{letter}": value for letter, value in inputs.items()}})
        energy = None
        if self._codec.lossy:
            if found["energy"].shape != () or found["energy"].dtype != np.float32:
                raise AssertionError(f"the energy is {found['energy']!r}; expected a scalar of float32")
            energy = float(found["energy"])
        moving = {mode.letter: found[f"next_{mode.letter}"] for mode in _carried(self._codec, saved)}
        return Coded({name: found[f"stored_{name}"] for name in names}, energy, moving)

    def decode(self, stored: Mapping[str, Array], saved: Saved, inputs: Mapping[str, Array]) -> Array:
        """Run the decoder."""
        if _is_dense(self._codec):
            return next(iter(stored.values()))
        if saved not in self._decoders:
            self._decoders[saved] = self._compile(decoder_model(self._codec, saved))
        feeds = {f"stored_{name}": value for name, value in stored.items()}
        feeds |= {f"input_{letter}": value for letter, value in _bases(self._codec, saved, inputs).items()}
        return self._decoders[saved](feeds)["decoded"]


def coder_for(codec: Codec, place: str) -> Coder:
    """Return the coder of ``codec`` at ``place``: ``oracle`` or one of ``ENGINES``."""
    return Oracle(codec) if place == ORACLE else Emitted(codec, place)


def _is_dense(codec: Codec) -> bool:
    return codec.name == Dense.name  # reverse mode emits nothing for it


def _carried(codec: Codec, saved: Saved) -> list[Mode]:
    return [mode for mode in codec.modes(saved) if mode.source is Source.CARRIED]


def encoder_model(codec: Codec, saved: Saved) -> onnx.ModelProto:
    """Return the encoder as a model: x and ``input_<letter>`` in; ``stored_<name>``, energy, ``next_<letter>`` out."""
    modes = codec.modes(saved)
    inputs = ["x", *(f"input_{mode.letter}" for mode in modes)]
    moving = [mode.letter for mode in _carried(codec, saved)]
    outputs = [_stored_value(tensor) for tensor in codec.stored(saved)]
    outputs += [_value("energy", np.float32, [])] if codec.lossy else []
    outputs += [_value(f"next_{m.letter}", np.float32, _input_shape(m)) for m in _carried(codec, saved)]

    def body(g: GraphBuilder, names: Sequence[str]) -> Sequence[str]:
        by_letter = {mode.letter: name for mode, name in zip(modes, names[1:], strict=True)}
        encoded = codec.emit_encode(g, names[0], saved, by_letter)
        _check_encoded(codec, saved, encoded, by_letter)
        carried = [encoded.carried[letter] for letter in moving]
        return [*encoded.stored, *([encoded.energy] if encoded.energy is not None else []), *carried]

    shapes: dict[str, list[int | str]] = {
        "x": ["batch", *saved.shape],
        **{f"input_{mode.letter}": _input_shape(mode) for mode in modes},
    }
    kinds = {f"input_{mode.letter}": np.int64 for mode in modes if mode.source is Source.COUNT}
    typed = [_value(name, kinds.get(name, np.float32), shapes[name]) for name in inputs]
    return _model(function_name("Encode", codec, saved), typed, outputs, body)


def decoder_model(codec: Codec, saved: Saved) -> onnx.ModelProto:
    """Return the decoder as a model: ``stored_<name>`` and the bases ``input_<letter>`` in, ``decoded`` out."""
    stored, bases = codec.stored(saved), [mode for mode in codec.modes(saved) if mode.source is Source.BASIS]

    def body(g: GraphBuilder, names: Sequence[str]) -> Sequence[str]:
        letters = {mode.letter: name for mode, name in zip(bases, names[len(stored) :], strict=True)}
        return [codec.emit_decode(g, Encoded(tuple(names[: len(stored)]), letters, None), saved)]

    typed = [_stored_value(tensor) for tensor in stored]
    typed += [_value(f"input_{mode.letter}", np.float32, _input_shape(mode)) for mode in bases]
    name = "_".join([function_name("Decode", codec, saved), *(mode.letter for mode in bases)])
    return _model(name, typed, [_value("decoded", np.float32, ["batch", *saved.shape])], body)


def _check_encoded(codec: Codec, saved: Saved, encoded: Encoded, inputs: Mapping[str, str]) -> None:
    """Check what the encoder says that it made against what its codec promises."""
    stored = [tensor.name for tensor in codec.stored(saved)]
    if len(encoded.stored) != len(stored):
        raise AssertionError(
            f"emit_encode stores {len(encoded.stored)} tensors, stored() tells {len(stored)}: {stored}"
        )
    if (encoded.energy is not None) != codec.lossy:
        raise AssertionError(f"emit_encode gives the energy {encoded.energy!r}, but lossy is {codec.lossy}")
    moving = [mode.letter for mode in _carried(codec, saved)]
    if list(encoded.carried) != moving:
        raise AssertionError(
            f"emit_encode carries {list(encoded.carried)}, the modes with the source CARRIED: {moving}"
        )
    bases = {mode.letter: inputs[mode.letter] for mode in codec.modes(saved) if mode.source is Source.BASIS}
    if dict(encoded.bases) != bases:
        raise AssertionError(f"Encoded.bases is {dict(encoded.bases)}, the modes with the source BASIS are {bases}")


def _input_shape(mode: Mode) -> list[int | str]:
    size: int | str = "batch" if mode.size is None else mode.size
    if mode.source is Source.COUNT:
        return [1]
    if mode.source is Source.NOISE:
        return [size]
    rank = f"rank_{mode.letter}"
    return [mode.groups, size, rank] if mode.source is Source.BASIS else [size, rank]


def _stored_value(tensor: StoredTensor) -> onnx.ValueInfoProto:
    """Numbers stay; what is symbolic gets a name of its own, for a name may stand for one extent only."""
    shape: list[int | str] = list(tensor.shape)
    for i, extent in enumerate(shape):
        shape[i] = extent if isinstance(extent, int) else f"{tensor.name}_{i}"
    return _value(f"stored_{tensor.name}", tensor.dtype, shape)


def _value(name: str, dtype: type | str, shape: Sequence[int | str]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), shape)


def _model(
    name: str,
    inputs: Sequence[onnx.ValueInfoProto],
    outputs: Sequence[onnx.ValueInfoProto],
    body: Callable[[GraphBuilder, Sequence[str]], Sequence[str]],
) -> onnx.ModelProto:
    """Return a model that calls one function."""
    names = [value.name for value in inputs]
    g, library = GraphBuilder(taken=set(names)), FunctionLibrary()
    library.call(g, name, names, [value.name for value in outputs], body)
    graph = helper.make_graph(g.nodes, "codec", inputs, outputs)
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)]
    return helper.make_model(
        graph, functions=list(library.functions.values()), opset_imports=opsets, ir_version=IR_VERSION
    )


# -- engines ----------------------------------------------------------------------------------------------------------


def why_missing(engine: str) -> str | None:
    """Return why ``engine`` cannot run here; None if it can."""
    try:
        importlib.import_module(_LIBRARIES[engine])
    except ImportError as error:
        return f"the engine {engine} cannot run here: {error}"
    return None


def run_on(engine: str, model: onnx.ModelProto, feeds: Mapping[str, Array]) -> dict[str, Array]:
    """Run ``model`` once on ``engine`` and return its outputs by name."""
    return _COMPILERS[engine](model)(feeds)


def _compile_for_onnxruntime(model: onnx.ModelProto) -> Run:
    """Load ``model`` as the engine does: not optimised, in the emitted order, nothing planned ahead."""
    from edgetune.engines.onnxruntime import import_onnxruntime

    ort = import_onnxruntime()
    options = ort.SessionOptions()
    options.log_severity_level = 4  # a failure is told by the exception
    options.intra_op_num_threads = 1
    options.enable_mem_pattern = options.enable_cpu_mem_arena = options.enable_mem_reuse = False
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.execution_order = ort.ExecutionOrder.PRIORITY_BASED
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    outputs = [value.name for value in session.get_outputs()]
    known = {value.name for value in session.get_inputs()}

    def run(feeds: Mapping[str, Array]) -> dict[str, Array]:
        taken = {name: np.asarray(value, order="C") for name, value in feeds.items() if name in known}
        return dict(zip(outputs, session.run(outputs, taken), strict=True))

    return run


def _compile_for_torch(model: onnx.ModelProto) -> Run:
    """Compile ``model`` as the engine does: native kernels stand in for functions, the others are inlined."""
    import torch
    from onnx import inliner

    from edgetune.engines.torch_ops.native import native_kernel
    from edgetune.engines.torch_ops.program import Program, Setting

    def read(tensor: onnx.TensorProto) -> torch.Tensor:
        return torch.from_numpy(np.array(numpy_helper.to_array(tensor)))

    found = {function.name: native_kernel(function) for function in model.functions}
    native = {name: kernel for name, kernel in found.items() if kernel is not None}
    inlined = [(f.domain, f.name) for f in model.functions if f.name not in native]
    flat = inliner.inline_selected_functions(model, inlined) if inlined else model
    outputs = [value.name for value in model.graph.output]
    with torch.inference_mode():
        program = Program.of_graph(flat.graph, Setting(OPSET, read, torch.device("cpu"), native))

    def run(feeds: Mapping[str, Array]) -> dict[str, Array]:
        with torch.inference_mode():
            given = {name: torch.from_numpy(np.array(value, order="C")) for name, value in feeds.items()}
            return {name: value.numpy() for name, value in program.run(given, outputs).items()}

    return run


_LIBRARIES = {"onnxruntime": "onnxruntime", "torch": "torch"}
_COMPILERS: dict[str, Callable[[onnx.ModelProto], Run]] = {
    "onnxruntime": _compile_for_onnxruntime,
    "torch": _compile_for_torch,
}
