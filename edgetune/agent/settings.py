"""Settings as text: a TOML file, ``section.key=value``, and the annotated file that holds every default.

A key is the name of a field of :class:`~edgetune.agent.config.AgentConfig`; its sections are tables. A size may be
written with its unit (``"512MiB"``). Knows the config's fields and types; nothing of what they do.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import sys
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from edgetune.agent.config import AgentConfig
from edgetune.errors import UsageError, choices
from edgetune.units import parse_bytes

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Settings = dict[str, Any]
"""Field name -> value; a section is such a mapping of its own."""

WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
NOTHING = "none"
_ALIKE = 0.75
_EXAMPLE: Settings = {"data": "/var/lib/edgetune/samples", "state": "/var/lib/edgetune/state"}


def read(path: Path) -> Settings:
    """Return what the TOML file ``path`` says, unchecked but for its syntax.

    Raises:
        UsageError: there is no such file, or it is not TOML.
    """
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise UsageError(
            f"the configuration '{path}' cannot be read ({error.strerror or error}); 'edgetune config' prints one"
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"the configuration '{path}' is not TOML: {error}") from None


def assignment(text: str) -> Settings:
    """Return what ``key=value`` or ``section.key=value`` says; the value is converted when the config is made.

    Raises:
        UsageError: it has not this form.
    """
    key, equals, value = text.partition("=")
    names = key.strip().split(".")
    if not equals or not all(names) or len(names) > 2:
        raise UsageError(
            f"'{text}' is not a setting: expected key=value or section.key=value, such as replay.ratio=0.3"
        )
    given: Any = _Word(value.strip())
    for name in reversed(names):
        given = {name: given}
    found: Settings = given
    return found


def merged(*layers: Mapping[str, Any]) -> Settings:
    """Return all settings of ``layers``; a later one wins, key by key."""
    found: Settings = {}
    for layer in layers:
        for name, value in layer.items():
            known = found.get(name)
            found[name] = merged(known, value) if isinstance(known, dict) and isinstance(value, Mapping) else value
    return found


def configured(settings: Mapping[str, Any]) -> AgentConfig:
    """Return the config that ``settings`` describe; :meth:`AgentConfig.check` has still to judge it.

    Raises:
        UsageError: a key is unknown, missing, or its value of another type; all such are named.
    """
    wrong: list[str] = []
    made = _made(AgentConfig, settings, "", wrong)
    if wrong:
        raise UsageError("; ".join(wrong))
    assert isinstance(made, AgentConfig)
    return made


def plain(config: AgentConfig) -> Settings:
    """Return ``config`` as JSON data, of which :func:`configured` makes the same again."""
    told: Settings = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    return told


def annotated(settings: Mapping[str, Any] | None = None) -> str:
    """Return a TOML file with every setting, its meaning as a comment, and its default commented out.

    Args:
        settings: what is set in the file, instead of ``data`` and ``state`` alone.
    """
    given = dict(_EXAMPLE if settings is None else settings)
    lines = ["# The settings of 'edgetune run --config FILE'. A line that begins with #name is the default.", ""]
    lines += ["# bundle: what 'edgetune export' wrote; the command line may name it instead."]
    lines += [f"bundle = {_toml(given['bundle'])}" if "bundle" in given else '#bundle = "model.edgetune"', ""]
    sections: list[str] = []
    for field, kind in _fields(AgentConfig):
        meaning = _meanings(AgentConfig)[field.name]
        if dataclasses.is_dataclass(kind) or field.name == "hyper":
            sections += ["", f"# {meaning}", f"[{field.name}]"]
            sections += _entries(kind, given.get(field.name, {})) if dataclasses.is_dataclass(kind) else _hyper(given)
            continue
        lines += _entry(field, meaning, given)
    return "\n".join([*lines, *sections]) + "\n"


def _hyper(given: Mapping[str, Any]) -> list[str]:
    known = given.get("hyper", {})
    return [f"{name} = {_toml(value)}" for name, value in known.items()] or ["#learning_rate = 0.001"]


def _entries(kind: Any, given: Mapping[str, Any]) -> list[str]:
    return [line for field, _ in _fields(kind) for line in _entry(field, _meanings(kind)[field.name], given)]


def _entry(field: dataclasses.Field[Any], meaning: str, given: Mapping[str, Any]) -> list[str]:
    default = None if field.default is dataclasses.MISSING else field.default
    if field.name in given:
        return [f"# {meaning}", f"{field.name} = {_toml(given[field.name])}"]
    shown = f"#{field.name} =" if default is None else f"#{field.name} = {_toml(default)}"
    return [f"# {meaning}", shown]


def _toml(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"[{', '.join(_toml(item) for item in value)}]"
    return json.dumps(value if isinstance(value, int | float | str) else str(value), ensure_ascii=False)


def _fields(kind: Any) -> Iterator[tuple[dataclasses.Field[Any], Any]]:
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        yield field, hints[field.name]


def _meanings(kind: Any) -> dict[str, str]:
    """Return what the docstring's attributes say, on one line each."""
    found: dict[str, str] = {}
    for line in (kind.__doc__ or "").partition("Attributes:")[2].splitlines():
        name, colon, text = line.strip().partition(": ")
        if colon and name.isidentifier():
            found[name] = text
    return {field.name: found.get(field.name, field.name) for field in dataclasses.fields(kind)}


class _Word(str):
    """A value from the command line: text, whatever it is to become."""


def _made(kind: Any, settings: Mapping[str, Any], where: str, wrong: list[str]) -> Any:
    known = dict(_fields(kind))
    hints = {field.name: hint for field, hint in known.items()}
    for name in settings:
        if name not in hints:
            near = difflib.get_close_matches(name, hints, 1, _ALIKE)
            advice = f"did you mean '{where}{near[0]}'?" if near else f"known are: {choices(hints)}"
            wrong.append(f"there is no setting '{where}{name}'; {advice}")
    values: dict[str, Any] = {}
    for field in known:
        place = where + field.name
        if field.name in settings:
            try:
                values[field.name] = _converted(hints[field.name], settings[field.name], place, wrong)
            except (ValueError, TypeError, UsageError) as error:
                wrong.append(f"{place}: {error}")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            wrong.append(f"the setting '{place}' is missing")
    return None if wrong else kind(**values)


def _converted(kind: Any, value: Any, place: str, wrong: list[str]) -> Any:
    """Return ``value`` as the type ``kind``.

    Raises:
        ValueError, TypeError, UsageError: it cannot be.
    """
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if type(None) in args and (value is None or (isinstance(value, _Word) and value.lower() == NOTHING)):
            return None
        return _converted(next(one for one in args if one is not type(None)), value, place, wrong)
    if dataclasses.is_dataclass(kind) or (origin is not None and issubclass(origin, Mapping)):
        if not isinstance(value, Mapping):
            raise TypeError(f"expected a table, found {value!r}")
        if dataclasses.is_dataclass(kind):
            return _made(kind, value, f"{place}.", wrong)
        return {name: _converted(args[1], item, f"{place}.{name}", wrong) for name, item in value.items()}
    if origin is tuple:
        if isinstance(value, _Word):
            value = [_Word(item.strip()) for item in value.split(",") if item.strip()]
        if not isinstance(value, list | tuple):
            raise TypeError(f"expected a list, found {value!r}")
        return tuple(_converted(args[0], item, place, wrong) for item in value)
    if kind is int and place.endswith("_bytes") and isinstance(value, str):
        return parse_bytes(value, zero=True)
    return _scalar(kind, value)


def _scalar(kind: Any, value: Any) -> Any:
    if kind is Path and isinstance(value, str | Path):
        return Path(value)
    if isinstance(value, _Word):
        text = str(value)
        if kind is bool and text.lower() not in WORDS:
            raise ValueError(f"expected true or false, found '{text}'")
        return WORDS[text.lower()] if kind is bool else kind(text)
    if kind is str and isinstance(value, Path):
        return str(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise TypeError(f"expected {'a text' if kind is str else kind.__name__}, found {value!r}")
    return value
