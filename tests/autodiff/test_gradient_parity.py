"""Gradients of whole models against torch autograd in float64, and of full-rank codecs against the dense one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

import edgetune
from edgetune.bundle import Array, Bundle
from tests.autodiff.parity import Bundles, batch_of, relative_error, sample_away_from_kinks, worst_error
from tools import models

BATCH = 2
# (model, shape of a sample, last N layers)
CASES = {
    "resnet18-last-8": ("resnet18", (3, 64, 64), 8),
    "resnet18-last-8-odd": ("resnet18", (3, 45, 37), 8),
    "mobilenet_v2-last-4": ("mobilenet_v2", (3, 64, 64), 4),
    "awkward_convs-all": ("awkward_convs", (3, 24, 20), 6),
    "awkward_convs-other-size": ("awkward_convs", (3, 17, 23), 6),
    "digits_resnet-last-5": ("digits_resnet", (1, 12, 12), 5),
}
FULL_RANKS = ("resnet18-last-8", "mobilenet_v2-last-4", "awkward_convs-all")
# The module whose output is the bundle's one feature, where torch is to start from the bundle's own features.
CUT = {"mobilenet_v2-last-4": "features.16"}


def gradients_of(bundle: Bundle, x: Array, y: Array) -> tuple[float, dict[str, Array]]:
    session = edgetune.TrainingSession(bundle, edgetune.plan(bundle, batch=len(x), epsilon=1.0))
    return session.gradients(x, y)


@pytest.mark.parametrize("case", CASES)
def test_dense_gradients_equal_torchs(bundles: Bundles, case: str) -> None:
    name, shape, last = CASES[case]
    bundle = bundles.model(name, shape, last=last, codec="dense")
    model = getattr(models, name)()
    session = edgetune.TrainingSession(bundle, edgetune.plan(bundle, batch=BATCH))
    trained = [spec.name for spec in bundle.manifest.parameters]
    assert len(bundle.manifest.layers) == last + 1
    # Fifty layers deep the rounding of any float32 trunk, torch's own too, exceeds 1e-5. So where the trunk is that
    # deep both tails start from the same features; the trunk is held to torch in the next test.
    start = (lambda x: {CUT[case]: session.features(x)[0]}) if case in CUT else None
    sample = sample_away_from_kinks(model, trained, shape, BATCH, len(bundle.manifest.classes), start)

    loss, found = session.gradients(sample.x, sample.y)
    assert set(found) == set(trained) <= dict(model.named_parameters()).keys()
    errors = {key: relative_error(found[key], sample.exact.gradients[key]) for key in found}
    assert max(errors.values()) <= 1e-5, errors
    assert worst_error(found, sample.rounded.gradients) <= 1e-5
    assert loss == pytest.approx(sample.exact.loss, rel=1e-5)


def test_a_deep_trunk_is_as_close_to_float64_as_torchs_own(bundles: Bundles) -> None:
    shape = (3, 64, 64)
    bundle = bundles.model("mobilenet_v2", shape, last=4, codec="dense")
    session = edgetune.TrainingSession(bundle, edgetune.plan(bundle, batch=BATCH))
    x, _ = batch_of(shape, BATCH, 1000, seed=0)
    (found,) = session.features(x)
    features = models.mobilenet_v2().features
    assert isinstance(features, torch.nn.Sequential)
    trunk = features[:17]
    with torch.no_grad():
        rounded = trunk(torch.from_numpy(x)).numpy()
        exact = trunk.double()(torch.from_numpy(x).double()).numpy()
    assert relative_error(found, exact) <= 2 * relative_error(rounded, exact) < 1e-4


@pytest.mark.parametrize("codec", ["hosvd", "svd"])
@pytest.mark.parametrize("case", [case for case in CASES if case in FULL_RANKS])
def test_full_ranks_give_the_dense_gradient(bundles: Bundles, case: str, codec: str) -> None:
    name, shape, last = CASES[case]
    dense = bundles.model(name, shape, last=last, codec="dense")
    compressed = bundles.model(name, shape, last=last, codec=codec)
    assert any(saved.options[0].codec == codec for saved in compressed.manifest.saved)
    x, y = batch_of(shape, 3, len(dense.manifest.classes), seed=0)
    expected_loss, expected = gradients_of(dense, x, y)
    loss, found = gradients_of(compressed, x, y)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert worst_error(found, expected) <= 1e-4


def test_a_tensor_read_by_two_trained_layers_is_saved_once(bundles: Bundles) -> None:
    bundle = bundles.model("resnet18", (3, 64, 64), last=8, codec="hosvd")
    shared = [saved for saved in bundle.manifest.saved if len(saved.layers) > 1]
    assert [set(saved.layers) for saved in shared] == [{"layer4.0.conv1", "layer4.0.downsample.0"}]


@pytest.mark.parametrize("samples", [1, 2])
def test_a_short_last_batch_gives_its_own_gradient(bundles: Bundles, samples: int) -> None:
    shape: Sequence[int] = (3, 24, 20)
    bundle = bundles.model("awkward_convs", shape, last=6, codec="hosvd")
    dense = bundles.model("awkward_convs", shape, last=6, codec="dense")
    x, y = batch_of(shape, samples, 10, seed=0)
    session = edgetune.TrainingSession(bundle, edgetune.plan(bundle, batch=4, epsilon=1.0))
    _, expected = gradients_of(dense, x, y)
    assert worst_error(session.gradients(x, y)[1], expected) <= 1e-4


def test_label_smoothing_is_torchs(bundles: Bundles) -> None:
    bundle = bundles.model("awkward_convs", (3, 24, 20), last=2, codec="dense", label_smoothing=0.1)
    x, y = batch_of((3, 24, 20), 4, 10, seed=1)
    loss, found = gradients_of(bundle, x, y)
    model = models.awkward_convs().double()
    logits = model(torch.from_numpy(x).double())
    expected = torch.nn.functional.cross_entropy(logits, torch.from_numpy(y), label_smoothing=0.1)
    expected.backward()  # type: ignore[no-untyped-call]
    gradient = model.get_parameter("fc.bias").grad
    assert gradient is not None
    assert loss == pytest.approx(float(expected.detach()), rel=1e-6)
    assert relative_error(found["fc.bias"], gradient.numpy()) <= 1e-5


def test_the_same_run_twice_is_equal_bit_for_bit(bundles: Bundles) -> None:
    bundle = bundles.model("awkward_convs", (3, 24, 20), last=6, codec="hosvd")
    x, y = batch_of((3, 24, 20), 4, 10, seed=3)
    plan = edgetune.plan(bundle, batch=4, epsilon=0.8, calibration=[(x, y)])
    first, second = (edgetune.TrainingSession(bundle, plan) for _ in range(2))
    for _ in range(3):
        assert first.step(x, y) == second.step(x, y)
    states = first.state(), second.state()
    assert states[0].keys() == states[1].keys()
    assert all(np.array_equal(states[0][key], states[1][key]) for key in states[0])
