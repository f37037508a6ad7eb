"""The weight gradients of hosvd-exact and asi stay in the factors, which are stored: at full rank torch's autograd;
with ranks cut, the exact rule on the decoded tensor. Native kernels against the bodies that they stand for."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from edgetune.autodiff.builder import DOMAIN, OPSET, FunctionLibrary, GraphBuilder
from edgetune.autodiff.losses import LossConfig, loss_from
from edgetune.autodiff.reverse import Gradients, Option, Slot, TrainedLayer, emit_gradients
from edgetune.bundle import Array
from edgetune.codecs import codec_named
from edgetune.codecs.base import Encoded
from edgetune.engines.torch_ops.base import Call
from edgetune.engines.torch_ops.native import native_kernel
from edgetune.engines.torch_ops.program import Program, Setting
from edgetune.export.symbolic import symbolic_shapes
from edgetune.planning.sizes import evaluate
from tests.autodiff.layers import BATCH, CASES, LayerCase, conv, run, train_model
from tests.autodiff.parity import relative_error

CODECS = ("hosvd-exact", "asi")
LAYERS: dict[str, LayerCase] = {
    "conv2d": conv((6, 7, 5), 4, (3, 2), strides=(2, 1), pads=(1, 0, 0, 1), bias=True),
    "conv2d of one row": conv((6, 1, 5), 4, (1, 3), pads=(0, 1, 0, 1)),
    "conv2d depthwise": conv((4, 6, 5), 4, (3, 3), groups=4, pads=(1, 1, 1, 1)),
    **{
        name: CASES[name]
        for name in (
            "conv1d everything", "conv1d of one position", "conv2d several per group", "conv3d", "conv3d flat",
            "spread2d everything", "spread3d", "linear of 2 axes", "linear of 3 axes, [c, o]", "linear of 5 axes",
            "linear of one channel", "linear of windows", "gemm",
        )
    },
}  # fmt: skip


@dataclass(frozen=True)
class Train:
    """A train graph of one layer whose input one codec keeps."""

    case: LayerCase
    g: GraphBuilder
    library: FunctionLibrary
    made: Gradients

    @staticmethod
    @functools.cache
    def of(name: str, codec: str) -> Train:
        """Emit it."""
        case = LAYERS[name]
        graph = case.graph()
        g, library = GraphBuilder(taken=set(graph.shapes)), FunctionLibrary()
        layers = {"layer": TrainedLayer("layer", (codec_named(codec),))}
        made = emit_gradients(g, library, graph, layers, list(case.parameters()), "targets", loss_from(LossConfig()))
        return Train(case, g, library, made)

    @property
    def slot(self) -> Slot:
        (slot,) = self.made.slots
        return slot

    @property
    def option(self) -> Option:
        (option,) = self.slot.options
        return option

    @property
    def encoded(self) -> Encoded:
        assert self.option.encoded is not None
        return self.option.encoded

    def given(self, share: float) -> dict[str, Array]:
        """Return what the modes get, by input name: orthonormal columns for ``share`` of the extent, rounded up."""
        rng = np.random.default_rng(1)
        sizes = {name: mode.size or BATCH for mode, name in self.option.inputs}
        made = {name: np.linalg.qr(rng.standard_normal((n, math.ceil(share * n))))[0] for name, n in sizes.items()}
        return {name: value.astype(np.float32) for name, value in made.items()}

    def feeds(self, share: float) -> dict[str, Array]:
        """Return all inputs of the graph."""
        x, targets = self.case.batch()
        return {"x": x, "targets": targets, **self.case.parameters(), **self.given(share)}

    def run(self, share: float, more: tuple[str, ...] = ()) -> dict[str, Array]:
        """Return the gradients by parameter, and the tensors ``more``."""
        named = {**self.made.parameters, **{name: name for name in more}}
        feeds = self.feeds(share)
        found = run(train_model(self.g, self.library, self.case.graph(), feeds, list(named.values())), feeds)
        return {key: found[name] for key, name in named.items()}

    def calls(self) -> list[onnx.NodeProto]:
        """Return the calls of the encoder and of the weight gradient."""
        wanted = {self.encoded.stored[0], self.made.parameters["weight"]}
        return [node for node in self.g.nodes if wanted.intersection(node.output)]


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("name", LAYERS)
def test_gradients_equal_torchs_at_full_rank(name: str, codec: str) -> None:
    train = Train.of(name, codec)
    found, expected = train.run(1.0), train.case.torch_gradients()
    assert np.abs(expected["weight"]).max() > 0
    for key in expected:
        assert relative_error(found[key], expected[key]) <= 1e-5, key


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("name", LAYERS)
def test_with_cut_ranks_the_weight_gradient_is_that_of_the_decoded_tensor(name: str, codec: str) -> None:
    train = Train.of(name, codec)
    slot, encoded, kept = train.slot, train.encoded, train.option.codec
    assert encoded.energy is not None and not encoded.bases
    _, call = train.calls()
    # No way leads back to the activation: the call has dY and what is stored.
    assert list(call.input[1:]) == list(encoded.stored)
    dy = str(call.input[0])
    made = train.run(0.5, (*encoded.stored, dy, encoded.energy))
    names = [tensor.name for tensor in kept.stored(slot.saved)]
    stored = {name: made[key].astype(np.float64) for name, key in zip(names, encoded.stored, strict=True)}
    decoded = kept.decode(stored, slot.saved, {}).reshape(BATCH, *train.case.shape)
    assert relative_error(made["weight"], train.case.weight_gradient(decoded, made[dy])) <= 1e-5
    x, _ = train.case.batch()
    energy = float(np.sum(np.square(decoded)) / np.sum(np.square(x, dtype=np.float64)))
    assert energy < 0.9999
    assert float(made[encoded.energy]) == pytest.approx(energy, rel=1e-5)
    expected = train.case.torch_gradients()
    for key in expected.keys() - {"weight"}:
        assert relative_error(made[key], expected[key]) <= 1e-5, key


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("name", ["conv2d", "conv2d several per group", "linear of 3 axes, [c, o]"])
def test_the_planner_sees_every_size(name: str, codec: str) -> None:
    train = Train.of(name, codec)
    dims: dict[str, list[int | str]] = {"x": ["batch", *train.case.shape], "targets": ["batch"]}
    dims |= {key: list(value.shape) for key, value in train.case.parameters().items()}
    dims |= {key: [mode.size or "batch", f"rank.{mode.letter}"] for mode, key in train.option.inputs}
    wanted = [*train.made.parameters.values(), *train.encoded.stored, *train.encoded.carried.values()]
    shapes = symbolic_shapes(train_model(train.g, train.library, train.case.graph(), dims, wanted))
    given = train.given(0.5)
    symbols = {"batch": BATCH, **{f"rank.{mode.letter}": given[key].shape[1] for mode, key in train.option.inputs}}
    made = train.run(0.5, (*train.encoded.stored, *train.encoded.carried.values()))
    for key in (*train.encoded.stored, *train.encoded.carried.values()):
        assert [evaluate(extent, symbols) for extent in shapes[key]] == list(made[key].shape)
    assert all(evaluate(extent, symbols) >= 0 for shape in shapes.values() for extent in shape)


@pytest.mark.parametrize("codec", CODECS)
def test_asi_carries_all_its_factors_and_hosvd_exact_none(codec: str) -> None:
    train = Train.of("conv2d", codec)
    names = [name for _, name in train.option.inputs]
    assert len(names) == 4
    assert list(train.made.carried) == (names if codec == "asi" else [])


# ---- native kernels -----------------------------------------------------------------------------------------------


def body(function: onnx.FunctionProto, feeds: list[Array]) -> list[Array]:
    """Return what the body of ``function`` makes."""
    inputs = [f"x{i}" for i in range(len(feeds))]
    call = helper.make_node(function.name, inputs, list(function.output), domain=DOMAIN)
    shapes = zip(inputs, feeds, strict=True)
    model = helper.make_model(
        helper.make_graph(
            [call],
            "one",
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, value.shape) for name, value in shapes],
            [helper.make_empty_tensor_value_info(name) for name in function.output],
        ),
        opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)],
        functions=[function],
        ir_version=8,
    )
    found = run(onnx.inliner.inline_local_functions(model), dict(zip(inputs, feeds, strict=True)))
    return [found[name] for name in function.output]


def native(function: onnx.FunctionProto, feeds: list[Array]) -> list[Array]:
    """Return what the kernel in its place makes."""
    kernel = native_kernel(function)
    assert kernel is not None, function.name
    made = kernel(Call(function.name, "", OPSET, {}, len(function.output)), *map(torch.from_numpy, feeds))
    return [value.numpy() for value in (made if isinstance(made, tuple) else (made,))]


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("name", LAYERS)
def test_a_native_encoder_stores_what_the_body_does(name: str, codec: str) -> None:
    train = Train.of(name, codec)
    call = train.calls()[0]
    function = train.library.functions[call.op_type]
    kept, saved, rng = train.option.codec, train.slot.saved, np.random.default_rng(4)
    names = [tensor.name for tensor in kept.stored(saved)]
    given = [*train.given(0.5).values()]
    x = rng.standard_normal([BATCH, *saved.shape])
    for axis in range(x.ndim):  # a spectrum that falls along every mode
        q = np.linalg.qr(rng.standard_normal((x.shape[axis],) * 2))[0]
        x = np.moveaxis(np.tensordot(q * 0.6 ** np.arange(len(q)), x, axes=(1, axis)), 0, axis)
    lead = [-1, *train.case.view[1:]]
    for batch in (x, np.zeros_like(x), np.ones_like(x), 1e15 * x):
        feeds = [batch.astype(np.float32).reshape(lead), *given]
        expected, found = body(function, feeds), native(function, feeds)
        assert [value.shape for value in found] == [value.shape for value in expected]
        assert [value.dtype for value in found] == [value.dtype for value in expected]
        decoded = [kept.decode(dict(zip(names, made, strict=False)), saved, {}) for made in (found, expected)]
        scale = max(float(np.abs(batch).max()), 1e-30)
        assert np.abs(decoded[0] - decoded[1]).max() <= 1e-5 * scale
        assert float(found[len(names)]) == pytest.approx(float(expected[len(names)]), abs=1e-6)
        for u, v in zip(found[len(names) + 1 :], [found[0], *found[2 : len(names)]], strict=codec == "asi"):
            assert np.array_equal(u, v) and not np.shares_memory(u, v)
        for u in (found[0], *found[2 : len(names)]):
            assert np.abs(u.T.astype(np.float64) @ u - np.eye(u.shape[1])).max() <= 2e-6


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("name", ["conv2d", "linear of 3 axes, [c, o]"])
def test_the_torch_engine_runs_the_body_too(name: str, codec: str) -> None:
    train = Train.of(name, codec)
    function = train.library.functions[train.calls()[0].op_type]
    feeds = [train.case.batch()[0], *train.given(0.5).values()]
    setting = Setting(OPSET, lambda t: torch.from_numpy(np.array(numpy_helper.to_array(t))), torch.device("cpu"))
    program = Program(function.node, function.input, function.output, {}, setting)
    tensors = dict(zip(function.input, map(torch.from_numpy, feeds), strict=True))
    found = program.run(tensors, function.output)
    names = [tensor.name for tensor in train.option.codec.stored(train.slot.saved)]
    expected = dict(zip(names, body(function, feeds), strict=False))
    again = dict(zip(names, (found[name].numpy() for name in function.output), strict=False))
    decoded = [train.option.codec.decode(made, train.slot.saved, {}) for made in (again, expected)]
    assert relative_error(*decoded) <= 1e-4  # no spectrum here that would say more


@pytest.mark.parametrize("codec", CODECS)
def test_a_native_encoder_passes_on_what_is_not_finite(codec: str) -> None:
    train = Train.of("conv2d", codec)
    function = train.library.functions[train.calls()[0].op_type]
    x = train.case.batch()[0]
    x[1, 2, 3, 4] = np.nan
    found = native(function, [x, *train.given(0.5).values()])
    assert not np.isfinite(found[len(train.encoded.stored)])
    assert all(np.isfinite(factor).all() for factor in found[len(train.encoded.stored) + 1 :])


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("name", ["conv2d", "conv2d of one row", "conv2d several per group", "conv2d depthwise"])
def test_a_native_weight_gradient_equals_the_body_that_it_stands_for(name: str, codec: str) -> None:
    train = Train.of(name, codec)
    call = train.calls()[1]
    made = train.run(0.5, tuple(call.input))
    function = train.library.functions[call.op_type]
    feeds = [made[key] for key in call.input]
    (expected,), (found,) = body(function, feeds), native(function, feeds)
    assert found.shape == expected.shape
    assert relative_error(found, expected) <= 3e-6


@pytest.mark.parametrize("codec", CODECS)
def test_an_encoder_of_another_signature_has_no_native_kernel(codec: str) -> None:
    train = Train.of("conv2d", codec)
    function = onnx.FunctionProto()
    function.CopyFrom(train.library.functions[train.calls()[0].op_type])
    name = function.name
    for changed in (f"{name}_more", name.replace("6x7x5", "6x7x1"), name.replace("_g1", "_g2"), f"X{name}"):
        function.name = changed
        assert native_kernel(function) is None, changed
    function.name = name
    assert native_kernel(function) is not None
    function.output.append("another")
    assert native_kernel(function) is None
