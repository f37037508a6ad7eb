"""The spelling of adapters, and the maps that settings lead to."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edgetune.adapters import AdapterSettings, Slicing, first_codes, first_map, parse, save_maps
from edgetune.adapters.maps import draw_bits, unpack_bits
from edgetune.errors import UsageError

SPELLINGS = [
    "csg",
    "bcsg",
    "bcsg:code=1024,seed=7",
    "csg:slice=12x12x3x3",
    "csg:slice=16x16x3x3+16x16x1x1,code=128+16,residual=no,kernels=any",
    "csg:map=some/file.safetensors,freeze=no",
]


@pytest.mark.parametrize("text", SPELLINGS)
def test_settings_read_back_from_their_own_spelling(text: str) -> None:
    settings = parse(text)
    assert parse(str(settings)) == settings


def test_what_is_not_said_follows_the_paper() -> None:
    assert parse("csg") == AdapterSettings() == parse("csg:slice=16x16x3x3,code=128,map=learned,residual=yes,seed=0")
    assert parse("csg:slice=12x12x3x3").codes == (72,)
    assert parse("bcsg") == parse("csg:map=binary")
    assert parse("bcsg").freeze and parse("csg:map=x.safetensors").freeze and not parse("csg").freeze


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("lora", "no adapter 'lora'; choose one of: bcsg, csg"),
        ("csg:rank=4", "no setting is called 'rank'; choose one of: code, freeze, kernels, map, residual, seed, slice"),
        ("csg:code=8,code=9", "'code' is given twice"),
        ("csg:code=many", "code=many cannot be read"),
        ("csg:residual=maybe", "choose one of: no, yes"),
        ("csg:map=", "map= cannot be read"),
        ("csg:slice=16x16", "a slice is filters x channels x kernel"),
        ("csg:slice=4x4x3x3+4x4x1x1,code=8", "2 shapes of slices and 1 code sizes"),
        ("csg:slice=4x4x3x3+4x4x3x3", "the same shape of slice twice"),
        ("csg:code=0", "a code has 1 element or more"),
        ("bcsg:freeze=no", "a binary map is never trained"),
        ("csg:kernels=all", "choose one of: any, same"),
        ("csg:seed=-1", "seed=-1: 0 or more"),
    ],
)
def test_a_wrong_setting_is_named_with_the_valid_ones(text: str, complaint: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(text)
    assert complaint in str(caught.value)


def test_a_binary_map_follows_from_its_seed_for_ever() -> None:
    # hashlib.shake_256(b"edgetune csg 2x20 7").hexdigest(6): a map that a device drew years ago must not change
    assert draw_bits(7, 2, 20).tobytes().hex() == "f0a516733a55"
    shared = first_map(parse("bcsg:slice=2x2x5,code=2,seed=7"), 0)
    assert np.array_equal(shared, unpack_bits(draw_bits(7, 2, 20), 20))
    assert not np.array_equal(shared, first_map(parse("bcsg:slice=2x2x5,code=2,seed=8"), 0))


def test_unpacked_bits_are_minus_and_plus_of_one_size() -> None:
    shared = unpack_bits(draw_bits(0, 64, 2304), 2304)
    assert shared.shape == (64, 2304) and shared.dtype == np.float32
    assert set(np.unique(shared)) == {np.float32(-1 / 48), np.float32(1 / 48)}
    assert abs(shared.mean()) < 1e-3  # as many of one as of the other
    alone = unpack_bits(np.array([[0b00000001, 0b00000010]], np.uint8), 16)
    assert np.flatnonzero(alone[0] > 0).tolist() == [0, 3]  # bit j of byte i is element 2j + i


def test_rows_of_a_learned_map_have_nearly_the_norm_one() -> None:
    norms = np.linalg.norm(first_map(parse("csg"), 0), axis=1)
    assert norms.shape == (128,) and 0.9 < norms.min() < 1 < norms.max() < 1.1


@pytest.mark.parametrize("kind", ["csg", "bcsg"])
def test_first_codes_are_zero_beside_a_residual_and_else_give_the_usual_variance(kind: str) -> None:
    cut = Slicing((64, 64, 3, 3), (16, 16, 3, 3))
    assert not first_codes(parse(kind), "w", cut, 128).any()
    settings = parse(f"{kind}:residual=no")
    codes = first_codes(settings, "w", cut, 128)
    filters = codes @ first_map(settings, 0)
    assert np.var(filters) == pytest.approx(2 / (64 * 9), rel=0.1)
    assert not np.array_equal(codes, first_codes(settings, "another", cut, 128))


def test_a_map_comes_back_from_its_file(tmp_path: Path) -> None:
    shared = np.random.default_rng(0).standard_normal((8, 36)).astype(np.float32)
    file = tmp_path / "map.safetensors"
    save_maps(file, {(2, 2, 3, 3): shared})
    assert np.array_equal(first_map(parse(f"csg:slice=2x2x3x3,code=8,map={file}"), 0), shared)
    with pytest.raises(UsageError, match=r"expected floats \[9, 36\]"):
        first_map(parse(f"csg:slice=2x2x3x3,code=9,map={file}"), 0)
    with pytest.raises(UsageError, match="holds no map of 4x4x3x3 slices; it holds: 2x2x3x3"):
        first_map(parse(f"csg:slice=4x4x3x3,code=8,map={file}"), 0)
    for unreadable in (tmp_path / "absent", tmp_path):
        with pytest.raises(UsageError, match="choose one of: binary, learned"):
            first_map(parse(f"csg:map={unreadable}"), 0)
    (tmp_path / "text").write_text("not a map")
    with pytest.raises(UsageError, match="can be read"):
        first_map(parse(f"csg:map={tmp_path / 'text'}"), 0)
