"""Augmentation: what each kind does, that it depends on seed, pass and content alone, and what it leaves alone."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy import ndimage

from edgetune.agent import augment as module
from edgetune.agent.augment import Augmentation, augment
from edgetune.agent.config import AgentConfig
from edgetune.agent.feeder import Feeder
from edgetune.agent.images import Decoder
from edgetune.agent.ledger import Ledger
from edgetune.agent.loop import run_agent
from edgetune.agent.sources import AUGMENTATIONS, FolderSource, IntakeConfig
from edgetune.agent.view import QuietView
from edgetune.bundle import Array
from edgetune.errors import UsageError
from edgetune.telemetry import runlog
from tests.agent.fakes import CLASSES, FakeSession, Workshop, make_bundle, make_folder, make_manifest

PIXELS = arrays.arrays(
    np.float32,
    st.tuples(st.sampled_from([1, 3]), st.integers(1, 9), st.integers(1, 9)),
    elements=st.floats(0, 1, width=32),
)


def picture(channels: int = 3, height: int = 12, width: int = 17) -> Array:
    return np.random.default_rng(0).random((channels, height, width)).astype(np.float32)


@settings(max_examples=80, deadline=None)
@given(PIXELS, st.sets(st.sampled_from(AUGMENTATIONS)), st.integers(0, 9), st.integers(0, 9))
def test_shape_type_and_range_stay_and_the_same_arguments_give_the_same(
    pixels: Array, kinds: set[str], seed: int, epoch: int
) -> None:
    before = pixels.copy()
    found = augment(pixels, kinds, seed, epoch, "content")
    assert found.shape == pixels.shape and found.dtype == np.float32 and found.flags.c_contiguous
    assert found.min() >= -1e-6 and found.max() <= 1 + 1e-6
    np.testing.assert_array_equal(found, augment(pixels, list(kinds), seed, epoch, "content"))
    np.testing.assert_array_equal(pixels, before)
    if not kinds:
        np.testing.assert_array_equal(found, pixels)


@pytest.mark.parametrize("kind", AUGMENTATIONS)
def test_seed_pass_and_content_all_matter(kind: str) -> None:
    pixels = picture()
    made = [
        augment(pixels, [kind], seed, epoch, content).tobytes()
        for seed in range(3) for epoch in range(3) for content in ("a", "b", "c")
    ]  # fmt: skip
    assert len(set(made)) == (2 if kind == "flip" else 27)
    if kind == "flip":
        assert 6 <= made.count(pixels.tobytes()) <= 21


def dice(monkeypatch: pytest.MonkeyPatch, *numbers: float) -> None:
    monkeypatch.setattr(module, "_dice", lambda text: [*numbers, *[0.5] * 8][:8])


def test_flip_is_left_to_right(monkeypatch: pytest.MonkeyPatch) -> None:
    dice(monkeypatch, 0, 0, 0, 0.49)
    np.testing.assert_array_equal(augment(picture(), ["flip"], 0, 0, ""), picture()[:, :, ::-1])
    dice(monkeypatch, 0, 0, 0, 0.5)
    np.testing.assert_array_equal(augment(picture(), ["flip"], 0, 0, ""), picture())


def test_crop_is_the_same_part_of_the_picture_made_larger(monkeypatch: pytest.MonkeyPatch) -> None:
    """The oracle: scipy's linear interpolation of a picture that is linear in both directions, hence exact."""
    rows, columns = np.mgrid[0:20, 0:30].astype(np.float32)
    ramp = ((rows + 2 * columns) / 80)[None]
    for size, down, right in ((0.0, 0.3, 0.8), (0.5, 0.5, 0.5), (0.9, 0.0, 1.0)):
        dice(monkeypatch, size, down, right)
        found = augment(ramp, ["crop"], 0, 0, "")[0]
        scale = 0.8 + 0.2 * size
        at_row = (np.arange(20) + 0.5) * scale + down * (1 - scale) * 20 - 0.5
        at_column = (np.arange(30) + 0.5) * scale + right * (1 - scale) * 30 - 0.5
        grid = np.meshgrid(at_row, at_column, indexing="ij")
        wanted = ndimage.map_coordinates(ramp[0].astype(np.float64), grid, order=1, mode="nearest")
        inner = (slice(2, -2), slice(2, -2))  # at the border a filter has fewer neighbours
        np.testing.assert_allclose(found[inner], wanted[inner], atol=1e-5)
    dice(monkeypatch, 1.0, 0.3, 0.3)
    np.testing.assert_allclose(augment(picture(), ["crop"], 0, 0, ""), picture(), atol=1e-6)


def test_colour_changes_brightness_contrast_and_saturation(monkeypatch: pytest.MonkeyPatch) -> None:
    neutral = -np.log(0.8) / np.log(1.25 / 0.8)
    half = 0.25 + picture() / 2  # nothing is clipped
    dice(monkeypatch, 0, 0, 0, 0, neutral, neutral, neutral)
    np.testing.assert_allclose(augment(half, ["colour"], 0, 0, ""), half, atol=1e-6)
    dice(monkeypatch, 0, 0, 0, 0, 0, neutral, neutral)
    np.testing.assert_allclose(augment(half, ["colour"], 0, 0, ""), 0.8 * half, atol=1e-6)
    dice(monkeypatch, 0, 0, 0, 0, neutral, 0, neutral)
    found = augment(half, ["colour"], 0, 0, "")
    assert abs(found.mean() - half.mean()) < 1e-6 and abs(found.std() - 0.8 * half.std()) < 1e-6
    dice(monkeypatch, 0, 0, 0, 0, neutral, neutral, 0)
    found = augment(half, ["colour"], 0, 0, "")
    luma = np.array([0.299, 0.587, 0.114]).reshape(3, 1, 1)
    np.testing.assert_allclose((found * luma).sum(0), (half * luma).sum(0), atol=1e-6)
    np.testing.assert_allclose(found - (half * luma).sum(0), 0.8 * (half - (half * luma).sum(0)), atol=1e-6)
    grey = np.repeat(half[:1], 3, axis=0)
    np.testing.assert_allclose(augment(grey, ["colour"], 0, 0, ""), grey, atol=1e-6)


# ---- in the agent --------------------------------------------------------------------------------------------------
def test_what_is_evaluated_is_never_augmented(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    source = FolderSource(make_folder(tmp_path / "data", 4), CLASSES, Decoder(make_manifest()).suffixes)
    feeder = Feeder(source, Decoder(bundle.manifest), augment=Augmentation(("flip", "colour"), 3))
    run(tmp_path, bundle, holdout=0, max_steps=1)
    rows = list(Ledger(tmp_path / "state" / "ledger.sqlite").samples())
    (plain,) = list(feeder.images(rows, 50))
    for index, row in enumerate(rows):
        data = source.read(row.path)
        np.testing.assert_array_equal(plain.features[0][index], Decoder(bundle.manifest).decode(data))
        change = partial(augment, kinds=["flip", "colour"], seed=3, epoch=row.passes, content=row.sha256)
        changed = Decoder(bundle.manifest).decode(data, change)
        np.testing.assert_array_equal(feeder.load(row, to_train=True), changed)
        assert not np.array_equal(changed, plain.features[0][index])


def run(tmp_path: Path, bundle: Any, state: str = "state", **changed: Any) -> list[FakeSession]:
    shop = Workshop()
    settings = {
        "batch": 4, "epsilon": 0.9, "once": True, "quiet": True, "epochs": 3, "settle_seconds": 0.1,
        "intake": IntakeConfig(augment=("crop", "flip", "colour")), "checkpoint_every": 3,
    }  # fmt: skip
    config = AgentConfig(data=tmp_path / "data", state=tmp_path / state, **{**settings, **changed})
    run_agent(bundle, config, parts=shop.parts(), view=QuietView())
    return shop.sessions


def test_an_augmented_run_is_the_same_however_it_is_interrupted_and_has_no_cache(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    make_folder(tmp_path / "data", 6)
    whole = run(tmp_path, bundle, "whole", cache_bytes=2**21)[-1]
    for steps in (2, 5, 7, None):
        last = run(tmp_path, bundle, "pieces", max_steps=steps)[-1]
    assert np.array_equal(whole.weight, last.weight) and whole.step_number == last.step_number
    plain = run(tmp_path, bundle, "plain", intake=IntakeConfig())[-1]
    other = run(tmp_path, bundle, "other", seed=1)[-1]
    assert not np.array_equal(whole.weight, plain.weight) and not np.array_equal(whole.weight, other.weight)
    records = list(runlog.read(tmp_path / "whole" / "log.jsonl"))
    assert any("no feature cache" in str(record.get("message")) for record in records)


def test_settings_that_cannot_be_are_refused(tmp_path: Path) -> None:
    wrong = IntakeConfig(window=0, augment=("crop", "rotate"), spool_bytes=5, max_pending=0, camera_interval_s=-1.0)
    config = AgentConfig(data="x", state=tmp_path, intake=wrong)
    with pytest.raises(UsageError) as refused:
        config.check({})
    for said in ("window is 0", "names 'rotate'", "spool_bytes is 5", "max_pending is 0", "interval_s is -1"):
        assert said in str(refused.value)
    assert "would stop before the window is full" in IntakeConfig(window=9, max_pending=8).check()[0]
