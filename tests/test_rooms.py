"""Which part of EdgeTune may import which. Holds the table of the design's chapter on rooms against the source.

A room is a module or a package directly under ``edgetune/``. An import counts as lazy inside a function or under
``if TYPE_CHECKING:``: it does not happen when the module is imported. The standard library is open to all.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "edgetune"
HOST_LIBRARIES = ("torch", "onnx", "onnx_ir", "onnxscript", "scipy", "sklearn")


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


@dataclass(frozen=True)
class Room:
    """What a room may import: other rooms, libraries, and both once more for lazy imports only."""

    rooms: frozenset[str] = frozenset()
    libraries: frozenset[str] = frozenset()
    lazy_rooms: frozenset[str] = frozenset()
    lazy_libraries: frozenset[str] = frozenset()


_ALL = _words("bundle errors units version codecs planning autodiff export engines telemetry doctor agent adapters api")
TABLE = {
    "errors": Room(),
    "units": Room(_words("errors")),
    "version": Room(),
    "plain": Room(_words("errors")),
    "bundle": Room(_words("errors units plain"), _words("numpy safetensors")),
    "codecs": Room(_words("bundle errors units"), _words("numpy")),
    "adapters": Room(_words("bundle errors"), _words("numpy safetensors")),
    "planning": Room(_words("bundle codecs errors units plain"), _words("numpy safetensors")),
    "autodiff": Room(_words("codecs errors units"), _words("numpy onnx onnx_ir")),
    "export": Room(
        _words("bundle codecs adapters planning autodiff errors units version"),
        _words("numpy safetensors onnx onnx_ir"),
        lazy_libraries=_words("torch onnxscript flatbuffers"),
    ),
    "engines": Room(_words("bundle codecs planning errors units"), _words("numpy")),
    "telemetry": Room(_words("bundle errors units"), lazy_libraries=_words("pynvml")),
    # Looks at the machine and at what is installed; loads a runtime only in a process of its own.
    "doctor": Room(_words("errors units telemetry"), lazy_libraries=_words("numpy onnxruntime")),
    "agent": Room(
        _words("bundle planning engines telemetry codecs errors units version"),
        _words("numpy PIL watchfiles rich safetensors tomli"),
        # An endpoint for monitors and a camera are optional, and take memory.
        lazy_libraries=_words("prometheus_client cv2"),
    ),
    "commands": Room(
        _ALL - _words("export autodiff"),
        _words("numpy PIL rich typer click"),
        lazy_rooms=_words("export autodiff __init__"),
        lazy_libraries=_words("torch onnx onnxruntime sklearn safetensors watchfiles pynvml"),
    ),
    # Tests of those who write codecs: needs what the host has; nobody imports it.
    "testing": Room(_ALL - _words("agent __init__"), _words("numpy onnx"), lazy_libraries=_words("torch onnxruntime")),
    # The front doors: cheap to import, so everything but the smallest rooms is fetched when it is first asked for.
    "__init__": Room(_words("errors units version"), lazy_rooms=_ALL),
    "api": Room(_words("bundle errors units"), _words("numpy"), lazy_rooms=_ALL),
    "__main__": Room(_words("commands")),
}
# Files and folders that may do more than their room: each runtime has one that speaks to it.
FILES = {
    "engines/onnxruntime.py": _words("onnxruntime"),
    "adapters/torch.py": _words("torch"),
    "engines/torch.py": _words("torch onnx"),
    "engines/torch_ops": _words("torch onnx"),
}


@dataclass(frozen=True)
class Import:
    """One imported name, absolute (``edgetune.codecs.base``, ``numpy.linalg``)."""

    name: str
    line: int
    lazy: bool


def imports_of(tree: ast.Module, package: str) -> Iterator[Import]:
    """Yield every import in ``tree``, a module of the dotted ``package``; also ``import_module`` of a constant."""

    def visit(node: ast.AST, lazy: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, lazy)
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(node.module or "", node.level, package)
            # `from edgetune import codecs` imports a room; `from edgetune.codecs import Dense` a name of one.
            for alias in node.names:
                yield Import(f"{base}.{alias.name}", node.lineno, lazy)
        elif isinstance(node, ast.Call) and _called(node.func) in ("import_module", "__import__") and node.args:
            argument = node.args[0]
            if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                level = len(argument.value) - len(argument.value.lstrip("."))
                yield Import(_absolute(argument.value[level:], level, package), node.lineno, lazy)
        if isinstance(node, ast.If) and _called(node.test) == "TYPE_CHECKING":
            for statement in node.body:
                yield from visit(statement, True)
            for statement in node.orelse:
                yield from visit(statement, lazy)
            return
        inside = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, inside)

    yield from visit(tree, False)


def _called(node: ast.AST) -> str:
    """Return the last part of a name such as ``importlib.import_module``."""
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


def _absolute(module: str, level: int, package: str) -> str:
    if level == 0:
        return module
    parts = package.split(".")
    return ".".join(part for part in [*parts[: len(parts) - level + 1], module] if part)


def violations(package: Path) -> list[str]:
    """Return one sentence per import in the ``edgetune`` package at ``package`` that the table does not allow."""
    return [problem for file in sorted(package.rglob("*.py")) for problem in _file_violations(package, file)]


def _file_violations(package: Path, file: Path) -> Iterator[str]:
    place = file.relative_to(package)
    room = place.parts[0].removesuffix(".py")
    if room not in TABLE:
        yield f"{place}: room '{room}' has no row in the table of rooms; known are {', '.join(sorted(TABLE))}"
        return
    allowed = TABLE[room]
    extra = FILES.get(place.as_posix(), frozenset()) | FILES.get(place.parent.as_posix(), frozenset())
    dotted = ".".join(["edgetune", *place.parent.parts])
    for item in imports_of(ast.parse(file.read_text("utf-8"), str(file)), dotted):
        top, *rest = item.name.split(".")
        where = f"{place}:{item.line}"
        if top != "edgetune":
            if top in sys.stdlib_module_names or top in allowed.libraries | extra:
                continue
            if top not in allowed.lazy_libraries:
                yield f"{where}: '{room}' may not import the library '{top}'"
            elif not item.lazy:
                yield f"{where}: '{room}' may import the library '{top}' only inside a function"
            continue
        target = rest[0] if rest else "__init__"
        if target == room or item.name == "edgetune.__version__" or target in allowed.rooms:
            continue
        if target not in allowed.lazy_rooms:
            yield f"{where}: '{room}' may not import '{target}'"
        elif not item.lazy:
            yield f"{where}: '{room}' may import '{target}' only inside a function"


def test_every_import_is_in_the_table() -> None:
    assert sum(1 for _ in PACKAGE.rglob("*.py")) > 3
    assert violations(PACKAGE) == []


def test_the_table_keeps_what_the_design_promises() -> None:
    def reach(room: str) -> frozenset[str]:
        return TABLE[room].rooms | TABLE[room].lazy_rooms

    assert "agent" not in reach("export")
    assert not reach("agent") & {"export", "autodiff"}
    assert all("commands" not in reach(room) for room in TABLE if room != "__main__")
    assert all("testing" not in reach(room) for room in TABLE)
    assert not reach("testing") & {"agent", "commands"}
    device = _words("errors units version plain bundle codecs adapters planning engines telemetry agent")
    for room in device:
        assert reach(room) <= device
        assert not (TABLE[room].libraries | TABLE[room].lazy_libraries) & set(HOST_LIBRARIES)


@pytest.mark.parametrize(
    ("file", "source", "complaint"),
    [
        ("agent/loop.py", "from edgetune.export import emit", "'agent' may not import 'export'"),
        ("agent/loop.py", "def f():\n    import edgetune.export.emit", "'agent' may not import 'export'"),
        ("agent/loop.py", "from ..export import emit", "'agent' may not import 'export'"),
        ("agent/loop.py", "from .. import export", "'agent' may not import 'export'"),
        ("agent/loop.py", "from edgetune import export", "'agent' may not import 'export'"),
        ("agent/loop.py", "import importlib\nimportlib.import_module('edgetune.export')", "may not import 'export'"),
        ("export/emit.py", "from edgetune.agent.loop import run", "'export' may not import 'agent'"),
        ("export/emit.py", "import torch", "'torch' only inside a function"),
        ("export/emit.py", "try:\n    import torch\nexcept ImportError:\n    pass", "'torch' only inside a function"),
        ("export/emit.py", "class A:\n    import torch", "'torch' only inside a function"),
        ("planning/plan.py", "import edgetune.engines", "'planning' may not import 'engines'"),
        ("planning/plan.py", "def f():\n    import torch", "may not import the library 'torch'"),
        ("engines/__init__.py", "import onnxruntime", "may not import the library 'onnxruntime'"),
        ("engines/choice.py", "import torch", "may not import the library 'torch'"),
        ("engines/choice.py", "def f():\n    import onnx", "may not import the library 'onnx'"),
        ("codecs/dense.py", "from onnx import helper", "may not import the library 'onnx'"),
        ("export/emit.py", "from edgetune.testing import tensor", "'export' may not import 'testing'"),
        ("testing/laws.py", "from edgetune.agent import loop", "'testing' may not import 'agent'"),
        ("testing/laws.py", "import torch", "'torch' only inside a function"),
        ("errors.py", "from edgetune.units import MIB", "'errors' may not import 'units'"),
        ("bundle.py", "from edgetune.commands import main", "'bundle' may not import 'commands'"),
        ("__init__.py", "from edgetune.export import export", "'export' only inside a function"),
        ("commands/train.py", "from edgetune.export import export", "'export' only inside a function"),
        ("attic/old.py", "import os", "room 'attic' has no row"),
    ],
)
def test_a_planted_import_is_found(tmp_path: Path, file: str, source: str, complaint: str) -> None:
    planted = tmp_path / "edgetune" / file
    planted.parent.mkdir(parents=True, exist_ok=True)
    planted.write_text(source)
    found = violations(tmp_path / "edgetune")
    assert len(found) == 1
    assert complaint in found[0]
    assert found[0].startswith(file)


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("agent/loop.py", "import os, sqlite3\nimport numpy as np\nfrom edgetune import bundle\nfrom .ledger import L"),
        ("export/emit.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch"),
        ("export/emit.py", "def f():\n    import torch.export"),
        ("engines/onnxruntime.py", "import onnxruntime"),
        ("engines/torch.py", "from torch import nn"),
        ("engines/torch_ops/layout.py", "import onnx\nfrom torch import nn"),
        ("__init__.py", "def export():\n    from edgetune.export import capture"),
        ("export/emit.py", "from edgetune import __version__"),
    ],
)
def test_an_allowed_import_is_left_alone(tmp_path: Path, file: str, source: str) -> None:
    allowed = tmp_path / "edgetune" / file
    allowed.parent.mkdir(parents=True, exist_ok=True)
    allowed.write_text(source)
    assert violations(tmp_path / "edgetune") == []


def test_the_device_side_never_loads_what_only_the_host_has() -> None:
    rooms = ("errors", "units", "bundle", "codecs", "adapters", "planning", "engines", "telemetry", "agent", "commands")
    modules = []
    for file in sorted(PACKAGE.rglob("*.py")):
        parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
        # These are for computers that have torch; __main__ would run the command line.
        needs_torch = parts[1:3] in (("adapters", "torch"), ("engines", "torch"), ("engines", "torch_ops"))
        if len(parts) > 1 and parts[1] in rooms and parts[-1] != "__main__" and not needs_torch:
            modules.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    assert "edgetune.bundle" in modules
    program = (
        "import importlib, sys\n"
        f"for name in {modules!r}:\n"
        "    importlib.import_module(name)\n"
        f"    loaded = [m for m in {HOST_LIBRARIES!r} if m in sys.modules]\n"
        "    if loaded:\n"
        "        sys.exit(f'importing {name} loaded {loaded}')\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=PACKAGE.parent, capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr
