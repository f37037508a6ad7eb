"""Storage as a sign and a logarithm: the laws, what becomes of single numbers, bytes, spelling, refusals."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from edgetune.codecs import (
    CODECS,
    Codec,
    Half,
    Hosvd,
    Log8,
    Saved,
    Threshold,
    codec_from,
    codec_named,
    label_of,
    menu_from,
)
from edgetune.codecs.base import Array, config_of
from edgetune.errors import UsageError
from edgetune.testing import Check, checks
from tests.codecs.workbench import run_decoder, run_encoder

TRANSFORMS = ("hosvd", "hosvd-exact", "asi", "svd", "dct", "db3", "threshold", "patch")
LOSES = 2 ** (1 / 16) - 1


@pytest.mark.parametrize(
    "check",
    [
        pytest.param(check, id=f"{name}-{check}")
        for name in ("hosvd", "asi", "dct", "patch")
        for check in checks(codec_named(f"{name}:storage=log8"), engines=("onnxruntime", "torch"))
    ],
)
def test_law(check: Check) -> None:
    check()


def one_by_one(values: Array) -> Array:
    """Return what every number of ``values`` [b, n] becomes: of all the largest, none is dropped."""
    saved, codec = Saved("l", values.shape[1:]), Log8(Threshold())
    inputs = {"k": np.array([values.shape[1]])}
    stored, _ = run_encoder(codec, values, saved, inputs)
    decoded = run_decoder(codec, stored, saved, inputs)
    assert np.array_equal(decoded, codec.decode(stored, saved, inputs))
    return decoded


@pytest.mark.parametrize("largest", [1e-36, 1e-6, 1.0, 1e30, 3e38])
def test_a_number_changes_by_a_thirty_second_of_an_octave_at_most(largest: float) -> None:
    rng = np.random.default_rng(0)
    octaves = rng.uniform(-15.7, 0, (4, 500))
    x = np.float32(largest) * (rng.choice([-1, 1], octaves.shape) * 2**octaves).astype(np.float32)
    x[:, 0] = largest
    decoded = one_by_one(x)
    off = np.abs(decoded / x.astype(np.float64) - 1)
    assert off.max() <= LOSES * (1 + 1e-4) and off.max() > 0.9 * LOSES
    assert decoded[0, 0] == np.float32(largest)
    assert math.sqrt((off**2).mean()) == pytest.approx(math.sqrt(Log8.lost), rel=0.1)
    assert abs(float(np.mean(decoded / x.astype(np.float64) - 1))) < 3 * math.sqrt(Log8.lost / off.size)  # no bias


def test_zero_stays_zero_and_what_is_far_below_the_largest_becomes_zero() -> None:
    x = np.array([[1.0, 0.0, -0.0, 2.0**-15.7, -(2.0**-15.7), 2.0**-17, -(2.0**-17)]], np.float32)
    decoded = one_by_one(x).reshape(-1)
    assert decoded[0] == 1 and not decoded[1:3].any() and not decoded[5:].any()
    assert np.allclose(decoded[3:5], x.reshape(-1)[3:5], rtol=LOSES * 1.001)
    assert not one_by_one(np.zeros((2, 3), np.float32)).any()


def test_a_quarter_of_the_bytes_but_for_factors_and_units() -> None:
    saved, symbols = Saved("l", (8, 6, 6)), {"batch": 4, "b": 3, "c": 5, "h": 4, "w": 2}
    factor, core = Hosvd().stored(saved)
    assert Log8(Hosvd()).stored(saved)[0] == factor
    _, codes, unit = (tensor.bytes(symbols) for tensor in Log8(Hosvd()).stored(saved))
    assert 4 * codes == core.bytes(symbols) and unit == 4


@pytest.mark.parametrize("name", TRANSFORMS)
def test_it_is_a_setting_and_survives_the_manifest(name: str) -> None:
    codec = codec_named(f"{name}:storage=log8")
    assert isinstance(codec, Log8) and codec.inner == CODECS[name] and codec.name == name
    assert label_of(codec) == f"{name}:storage=log8"
    assert codec_from(codec.name, json.loads(json.dumps(config_of(codec)))) == codec
    # Rounded at every rank: something exact must stand beside it.
    assert [label_of(one) for one in menu_from(f"{name}+{name}:storage=log8")] == [name, f"{name}:storage=log8"]


@pytest.mark.parametrize("text", ["dense:storage=log8", "fp16:storage=log8", "int8:storage=log8", "int4:storage=log8"])
def test_what_no_transform_has_made_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"is for what a transform leaves; .* take int8 or int4"):
        codec_named(text)


def test_what_stores_nothing_and_what_is_narrow_already() -> None:
    with pytest.raises(UsageError, match="recompute stores nothing, so storage=log8 means nothing"):
        codec_named("recompute:storage=log8")
    inner: Codec = Half(Hosvd())
    with pytest.raises(UsageError, match="hosvd is stored as float16 already"):
        Log8(inner)
    with pytest.raises(UsageError, match="storage=float16 of the codec hosvd is no logarithm"):
        Log8(Hosvd(), "float16")
