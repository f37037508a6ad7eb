"""Models of every make: what is trained, inputs and outputs by name, losses of one's own, trained batch-norm, tied
weights, tensors whose batch axis does not lead, and the ways to capture. The oracle is torch's autograd in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import edgetune
from edgetune.agent.images import Decoder
from edgetune.bundle import Array
from edgetune.errors import BundleError, DataError, UsageError
from tests.export.small_models import (
    BATCH,
    LIMIT,
    Tokens,
    TwoByTwo,
    assert_equal_gradients,
    drawn,
    seeded,
    session_of,
    small,
    torch_gradients,
)

# -- a small transformer: tokens, positions, windows, several inputs and outputs ---------------------------------------


@pytest.mark.parametrize(
    ("options", "codec"),
    [
        ({"last": "all"}, "dense"),
        ({"last": "all"}, "hosvd"),
        ({"last": 1}, "dense"),
        ({"last": 2}, "hosvd"),
        ({"last": 3}, "dense"),
        ({"train": "windows"}, "hosvd"),
        ({"train": "token|positions"}, "dense"),
        ({"train": r"norm\.|qkv.bias"}, "dense"),
        ({"last": 2, "freeze_head": True}, "hosvd"),
    ],
    ids=str,
)
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
