"""Awkward models, third-party ones among them, every parameter trained: each engine's gradients are torch's, at full
ranks of a lossy codec. The whole zoo, with more choices, is in docs/parity.md."""

from __future__ import annotations

import pytest

from edgetune.export.capture import capture
from tools.gradients import Settings
from tools.parity import TOLERANCE, run_zoo_model, zoo_subjects

pytest.importorskip("transformers")

MODELS = ("vit", "swin", "unet3d", "tied_tokens")


@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_torchs_on_every_engine(name: str) -> None:
    (subject,) = [subject for subject in zoo_subjects() if subject.name == name]
    model = subject.make()
    captured = capture(model, subject.inputs)
    row = run_zoo_model(subject, model, captured, Settings(last="all"), ("onnxruntime", "torch"), ("hosvd",))
    assert row.holds(TOLERANCE), row.cells
    assert row.tensors > 10 and set(row.cells) == {("onnxruntime", "hosvd"), ("torch", "hosvd")}
