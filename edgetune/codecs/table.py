"""The table of all codecs, and how one is spelled: on the command line, in a manifest, in a label.

hosvd · patch:size=4 · int8:group=128,storage=float16 · hosvd+dct+int8 (a menu)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from edgetune.codecs.asi import Asi
from edgetune.codecs.base import Codec, config_of
from edgetune.codecs.dct import Dct
from edgetune.codecs.dense import Dense
from edgetune.codecs.hosvd import Hosvd
from edgetune.codecs.hosvd_exact import HosvdExact
from edgetune.codecs.log8 import LOG8, Log8
from edgetune.codecs.narrow import FLOAT16, FLOAT32, Half, Narrow
from edgetune.codecs.patch import Patch
from edgetune.codecs.quantised import Int4, Int8
from edgetune.codecs.recompute import Recompute
from edgetune.codecs.svd import Svd
from edgetune.codecs.threshold import Threshold
from edgetune.codecs.wavelet import Db3, Haar
from edgetune.errors import UsageError, choices

_ALL: tuple[Codec, ...] = (
    Dense(),
    Half(Dense()),
    Recompute(),
    Hosvd(),
    HosvdExact(),
    Asi(),
    Svd(),
    Dct(),
    Haar(),
    Db3(),
    Threshold(),
    Patch(),
    Int8(),
    Int4(),
)

CODECS: dict[str, Codec] = {codec.name: codec for codec in _ALL}
"""Every codec with its default settings."""

EXACT_AT_FULL_RANK = frozenset({"hosvd", "hosvd-exact", "asi", "svd"})
"""Lossy codecs that lose nothing (but rounding) where every rank is full."""

_BOOLEANS = {"True": True, "False": False}
STORAGE = "storage"
"""The setting that every codec has: how its numbers are stored."""
_NARROW: dict[str, Callable[[Codec], Codec]] = {FLOAT16: Half, LOG8: Log8}


def codec_from(name: str, config: Mapping[str, Any]) -> Codec:
    """Return the codec called ``name`` with the settings ``config`` (those that are absent keep their defaults).

    Raises:
        UsageError: no such codec, no such setting, or a value that the setting cannot take; the choices are listed.
    """
    default, known = _known(name)
    for key, value in config.items():
        if key not in known:
            raise UsageError(f"the codec {name} has no setting '{key}'; it has: {choices(known)}")
        if type(value) is not type(known[key]):
            raise UsageError(f"{key}={value!r} of the codec {name} should be of the type {type(known[key]).__name__}")
    storage = config.get(STORAGE, known[STORAGE])
    if storage not in (FLOAT32, *_NARROW):
        raise UsageError(f"{STORAGE}={storage} of the codec {name}: choose one of: {choices((FLOAT32, *_NARROW))}")
    if storage != FLOAT32 and isinstance(default, Recompute):
        raise UsageError(f"the codec {name} stores nothing, so {STORAGE}={storage} means nothing; leave it away")
    codec: Codec = dataclasses.replace(default, **{key: value for key, value in config.items() if key != STORAGE})
    return codec if storage == FLOAT32 else _NARROW[storage](codec)


def codec_named(text: str) -> Codec:
    """Return the codec that ``text`` spells: ``name`` or ``name:key=value,key=value``.

    Raises:
        UsageError: as :func:`codec_from`, or it is not of this form.
    """
    name, _, settings = text.strip().partition(":")
    _, known = _known(name)
    config: dict[str, Any] = {}
    for part in filter(None, settings.split(",")):
        key, equals, value = part.partition("=")
        if not equals:
            raise UsageError(f"'{part}' in the codec '{text}' is no setting; expected key=value, such as size=4")
        kind: Any = type(known.get(key, ""))
        try:
            config[key] = _BOOLEANS[value] if kind is bool else kind(value)
        except (ValueError, KeyError):
            raise UsageError(f"{key}={value} of the codec {name} should be of the type {kind.__name__}") from None
    return codec_from(name, config)


def _known(name: str) -> tuple[Any, dict[str, Any]]:
    """Return the codec without its storage (a dataclass, which its protocol cannot say), and its default settings."""
    if name not in CODECS:
        raise UsageError(f"there is no codec '{name}'; choose one of: {choices(CODECS)}")
    codec = CODECS[name]
    return codec.inner if isinstance(codec, Narrow) else codec, {STORAGE: FLOAT32, **config_of(codec)}


def menu_from(text: str) -> tuple[Codec, ...]:
    """Return the codecs that ``text`` spells, joined by ``+``: from these a plan chooses for every tensor.

    Raises:
        UsageError: as :func:`codec_named`, or one appears twice.
    """
    menu = tuple(codec_named(part) for part in text.split("+"))
    labels = [label_of(codec) for codec in menu]
    twice = next((label for label in labels if labels.count(label) > 1), None)
    if twice is not None:
        raise UsageError(f"the codec {twice} appears twice in '{text}'; name each once")
    return menu


def label_of(codec: Codec) -> str:
    """Return the shortest spelling of ``codec``: its name, and the settings that differ from the defaults."""
    _, default = _known(codec.name)
    settings = ",".join(f"{key}={value}" for key, value in config_of(codec).items() if value != default[key])
    return f"{codec.name}:{settings}" if settings else codec.name


def identifier(codec: Codec) -> str:
    """Return :func:`label_of` as a part of a function's name: letters, digits and underscores."""
    return "".join(letter if letter.isalnum() else "_" for letter in label_of(codec).replace("=", ""))


def with_fallback(menu: tuple[Codec, ...]) -> tuple[Codec, ...]:
    """Return ``menu``, and dense at its end unless some codec of it can be exact.

    What cannot be exact cannot satisfy every ε, and to know what it loses takes a gradient that loses nothing.
    """
    full = (codec.name in EXACT_AT_FULL_RANK and not isinstance(codec, Narrow) for codec in menu)
    exact = any(full) or any(not codec.lossy for codec in menu)
    return menu if exact else (*menu, Dense())
