"""What a user names: a model, a loss, the shapes of inputs. Knows torch (inside functions) and onnx."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from edgetune.errors import ExportError, UsageError, choices

DTYPES = ("float32", "int64", "int32", "bool")


@dataclass(frozen=True)
class Signature:
    """One input of a model or one target of a loss, without the batch.

    ``name`` is empty until it is known; ``named`` inputs are passed to the model by keyword.
    """

    shape: tuple[int, ...]
    dtype: str = "float32"
    name: str = ""
    named: bool = False

    @staticmethod
    def parse(text: str) -> Signature:
        """Return the signature that ``[NAME=]SHAPE[:DTYPE]`` describes, such as ``ids=16:int64``.

        Raises:
            UsageError: it is not of that form.
        """
        head, separator, rest = text.partition("=")
        name, body = (head.strip(), rest) if separator else ("", text)
        extents, _, dtype = body.partition(":")
        dtype = dtype.strip() or "float32"
        if dtype not in DTYPES:
            raise UsageError(f"'{text}': there is no element type '{dtype}'; choose one of: {choices(DTYPES)}")
        try:
            shape = tuple(int(part) for part in extents.split(",") if part.strip())
        except ValueError:
            shape = (0,)
        if any(extent < 1 for extent in shape):
            raise UsageError(
                f"'{text}' is no shape: expected positive integers without the batch, such as 3,224,224 or ids=16:int64"
            )
        return Signature(shape, dtype, name, bool(name))

    @staticmethod
    def of(example: Any, name: str = "") -> Signature:
        """Return the signature of a batch: an array or a tensor whose leading axis is the batch."""
        dtype = str(example.dtype).removeprefix("torch.")
        if dtype not in DTYPES:
            raise UsageError(f"an example of element type {dtype} was given; choose one of: {choices(DTYPES)}")
        return Signature(tuple(int(extent) for extent in example.shape[1:]), dtype, name, bool(name))

    def example(self, batch: int) -> Any:
        """Return an array of zeros [batch, *shape]."""
        return np.zeros((batch, *self.shape), self.dtype)

    def __str__(self) -> str:
        extents = ", ".join(map(str, ("batch", *self.shape)))
        return f"{self.name or 'input'} [{extents}] {self.dtype}"


def signatures_of(example: Any) -> list[Signature]:
    """Return the signatures of an example input: one batch, a sequence of them, or a mapping by name; [] for None."""
    if example is None:
        return []
    if isinstance(example, dict):
        return [Signature.of(value, str(name)) for name, value in example.items()]
    if isinstance(example, list | tuple):
        return [Signature.of(value) for value in example]
    return [Signature.of(example)]


def load_source(source: str) -> Any:
    """Return what ``source`` names: a torch module (from a factory), an exported program, or an ONNX model.

    ``source`` is ``package.module:factory``, ``file.py:factory``, ``model.onnx`` or ``model.pt2``. A factory is called
    without arguments and returns an ``nn.Module``.

    Raises:
        UsageError: no such file, module or factory, or another kind of source.
    """
    if source.endswith((".onnx", ".pt2")):
        if not Path(source).is_file():
            raise UsageError(f"there is no file '{source}'")
        try:
            return onnx.load(source) if source.endswith(".onnx") else _load_program(source)
        except Exception as error:
            kind = "an ONNX model" if source.endswith(".onnx") else "an exported program (torch.export.save)"
            raise ExportError(f"'{source}' cannot be read as {kind}: {error}") from error
    return load_factory(source, "package.module:factory, file.py:factory, model.onnx or model.pt2")()


def _load_program(source: str) -> Any:
    import torch

    return torch.export.load(source)


def load_factory(source: str, expected: str = "package.module:factory or file.py:factory") -> Any:
    """Return the callable that ``source`` names.

    Raises:
        UsageError: no such module or factory, or the text is not of that form.
    """
    place, separator, factory_name = source.rpartition(":")
    if not separator:
        raise UsageError(f"'{source}' is no source: expected {expected}")
    module = _import_file(Path(place)) if place.endswith(".py") else _import_module(place)
    factory = getattr(module, factory_name, None)
    if not callable(factory):
        names = [n for n in vars(module) if callable(getattr(module, n)) and not n.startswith("_")]
        raise UsageError(f"'{place}' has no factory '{factory_name}'; it has: {', '.join(sorted(names)) or 'none'}")
    return factory


def _import_module(name: str) -> Any:
    sys.path.insert(0, "")  # a module beside the user, as with python -m
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UsageError(f"module '{name}' cannot be imported: {error}") from error
    finally:
        sys.path.remove("")


def _import_file(path: Path) -> Any:
    if not path.is_file():
        raise UsageError(f"there is no file '{path}'")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look their module up there
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UsageError(f"'{path}' cannot be run: {type(error).__name__}: {error}") from error
    return module


def name_inputs(signatures: Sequence[Signature], known: Sequence[str]) -> list[Signature]:
    """Give unnamed inputs, in order, the names in ``known`` that no other has."""
    taken = {signature.name for signature in signatures}
    free = iter([name for name in known if name not in taken])
    return [
        s if s.name else Signature(s.shape, s.dtype, next(free, f"input.{i}" if i else "input"), False)
        for i, s in enumerate(signatures)
    ]
