"""How a train graph writes convolutions: as products or directly, with the same gradients."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

import edgetune
from edgetune.bundle import Bundle
from edgetune.errors import UsageError

WIDE, SIDE, BATCH = 128, 6, 3


class Mixed(nn.Module):
    """A pointwise, a depthwise and a 3 × 3 layer that is wide enough for Winograd's form, each with a batch-norm."""

    def __init__(self) -> None:
        super().__init__()
        self.expand = nn.Conv2d(8, WIDE, 1)
        self.depth = nn.Conv2d(WIDE, WIDE, 3, padding=1, groups=WIDE, bias=False)
        self.wide = nn.Conv2d(WIDE, WIDE, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(WIDE) for _ in range(3))
        self.fc = nn.Linear(WIDE, 4)

    def forward(self, x: Tensor) -> Tensor:
        for layer, norm in zip((self.expand, self.depth, self.wide), self.norms, strict=True):
            x = torch.relu(norm(layer(x)))
        out: Tensor = self.fc(x.mean((2, 3)))
        return out


def _model() -> Mixed:
    torch.manual_seed(2)
    model = Mixed()
    for norm in model.norms:
        assert isinstance(norm, nn.BatchNorm2d)
        assert norm.running_mean is not None
        assert norm.running_var is not None
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias)
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2.0)
    return model.eval()


def _export(path: Path, **options: str) -> Bundle:
    return edgetune.export(_model(), torch.zeros(1, 8, SIDE, SIDE), path, last=3, codec="dense", **options)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    root = tmp_path_factory.mktemp("convolutions")
    return {kind: _export(root / kind, convolutions=kind) for kind in ("products", "direct")}


def _kinds(bundle: Bundle) -> set[str]:
    graph = onnx.load_model(str(bundle.path / "train.onnx"), load_external_data=False).graph
    return {
        node.op_type.split("_")[1] for node in graph.node if node.op_type.startswith(("ConvForward", "ConvInputGrad"))
    }


def test_each_layer_has_the_form_that_suits_it(bundles: dict[str, Bundle]) -> None:
    assert _kinds(bundles["products"]) == {"pointwise", "depthwise", "winograd"}
    assert _kinds(bundles["direct"]) == set()


@pytest.mark.parametrize("engine", ["onnxruntime", "torch"])
@pytest.mark.parametrize("kind", ["products", "direct"])
def test_the_gradients_are_those_of_the_model(bundles: dict[str, Bundle], kind: str, engine: str) -> None:
    rng = np.random.default_rng(1)
    x = rng.standard_normal((BATCH, 8, SIDE, SIDE)).astype(np.float32)
    y = rng.integers(0, 4, BATCH)
    model = _model().double()
    loss = nn.functional.cross_entropy(model(torch.from_numpy(x).double()), torch.from_numpy(y))
    found_names = [spec.name for spec in bundles[kind].manifest.parameters]
    named = dict(model.named_parameters())
    expected = torch.autograd.grad(loss, [named[name] for name in found_names])
    session = edgetune.TrainingSession(bundles[kind], edgetune.plan(bundles[kind], batch=BATCH), engine=engine)
    found_loss, found = session.gradients(x, y)
    assert found_loss == pytest.approx(loss.item(), rel=1e-5)
    for name, gradient in zip(found_names, expected, strict=True):
        wanted = gradient.numpy()
        assert np.linalg.norm(found[name] - wanted) <= 1e-5 * np.linalg.norm(wanted), name


def test_fast_memory_changes_no_bit(bundles: dict[str, Bundle]) -> None:
    rng = np.random.default_rng(3)
    x, y = rng.standard_normal((BATCH, 8, SIDE, SIDE)).astype(np.float32), rng.integers(0, 4, BATCH)
    states = []
    for memory in ("lean", "fast"):
        plan = edgetune.plan(bundles["products"], batch=BATCH)
        session = edgetune.TrainingSession(bundles["products"], plan, engine="onnxruntime", memory=memory)
        for _ in range(3):  # one block from the second step on
            session.step(x, y)
        states.append(session.state())
    assert all(np.array_equal(states[0][name], states[1][name]) for name in states[0])


def test_unknown_choices_are_refused_with_the_known_ones(bundles: dict[str, Bundle], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"'fft'.*products"):
        _export(tmp_path / "b", convolutions="fft")
    plan = edgetune.plan(bundles["direct"], batch=BATCH)
    with pytest.raises(UsageError, match=r"'huge'.*lean"):
        edgetune.TrainingSession(bundles["direct"], plan, memory="huge")
