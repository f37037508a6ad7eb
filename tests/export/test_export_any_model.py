"""Models of every make: what is trained, inputs and outputs by name, losses of one's own, trained batch-norm, tied
weights, tensors whose batch axis does not lead, and the ways to capture. The oracle is torch's autograd in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

import edgetune
from edgetune.agent.images import Decoder
from edgetune.bundle import Array, Bundle
from edgetune.errors import BundleError, DataError, ExportError, UsageError
from edgetune.export.source import Signature
from tests.autodiff.parity import relative_error

BATCH = 3
LIMIT = 1e-5


def session_of(bundle: Bundle, batch: int = BATCH, **options: Any) -> edgetune.TrainingSession:
    return edgetune.TrainingSession(bundle, edgetune.plan(bundle, batch=batch, epsilon=1.0), **options)


def drawn(shape: tuple[int, ...], seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def torch_gradients(model: nn.Module, loss: Callable[[nn.Module], torch.Tensor]) -> dict[str, Array]:
    """Return the gradients of ``loss(model)`` in float64, by the model's own names."""
    wide = copy.deepcopy(model).double()
    loss(wide).backward()  # type: ignore[no-untyped-call]
    return {name: p.grad.numpy() for name, p in wide.named_parameters() if p.grad is not None}


def assert_equal_gradients(found: Mapping[str, Array], expected: Mapping[str, Array], limit: float = LIMIT) -> None:
    errors = {name: relative_error(found[name], expected[name]) for name in found}
    assert max(errors.values()) <= limit, errors


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make().eval()


# -- a small transformer: tokens, positions, windows, several inputs and outputs ---------------------------------------


class Tokens(nn.Module):
    """Patches and a class token, attention with the batch on the third axis, windows of k times the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.positions = nn.Parameter(torch.randn(1, 5, 8) * 0.1)
        self.patch = nn.Conv2d(1, 8, 4, stride=4)
        self.norm = nn.LayerNorm(8)
        self.qkv = nn.Linear(8, 24)
        self.mix = nn.Linear(8, 8)
        self.windows = nn.Linear(8, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.patch(image).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.positions
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        attention = torch.softmax(q @ k.transpose(-1, -2) / 2.0, -1) @ v
        x = x + self.mix(attention.transpose(1, 2).flatten(2))
        pairs = x[:, 1:].reshape(-1, 2, 8)  # two windows of two patches per image
        pairs = torch.tanh(self.windows(pairs)) + pairs
        result: torch.Tensor = self.head(x[:, 0] + pairs.reshape(-1, 4, 8).mean(1))
        return result


@pytest.mark.parametrize(
    "options",
    [
        {"last": "all"},
        {"last": 1},
        {"last": 2},
        {"last": 3},
        {"train": "windows"},
        {"train": "token|positions"},
        {"train": r"norm\.|qkv.bias"},
        {"last": 2, "freeze_head": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("codec", ["dense", "hosvd"])
def test_what_is_trained(tmp_path: Path, options: dict[str, Any], codec: str) -> None:
    model = seeded(Tokens)
    bundle = edgetune.export(model, torch.zeros(2, 1, 8, 8), tmp_path / "b", codec=codec, **options)
    x, y = drawn((BATCH, 1, 8, 8)), np.array([0, 3, 1])
    expected = torch_gradients(
        model, lambda m: nn.functional.cross_entropy(m(torch.from_numpy(x).double()), torch.from_numpy(y))
    )
    names = {
        "{'last': 'all'}": set(expected),
        "{'last': 1}": {"windows.weight", "windows.bias", "head.weight", "head.bias"},
        "{'train': 'windows'}": {"windows.weight", "windows.bias"},
        "{'train': 'token|positions'}": {"token", "positions"},
        "{'last': 2, 'freeze_head': True}": {"windows.weight", "windows.bias", "mix.weight", "mix.bias"},
    }
    session = session_of(bundle)
    loss, found = session.gradients(x, y)
    assert set(found) == names.get(str(options), set(found)) and found
    assert_equal_gradients(found, expected, LIMIT if codec == "dense" else 1e-4)
    logits = model(torch.from_numpy(x)).detach().numpy()
    np.testing.assert_allclose(session.predict(x), logits, rtol=1e-4, atol=1e-5)
    assert session.step(x, y) == pytest.approx(loss, rel=1e-6) and session.report.correct is not None


def test_samples_do_not_depend_on_their_place_in_the_batch(tmp_path: Path) -> None:
    """Features are computed in micro-batches, so a trunk must not know where in the batch a sample stands."""
    bundle = edgetune.export(seeded(Tokens), torch.zeros(2, 1, 8, 8), tmp_path / "b", last=1, codec="dense")
    assert any(feature.name.endswith(".by_sample") for feature in bundle.manifest.features) or bundle.manifest.features
    session = session_of(bundle, batch=9)
    x = drawn((9, 1, 8, 8))
    together = session.features(x)
    apart = [session.features(x[i : i + 1]) for i in range(9)]
    for i, feature in enumerate(together):
        np.testing.assert_allclose(feature, np.concatenate([one[i] for one in apart]), rtol=1e-5, atol=1e-6)


class TwoByTwo(nn.Module):
    """An image and a vector in; classes and a score out."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Conv2d(1, 4, 3)
        self.side = nn.Linear(5, 4)
        self.classes = nn.Linear(4, 3)
        self.score = nn.Linear(4, 1)

    def forward(self, image: torch.Tensor, side: torch.Tensor) -> dict[str, torch.Tensor]:
        x = torch.relu(self.image(image)).mean((2, 3)) + self.side(side)
        return {"classes": self.classes(x), "score": self.score(x)}


class Joint(nn.Module):
    """Cross-entropy of one output plus the squared other."""

    def forward(self, outputs: dict[str, torch.Tensor], targets: torch.Tensor) -> torch.Tensor:
        penalty = (outputs["score"] ** 2).sum() / outputs["score"].shape[0]
        return nn.functional.cross_entropy(outputs["classes"], targets) + 0.1 * penalty


@pytest.mark.parametrize("named", [True, False])
def test_several_inputs_and_outputs_by_name(tmp_path: Path, named: bool) -> None:
    model = seeded(TwoByTwo)
    examples = {"image": torch.zeros(2, 1, 6, 6), "side": torch.zeros(2, 5)}
    bundle = edgetune.export(
        model, examples if named else list(examples.values()), tmp_path / "b", last="all", outputs=["classes", "score"],
        train="image|side|classes",
    )  # fmt: skip
    assert [spec.name for spec in bundle.manifest.inputs] == ["image", "side"]
    x = {"image": drawn((BATCH, 1, 6, 6)), "side": drawn((BATCH, 5), 1)}
    y = np.array([2, 0, 1])
    session = session_of(bundle)
    _, found = session.gradients(x, y)
    expected = torch_gradients(
        model,
        lambda m: nn.functional.cross_entropy(
            m(*(torch.from_numpy(v).double() for v in x.values()))["classes"], torch.from_numpy(y)
        ),
    )
    assert_equal_gradients(found, expected)
    outputs = session.outputs(x)
    for name, value in model(*map(torch.from_numpy, x.values())).items():
        np.testing.assert_allclose(outputs[name], value.detach().numpy(), rtol=1e-5, atol=1e-6)
    with pytest.raises(DataError, match="image, side"):
        session.predict({"image": x["image"]})
    with pytest.raises(DataError, match="different batches"):
        session.predict({"image": x["image"], "side": x["side"][:1]})


def test_a_loss_of_ones_own_is_traced_with_the_model(tmp_path: Path) -> None:
    model = seeded(TwoByTwo)
    examples = [torch.zeros(2, 1, 6, 6), torch.zeros(2, 5)]
    bundle = edgetune.export(
        model, examples, tmp_path / "b", last="all", codec="hosvd", loss=Joint(), outputs=["classes"],
        example_target=torch.zeros(2, dtype=torch.int64),
    )  # fmt: skip
    assert bundle.manifest.loss.kind == "traced" and not bundle.manifest.classifies
    x = {"image": drawn((BATCH, 1, 6, 6)), "side": drawn((BATCH, 5), 1)}
    y = np.array([2, 0, 1])

    def loss(m: nn.Module) -> torch.Tensor:
        result: torch.Tensor = Joint()(m(*(torch.from_numpy(v).double() for v in x.values())), torch.from_numpy(y))
        return result

    session = session_of(bundle)
    value, found = session.gradients(x, y)
    expected = torch_gradients(model, loss)
    assert set(found) == set(expected)
    assert_equal_gradients(found, expected, 1e-4)
    with torch.no_grad():
        assert value == pytest.approx(float(loss(copy.deepcopy(model).double())), rel=1e-6)
    # the last batch may be shorter: the mean is over its own samples
    short = {name: array[:1] for name, array in x.items()}
    assert session.gradients(short, y[:1])[0] != pytest.approx(value)
    session.step(x, y)
    assert session.report.correct is None


class Rows(nn.Module):
    """A loss that forgets to be one number."""

    def forward(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return (outputs - targets) ** 2


def small() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2))


def test_a_loss_that_is_not_one_number_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"returns \[2, 2\]; expected one floating-point number"):
        edgetune.export(
            seeded(small), torch.zeros(2, 1, 6, 6), tmp_path / "b", loss=Rows(), example_target=torch.zeros(2, 2)
        )
    with pytest.raises(UsageError, match="does not run on targets"):
        edgetune.export(
            seeded(small), torch.zeros(2, 1, 6, 6), tmp_path / "b", loss=Rows(), example_target=torch.zeros(2, 7)
        )
    with pytest.raises(UsageError, match="--target"):
        edgetune.export(seeded(small), torch.zeros(2, 1, 6, 6), tmp_path / "b", loss=Rows())
    assert list(tmp_path.iterdir()) == []


# -- losses by name through a whole bundle ----------------------------------------------------------------------------

Expected = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
NAMED: dict[str, tuple[dict[str, Any], Array, Expected]] = {
    "mse": ({"loss": "mse"}, drawn((BATCH, 2), 5), nn.functional.mse_loss),
    "binary_cross_entropy": (
        {"loss": "binary_cross_entropy"},
        (drawn((BATCH, 2), 5) > 0).astype(np.float32),
        nn.functional.binary_cross_entropy_with_logits,
    ),
    "weighted": (
        {"class_weights": (0.2, 1.5), "ignore_index": -100, "label_smoothing": 0.1},
        np.array([0, -100, 1]),
        lambda z, y: nn.functional.cross_entropy(
            z, y, weight=torch.tensor([0.2, 1.5], dtype=torch.float64), ignore_index=-100, label_smoothing=0.1
        ),
    ),
}


@pytest.mark.parametrize("name", NAMED)
def test_losses_by_name(tmp_path: Path, name: str) -> None:
    options, y, expected_loss = NAMED[name]
    model = seeded(small)
    bundle = edgetune.export(model, torch.zeros(2, 1, 6, 6), tmp_path / "b", last=1, codec="dense", **options)
    x = drawn((BATCH, 1, 6, 6))
    targets = torch.from_numpy(y)
    wide = targets.double() if targets.is_floating_point() else targets
    expected = torch_gradients(model, lambda m: expected_loss(m(torch.from_numpy(x).double()), wide))
    _, found = session_of(bundle).gradients(x, y)
    assert_equal_gradients(found, expected)


def test_targets_of_another_shape_or_type_are_refused(tmp_path: Path) -> None:
    bundle = edgetune.export(seeded(small), torch.zeros(2, 1, 6, 6), tmp_path / "b", last=1, loss="mse")
    session, x = session_of(bundle), drawn((BATCH, 1, 6, 6))
    with pytest.raises(DataError, match=r"expected targets \[batch, 2\]"):
        session.step(x, np.zeros((BATCH, 3), np.float32))
    with pytest.raises(BundleError, match=r"one label per sample.*mse"):
        Decoder(bundle.manifest)


# -- trained batch-norm -----------------------------------------------------------------------------------------------


def normed() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4, momentum=0.3), nn.ReLU(),
        nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(24, 3),
    )  # fmt: skip


def with_statistics(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(3)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.copy_(torch.randn(module.running_mean.shape, generator=generator) * 0.2)
            module.running_var.copy_(torch.rand(module.running_var.shape, generator=generator) + 0.5)
            module.weight.data.uniform_(0.5, 1.5, generator=generator)
            module.bias.data.uniform_(-0.3, 0.3, generator=generator)
    return model


def test_trained_batch_norm_goes_on_as_in_torch(tmp_path: Path) -> None:
    """Three steps: parameters, running statistics and predictions are those of torch in training mode."""
    model = with_statistics(seeded(normed))
    bundle = edgetune.export(
        model, torch.zeros(2, 1, 6, 6), tmp_path / "b", last="all", codec="dense", batch_norm="trained"
    )
    assert {b.name for b in bundle.manifest.buffers} == {
        "1.running_mean", "1.running_var", "4.running_mean", "4.running_var",
    }  # fmt: skip
    hyper = {"learning_rate": 0.05, "momentum": 0.9}
    session = session_of(bundle, batch=8, hyper=hyper)
    other = copy.deepcopy(model).double().train()
    optimizer = torch.optim.SGD(other.parameters(), lr=0.05, momentum=0.9)
    for step in range(3):
        x, y = drawn((8 - step, 1, 6, 6), step), np.arange(8 - step) % 3
        optimizer.zero_grad()
        expected = nn.functional.cross_entropy(other(torch.from_numpy(x).double()), torch.from_numpy(y))
        expected.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        assert session.step(x, y) == pytest.approx(float(expected.detach()), rel=1e-5)
    state = session.state()
    for name, value in other.state_dict().items():
        if "num_batches" not in name:
            key = f"buffer/{name}" if "running" in name else name
            assert relative_error(state[key], value.numpy()) <= 1e-5, name
    x = drawn((5, 1, 6, 6), 9)
    logits = other.eval()(torch.from_numpy(x).double()).detach().numpy()
    np.testing.assert_allclose(session.predict(x), logits, rtol=1e-4, atol=1e-5)
    # a resumed session goes on from the same statistics
    resumed = session_of(bundle, batch=8, hyper=hyper)
    resumed.load_state(state)
    np.testing.assert_array_equal(resumed.predict(x), session.predict(x))


def test_a_step_without_a_finite_loss_leaves_the_statistics(tmp_path: Path) -> None:
    bundle = edgetune.export(
        with_statistics(seeded(normed)), torch.zeros(2, 1, 6, 6), tmp_path / "b", last="all", batch_norm="trained"
    )
    session = session_of(bundle)
    before = session.state()
    session.step(np.full((BATCH, 1, 6, 6), np.nan, np.float32), np.zeros(BATCH, np.int64))
    assert not session.report.applied
    assert all(np.array_equal(value, before[name]) for name, value in session.state().items() if name != "step")


def test_frozen_statistics_with_trained_scale_and_shift(tmp_path: Path) -> None:
    model = with_statistics(seeded(normed))
    bundle = edgetune.export(model, torch.zeros(2, 1, 6, 6), tmp_path / "b", train=r"^(1|4)\.", codec="dense")
    x, y = drawn((BATCH, 1, 6, 6)), np.array([0, 2, 1])
    _, found = session_of(bundle).gradients(x, y)
    assert set(found) == {"1.weight", "1.bias", "4.weight", "4.bias"} and not bundle.manifest.buffers
    expected = torch_gradients(
        model, lambda m: nn.functional.cross_entropy(m(torch.from_numpy(x).double()), torch.from_numpy(y))
    )
    assert_equal_gradients(found, expected)


# -- shared weights ---------------------------------------------------------------------------------------------------


class Tied(nn.Module):
    """An embedding whose table is also the last layer's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.middle = nn.Linear(6, 6)
        self.output = nn.Linear(6, 11, bias=False)
        self.output.weight = self.embedding.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.output(torch.tanh(self.middle(self.embedding(ids))).mean(1))
        return result


@pytest.mark.parametrize("codec", ["dense", "hosvd"])
def test_a_tied_weight_is_one_parameter_with_the_sum_of_its_gradients(tmp_path: Path, codec: str) -> None:
    model = seeded(Tied)
    ids = np.random.default_rng(0).integers(0, 11, (BATCH, 4))
    bundle = edgetune.export(model, torch.from_numpy(ids), tmp_path / "b", last="all", codec=codec)
    y = np.array([1, 10, 4])
    expected = torch_gradients(
        model, lambda m: nn.functional.cross_entropy(m(torch.from_numpy(ids)), torch.from_numpy(y))
    )
    _, found = session_of(bundle).gradients(ids, y)
    assert set(found) == set(expected) == {"embedding.weight", "middle.weight", "middle.bias"}
    assert_equal_gradients(found, expected, 1e-4)


# -- ways to capture --------------------------------------------------------------------------------------------------


class Fickle(nn.Module):
    """Branches on a value of its data, which torch.export cannot follow."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 6)
        self.second = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.first(x))
        if float(x.detach().sum()) < -1.0:  # never, behind a ReLU
            x = -x
        result: torch.Tensor = self.second(x)
        return result


def test_what_torch_export_cannot_capture_is_traced_and_said(tmp_path: Path) -> None:
    model = seeded(Fickle)
    bundle = edgetune.export(model, torch.zeros(2, 5), tmp_path / "b", last="all", codec="dense")
    assert "tracing, because torch.export failed" in bundle.manifest.made_by
    x, y = drawn((BATCH, 5)), np.array([0, 2, 1])
    expected = torch_gradients(
        model, lambda m: nn.functional.cross_entropy(m(torch.from_numpy(x).double()), torch.from_numpy(y))
    )
    _, found = session_of(bundle).gradients(x, y)
    assert set(found) == set(expected)
    assert_equal_gradients(found, expected)


class Counting(nn.Module):
    """Divides by the size of the batch, as a number that an exporter may write down."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.first = nn.Linear(5, 3)
        self.how = how

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.how == "branch" and float(x.detach().sum()) > 1e9:  # torch.export cannot follow it
            x = -x
        result: torch.Tensor = self.first(x) / len(x)
        return result


@pytest.mark.parametrize("how", ["plain", "branch"])
def test_a_batch_size_that_was_written_down_is_refused(tmp_path: Path, how: str) -> None:
    with pytest.raises(ExportError, match="batch"):
        edgetune.export(seeded(lambda: Counting(how)), torch.zeros(2, 5), tmp_path / "b", last=0)
    assert list(tmp_path.iterdir()) == []


def test_an_exported_program_is_a_source(tmp_path: Path) -> None:
    model = seeded(small)
    batch = torch.export.Dim("batch")
    program = torch.export.export(model, (torch.zeros(2, 1, 6, 6),), dynamic_shapes=({0: batch},))
    torch.export.save(program, tmp_path / "model.pt2")
    bundle = edgetune.export(str(tmp_path / "model.pt2"), None, tmp_path / "b", last="all", codec="dense")
    x, y = drawn((BATCH, 1, 6, 6)), np.array([0, 1, 1])
    expected = torch_gradients(
        model, lambda m: nn.functional.cross_entropy(m(torch.from_numpy(x).double()), torch.from_numpy(y))
    )
    _, found = session_of(bundle).gradients(x, y)
    assert set(found) == set(expected)
    assert_equal_gradients(found, expected)
    (tmp_path / "bad.pt2").write_bytes(b"no archive")
    with pytest.raises(ExportError, match=r"bad.pt2.*exported program"):
        edgetune.export(str(tmp_path / "bad.pt2"), None, tmp_path / "c")


def test_a_dynamic_axis_besides_the_batch_is_refused(tmp_path: Path) -> None:
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", "time", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(drawn((4, 3)), "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    with pytest.raises(ExportError, match="'x' has an axis of unknown extent besides the batch"):
        edgetune.export(model, None, tmp_path / "b")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"last": 0, "freeze_head": True}, "nothing is trained"),
        ({"train": "nothing_of_that_name"}, r"matches no parameter.*windows\.weight"),
        ({"train": "("}, "no regular expression"),
        ({"last": "most"}, "--last most"),
        ({"outputs": ["logits"]}, "no output logits"),
        ({"batch_norm": "thawed"}, "frozen, trained"),
    ],
)
def test_choices_that_cannot_be_met(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        edgetune.export(seeded(Tokens), torch.zeros(2, 1, 8, 8), tmp_path / "b", **options)
    assert list(tmp_path.iterdir()) == []


def test_a_trained_tensor_that_the_loss_does_not_reach_is_no_parameter(tmp_path: Path) -> None:
    model = seeded(TwoByTwo)
    examples = [torch.zeros(2, 1, 6, 6), torch.zeros(2, 5)]
    with pytest.raises(UsageError, match="matches no parameter"):
        edgetune.export(model, examples, tmp_path / "b", train="score", outputs=["classes", "score"])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("3,224,224", Signature((3, 224, 224))),
        ("ids=16:int64", Signature((16,), "int64", "ids", True)),
        (":int64", Signature((), "int64")),
    ],
)
def test_signatures_as_text(text: str, expected: Signature) -> None:
    assert Signature.parse(text) == expected


@pytest.mark.parametrize("text", ["3,a", "x=0,2", "4:float99"])
def test_signatures_that_are_none(text: str) -> None:
    with pytest.raises(UsageError, match=text.partition("=")[0]):
        Signature.parse(text)


def test_a_gemm_of_a_transposed_input(tmp_path: Path) -> None:
    graph = helper.make_graph(
        [
            helper.make_node("Transpose", ["x"], ["t"], perm=[1, 0]),
            helper.make_node("Gemm", ["t", "w"], ["y"], transA=1),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(drawn((4, 3)), "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    bundle = edgetune.export(model, None, tmp_path / "b", last=0)
    x, y = drawn((BATCH, 4)), np.array([0, 2, 1])
    weight = torch.from_numpy(drawn((4, 3))).double().requires_grad_(True)
    loss = nn.functional.cross_entropy(torch.from_numpy(x).double() @ weight, torch.from_numpy(y))
    loss.backward()  # type: ignore[no-untyped-call]
    _, found = session_of(bundle).gradients(x, y)
    assert weight.grad is not None and relative_error(found["w"], weight.grad.numpy()) <= LIMIT


def test_external_onnx_tensors_may_be_called_like_an_output(tmp_path: Path) -> None:
    """An ONNX file from elsewhere: its own names, a fixed batch, a scalar among its initializers."""
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "w"], ["h"]),
            helper.make_node("Mul", ["h", "half"], ["logits"]),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, 3])],
        [numpy_helper.from_array(drawn((4, 3)), "w"), numpy_helper.from_array(np.array(0.5, np.float32), "half")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    onnx.checker.check_model(model)
    bundle = edgetune.export(model, None, tmp_path / "b", last=0, codec="dense")
    x = drawn((BATCH, 4))
    np.testing.assert_allclose(session_of(bundle).predict(x), 0.5 * (x @ drawn((4, 3))), rtol=1e-5, atol=1e-6)
    assert [spec.name for spec in bundle.manifest.outputs] == ["logits"]
