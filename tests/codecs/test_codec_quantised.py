"""int8 and int4: against a plain loop, unbiased, inside their bounds, two codes to a byte, emitted bit for bit."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgetune.codecs import Int4, Int8, Saved, captured_energy, codec_named
from edgetune.codecs.base import Array
from edgetune.errors import DataError, UsageError
from tests.codecs.workbench import held_as_told, noise_for, run_decoder, run_encoder

FEW = settings(max_examples=25, deadline=None, derandomize=True)
CODECS = (Int8(), Int4(), Int8(group=7), Int4(group=6), Int8(group=1000), Int4(group=2))
SHAPES = ((1,), (3,), (64,), (65,), (5, 7, 9), (4, 8, 8), (2, 3, 4, 5), (17, 6))
GOLDEN = np.float32(0.618034)


def samples(shape: tuple[int, ...], batch: int, seed: int, magnitude: float = 1.0, offset: float = 0.0) -> Array:
    x = np.random.default_rng(seed).standard_normal((batch, *shape)) * magnitude + offset * magnitude
    return x.astype(np.float32)


def by_a_loop(codec: Int8, x: Array, noise: Array) -> Array:
    """Quantise group by group and element by element; return the decoded tensor."""
    size = x[0].size
    count = -(-size // codec.group)
    length = -(-size // count)
    length += length % 2 if codec.bits == 4 else 0
    levels = 2**codec.bits - 1
    decoded = np.empty((len(x), size), np.float32)
    for sample, row in enumerate(x.reshape(len(x), size)):
        for i in range(count):
            group = row[i * length : (i + 1) * length]
            lowest = group.min()
            step = max(np.float32((group.max() - lowest) * np.float32((1 + 2.0**-20) / levels)), np.float32(2.0**-126))
            start = np.float32(i) * GOLDEN
            for j, value in enumerate(group):
                u = np.float32(noise[j] + np.float32(start - np.floor(start)))
                u = np.float32(u - np.floor(u))
                code = math.floor(np.float32(np.float32((value - lowest) * np.float32(1 / step)) + u))
                assert 0 <= code <= levels
                decoded[sample, i * length + j] = lowest + np.float32(np.float32(code) * step)
    return decoded.reshape(x.shape)


@pytest.mark.parametrize("codec", CODECS, ids=repr)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_oracle_is_a_plain_loop(codec: Int8, shape: tuple[int, ...]) -> None:
    saved = Saved("layer", shape)
    x, inputs = samples(shape, 2, 1), noise_for(codec, saved, 2)
    found = codec.decode(codec.encode(x, saved, inputs), saved, inputs)
    assert np.array_equal(found, by_a_loop(codec, x, inputs["u"]))


@FEW
@given(
    codec=st.sampled_from(CODECS),
    shape=st.sampled_from(SHAPES),
    batch=st.integers(1, 3),
    magnitude=st.sampled_from([1.0, 1e30, 1e-30, 0.0]),
    offset=st.sampled_from([0.0, 100.0, -3.0]),
)
def test_what_is_emitted_is_the_oracle_bit_for_bit(
    codec: Int8, shape: tuple[int, ...], batch: int, magnitude: float, offset: float
) -> None:
    saved = Saved("layer", shape)
    x, inputs = samples(shape, batch, 3, magnitude, offset), noise_for(codec, saved, 4)
    expected = codec.encode(x, saved, inputs)
    stored, energy = run_encoder(codec, x, saved, inputs)
    assert list(stored) == list(expected)
    assert all(np.array_equal(stored[name], expected[name]) for name in stored)
    assert held_as_told(codec, stored, saved, {"batch": batch})
    decoded = run_decoder(codec, stored, saved, inputs)
    assert np.array_equal(decoded, codec.decode(stored, saved, inputs))
    assert energy == pytest.approx(captured_energy(x, decoded), abs=1e-5)


@FEW
@given(
    codec=st.sampled_from(CODECS),
    seed=st.integers(0, 99),
    magnitude=st.sampled_from([1.0, 1e30, 1e-30]),
    highest=st.booleans(),
)
def test_no_element_moves_by_more_than_one_step(codec: Int8, seed: int, magnitude: float, highest: bool) -> None:
    """Also with the largest noise there is, which must not lift a code past the last level."""
    saved = Saved("layer", (5, 7, 9))
    x = samples(saved.shape, 2, seed, magnitude)
    (mode,) = codec.modes(saved)
    assert mode.size is not None
    largest = np.full(mode.size, np.nextafter(np.float32(1), np.float32(0)))
    inputs = {"u": largest} if highest else noise_for(codec, saved, seed)
    stored = codec.encode(x, saved, inputs)
    steps = np.repeat(stored["scale"], mode.size, axis=1)[:, : x[0].size].reshape(x.shape)
    off = np.abs(codec.decode(stored, saved, inputs).astype(np.float64) - x)
    assert (off <= steps * (1 + 1e-4)).all()
    assert 0 < steps.max() < 1.1 * np.ptp(x) / (2**codec.bits - 1)


@pytest.mark.parametrize("codec", [Int8(), Int4()], ids=repr)
def test_the_decoded_tensor_is_unbiased(codec: Int8) -> None:
    """The mean of n draws is as far from x as n independent errors of that variance leave it, and no farther."""
    saved, draws = Saved("layer", (3, 50)), 2000
    x = samples(saved.shape, 2, 5)
    mean = np.zeros(x.shape)
    for seed in range(draws):
        inputs = noise_for(codec, saved, seed)
        stored = codec.encode(x, saved, inputs)
        mean += (codec.decode(stored, saved, inputs).astype(np.float64) - x) / draws
    (mode,) = codec.modes(saved)
    assert mode.size == 50
    lowest, step = (stored[name][:, :, None].astype(np.float64) for name in ("lowest", "scale"))
    fraction = np.modf((x - lowest) / step)[0]
    scores = mean / step / np.sqrt(fraction * (1 - fraction) / draws + 1e-12)
    likely = (fraction > 0.01) & (fraction < 0.99)  # of the others too few draws are rounded the other way
    assert likely.sum() > 250
    assert np.abs(scores[likely]).max() < 5
    assert scores[likely].std() == pytest.approx(1.0, abs=0.2)  # no bias, and errors as large as they should be
    assert (np.abs(mean[~likely]) < 0.02 * np.broadcast_to(step, x.shape)[~likely]).all()


def test_groups_that_lie_alike_do_not_err_alike() -> None:
    """A sum over tokens, as a weight gradient is one, errs about as it does with independent noise."""
    codec, saved = Int4(), Saved("layer", (100, 192), channels_last=True)
    x = samples(saved.shape, 1, 6)
    independent = np.sqrt(np.square(codec.encode(x, saved, noise_for(codec, saved, 0))["scale"]).mean() / 6 * 100)
    off = []
    for seed in range(5):
        inputs = noise_for(codec, saved, seed)
        decoded = codec.decode(codec.encode(x, saved, inputs), saved, inputs)
        off.append(np.square((decoded - x).sum(axis=1)).mean())
    assert math.sqrt(np.mean(off)) < 1.2 * independent


@pytest.mark.parametrize("codec", [Int8(), Int4()], ids=repr)
def test_constants_and_zeros_are_exact(codec: Int8) -> None:
    saved = Saved("layer", (5, 7, 9))
    inputs = noise_for(codec, saved, 7)
    for value in (0.0, 1.7, -3e30, 1e-38):
        x = np.full((2, *saved.shape), value, np.float32)
        stored, energy = run_encoder(codec, x, saved, inputs)
        assert np.array_equal(run_decoder(codec, stored, saved, inputs), x)
        assert energy == 1.0
    rectified = np.maximum(samples(saved.shape, 2, 8), 0)
    decoded = codec.decode(codec.encode(rectified, saved, inputs), saved, inputs)
    assert not decoded[rectified == 0].any()


def test_bytes_of_one_sample() -> None:
    saved = Saved("layer", (256, 14, 14))
    groups = 256 * 14 * 14 // 64
    assert sum(t.bytes({"batch": 3}) for t in Int8().stored(saved)) == 3 * (64 + 8) * groups
    assert sum(t.bytes({"batch": 3}) for t in Int4().stored(saved)) == 3 * (32 + 8) * groups


def test_int4_packs_two_codes_into_a_byte() -> None:
    saved = Saved("layer", (4,))
    x = np.array([[0.0, 15.0, 4.0, 9.0]], np.float32)
    stored = Int4().encode(x, saved, {"u": np.full(4, 0.5, np.float32)})
    assert stored["codes"].tolist() == [[0 | 4 << 4, 15 | 9 << 4]]


@pytest.mark.parametrize("codec", [Int8(), Int4()], ids=repr)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused_or_told(codec: Int8, value: float) -> None:
    saved = Saved("layer", (3, 50))
    x, inputs = samples(saved.shape, 2, 9), noise_for(codec, saved, 10)
    x[1, 2, 3] = value
    with pytest.raises(DataError, match="'layer' is not finite"):
        codec.encode(x, saved, inputs)
    assert not math.isfinite(run_encoder(codec, x, saved, inputs)[1])


def test_a_range_beyond_float32_is_refused() -> None:
    saved = Saved("layer", (2,))
    x = np.array([[-3e38, 3e38]], np.float32)
    with pytest.raises(DataError, match="range of the activation 'layer' is beyond float32"):
        Int8().encode(x, saved, {"u": np.zeros(2, np.float32)})
    assert not math.isfinite(run_encoder(Int8(), x, saved, {"u": np.zeros(2, np.float32)})[1])


def test_settings_that_no_group_can_have() -> None:
    with pytest.raises(UsageError, match="group=1 of the codec int8 is too small"):
        codec_named("int8:group=1")
    with pytest.raises(UsageError, match="group=65 of the codec int4 is odd"):
        codec_named("int4:group=65")
