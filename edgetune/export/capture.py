"""A model from wherever it comes -> one ONNX model of the project's opset. Knows torch (inside functions) and onnx."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx
from onnx import version_converter

from edgetune.autodiff.builder import OPSET
from edgetune.errors import ExportError, UsageError

if TYPE_CHECKING:
    import torch


def load_source(source: str) -> Any:
    """Return what ``source`` names: a torch module (from a factory) or an ONNX model (from a file).

    ``source`` is ``package.module:factory``, ``file.py:factory`` or ``model.onnx``. A factory is called without
    arguments and returns an ``nn.Module``.

    Raises:
        UsageError: no such file, module or factory, or another kind of source.
    """
    if source.endswith(".onnx"):
        if not Path(source).is_file():
            raise UsageError(f"there is no file '{source}'")
        try:
            return onnx.load(source)
        except Exception as error:
            raise ExportError(f"'{source}' cannot be read as an ONNX model: {error}") from error
    place, separator, factory_name = source.rpartition(":")
    if not separator:
        raise UsageError(f"'{source}' is no source: expected package.module:factory, file.py:factory or model.onnx")
    module = _import_file(Path(place)) if place.endswith(".py") else _import_module(place)
    factory = getattr(module, factory_name, None)
    if not callable(factory):
        names = [n for n in vars(module) if callable(getattr(module, n)) and not n.startswith("_")]
        raise UsageError(f"'{place}' has no factory '{factory_name}'; it has: {', '.join(sorted(names)) or 'none'}")
    return factory()


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


def capture(model: Any, input_shape: Sequence[int] | None) -> onnx.ModelProto:
    """Return ``model`` (an ``nn.Module`` or an ONNX model) as ONNX of the project's opset, the batch dynamic.

    Args:
        input_shape: shape of one sample; an ONNX model tells its own.

    Raises:
        ExportError: the model cannot be captured or converted.
        UsageError: the shape is missing, or the object is not a model.
    """
    if isinstance(model, onnx.ModelProto):
        return to_opset(model)
    import torch

    if not isinstance(model, torch.nn.Module):
        raise UsageError(f"the factory returned {type(model).__name__}; expected a torch.nn.Module")
    if input_shape is None:
        raise UsageError("a torch model needs the shape of one input sample: --input 3,224,224")
    return _capture_module(model, input_shape)


def _capture_module(model: torch.nn.Module, input_shape: Sequence[int]) -> onnx.ModelProto:
    import torch

    model = model.eval()
    sample = torch.zeros((2, *input_shape), dtype=torch.float32)
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                model,
                (sample,),
                dynamo=True,
                opset_version=OPSET,
                # The exporter's own optimiser folds batch-norm into weights and keeps their names: what is trained
                # would no longer be what the model calls so.
                optimize=False,
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                verbose=False,
            )
    except Exception as error:
        raise ExportError(
            f"torch could not export the model for input [batch, {', '.join(map(str, input_shape))}]: "
            f"{str(error).splitlines()[0] if str(error) else type(error).__name__}"
        ) from error
    finally:
        log.setLevel(level)
    assert program is not None
    return to_opset(program.model_proto)


def to_opset(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return ``model`` in the project's opset.

    Raises:
        ExportError: it uses operators of other domains, or the converter cannot translate it.
    """
    foreign = {n.domain for n in model.graph.node if n.domain not in ("", "ai.onnx")} - {
        f.domain for f in model.functions
    }
    if foreign:
        raise ExportError(
            f"the model uses operators of the domains {sorted(foreign)}; only standard ONNX ones are known"
        )
    version = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), None)
    if version is None:
        raise ExportError("the model names no version of the standard operators")
    if version != OPSET:
        try:
            model = version_converter.convert_version(model, OPSET)
        except Exception as error:
            raise ExportError(
                f"the model's opset {version} cannot be converted to {OPSET} ({error}); export it with opset {OPSET}"
            ) from error
    return model
