"""The demonstration's data is what it claims to be, and its model really suffers from the drift."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edgetune.commands import _digits


@pytest.fixture(scope="module")
def digits() -> _digits.Digits:
    return _digits.load()


def test_the_three_parts_are_disjoint_and_hold_every_digit(digits: _digits.Digits) -> None:
    from sklearn.datasets import load_digits

    parts = [digits.pretrain_images, digits.stream_images, digits.test_images]
    labels = [digits.pretrain_labels, digits.stream_labels, digits.test_labels]
    assert [len(p) for p in parts] == [len(y) for y in labels] == [800, 600, 397]
    assert all(p.shape[1:] == (16, 16) and p.dtype == np.uint8 for p in parts)
    assert all(y.dtype == np.int64 and set(y.tolist()) == set(range(10)) for y in labels)
    # The same multiset of labels and, within the rounding of the resampling, the same ink as the source.
    source = load_digits()
    assert np.array_equal(np.sort(np.concatenate(labels)), np.sort(source.target))
    assert np.concatenate(parts).mean() == pytest.approx(source.images.mean() * 255 / 16, rel=0.02)
    assert all(len(np.unique(image)) > 2 for image in parts[0])


def test_drift_follows_its_generator_and_exchanges_dark_and_light(digits: _digits.Digits) -> None:
    clean = digits.test_images
    drifted = _digits.drift(clean, np.random.default_rng(1))
    assert drifted.shape == clean.shape and drifted.dtype == np.uint8
    assert np.array_equal(drifted, _digits.drift(clean, np.random.default_rng(1)))
    assert not np.array_equal(drifted, _digits.drift(clean, np.random.default_rng(2)))
    assert float(np.median(clean)) < 64
    assert float(np.median(drifted)) > 192


def test_preprocessing_is_the_one_the_bundle_will_carry(digits: _digits.Digits) -> None:
    inputs = _digits.to_input(digits.test_images)
    mean, std = np.array(_digits.PREPROCESS.mean), np.array(_digits.PREPROCESS.std)
    expected = (digits.test_images / 255 - mean) / std
    assert inputs.dtype == np.float32 and inputs.shape == (397, 1, 16, 16)
    assert np.allclose(inputs[:, 0], expected, atol=1e-6)


def test_a_stream_is_read_back_as_it_was_written(digits: _digits.Digits, tmp_path: Path) -> None:
    images, labels = digits.stream_images[:12], digits.stream_labels[:12]
    files = _digits.write_stream(tmp_path, images[:7], labels[:7])
    files += _digits.write_stream(tmp_path, images[7:], labels[7:], first=7)
    assert [f.stem for f in files] == [f"{i:06d}" for i in range(12)]
    assert [int(f.parent.name) for f in files] == labels.tolist()
    assert all(np.array_equal(np.asarray(Image.open(f)), image) for f, image in zip(files, images, strict=True))
    assert sorted(p for p in tmp_path.rglob("*") if p.is_file()) == sorted(files)


def test_the_model_is_good_before_the_drift_and_bad_after_it(digits: _digits.Digits) -> None:
    model = _digits.pretrain(digits.pretrain_images, digits.pretrain_labels)
    assert not model.training
    assert _digits.accuracy(model, digits.test_images, digits.test_labels) > 0.95
    drifted = _digits.drift(digits.test_images, np.random.default_rng(1))
    assert _digits.accuracy(model, drifted, digits.test_labels) < 0.6
