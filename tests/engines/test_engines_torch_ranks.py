"""However small the ranks are, torch's products of factors give what onnxruntime gives."""

from __future__ import annotations

import dataclasses
import functools
import re

import numpy as np
import onnx
import pytest
import torch

import edgetune
from edgetune.bundle import Array
from edgetune.codecs import codec_named
from edgetune.codecs.log8 import Log8
from edgetune.engines.session import TrainingSession
from edgetune.engines.torch_ops import native
from edgetune.engines.torch_ops.narrow import rounded, widened
from tests.autodiff.parity import worst_error
from tests.engines.workshop import bundle_of, plan_of, samples

BATCH = 8


@functools.cache
def session(engine: str, codec: str) -> TrainingSession:
    bundle = bundle_of(codec)
    return edgetune.TrainingSession(bundle, plan_of(bundle, BATCH), engine=engine, seed=0)


def gradients(engine: str, ranks: dict[str, int], codec: str = "hosvd") -> dict[str, Array]:
    plan = plan_of(bundle_of(codec), BATCH)
    cut = {
        name: {letter: ranks.get(letter, rank) for letter, rank in modes.items()} for name, modes in plan.ranks.items()
    }
    one = session(engine, codec)
    one.set_plan(dataclasses.replace(plan, ranks=cut))
    return one.gradients(*samples(BATCH, bundle_of(codec).manifest.inputs[0].shape))[1]


@pytest.mark.parametrize("b", [2, BATCH])
@pytest.mark.parametrize("c", [1, 5])
@pytest.mark.parametrize(("h", "w"), [(1, 1), (1, 3), (2, 1), (3, 1), (2, 2)])
def test_the_engines_agree_at_any_ranks(b: int, c: int, h: int, w: int) -> None:
    ranks = {"b": b, "c": c, "h": h, "w": w}
    assert worst_error(gradients("torch", ranks), gradients("onnxruntime", ranks)) <= 1e-4


@pytest.mark.parametrize("codec", ["hosvd", "hosvd:cut=c", "hosvd-exact", "asi", "svd"])
def test_the_engines_agree_with_one_byte_a_number(codec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ranks, narrow = {"b": 3, "c": 5, "h": 2, "w": 2}, f"{codec}{',' if ':' in codec else ':'}storage=log8"
    ours, wide = gradients("torch", ranks, narrow), gradients("torch", ranks, codec)
    session.cache_clear()
    bundle = bundle_of(narrow)
    graph = onnx.load_model(str(bundle.path / "train.onnx"), load_external_data=False)
    functions = [f for f in graph.functions if re.match(r"Hosvd(_cut|_storage).*Encode|ConvWeightGrad.*log8", f.name)]
    functions = [f for f in functions if "_8x16x16_" not in f.name and "_k1x1_" not in f.name]
    assert functions and all(native.native_kernel(f) for f in functions), "they are met at all"
    monkeypatch.setattr(native, "_FINDERS", ())
    # A number on the border of two codes may be rounded to one or the other.
    assert worst_error(ours, gradients("torch", ranks, narrow)) <= 2e-3
    session.cache_clear()
    # The factor of b is any basis of its space, so another engine rounds another core.
    assert worst_error(ours, gradients("onnxruntime", ranks, narrow)) <= 3e-2
    assert 5e-3 < worst_error(ours, wide) < 3e-2 or ":" in codec


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30, 0.0])
@pytest.mark.parametrize("count", [1, 7, 300_000])
def test_one_byte_a_number_is_what_the_codec_says(count: int, scale: float) -> None:
    value = (np.random.default_rng(count).standard_normal(count) * scale).astype(np.float32)
    value[0] = 0.0
    codec = codec_named("hosvd:storage=log8")
    assert isinstance(codec, Log8)
    (codes, unit), (ours, our_unit) = codec.rounded(value), rounded(torch.from_numpy(value))
    assert our_unit.numpy() == unit
    other = codes != ours.numpy()
    assert other.mean() <= 1e-4 and (np.abs(codes[other].astype(int) - ours.numpy()[other]) == 1).all()
    np.testing.assert_array_equal(widened(ours, our_unit).numpy(), codec.widened(ours.numpy(), our_unit.numpy()))


@pytest.mark.parametrize("cut", ["c", "hw", "w"])
def test_the_engines_agree_whichever_modes_are_cut(cut: str) -> None:
    ranks, codec = {"b": 3, "c": 5, "h": 2, "w": 1}, f"hosvd:cut={cut}"
    ours = gradients("torch", ranks, codec)
    assert worst_error(ours, gradients("onnxruntime", ranks, codec)) <= 1e-4
    assert worst_error(ours, gradients("torch", ranks)) > 1e-3, "another truncation"
