"""torch's own exporters, one after the other, with their reports kept off the screen. Knows torch (inside functions).

Ways to capture a module, tried in this order:
    1. torch.export, the batch symbolic
    2. tracing (the TorchScript exporter), the batch a dynamic axis; for what torch.export cannot follow or decompose
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import numpy_helper

from edgetune.autodiff.builder import OPSET
from edgetune.autodiff.graph import BATCH
from edgetune.codecs.base import Array
from edgetune.errors import ExportError
from edgetune.export.source import Signature

if TYPE_CHECKING:
    import torch

_SAMPLES = 2


def module_to_onnx(
    whole: torch.nn.Module, inputs: Sequence[Signature], outputs: Sequence[str]
) -> tuple[onnx.ModelProto, str]:
    """Return ``whole`` (positional tensors to a tuple of tensors) as ONNX, and how it was captured, for people.

    Raises:
        ExportError: no way leads there, or the module computes with the size of the batch as a fixed number.
    """
    names = [signature.name for signature in inputs]

    def export(samples: int) -> onnx.ModelProto:
        return _by_export(whole, _examples(inputs, samples), names)

    def trace(samples: int) -> onnx.ModelProto:
        return _by_tracing(whole, _examples(inputs, samples), names, outputs)

    try:
        proto = export(_SAMPLES)
    except Exception as error:
        reason = first_line(error)
        try:
            proto = trace(_SAMPLES)
        except Exception as second:
            raise ExportError(
                f"torch could not capture the model for {', '.join(map(str, inputs))}: torch.export: {reason}; "
                f"tracing: {first_line(second)}"
            ) from second
        _refuse_fixed_batch(proto, trace(_SAMPLES + 1))  # a trace writes down any number that it sees
        return proto, f"tracing, because torch.export failed: {reason}"
    if any(value.type.tensor_type.shape.dim[0].dim_value for value in proto.graph.input):
        _refuse_fixed_batch(proto, export(_SAMPLES + 1))  # the exporter fell back to a batch of that size
    return proto, "torch.export"


def _examples(inputs: Sequence[Signature], samples: int) -> list[Any]:
    import torch

    return [torch.from_numpy(signature.example(samples)) for signature in inputs]


def _refuse_fixed_batch(proto: onnx.ModelProto, other: onnx.ModelProto) -> None:
    """Raise ExportError where captures at two sizes of the batch differ in a number that is no shape."""
    known, second = _numbers(proto), _numbers(other)
    same = known.keys() == second.keys()
    if not same or any(not np.array_equal(value, second[name], equal_nan=True) for name, value in known.items()):
        raise ExportError(
            "the model takes the size of the batch as a fixed number, which another batch would not follow; take it "
            "from the shape (x.shape[0] instead of len(x) or int(...)), or do without it"
        )


def _numbers(proto: onnx.ModelProto) -> dict[str, Array]:
    """Return the constants that are no shapes: all but lists of integers."""
    tensors = {tensor.name: tensor for tensor in proto.graph.initializer}
    for node in proto.graph.node:
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            tensors[node.output[0]] = node.attribute[0].t
    arrays = {name: numpy_helper.to_array(tensor) for name, tensor in tensors.items()}
    return {name: array for name, array in arrays.items() if array.dtype != np.int64 or not array.ndim}


def first_line(error: BaseException) -> str:
    """Return the line of a long report that says what happened."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    for line in lines:
        if line.startswith("<class"):
            return line
    return lines[0] if lines else type(error).__name__


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


def program_to_onnx(program: torch.export.ExportedProgram) -> onnx.ModelProto:
    """Return an exported program as ONNX.

    Raises:
        ExportError: torch's exporter refuses.
    """
    import torch

    with _quiet():
        try:
            made = torch.onnx.export(program, dynamo=True, opset_version=OPSET, optimize=False, verbose=False)
        except Exception as error:
            raise ExportError(f"torch could not turn the exported program into ONNX: {first_line(error)}") from error
    assert made is not None
    proto: onnx.ModelProto = made.model_proto
    return proto
