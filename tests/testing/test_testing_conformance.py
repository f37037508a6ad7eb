"""The conformance kit itself: it passes what is right, and each deliberately wrong codec breaks the right law."""

from __future__ import annotations

import dataclasses
import unittest
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from edgetune.codecs import CODECS, Hosvd, Svd
from edgetune.codecs.base import Array, Codec, Emitter, Encoded, Mode, Saved, StoredTensor, check_finite
from edgetune.errors import EngineError
from edgetune.testing import (
    BrokenLawError,
    Tolerance,
    check_codec,
    checks,
    coder_for,
    coders,
    inputs_for,
    registered,
    tensor,
)
from edgetune.testing.cases import LARGE
from tests.testing.toys import FLOAT, Absent, Halved, Largest, Rounded, Warm

OUTSIDE = (Largest(), Rounded(), Rounded(levels=100), Warm(), Halved(), Absent())
SMALL = (Saved("conv", (4, 3, 5), groups=2), Saved("tokens", (5, 4), channels_last=True))


@pytest.mark.parametrize("codec", OUTSIDE, ids=repr)
def test_a_right_codec_of_somebody_else_passes(codec: Codec) -> None:
    assert check_codec(codec) == []
    assert codec.name not in CODECS


# -- wrong codecs -----------------------------------------------------------------------------------------------------


class _Wrong(Svd):
    name = "wrong"


class EnergyTooLarge(_Wrong):
    def emit_encode(self, g: Emitter, x: str, saved: Saved, inputs: Mapping[str, str]) -> Encoded:
        encoded = super().emit_encode(g, x, saved, inputs)
        return dataclasses.replace(encoded, energy=g.op("Sqrt", encoded.energy or ""))


class EnergyTooSmall(EnergyTooLarge):
    def emit_encode(self, g: Emitter, x: str, saved: Saved, inputs: Mapping[str, str]) -> Encoded:
        encoded = super().emit_encode(g, x, saved, inputs)
        return dataclasses.replace(encoded, energy=g.op("Mul", encoded.energy or "", g.const(0.9)))


class BoundNotReached(EnergyTooSmall):
    energy_is_bound = True


class EnergyWithAxis(_Wrong):
    def emit_encode(self, g: Emitter, x: str, saved: Saved, inputs: Mapping[str, str]) -> Encoded:
        encoded = super().emit_encode(g, x, saved, inputs)
        return dataclasses.replace(encoded, energy=g.op("Unsqueeze", encoded.energy or "", g.const([0])))


class EnergyHidesNan(_Wrong):
    def emit_encode(self, g: Emitter, x: str, saved: Saved, inputs: Mapping[str, str]) -> Encoded:
        encoded = super().emit_encode(g, x, saved, inputs)
        finite = g.op("Where", g.op("IsNaN", encoded.energy or ""), g.const(1.0), encoded.energy or "")
        return dataclasses.replace(encoded, energy=finite)


class EnergyOfZerosIsNan(_Wrong):
    def emit_encode(self, g: Emitter, x: str, saved: Saved, inputs: Mapping[str, str]) -> Encoded:
        encoded = super().emit_encode(g, x, saved, inputs)
        kept, total = (g.op("ReduceSumSquare", t, keepdims=0) for t in (encoded.stored[1], x))
        return dataclasses.replace(encoded, energy=g.op("Div", kept, total))


class Leaks(_Wrong):
    def emit_decode(self, g: Emitter, encoded: Encoded, saved: Saved) -> str:
        return str(g.op("Identity", "in0.x"))


class StoresMore(_Wrong):
    def emit_encode(self, g: Emitter, x: str, saved: Saved, inputs: Mapping[str, str]) -> Encoded:
        encoded = super().emit_encode(g, x, saved, inputs)
        return dataclasses.replace(encoded, stored=(*encoded.stored, g.op("Identity", x)))


class StoredLies(_Wrong):
    def stored(self, saved: Saved) -> tuple[StoredTensor, ...]:
        return StoredTensor("factor", ("batch", "b")), StoredTensor("core", ("b", *saved.shape), "float16")


class StoredLiesOfTheShape(_Wrong):
    def stored(self, saved: Saved) -> tuple[StoredTensor, ...]:
        return StoredTensor("factor", ("batch", "b")), StoredTensor("core", ("b", 1, *saved.shape[1:]))


class DrawsItself(_Wrong):
    def encode(self, x: Array, saved: Saved, inputs: Mapping[str, Array]) -> dict[str, Array]:
        sketch = np.asarray(np.random.default_rng().standard_normal(inputs["b"].shape), x.dtype)
        return super().encode(x, saved, {"b": sketch})


class EmitsRandomNumbers(_Wrong):
    def emit_encode(self, g: Emitter, x: str, saved: Saved, inputs: Mapping[str, str]) -> Encoded:
        sketch = g.op("RandomNormalLike", inputs["b"], dtype=FLOAT)
        return super().emit_encode(g, x, saved, {"b": sketch})


class ChangesItsInput(_Wrong):
    def encode(self, x: Array, saved: Saved, inputs: Mapping[str, Array]) -> dict[str, Array]:
        encoded = super().encode(x, saved, inputs)
        x[:] = 0
        return encoded


class OtherSign(_Wrong):
    """Each side alone is right."""

    def encode(self, x: Array, saved: Saved, inputs: Mapping[str, Array]) -> dict[str, Array]:
        encoded = super().encode(x, saved, inputs)
        return {**encoded, "core": -encoded["core"]}

    def decode(self, stored: Mapping[str, Array], saved: Saved, inputs: Mapping[str, Array]) -> Array:
        return -super().decode(stored, saved, inputs)


class OtherSubspace(_Wrong):
    """The oracle finds a subspace, though not the leading one."""

    def encode(self, x: Array, saved: Saved, inputs: Mapping[str, Array]) -> dict[str, Array]:
        check_finite(x, saved)
        factor = np.linalg.qr(inputs["b"])[0]
        return {"factor": factor, "core": np.tensordot(factor.T, x, axes=1)}


class TakesAnything(_Wrong):
    def encode(self, x: Array, saved: Saved, inputs: Mapping[str, Array]) -> dict[str, Array]:
        return super().encode(np.nan_to_num(x), saved, inputs)


class TakesAnEmptyBatch(_Wrong):
    def encode(self, x: Array, saved: Saved, inputs: Mapping[str, Array]) -> dict[str, Array]:
        return super().encode(x, saved, inputs) if len(x) else {"factor": x, "core": x}


class FixedBatch(_Wrong):
    def emit_decode(self, g: Emitter, encoded: Encoded, saved: Saved) -> str:
        return str(g.op("Reshape", super().emit_decode(g, encoded, saved), g.const([4, *saved.shape])))


class PairsOfSamples(Largest):
    """A last sample without a partner is forgotten."""

    name = "wrong"

    def encode(self, x: Array, saved: Saved, inputs: Mapping[str, Array]) -> dict[str, Array]:
        encoded: dict[str, Array] = super().encode(x, saved, inputs)
        encoded["values"][len(x) // 2 * 2 :] = 0
        return encoded


class NearlyRight(_Wrong):
    def decode(self, stored: Mapping[str, Array], saved: Saved, inputs: Mapping[str, Array]) -> Array:
        decoded = super().decode(stored, saved, inputs)
        slightly_more: Array = decoded + decoded * np.asarray(5e-6, decoded.dtype)
        return slightly_more


class WrongFormula(_Wrong):
    def decode(self, stored: Mapping[str, Array], saved: Saved, inputs: Mapping[str, Array]) -> Array:
        return np.flip(super().decode(stored, saved, inputs), 0)


class FlatResult(_Wrong):
    def emit_decode(self, g: Emitter, encoded: Encoded, saved: Saved) -> str:
        return str(g.op("Flatten", super().emit_decode(g, encoded, saved), axis=1))


class CountsTheBatch(_Wrong):
    def emit_decode(self, g: Emitter, encoded: Encoded, saved: Saved) -> str:
        decoded = super().emit_decode(g, encoded, saved)
        return str(g.op("Reshape", decoded, g.op("Shape", decoded)))


class SaysLossless(_Wrong):
    lossy = False


class NeedsTheSketch(_Wrong):
    def decode(self, stored: Mapping[str, Array], saved: Saved, inputs: Mapping[str, Array]) -> Array:
        return super().decode({**stored, "factor": stored["factor"] + 0 * inputs["b"]}, saved, inputs)


class SpectrumUnfiled(_Wrong):
    def modes(self, saved: Saved) -> tuple[Mode, ...]:
        return tuple(dataclasses.replace(mode, spectrum="") for mode in super().modes(saved))


class ModesInDisorder(Hosvd):
    name = "wrong"

    def modes(self, saved: Saved) -> tuple[Mode, ...]:
        return super().modes(saved)[::-1]


class SmallestAboveTheMiddle(Largest):
    """With more than half of the count the smallest magnitudes are kept; encoder and decoder agree on it."""

    name = "wrong"

    def encode(self, x: Array, saved: Saved, inputs: Mapping[str, Array]) -> dict[str, Array]:
        count, whole = int(inputs["k"][0]), x[0].size
        few = {"k": np.array([1])}
        one = super().encode(x, saved, few)
        if count < (whole + 1) // 2 or count == whole:
            return super().encode(x, saved, inputs)
        return {"values": np.repeat(one["values"] * 0, count, 1), "indices": np.repeat(one["indices"], count, 1)}


class ByteIndices(Largest):
    name, index, code = "wrong", "int8", 3


class ShortIndices(Largest):
    name, index, code = "wrong", "int16", 5


class CarriesZeros(Warm):
    name = "wrong"

    def next(self, g: Emitter, factor: str) -> str:
        return str(g.op("Sub", factor, factor))


class CarriesTheTransposed(Warm):
    name = "wrong"

    def next(self, g: Emitter, factor: str) -> str:
        return str(g.op("Transpose", factor, perm=[1, 0]))


class DecodesNothing(Absent):
    name = "wrong"

    def decode(self, stored: Mapping[str, Array], saved: Saved, inputs: Mapping[str, Array]) -> Array:
        return np.zeros((1, *saved.shape), np.float32)


@dataclass(frozen=True)
class ListSetting(Svd):
    sizes: list[int] = field(default_factory=list, hash=False)
    name = "wrong"

    def __post_init__(self) -> None:
        object.__setattr__(self, "sizes", tuple(self.sizes))


@dataclass(frozen=True)
class PlusInSetting(Svd):
    note: str = "a"
    name = "wrong"


@dataclass
class NotFrozen:
    name, lossy = "wrong", False
    applies, modes, stored = Absent.applies, Absent.modes, Absent.stored


WRONG: list[tuple[Any, str, str]] = [
    (EnergyTooLarge(), "energy", "onnxruntime"),
    (EnergyTooLarge(), "energy", "torch"),
    (EnergyTooSmall(), "energy", "onnxruntime"),
    (BoundNotReached(), "exact", "onnxruntime"),
    (EnergyWithAxis(), "held", "torch"),
    (EnergyHidesNan(), "not_finite", "onnxruntime"),
    (EnergyHidesNan(), "not_finite", "torch"),
    (EnergyOfZerosIsNan(), "extremes", "onnxruntime"),
    (Leaks(), "emission", ""),
    (StoresMore(), "emission", ""),
    (StoredLies(), "held", "oracle"),
    (StoredLies(), "held", "torch"),
    (StoredLiesOfTheShape(), "held", "onnxruntime"),
    (DrawsItself(), "repeatable", "oracle"),
    (EmitsRandomNumbers(), "repeatable", "onnxruntime"),
    (ChangesItsInput(), "repeatable", "oracle"),
    (OtherSign(), "agreement", "onnxruntime"),
    (OtherSign(), "agreement", "torch"),
    (OtherSubspace(), "agreement", "onnxruntime"),
    (TakesAnything(), "not_finite", "oracle"),
    (TakesAnEmptyBatch(), "empty", "oracle"),
    (FixedBatch(), "batches", "onnxruntime"),
    (FixedBatch(), "batches", "torch"),
    (PairsOfSamples(), "batches", "oracle"),
    (NearlyRight(), "double", "oracle"),
    (WrongFormula(), "exact", "oracle"),
    (FlatResult(), "exact", "torch"),
    (CountsTheBatch(), "emission", ""),
    (SaysLossless(), "declarations", ""),
    (NeedsTheSketch(), "exact", "oracle"),
    (SpectrumUnfiled(), "declarations", ""),
    (ModesInDisorder(), "declarations", ""),
    (SmallestAboveTheMiddle(), "monotone", "oracle"),
    (CarriesZeros(), "carries", "onnxruntime"),
    (CarriesTheTransposed(), "carries", "torch"),
    (DecodesNothing(), "nothing_to_decode", "oracle"),
    (ListSetting([1]), "config", ""),
    (PlusInSetting("a+b"), "config", ""),
    (NotFrozen(), "config", ""),
]


FAIL_BY_THEMSELVES = {FixedBatch, NeedsTheSketch, ListSetting, PlusInSetting}


def named(value: object) -> str:
    return value if isinstance(value, str) else type(value).__name__


@pytest.mark.parametrize(("codec", "law", "place"), WRONG, ids=named)
def test_a_wrong_codec_breaks_its_law(codec: Any, law: str, place: str) -> None:
    (check,) = [c for c in checks(codec, geometries=SMALL) if (c.law, c.place) == (law, place)]
    with pytest.raises(BrokenLawError) as caught:
        check()
    assert (caught.value.law, caught.value.place) == (law, place)
    assert f"breaks the law '{law}'" in str(caught.value)
    # what is wrong was judged by the law, and is no accident of the wrong codec
    assert type(caught.value.__cause__) is AssertionError or type(codec) in FAIL_BY_THEMSELVES


@pytest.mark.parametrize("place", ["oracle", "onnxruntime", "torch"])
@pytest.mark.parametrize(("codec", "saved"), [(ByteIndices(), Saved("l", (300,))), (ShortIndices(), LARGE)], ids=repr)
def test_indices_that_are_too_narrow_are_found(codec: Codec, saved: Saved, place: str) -> None:
    (check,) = [c for c in checks(codec, geometries=[saved]) if (c.law, c.place) == ("exact", place)]
    with pytest.raises(BrokenLawError, match="'exact'"):
        check()
    assert any(LARGE in c.cases for c in checks(codec) if (c.law, c.place) == ("exact", place))


def test_the_message_says_which_codec_law_place_and_tensor() -> None:
    expected = (
        r"EnergyTooSmall\(\) breaks the law 'exact' on onnxruntime, for 'conv' \[4, 3, 5\] \(groups 2\): "
        r"the energy is 0\.9\d*, but 1 is captured at full rank with the content '\w+', batch 4"
    )
    with pytest.raises(BrokenLawError, match=expected):
        check_codec(EnergyTooSmall(), geometries=SMALL)


def test_float16_is_recognised_and_another_tolerance_can_be_given() -> None:
    (check,) = [c for c in checks(Halved(), tolerance=Tolerance()) if (c.law, c.place) == ("exact", "oracle")]
    with pytest.raises(BrokenLawError, match="of ‖x‖ away"):
        check()


# -- what surrounds the laws ------------------------------------------------------------------------------------------


def test_an_engine_that_is_not_installed_is_skipped_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coders, "_LIBRARIES", {**coders._LIBRARIES, "torch": "no_such_library"})
    check = next(c for c in checks(Largest()) if c.place == "torch")
    with pytest.raises(unittest.SkipTest, match="the engine torch cannot run here: No module named 'no_such_library'"):
        check()
    with pytest.warns(UserWarning, match="the engine torch cannot run here"):
        skipped = check_codec(Largest(), geometries=SMALL)
    assert skipped == ["the engine torch cannot run here: No module named 'no_such_library'"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert check_codec(Largest(), geometries=SMALL, engines=("onnxruntime",)) == []


def test_an_unknown_engine_lists_the_known_ones() -> None:
    with pytest.raises(EngineError, match="no engine 'tvm'; choose one of: onnxruntime, torch"):
        checks(Largest(), engines=("tvm",))


def test_a_codec_that_applies_to_nothing_is_not_passed() -> None:
    with pytest.raises(ValueError, match="warm applies to none"):
        checks(Warm(), geometries=SMALL[:1])


def test_a_taken_name_is_refused() -> None:
    class Svd2(Svd):
        pass

    with (
        pytest.raises(AssertionError, match=r"the table makes Svd\(\) of its name .* is 'svd' taken\?"),
        registered(Svd2()),
    ):
        pass
    with pytest.raises(BrokenLawError, match="is 'svd' taken"):
        check_codec(Svd2())


def test_inputs_follow_the_seed_and_bases_are_nested_and_orthonormal() -> None:
    codec, saved = Hosvd(), SMALL[0]
    full, cut = inputs_for(codec, saved, 4, 7), inputs_for(codec, saved, 4, 7, {"c": 1, "b": 2})
    assert {letter: value.shape for letter, value in full.items()} == {
        "b": (4, 4), "c": (2, 2, 2), "h": (1, 3, 3), "w": (1, 5, 5)
    }  # fmt: skip
    assert np.array_equal(cut["c"], full["c"][..., :1]) and np.array_equal(cut["b"], full["b"][:, :2])
    assert np.allclose(full["w"][0].T @ full["w"][0], np.eye(5), atol=1e-6)
    assert not np.array_equal(full["b"], inputs_for(codec, saved, 4, 8)["b"])


@pytest.mark.parametrize("saved", SMALL, ids=lambda saved: saved.name)
def test_the_decaying_tensor_has_the_singular_values_that_it_tells(saved: Saved) -> None:
    x = tensor("decaying", saved, 4, seed=1).astype(np.float64)
    terms = min(n for n in (4, *saved.extents().values()) if n > 1)
    expected = 4.0 ** -np.arange(terms)
    parts = np.split(x, saved.groups, axis=1) if not saved.channels_last else [x]
    for part in parts:
        for axis in range(part.ndim):
            singular = np.linalg.svd(np.moveaxis(part, axis, 0).reshape(part.shape[axis], -1), compute_uv=False)
            assert np.allclose(singular[:terms], expected, rtol=1e-4)


def test_emitted_and_oracle_can_be_run_one_by_one() -> None:
    codec, saved = Svd(), SMALL[1]
    x, inputs = tensor("smooth", saved, 4, 0), inputs_for(Svd(), saved, 4, 0)
    for place in ("oracle", "onnxruntime", "torch"):
        coder = coder_for(codec, place)
        coded = coder.encode(x, saved, inputs)
        assert coded.energy == pytest.approx(1.0, abs=1e-5)
        assert np.allclose(coder.decode(coded.stored, saved, inputs), x, atol=1e-4)
