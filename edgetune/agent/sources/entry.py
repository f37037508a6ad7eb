"""Python functions that a user names, ``package.module:function`` or ``file.py:function``. Knows only how to import."""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

from edgetune.errors import DataError, choices

_FORM = re.compile(r"(?P<place>.+):(?P<name>[A-Za-z_]\w*(\.[A-Za-z_]\w*)*)")
_MODULE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")


def is_entry(spec: str) -> bool:
    """Return whether ``spec`` has the form of an entry point (whether or not there is one)."""
    found = _FORM.fullmatch(spec)
    return found is not None and (found["place"].endswith(".py") or _MODULE.fullmatch(found["place"]) is not None)


def load_entry(spec: str) -> Any:
    """Return what ``spec`` names. Its module runs: it is the user's own.

    Raises:
        DataError: there is no such module, file or name, or the module failed.
    """
    found = _FORM.fullmatch(spec)
    if found is None or not is_entry(spec):
        raise DataError(f"'{spec}' names no function; expected module:function or file.py:function")
    place, name = found["place"], found["name"]
    try:
        module = _from_file(Path(place)) if place.endswith(".py") else _from_module(place)
    except Exception as error:  # whatever the user's own module raises
        raise DataError(f"'{place}' of '{spec}' cannot be imported ({type(error).__name__}: {error})") from error
    target: Any = module
    for part in name.split("."):
        if not hasattr(target, part):
            known = choices(one for one in vars(module) if not one.startswith("_"))
            raise DataError(f"'{place}' has no '{name}'; it has: {known}")
        target = getattr(target, part)
    return target


def _from_module(name: str) -> Any:
    sys.path.insert(0, "")  # a module beside the user, as with python -m
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove("")


def _from_file(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file '{path}'")
    name = f"edgetune_user_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path.resolve())
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and the like look their module up
    spec.loader.exec_module(module)
    return module
