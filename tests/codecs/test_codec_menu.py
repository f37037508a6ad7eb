"""Menus: how several codecs are spelled, and when dense is added to them."""

from __future__ import annotations

import pytest

from edgetune.codecs import identifier, label_of, menu_from, with_fallback
from edgetune.errors import UsageError


def labels(text: str) -> list[str]:
    return [label_of(codec) for codec in with_fallback(menu_from(text))]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("hosvd", ["hosvd"]),
        ("hosvd+int8", ["hosvd", "int8"]),
        ("int8", ["int8", "dense"]),
        ("dct+patch:size=7", ["dct", "patch:size=7", "dense"]),
        ("recompute+int4", ["recompute", "int4"]),
        ("hosvd:storage=float16", ["hosvd:storage=float16", "dense"]),
        ("fp16", ["fp16", "dense"]),
        ("int8+dense+hosvd", ["int8", "dense", "hosvd"]),
    ],
)
def test_dense_is_added_to_a_menu_that_cannot_be_exact(text: str, expected: list[str]) -> None:
    assert labels(text) == expected


@pytest.mark.parametrize("text", ["hosvd+hosvd", "dense+svd+dense", "patch+patch:size=2", "fp16+dense:storage=float16"])
def test_a_codec_stands_in_a_menu_once(text: str) -> None:
    with pytest.raises(UsageError, match="appears twice"):
        menu_from(text)


def test_settings_tell_two_codecs_of_one_name_apart() -> None:
    two, seven = menu_from("patch:size=2,storage=float16+patch:size=7")
    assert identifier(two) != identifier(seven)
    assert identifier(seven).isidentifier()


@pytest.mark.parametrize("text", ["", "hosvd+", "+hosvd"])
def test_an_empty_place_in_a_menu_is_an_error(text: str) -> None:
    with pytest.raises(UsageError, match="there is no codec ''"):
        menu_from(text)
