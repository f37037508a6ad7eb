"""What torch finds for a model, and what a bundle of it finds: the comparison behind ``tools/parity.py``.

Knows torch and the package's front door; prints nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

import edgetune
from edgetune.autodiff.losses import loss_named
from edgetune.bundle import Array, Bundle
from edgetune.export.capture import Captured, choose_outputs, named_tensors
from edgetune.export.source import Signature
from tools.kinks import Kinks, near_kinks
from tools.zoo import draw_smooth

SEEDS = 12


@dataclass(frozen=True)
class Settings:
    """What is trained and how, as for ``edgetune export``."""

    last: int | str = 4
    train: str | None = None
    batch_norm: str = "frozen"
    loss: str = "cross_entropy"
    batch: int = 2


@dataclass(frozen=True)
class Row:
    """One trained tensor: how far ours, and torch's own float32 gradient, are from torch's in float64."""

    name: str
    shape: tuple[int, ...]
    error: float
    torch_error: float


@dataclass(frozen=True)
class Comparison:
    """One model on one engine with one codec. ``near_kinks`` counts the values that rounding may take past a kink."""

    engine: str
    codec: str
    loss_error: float
    near_kinks: int
    rows: tuple[Row, ...]

    @property
    def worst(self) -> Row:
        """The row with the largest error; a NaN is larger than everything."""
        return max(self.rows, key=lambda row: np.inf if np.isnan(row.error) else row.error)

    def holds(self, tolerance: float) -> bool:
        """Tell whether every tensor's error is at most ``tolerance``."""
        return bool(self.worst.error <= tolerance)


@dataclass(frozen=True)
class Subject:
    """A model and its inputs; integers are drawn below ``tokens``. ``output`` names the one for the loss."""

    name: str
    make: Callable[[], Any]
    inputs: tuple[Signature, ...]
    tokens: int = 2
    output: str | None = None

    def draw(self, batch: int, seed: int) -> list[Array]:
        """Return random inputs: smooth ones, or integers below ``tokens``."""
        rng = np.random.default_rng(seed)
        result: list[Array] = []
        for signature in self.inputs:
            if signature.dtype != "float32":
                result.append(rng.integers(0, self.tokens, (batch, *signature.shape)).astype(signature.dtype))
            else:
                result.append(draw_smooth(rng, (batch, *signature.shape)))
        return result

    def call(self, model: nn.Module, values: Sequence[Tensor]) -> Tensor:
        """Return the output of ``model`` for the loss; inputs that have a name are passed by it."""
        named = {s.name: v for s, v in zip(self.inputs, values, strict=True) if s.named}
        made = model(*(v for s, v in zip(self.inputs, values, strict=True) if not s.named), **named)
        return first_output(made, self.output)


@dataclass(frozen=True)
class Sample:
    """A batch, what torch finds for it in float64 and in float32, and how many values lie near a kink."""

    inputs: list[Array]
    targets: Array
    loss: float
    exact: dict[str, Array]
    rounded: dict[str, Array]
    near_kinks: int


def first_output(outputs: Any, name: str | None = None) -> Tensor:
    """Return the tensor ``name`` of what a model returns, or else the one that the exporter takes for the loss."""
    tensors = named_tensors(outputs)
    (chosen,) = choose_outputs(list(tensors), [] if name is None else [name])
    return cast(Tensor, tensors[chosen])


TORCH_LOSSES: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cross_entropy": functional.cross_entropy,
    "binary_cross_entropy": functional.binary_cross_entropy_with_logits,
    "mse": functional.mse_loss,
}


def draw_targets(kind: str, output: Sequence[int], seed: int) -> Array:
    """Return random targets for a loss and the shape of an output [b, ...]."""
    shape, dtype = loss_named(kind).target(tuple(output[1:]))
    rng = np.random.default_rng(seed)
    if dtype == "int64":
        return rng.integers(0, output[1], (output[0], *shape))
    return rng.random((output[0], *shape)).astype(np.float32)


def torch_gradients(
    subject: Subject,
    model: nn.Module,
    trained: Sequence[str],
    inputs: Sequence[Array],
    targets: Array,
    settings: Settings,
    dtype: torch.dtype,
) -> tuple[float, dict[str, Array], list[Tensor]]:
    """Return torch's loss, its gradient per trained tensor, and the distances from all kinks on the way."""
    model = copy.deepcopy(model).to(dtype).eval()
    wanted = {name: model.get_parameter(name) for name in trained}
    chosen = {id(parameter) for parameter in wanted.values()}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in chosen)
    for module in model.modules():
        if settings.batch_norm == "trained" and isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.train(any(id(parameter) in chosen for parameter in module.parameters()))

    def tensor(value: Array) -> Tensor:
        made = torch.from_numpy(value)
        return made.to(dtype) if made.is_floating_point() else made

    with Kinks() as kinks:
        output = subject.call(model, [tensor(value) for value in inputs])
        loss = TORCH_LOSSES[settings.loss](output, tensor(targets))
    loss.backward()  # type: ignore[no-untyped-call]
    gradients = {}
    for name, parameter in wanted.items():
        gradients[name] = (torch.zeros_like(parameter) if parameter.grad is None else parameter.grad).numpy()
    return float(loss.detach()), gradients, kinks.distances


def choose_sample(subject: Subject, model: nn.Module, trained: Sequence[str], settings: Settings) -> Sample:
    """Return the first of ``SEEDS`` random batches without a value near a kink, or the one with the fewest."""
    best: Sample | None = None
    for seed in range(SEEDS):
        inputs = subject.draw(settings.batch, seed)
        with torch.no_grad():
            output = subject.call(model, [torch.from_numpy(value) for value in inputs])
        targets = draw_targets(settings.loss, output.shape, seed)
        given = (subject, model, trained, inputs, targets, settings)
        loss, exact, precise = torch_gradients(*given, torch.float64)
        _, rounded, rough = torch_gradients(*given, torch.float32)
        near = near_kinks(precise, rough)
        if best is None or near < best.near_kinks:
            best = Sample(inputs, targets, loss, exact, rounded, near)
        if not near:
            break
    assert best is not None
    return best


def relative_error(found: Array, expected: Array) -> float:
    """Return ‖found - expected‖ / ‖expected‖ in float64; where ``expected`` is all zeros, ‖found‖."""
    difference = float(np.linalg.norm(found.astype(np.float64) - expected.astype(np.float64)))
    return difference / (float(np.linalg.norm(expected.astype(np.float64))) or 1.0)


def reached(subject: Subject, model: nn.Module, settings: Settings) -> set[str]:
    """Return the parameters that torch finds a gradient for, but for those of frozen batch-norms."""
    model = copy.deepcopy(model).eval()
    inputs = [torch.from_numpy(value) for value in subject.draw(settings.batch, 0)]
    output = subject.call(model, inputs)
    targets = torch.from_numpy(draw_targets(settings.loss, output.shape, 0))
    TORCH_LOSSES[settings.loss](output, targets).backward()  # type: ignore[no-untyped-call]
    frozen = set()
    if settings.batch_norm == "frozen":
        norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        frozen = {id(parameter) for norm in norms for parameter in norm.parameters()}
    return {name for name, p in model.named_parameters() if p.grad is not None and id(p) not in frozen}


def export(subject: Subject, model: Any, settings: Settings, codec: str, folder: Path) -> Bundle:
    """Return the bundle of ``model`` (a module, or one that is captured already), written to ``folder``."""
    values = subject.draw(2, 0)
    example: Any = {s.name: v for s, v in zip(subject.inputs, values, strict=True)}
    if not all(signature.named for signature in subject.inputs):
        example = values
    return edgetune.export(
        model,
        None if isinstance(model, Captured) else example,
        folder,
        last=settings.last,
        train=settings.train,
        batch_norm=settings.batch_norm,
        codec=codec,
        loss=settings.loss,
        outputs=() if subject.output is None else (subject.output,),
    )


def _row(name: str, found: Array, rounded: Array, exact: Array, largest: float) -> Row:
    """Return the errors of one tensor.

    Some gradients are zero by construction, such as that of a bias before an instance norm: all that any precision
    finds there is rounding. They are known by torch's own float32 gradient being wrong altogether; what is found is
    then held against the ``largest`` gradient of the model instead.
    """
    error, torch_error = relative_error(found, exact), relative_error(rounded, exact)
    if torch_error > 1.0:
        scale = float(np.linalg.norm(exact.astype(np.float64))) or 1.0
        error, torch_error = error * scale / largest, torch_error * scale / largest
    return Row(name, found.shape, error, torch_error)


def compare(bundle: Bundle, sample: Sample, engine: str) -> Comparison:
    """Compute one gradient on ``engine``, a lossy codec at full ranks, and compare it tensor by tensor."""
    plan = edgetune.plan(bundle, batch=len(sample.targets), epsilon=1.0)
    session = edgetune.TrainingSession(bundle, plan, engine=engine)
    names = [spec.name for spec in bundle.manifest.inputs]
    loss, found = session.gradients(dict(zip(names, sample.inputs, strict=True)), sample.targets)
    largest = max(float(np.linalg.norm(exact)) for exact in sample.exact.values())
    rows = tuple(_row(name, found[name], sample.rounded[name], sample.exact[name], largest) for name in sample.exact)
    loss_error = abs(loss - sample.loss) / max(abs(sample.loss), 1e-30)
    return Comparison(engine, bundle.manifest.codec, loss_error, sample.near_kinks, rows)
