"""Runs what a codec emits in onnxruntime: its encoder, its decoder, or both."""

from __future__ import annotations

import numpy as np
import onnxruntime
from onnx import helper, numpy_helper

from edgetune.autodiff.builder import IR_VERSION, OPSET, GraphBuilder
from edgetune.codecs import Codec, Encoded, Saved, Source
from edgetune.codecs.base import Array


def run_graph(g: GraphBuilder, feeds: dict[str, Array], wanted: list[str]) -> dict[str, Array]:
    """Return the tensors ``wanted`` that the nodes of ``g`` make of ``feeds``, of which not all need be read."""
    read = {name for node in g.nodes for name in node.input}
    taken = {name: value for name, value in feeds.items() if name in read}
    graph = helper.make_graph(
        g.nodes,
        "codec",
        [helper.make_tensor_value_info(k, helper.np_dtype_to_tensor_dtype(v.dtype), v.shape) for k, v in taken.items()],
        [helper.make_empty_tensor_value_info(name) for name in wanted],
        [numpy_helper.from_array(value, name) for name, value in g.constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return dict(zip(wanted, session.run(wanted, taken), strict=True))


def noise_for(codec: Codec, saved: Saved, seed: int) -> dict[str, Array]:
    """Return the noise that ``codec`` asks for."""
    rng = np.random.default_rng(seed)
    return {m.letter: rng.random(m.size, np.float32) for m in codec.modes(saved) if m.source is Source.NOISE}


def run_encoder(codec: Codec, x: Array, saved: Saved, inputs: dict[str, Array]) -> tuple[dict[str, Array], float]:
    """Return what the emitted encoder stores, by name, and the energy."""
    g = GraphBuilder("encode", taken={"x", *inputs})
    encoded = codec.emit_encode(g, "x", saved, {letter: letter for letter in inputs})
    assert encoded.energy is not None
    found = run_graph(g, {"x": x, **inputs}, [*dict.fromkeys(encoded.stored), encoded.energy])
    names = [tensor.name for tensor in codec.stored(saved)]
    return dict(zip(names, (found[n] for n in encoded.stored), strict=True)), float(found[encoded.energy])


def run_decoder(codec: Codec, stored: dict[str, Array], saved: Saved, inputs: dict[str, Array]) -> Array:
    """Return what the emitted decoder makes of ``stored`` and of the bases among ``inputs``."""
    bases = {m.letter: inputs[m.letter] for m in codec.modes(saved) if m.source is Source.BASIS}
    g = GraphBuilder("decode", taken={*stored, *bases})
    encoded = Encoded(tuple(stored), {letter: letter for letter in bases}, None)
    decoded = codec.emit_decode(g, encoded, saved)
    return run_graph(g, {**stored, **bases}, [decoded])[decoded]


def held_as_told(codec: Codec, stored: dict[str, Array], saved: Saved, symbols: dict[str, int]) -> bool:
    """Whether ``stored`` has the names, the element types and the bytes that the codec tells."""
    told = {t.name: (t.dtype, t.bytes(symbols)) for t in codec.stored(saved)}
    return told == {name: (str(value.dtype), value.nbytes) for name, value in stored.items()}
