"""Every loss, run by onnxruntime in float32, against torch's own definition and autograd in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor
from torch.nn import functional

from edgetune.autodiff.builder import DOMAIN, IR_VERSION, OPSET, FunctionLibrary, GraphBuilder
from edgetune.autodiff.losses import LOSSES, EmittedLoss, Loss, LossConfig, loss_from, loss_named
from edgetune.bundle import Array
from edgetune.errors import ExportError, UsageError

TOLERANCE = 1e-5
BATCH = 3


def build(loss: Loss, shape: tuple[int, ...]) -> onnx.ModelProto:
    """Return a model of ``loss`` alone, for outputs [b, *shape] and the targets that it asks for."""
    g, library = GraphBuilder(), FunctionLibrary()
    target_shape, dtype = loss.target(shape)
    emitted = loss.emit(g, library, "z", shape, "t")
    kinds = {"float32": TensorProto.FLOAT, "int64": TensorProto.INT64}
    outputs = [emitted.loss, emitted.gradient, *([emitted.correct] if emitted.correct else [])]
    graph = helper.make_graph(
        g.nodes,
        "loss",
        [
            helper.make_tensor_value_info("z", TensorProto.FLOAT, ["b", *shape]),
            helper.make_tensor_value_info("t", kinds[dtype], ["b", *target_shape]),
        ],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(value, name) for name, value in g.constants.items()],
    )
    return helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)],
        functions=list(library.functions.values()),
        ir_version=IR_VERSION,
    )


def run(loss: Loss, shape: tuple[int, ...], z: Array, t: Array) -> list[Array]:
    """Return the loss, the gradient and, where there is one, the number of right answers."""
    session = onnxruntime.InferenceSession(build(loss, shape).SerializeToString(), providers=["CPUExecutionProvider"])
    return list(session.run(None, {"z": z, "t": t}))


def draw(loss: Loss, shape: tuple[int, ...], classes: int, seed: int, batch: int = BATCH) -> tuple[Array, Array]:
    """Return outputs, large ones behind the first sample, and targets, a third ignored where one may be."""
    rng = np.random.default_rng(seed)
    # The first sample is never saturated, or the whole gradient might be as small as its rounding.
    scale = np.array([1.0, *rng.choice([1.0, 4.0, 30.0], batch - 1)]).reshape(-1, *[1] * len(shape))
    z = (rng.standard_normal((batch, *shape)) * scale).astype(np.float32)
    target_shape, dtype = loss.target(shape)
    if dtype == "float32":
        return z, rng.random((batch, *target_shape)).astype(np.float32)
    t = rng.integers(0, classes, (batch, *target_shape))
    ignored = getattr(loss, "config", LossConfig()).ignore_index
    if ignored is not None:
        t[rng.random(t.shape) < 0.3] = ignored
        t.flat[0] = (ignored + 1) % classes  # one at least counts
    return z, t


def torch_cross_entropy(z: Tensor, t: Tensor, config: LossConfig) -> Tensor:
    weight = torch.tensor(config.class_weights, dtype=z.dtype) if config.class_weights else None
    ignore = -100 if config.ignore_index is None else config.ignore_index
    return functional.cross_entropy(z, t, weight, ignore_index=ignore, label_smoothing=config.label_smoothing)


def torch_binary_cross_entropy(z: Tensor, t: Tensor, config: LossConfig) -> Tensor:
    positive = None
    if config.class_weights:
        positive = torch.tensor(config.class_weights, dtype=z.dtype).reshape(-1, *[1] * (z.ndim - 2))
    return functional.binary_cross_entropy_with_logits(z, t.to(z.dtype), pos_weight=positive)


def torch_mse(z: Tensor, t: Tensor, config: LossConfig) -> Tensor:
    assert config == LossConfig("mse")
    return functional.mse_loss(z, t.to(z.dtype))


def torch_dice(z: Tensor, t: Tensor, config: LossConfig) -> Tensor:
    """Dice by its definition, sample by sample and class by class."""
    smooth = 1.0 if config.smooth is None else config.smooth
    p = torch.cat([1 - z.sigmoid(), z.sigmoid()], 1) if z.shape[1] == 1 else z.softmax(1)
    terms = []
    for b in range(len(z)):
        counts = torch.ones_like(t[b], dtype=torch.bool) if config.ignore_index is None else t[b] != config.ignore_index
        for k in [1] if z.shape[1] == 1 else range(z.shape[1]):
            probability, truth = p[b, k][counts], (t[b] == k)[counts].to(z.dtype)
            both = (probability * truth).sum()
            terms.append((2 * both + smooth) / (probability.sum() + truth.sum() + smooth))
    return 1 - torch.stack(terms).mean()


ORACLES: dict[str, Callable[[Tensor, Tensor, LossConfig], Tensor]] = {
    "cross_entropy": torch_cross_entropy,
    "binary_cross_entropy": torch_binary_cross_entropy,
    "mse": torch_mse,
    "dice": torch_dice,
}


def errors(loss: Loss, config: LossConfig, shape: tuple[int, ...], z: Array, t: Array) -> tuple[float, float]:
    """Return the errors of the value and of the gradient against torch in float64, relative to their sizes."""
    exact = torch.from_numpy(z).double().requires_grad_()
    expected = ORACLES[config.kind](exact, torch.from_numpy(t), config)
    expected.backward()  # type: ignore[no-untyped-call]
    assert exact.grad is not None
    value, gradient = run(loss, shape, z, t)[:2]
    assert value.shape == ()
    assert gradient.shape == z.shape
    assert gradient.dtype == np.float32
    difference = np.linalg.norm(gradient - exact.grad.numpy()) / max(float(exact.grad.norm()), 1e-30)
    scale = max(abs(float(expected.detach())), 1.0)  # a loss near 0 is a difference of numbers near 1
    return abs(float(value) - float(expected.detach())) / scale, float(difference)


PIXELS = st.lists(st.integers(1, 5), max_size=3).map(tuple)
WEIGHTS = st.sampled_from([0.0, 0.25, 1.0, 3.5])


@st.composite
def cases(draw_: st.DrawFn) -> tuple[LossConfig, tuple[int, ...], int]:
    """Return a loss with any legal options, the shape of an output, and the number of classes of its targets."""
    kind = draw_(st.sampled_from(sorted(LOSSES)))
    pixels = draw_(PIXELS)
    classes = draw_(st.integers(2, 6))
    if kind == "mse":
        return LossConfig(kind), draw_(st.sampled_from([pixels, (classes, *pixels)])), classes
    weights = tuple(draw_(st.lists(WEIGHTS, min_size=classes, max_size=classes)))
    given = weights if draw_(st.booleans()) and sum(w > 0 for w in weights) > 1 else ()
    if kind == "binary_cross_entropy":
        return LossConfig(kind, class_weights=given), (classes, *pixels), classes
    ignore = draw_(st.sampled_from([None, -100, 255, classes - 1]))
    if kind == "dice":
        smooth = draw_(st.sampled_from([None, 1e-3, 2.0]))
        channels = draw_(st.sampled_from([1, classes]))
        shape = (channels, *(pixels or (3,)))
        return LossConfig(kind, ignore_index=ignore, smooth=smooth), shape, max(2, channels)
    smoothing = draw_(st.sampled_from([0.0, 0.1, 0.5]))
    return LossConfig(kind, smoothing, given, ignore), (classes, *pixels), classes


@settings(max_examples=120, deadline=None)
@given(cases(), st.integers(0, 2**32 - 1))
def test_value_and_gradient_are_torchs(case: tuple[LossConfig, tuple[int, ...], int], seed: int) -> None:
    config, shape, classes = case
    loss = loss_from(config)
    z, t = draw(loss, shape, classes, seed)
    if config.class_weights and config.kind == "cross_entropy":
        t.flat[0] = int(np.argmax([w * (k != config.ignore_index) for k, w in enumerate(config.class_weights)]))
    value, gradient = errors(loss, config, shape, z, t)
    assert max(value, gradient) <= TOLERANCE


@pytest.mark.parametrize(
    "config",
    [
        LossConfig("cross_entropy"),
        LossConfig("cross_entropy", 0.2, (1.0, 0.5, 2.0), 2),
        LossConfig("binary_cross_entropy", class_weights=(1.0, 0.5, 2.0)),
        LossConfig("dice"),
    ],
    ids=lambda config: str(config.kind),
)
def test_large_outputs_do_not_overflow(config: LossConfig) -> None:
    loss, shape = loss_from(config), (3, 4)
    z, t = draw(loss, shape, 3, 1)
    z = np.where(z > 0, 1e4, -1e4).astype(np.float32)
    value, gradient = run(loss, shape, z, t)[:2]
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()
    if config.kind != "dice":  # Dice is flat there: no gradient to compare
        assert max(errors(loss, config, shape, z, t)) <= TOLERANCE


def test_right_answers_are_counted_among_those_that_are_not_ignored() -> None:
    z = np.array([[3, 0, 1], [0, 3, 1], [0, 1, 3], [5, 1, 3]], np.float32)
    t = np.array([0, 0, 2, 255])
    assert run(loss_from(LossConfig(ignore_index=255)), (3,), z, t)[2] == 2
    assert run(loss_from(LossConfig(class_weights=(0.0, 1.0, 2.0))), (3,), z[:3], t[:3])[2] == 2
    assert run(loss_named("cross_entropy"), (3,), z[:3], t[:3])[2] == 2


def test_without_a_target_that_counts_cross_entropy_is_nan_as_in_torch_and_dice_is_zero() -> None:
    z, t = np.ones((2, 3, 4), np.float32), np.full((2, 4), 255)
    value, gradient = run(loss_from(LossConfig(ignore_index=255)), (3, 4), z, t)
    assert np.isnan(value)
    assert np.isnan(gradient).all()
    assert np.isnan(float(functional.cross_entropy(torch.from_numpy(z), torch.from_numpy(t), ignore_index=255)))
    value, gradient = run(loss_from(LossConfig("dice", ignore_index=255)), (3, 4), z, t)
    assert value == 0
    assert not gradient.any()


@dataclass(frozen=True)
class _Wrong:
    """A loss whose gradient, or value, is that of ``own`` after ``change``."""

    own: Loss
    change: Callable[[GraphBuilder, EmittedLoss], EmittedLoss]

    def target(self, output: tuple[int, ...]) -> tuple[tuple[int, ...], str]:
        return self.own.target(output)

    def emit(
        self, g: GraphBuilder, library: FunctionLibrary, output: str, shape: tuple[int, ...], targets: str
    ) -> EmittedLoss:
        return self.change(g, self.own.emit(g, library, output, shape, targets))


def _scaled_gradient(g: GraphBuilder, made: EmittedLoss) -> EmittedLoss:
    return EmittedLoss(made.loss, g.op("Mul", made.gradient, g.const(1.0001)))


def _shifted_gradient(g: GraphBuilder, made: EmittedLoss) -> EmittedLoss:
    return EmittedLoss(made.loss, g.op("Add", made.gradient, g.const(1e-5)))


def _scaled_value(g: GraphBuilder, made: EmittedLoss) -> EmittedLoss:
    return EmittedLoss(g.op("Mul", made.loss, g.const(1.0001)), made.gradient)


@pytest.mark.parametrize("kind", sorted(LOSSES))
@pytest.mark.parametrize("change", [_scaled_gradient, _shifted_gradient, _scaled_value])
def test_a_wrong_formula_is_noticed(kind: str, change: Callable[[GraphBuilder, EmittedLoss], EmittedLoss]) -> None:
    loss, shape = loss_named(kind), (3, 4)
    z, t = draw(loss, shape, 3, 0)
    assert max(errors(loss, LossConfig(kind), shape, z, t)) <= TOLERANCE
    assert max(errors(_Wrong(loss, change), LossConfig(kind), shape, z, t)) > TOLERANCE


@pytest.mark.parametrize(
    ("used", "meant"),
    [
        # The mean over all targets instead of the weights' sum, smoothing without weights, and the like: what one gets
        # by forgetting an option is another number.
        (LossConfig(), LossConfig(ignore_index=1)),
        (LossConfig(ignore_index=1), LossConfig(class_weights=(1.0, 2.0, 0.5), ignore_index=1)),
        (LossConfig(class_weights=(1.0, 2.0, 0.5)), LossConfig(label_smoothing=0.1, class_weights=(1.0, 2.0, 0.5))),
        (LossConfig("dice", smooth=1.0), LossConfig("dice", smooth=0.5)),
        (LossConfig("dice"), LossConfig("dice", ignore_index=1)),
        (LossConfig("binary_cross_entropy"), LossConfig("binary_cross_entropy", class_weights=(1.0, 2.0, 0.5))),
    ],
)
def test_a_forgotten_option_is_noticed(used: LossConfig, meant: LossConfig) -> None:
    loss, shape = loss_from(meant), (3, 4)
    z, t = draw(loss, shape, 3, 0)
    assert max(errors(loss, meant, shape, z, t)) <= TOLERANCE
    assert min(errors(loss_from(used), meant, shape, z, t)) > 10 * TOLERANCE


def emitted_operators(config: LossConfig, shape: Sequence[int]) -> list[onnx.NodeProto]:
    model = build(loss_from(config), tuple(shape))
    assert len(model.graph.node) == 1, "a loss is one call of one function"
    (function,) = model.functions
    return list(function.node)


@pytest.mark.parametrize("shape", [(5,), (5, 4, 3)])
@pytest.mark.parametrize("kind", sorted(LOSSES))
def test_no_shape_is_read_at_run_time(kind: str, shape: tuple[int, ...]) -> None:
    if kind == "dice" and len(shape) == 1:
        shape = (5, 4)
    operators = {node.op_type for node in emitted_operators(LossConfig(kind), shape)}
    assert not operators & {"Shape", "Size", "ConstantOfShape", "OneHot", "NonZero"}


def test_unused_options_cost_nothing() -> None:
    plain = build(loss_named("cross_entropy"), (10,))
    assert [f.name for f in plain.functions] == ["SoftmaxCrossEntropy_10_0"]
    assert len(plain.functions[0].node) == 22
    pixels = {node.op_type for node in emitted_operators(LossConfig(), (10, 4, 4))}
    # No tensor of the output's size is made of the targets: they are gathered and scattered along one channel.
    assert {"GatherElements", "ScatterElements"} <= pixels
    assert not pixels & {"Where", "Sub", "Add"}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LossConfig("hinge"), r"no loss 'hinge'; choose one of: binary_cross_entropy, cross_entropy, dice, mse"),
        (LossConfig(label_smoothing=1.0), r"out of range: expected 0 <= value < 1"),
        (LossConfig(label_smoothing=-0.1), r"out of range"),
        (LossConfig(class_weights=(1.0, -1.0)), r"expected finite values of at least 0"),
        (LossConfig(class_weights=(0.0, 0.0)), r"leave nothing to learn"),
        (LossConfig(smooth=1.0), r"takes label_smoothing, class_weights, ignore_index; it has no smooth"),
        (LossConfig("mse", ignore_index=3), r"takes no options; it has no ignore index"),
        (LossConfig("binary_cross_entropy", label_smoothing=0.1), r"no label smoothing"),
        (LossConfig("dice", class_weights=(1.0, 2.0)), r"no class weights"),
        (LossConfig("dice", smooth=0.0), r"expected a finite value above 0"),
    ],
)
def test_options_that_do_not_suit_are_refused(config: LossConfig, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        loss_from(config)


@pytest.mark.parametrize(
    ("config", "shape", "kind", "message"),
    [
        (LossConfig(), (), ExportError, r"\[batch\]; cross_entropy needs \[batch, classes, \.\.\.\]"),
        (LossConfig(), (1, 4, 4), ExportError, r"\[batch, 1, 4, 4\]; .* choose binary_cross_entropy"),
        (LossConfig(class_weights=(1.0, 2.0)), (3,), UsageError, r"2 class weights .* 3 classes"),
        (
            LossConfig("binary_cross_entropy", class_weights=(1.0, 2.0)),
            (3, 4),
            UsageError,
            r"2 class weights .* 3 chan",
        ),
        (LossConfig("dice"), (3,), ExportError, r"\[batch, 3\]; dice needs"),
    ],
)
def test_outputs_that_do_not_suit_are_refused(
    config: LossConfig, shape: tuple[int, ...], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        loss_from(config).target(shape)
    with pytest.raises(kind, match=message):
        loss_from(config).emit(GraphBuilder(), FunctionLibrary(), "z", shape, "t")
