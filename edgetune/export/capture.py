"""A model from wherever it comes -> one ONNX model of the project's opset. Knows torch (inside functions) and onnx."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import onnx
from onnx import inliner, version_converter

from edgetune.autodiff.builder import OPSET
from edgetune.errors import ExportError, UsageError, choices
from edgetune.export.exporters import first_line, module_to_onnx, program_to_onnx
from edgetune.export.naming import RESERVED, free, own_names, refuse_reserved, rename, without_reserved
from edgetune.export.newer import expand_newer
from edgetune.export.source import Signature, name_inputs

if TYPE_CHECKING:
    import torch

LOSS, TARGETS = "loss", "targets"
USUAL_OUTPUTS = ("logits", "out")
"""What the output that a loss is computed from is called in transformers and in torchvision."""
_SAMPLES = 2


@dataclass(frozen=True)
class Captured:
    """A model as ONNX.

    Attributes:
        parameters: names of the initializers that may be trained; None where nobody said which.
        targets: names of the inputs that belong to a traced loss; its value is the output ``loss``.
        method: how it was captured, and why not in the usual way, for people.
    """

    model: onnx.ModelProto
    parameters: frozenset[str] | None = None
    targets: tuple[str, ...] = ()
    method: str = ""


def capture(
    model: Any,
    inputs: Sequence[Signature],
    *,
    outputs: Sequence[str] = (),
    loss: Any = None,
    target: Signature | None = None,
) -> Captured:
    """Return ``model`` (an ``nn.Module``, an exported program or an ONNX model) as ONNX of the project's opset.

    Args:
        inputs: one per input, without the batch; an ONNX model or an exported program tells its own.
        outputs: names of the outputs to keep, the one for the loss first; the usual one if empty.
        loss: a module ``(outputs, targets) -> scalar`` to be traced with the model.
        target: what ``loss`` takes as targets.

    Raises:
        ExportError: the model cannot be captured or converted.
        UsageError: an input is missing, an output unknown, or the object is not a model.
    """
    if isinstance(model, onnx.ModelProto):
        if loss is not None:
            raise UsageError("a loss of your own is traced with a torch model; this model is an ONNX file")
        own = onnx.ModelProto()
        own.CopyFrom(model)  # what follows writes into it
        return Captured(without_reserved(_with_outputs(to_opset(own), outputs)), method="an ONNX file")
    import torch

    if isinstance(model, torch.export.ExportedProgram):
        if loss is not None:
            raise UsageError("a loss of your own is traced with the model; give the module, not an exported program")
        program = without_reserved(_with_outputs(to_opset(program_to_onnx(model)), outputs))
        trained = frozenset(free(name, RESERVED) for name in model.graph_signature.parameters)
        return Captured(program, trained, method="an exported program")
    if not isinstance(model, torch.nn.Module):
        raise UsageError(f"the factory returned {type(model).__name__}; expected a torch.nn.Module")
    if not inputs:
        raise UsageError("a torch model needs the shape of one input sample: --input 3,224,224")
    with _in_evaluation(model), _in_evaluation(loss):
        return _capture_module(model, inputs, outputs, loss, target)


@contextlib.contextmanager
def _in_evaluation(model: Any) -> Iterator[None]:
    """Within this context ``model`` is in evaluation mode; then every part of it is in the mode that it was in."""
    modes = [(part, part.training) for part in model.modules()] if hasattr(model, "modules") else []
    for part, _ in modes:
        part.training = False
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


def _capture_module(
    model: torch.nn.Module,
    inputs: Sequence[Signature],
    wanted: Sequence[str],
    loss: torch.nn.Module | None,
    target: Signature | None,
) -> Captured:
    import torch

    known = [n for n, p in inspect.signature(model.forward).parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    inputs = name_inputs(inputs, known)
    tensors = [torch.from_numpy(signature.example(_SAMPLES)) for signature in inputs]
    result = _run(model, tensors, inputs)
    outputs = choose_outputs(list(named_tensors(result)), wanted)
    names = [signature.name for signature in inputs]
    targets: tuple[str, ...] = ()
    if loss is None:
        target = None
    else:
        if target is None:
            raise UsageError(
                "a loss of your own needs the shape of one target: --target-shape SHAPE[:DTYPE]; ':int64' for a label"
            )
        targets = (TARGETS,)
        _check_loss(loss, result, torch.from_numpy(target.example(_SAMPLES)), target)
    whole = _wrapped(model, loss, inputs, outputs)
    made = [*outputs, *([LOSS] if loss is not None else [])]
    proto, method = module_to_onnx(whole, [*inputs, *([] if target is None else [replace(target, name=TARGETS)])], made)
    occupied = {*names, *made, *RESERVED}
    refuse_reserved(names)
    own = {name: free(called, occupied) for name, called in own_names(whole).items()}
    rename(proto, [*names, *targets], made, own)
    trained = frozenset(free(name, occupied) for name, _ in model.named_parameters())
    return Captured(to_opset(proto), trained, targets, method)


def _call(model: torch.nn.Module, tensors: Sequence[Any], inputs: Sequence[Signature]) -> Any:
    """Call the model: named inputs by keyword, the others in order."""
    pairs = list(zip(inputs, tensors, strict=True))
    named = {signature.name: tensor for signature, tensor in pairs if signature.named}
    return model(*(tensor for signature, tensor in pairs if not signature.named), **named)


def _run(model: torch.nn.Module, tensors: Sequence[Any], inputs: Sequence[Signature]) -> Any:
    import torch

    try:
        with torch.no_grad():
            return _call(model, tensors, inputs)
    except Exception as error:
        raise ExportError(
            f"the model does not run on an example of its input ({', '.join(map(str, inputs))}): {first_line(error)}"
        ) from error


def named_tensors(result: Any) -> dict[str, Any]:
    """Return the tensors of what a model returned, by name.

    Raises:
        ExportError: there is none.
    """
    import torch

    if isinstance(result, torch.Tensor):
        return {"output": result}
    if isinstance(result, Mapping):
        found = {str(key): value for key, value in result.items() if isinstance(value, torch.Tensor)}
    elif isinstance(result, tuple) and hasattr(result, "_fields"):
        pairs = zip(result._fields, result, strict=True)
        found = {name: value for name, value in pairs if isinstance(value, torch.Tensor)}
    elif isinstance(result, tuple | list):
        found = {
            f"output.{i}" if i else "output": value for i, value in enumerate(result) if isinstance(value, torch.Tensor)
        }
    else:
        found = {}
    if not found:
        raise ExportError(
            f"the model returns {type(result).__name__} without a tensor; expected tensors, by name or not"
        )
    return found


def choose_outputs(known: Sequence[str], wanted: Sequence[str]) -> list[str]:
    """Return the outputs to keep, the one for the loss first: those ``wanted``, or else the usual one.

    Raises:
        UsageError: there is no output of a wanted name, or none is the usual one.
    """
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise UsageError(f"the model has no output {choices(unknown)}; it has: {choices(known)}")
    if wanted:
        return list(wanted)
    usual = [name for name in USUAL_OUTPUTS if name in known]
    if len(known) > 1 and not usual and known[0] != "output":
        raise UsageError(
            f"the model has several outputs; name the one for the loss with --output-name: {choices(known)}"
        )
    return [usual[0] if usual else known[0]]


def _wrapped(
    model: torch.nn.Module, loss: torch.nn.Module | None, inputs: Sequence[Signature], outputs: Sequence[str]
) -> torch.nn.Module:
    """Return a module from positional inputs (and targets) to the chosen outputs (and the loss)."""
    import torch

    class Whole(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model
            self.loss = loss

        def forward(self, *tensors: Any) -> tuple[Any, ...]:
            result = _call(self.model, tensors[: len(inputs)], inputs)
            found = named_tensors(result)
            chosen = tuple(found[name] for name in outputs)
            return chosen if self.loss is None else (*chosen, self.loss(result, tensors[len(inputs)]))

    return Whole().eval()


def _check_loss(loss: Any, result: Any, target: Any, signature: Signature) -> None:
    """Raise UsageError unless the loss of the outputs is one number."""
    import torch

    if not isinstance(loss, torch.nn.Module):
        raise UsageError(f"the loss is {type(loss).__name__}; expected a torch.nn.Module (outputs, targets) -> scalar")
    try:
        with torch.no_grad():
            value = loss(result, target)
    except Exception as error:
        raise UsageError(f"the loss does not run on targets {signature}: {first_line(error)}") from error
    if not isinstance(value, torch.Tensor) or value.dim() or not value.is_floating_point():
        found = list(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
        raise UsageError(f"the loss returns {found}; expected one floating-point number (reduce it: mean or sum)")


def _with_outputs(model: onnx.ModelProto, wanted: Sequence[str]) -> onnx.ModelProto:
    """Keep the wanted outputs of an ONNX model, in the order in which they are wanted."""
    known = {value.name: value for value in model.graph.output}
    if len(known) == 1 and not wanted:
        return model
    kept = [known[name] for name in choose_outputs(list(known), wanted)]
    del model.graph.output[:]
    model.graph.output.extend(kept)
    return model


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
    if model.functions:
        model = inliner.inline_local_functions(model, convert_version=True)  # the converter would drop them
    version = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), None)
    if version is None:
        raise ExportError("the model names no version of the standard operators")
    expand_newer(model, version)
    if version != OPSET:
        try:
            model = version_converter.convert_version(model, OPSET)
        except Exception as error:
            raise ExportError(
                f"the model's opset {version} cannot be converted to {OPSET} ({error}); export it with opset {OPSET}"
            ) from error
    return model
