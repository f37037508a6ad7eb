"""Plain JSON data -> dataclasses, every field checked. Knows the errors; what the dataclasses mean is theirs."""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Mapping
from typing import Any

from edgetune.errors import BundleError

_SCALARS = (str, int, float, bool)


# A manifest holds many thousand instances of a few classes, and to evaluate annotations is slow.
@functools.cache
def _fields(kind: type) -> tuple[dict[str, Any], frozenset[str]]:
    """Return the type of every field of a dataclass, and the names of those without a default."""
    needed = (
        f.name
        for f in dataclasses.fields(kind)
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    )
    hints = typing.get_type_hints(kind)
    return {f.name: hints[f.name] for f in dataclasses.fields(kind)}, frozenset(needed)


def from_plain(kind: Any, value: Any, where: str) -> Any:
    """Return ``value`` (plain JSON data) as an instance of the type ``kind``; the inverse of ``dataclasses.asdict``.

    Raises:
        BundleError: a field is missing, unknown, or of the wrong type; the message names its place.
    """
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        if not isinstance(value, dict):
            raise BundleError(f"{where}: expected an object, found {type(value).__name__}")
        hints, required = _fields(kind)
        if not required <= value.keys() <= hints.keys():
            unknown, missing = value.keys() - hints.keys(), required - value.keys()
            raise BundleError(f"{where}: unknown fields {sorted(unknown)}, missing fields {sorted(missing)}")
        return kind(**{name: from_plain(hints[name], item, f"{where}.{name}") for name, item in value.items()})
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return from_plain(next(a for a in args if a is not type(None)), value, where)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise BundleError(f"{where}: expected a list, found {type(value).__name__}")
        if args[0] in _SCALARS and all(type(item) is args[0] for item in value):
            return tuple(value)
        return tuple(from_plain(args[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, dict):
            raise BundleError(f"{where}: expected an object, found {type(value).__name__}")
        return {key: from_plain(args[1], item, f"{where}.{key}") for key, item in value.items()}
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise BundleError(f"{where}: expected {kind.__name__}, found {type(value).__name__}")
    return value
