"""A model from wherever it comes -> one ONNX model of the project's opset. Knows torch (inside functions) and onnx.

Ways to capture a torch module, tried in this order:
    1. torch.export, the batch symbolic
    2. tracing (the TorchScript exporter), the batch a dynamic axis; for what torch.export cannot follow or decompose
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import tempfile
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx
from onnx import helper, inliner, version_converter

from edgetune.autodiff.builder import OPSET
from edgetune.autodiff.graph import BATCH
from edgetune.errors import ExportError, UsageError, choices
from edgetune.export.newer import expand_newer
from edgetune.export.source import Signature, name_inputs

if TYPE_CHECKING:
    import torch

LOSS = "loss"
USUAL_OUTPUTS = ("logits", "out")
"""What the output that a loss is computed from is called in transformers and in torchvision."""
RESERVED = frozenset((
    "targets", "loss", "correct", "gradient_norm", "step", "learning_rate", "momentum", "weight_decay", "clip_norm",
    "beta1", "beta2", "epsilon",
))  # fmt: skip
"""What the graphs and the state of a bundle call tensors of their own: no tensor of a model may be called so."""
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
        return Captured(_without_reserved(_with_outputs(to_opset(own), outputs)), method="an ONNX file")
    import torch

    if isinstance(model, torch.export.ExportedProgram):
        if loss is not None:
            raise UsageError("a loss of your own is traced with the model; give the module, not an exported program")
        program = _without_reserved(_with_outputs(to_opset(_to_onnx(model)), outputs))
        trained = frozenset(_free(name, RESERVED) for name in model.graph_signature.parameters)
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
    outputs = _choose_outputs(list(named_tensors(result)), wanted)
    names = [signature.name for signature in inputs]
    targets: tuple[str, ...] = ()
    if loss is not None:
        if target is None:
            raise UsageError(
                "a loss of your own needs the shape of one target: --target-shape SHAPE[:DTYPE]; ':int64' for a label"
            )
        targets = ("targets",)
        tensors.append(torch.from_numpy(target.example(_SAMPLES)))
        _check_loss(loss, result, tensors[-1], target)
    whole = _wrapped(model, loss, inputs, outputs)
    try:
        proto, method = _by_export(whole, tensors, [*names, *targets]), "torch.export"
    except Exception as error:
        reason = _first_line(error)
        try:
            proto = _by_tracing(whole, tensors, [*names, *targets], [*outputs, *([LOSS] if loss is not None else [])])
        except Exception as second:
            shapes = ", ".join(f"{s.name} [batch, {', '.join(map(str, s.shape))}]" for s in inputs)
            raise ExportError(
                f"torch could not capture the model for {shapes}: torch.export: {reason}; "
                f"tracing: {_first_line(second)}"
            ) from second
        method = f"tracing, because torch.export failed: {reason}"
    if loss is not None and any(value.type.tensor_type.shape.dim[0].dim_value for value in proto.graph.input):
        raise ExportError(
            "model or loss take the size of the batch as a fixed number, which another batch would not follow; take it "
            "from the shape (x.shape[0] instead of len(x))"
        )
    made = [*outputs, *([LOSS] if loss is not None else [])]
    occupied = {*names, *made, *RESERVED}
    own_names = {name: _free(own, occupied) for name, own in _own_names(whole).items()}
    _refuse_reserved(names)
    _rename(proto, [*names, *targets], made, own_names)
    trained = frozenset(_free(name, occupied) for name, _ in model.named_parameters())
    return Captured(to_opset(proto), trained, targets, method)


def _first_line(error: BaseException) -> str:
    """Return the line of a long report that says what happened."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    for line in lines:
        if line.startswith("<class"):
            return line
    return lines[0] if lines else type(error).__name__


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
            f"the model does not run on an example of its input ({', '.join(map(str, inputs))}): {_first_line(error)}"
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


def _choose_outputs(known: Sequence[str], wanted: Sequence[str]) -> list[str]:
    """Return the outputs to keep, the one for the loss first."""
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
        raise UsageError(f"the loss does not run on targets {signature}: {_first_line(error)}") from error
    if not isinstance(value, torch.Tensor) or value.dim() or not value.is_floating_point():
        found = list(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
        raise UsageError(f"the loss returns {found}; expected one floating-point number (reduce it: mean or sum)")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporters' own reports off the screen, and attention in plain operators.

    The fused attention kernels of a CPU have strides of their own, on which torch's decomposition of views fails.
    Adaptive pooling to a size that does not divide the input would become gathers by sample; see ``pooling``.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from edgetune.export.pooling import plain_adaptive_pooling

    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), sdpa_kernel(SDPBackend.MATH), plain_adaptive_pooling():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


def _by_export(whole: torch.nn.Module, tensors: Sequence[Any], names: Sequence[str]) -> onnx.ModelProto:
    import torch

    batch = torch.export.Dim(BATCH)
    dynamic = tuple({0: batch} for _ in tensors)
    with _quiet():
        program = torch.onnx.export(
            whole,
            tuple(tensors),
            dynamo=True,
            opset_version=OPSET,
            # The exporter's own optimiser folds batch-norm into weights and keeps their names: what is trained would
            # no longer be what the model calls so.
            optimize=False,
            dynamic_shapes=(dynamic,),
            input_names=list(names),
            verbose=False,
        )
    assert program is not None
    proto: onnx.ModelProto = program.model_proto
    return proto


def _by_tracing(
    whole: torch.nn.Module, tensors: Sequence[Any], names: Sequence[str], outputs: Sequence[str]
) -> onnx.ModelProto:
    import torch

    with _quiet(), tempfile.TemporaryDirectory(prefix="edgetune-") as scratch:
        path = Path(scratch) / "traced.onnx"
        torch.onnx.export(
            whole,
            tuple(tensors),
            str(path),
            dynamo=False,
            opset_version=17,
            # Otherwise batch-norm would be fused, and weights transposed and renamed.
            training=torch.onnx.TrainingMode.PRESERVE,
            do_constant_folding=False,
            input_names=list(names),
            output_names=list(outputs),
            dynamic_axes={name: {0: BATCH} for name in names},
        )
        return onnx.load(path)


def _to_onnx(program: torch.export.ExportedProgram) -> onnx.ModelProto:
    import torch

    with _quiet():
        try:
            made = torch.onnx.export(program, dynamo=True, opset_version=OPSET, optimize=False, verbose=False)
        except Exception as error:
            raise ExportError(f"torch could not turn the exported program into ONNX: {_first_line(error)}") from error
    assert made is not None
    proto: onnx.ModelProto = made.model_proto
    return proto


def _own_names(whole: torch.nn.Module) -> dict[str, str]:
    """Return what the model calls the parameters and buffers of the wrapper; a shared one by the first of its names."""
    first: dict[int, str] = {}
    names: dict[str, str] = {}
    tensors = [*whole.named_parameters(remove_duplicate=False), *whole.named_buffers(remove_duplicate=False)]
    for name, tensor in tensors:
        names[name] = first.setdefault(id(tensor), name.removeprefix("model."))
    return names


def _rename(
    proto: onnx.ModelProto, inputs: Sequence[str], outputs: Sequence[str], own_names: Mapping[str, str]
) -> None:
    """Give inputs and outputs their own names, and parameters the names that the model calls them."""
    graph = proto.graph
    names = {old.name: new for old, new in zip(graph.input, inputs, strict=True)}
    kept: dict[str, onnx.TensorProto] = {}
    for tensor in graph.initializer:
        name = own_names.get(tensor.name, tensor.name)
        if name != tensor.name:
            names[tensor.name] = name
        kept.setdefault(name, tensor)  # tracing gives a shared weight once per name
    if len(kept) < len(graph.initializer):
        unique = list(kept.values())
        del graph.initializer[:]
        graph.initializer.extend(unique)
    taken = {name for node in graph.node for name in node.output} | {t.name for t in graph.initializer}
    for name in set(names.values()) & taken - set(names):
        names[name] = f"{name}.inner"
    _rename_values(graph, names)
    made = [value.name for value in graph.output]
    for value, emitted, wanted in zip(graph.output, made, outputs, strict=True):
        # A copy, because one tensor may be two outputs, or be called as another's name is.
        graph.node.append(helper.make_node("Identity", [emitted], [f"{wanted}.out"]))
        value.name = f"{wanted}.out"
    taken = {name for node in graph.node for name in node.output} | {value.name for value in graph.input}
    _rename_values(graph, {name: f"{name}.inner" for name in outputs if name in taken})
    _rename_values(graph, {f"{name}.out": name for name in outputs})


def _rename_values(graph: onnx.GraphProto, names: Mapping[str, str]) -> None:
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                _rename_values(attribute.g, names)
    for value in [*graph.input, *graph.output, *graph.initializer, *graph.value_info]:
        value.name = names.get(value.name, value.name)


def _free(name: str, occupied: Collection[str]) -> str:
    """Return ``name``, or another where something else is called so."""
    return f"{name}.inner" if name in occupied else name


def _refuse_reserved(inputs: Sequence[str]) -> None:
    taken = [name for name in inputs if name in RESERVED]
    if taken:
        raise ExportError(
            f"an input of the model is called {choices(taken)}, as a tensor of every bundle is; give it another name"
        )


def _without_reserved(model: onnx.ModelProto) -> onnx.ModelProto:
    """Rename what inside an ONNX model is called as tensors of a bundle are; its outputs get those names in the end."""
    constants = {tensor.name for tensor in model.graph.initializer}
    _refuse_reserved([value.name for value in model.graph.input if value.name not in constants])
    _rename_values(model.graph, {name: f"{name}.inner" for name in RESERVED})
    return model


def _with_outputs(model: onnx.ModelProto, wanted: Sequence[str]) -> onnx.ModelProto:
    """Keep the wanted outputs of an ONNX model, in the order in which they are wanted."""
    known = {value.name: value for value in model.graph.output}
    if len(known) == 1 and not wanted:
        return model
    kept = [known[name] for name in _choose_outputs(list(known), wanted)]
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
