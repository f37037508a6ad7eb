"""Helpers of the numerical tests: bundles exported once per run, and torch's gradients with the distance from kinks.

Where an activation lies within rounding of a kink of ReLU and its kin, or two elements of a pooling window are equal
but for rounding, any two implementations may take different branches, and their gradients then differ by whole
elements. So a comparison says beforehand, from torch alone, that its data keep a distance from all kinks.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

import edgetune
from edgetune.bundle import Array, Bundle
from edgetune.export.capture import capture
from edgetune.export.source import Signature
from tools import models


class Bundles:
    """Exports every (model, options) once and hands out the opened bundle; a torch model is captured once."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._captured: dict[tuple[str, tuple[int, ...]], onnx.ModelProto] = {}
        self._known: dict[str, Bundle] = {}

    def model(self, name: str, shape: Sequence[int], **options: Any) -> Bundle:
        """Return the bundle of the factory ``name`` of tools/models.py for samples of ``shape``."""
        return self.onnx(f"{name}{tuple(shape)}", lambda: self.captured(name, shape), **options)

    def captured(self, name: str, shape: Sequence[int]) -> onnx.ModelProto:
        """Return the same model as ONNX, as the export captures it."""
        key = (name, tuple(shape))
        if key not in self._captured:
            self._captured[key] = capture(getattr(models, name)(), [Signature(tuple(shape))]).model
        copied = onnx.ModelProto()
        copied.CopyFrom(self._captured[key])
        return copied

    def onnx(self, name: str, make: Callable[[], onnx.ModelProto], **options: Any) -> Bundle:
        """Return the bundle of the ONNX model that ``make`` returns; ``name`` stands for it."""
        key = repr((name, options))
        if key not in self._known:
            self._known[key] = edgetune.export(make(), None, self._root / str(len(self._known)), **options)
        return self._known[key]


def relative_error(found: Array, expected: Array) -> float:
    """Return ‖found - expected‖ / ‖expected‖, in float64."""
    assert found.shape == expected.shape
    difference = found.astype(np.float64) - expected.astype(np.float64)
    return float(np.linalg.norm(difference) / max(float(np.linalg.norm(expected.astype(np.float64))), 1e-30))


def worst_error(found: Mapping[str, Array], expected: Mapping[str, Array]) -> float:
    """Return the largest relative error over all tensors, which must have the same names."""
    assert set(found) == set(expected)
    return max(relative_error(found[name], expected[name]) for name in expected)


@dataclass
class Reference:
    """What torch finds: loss, gradients of the trained tensors, and each activation function's argument.

    ``kinks`` holds, per call behind a trained tensor, the values that must keep their distance from zero.
    """

    loss: float
    gradients: dict[str, Array]
    kinks: list[Array] = field(default_factory=list)


class _Watch(TorchFunctionMode):
    """Records the distance from the nearest kink of every piecewise function of a trained tensor."""

    BOUNDS: Mapping[Any, tuple[float, ...]] = {
        functional.relu: (0.0,),
        functional.relu6: (0.0, 6.0),
        functional.hardtanh: (0.0, 6.0),
        functional.hardswish: (-3.0, 3.0),
    }

    def __init__(self) -> None:
        super().__init__()
        self.kinks: list[Array] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        x = args[0] if args else None
        if func in self.BOUNDS and isinstance(x, Tensor) and x.requires_grad:
            self.kinks.extend((x.detach() - bound).numpy().copy() for bound in self.BOUNDS[func])
        if func is functional.max_pool2d and isinstance(x, Tensor) and x.requires_grad:
            self.kinks.append(_lead_of_winner(x.detach(), *args[1:], **(kwargs or {})))
        return func(*args, **(kwargs or {}))


def _lead_of_winner(x: Tensor, kernel: int, stride: int, padding: int, *_: Any, **__: Any) -> Array:
    """Return by how much the largest element of each window exceeds the next; infinite where the largest is 0.

    Behind a ReLU equal zeros are common, and harmless: none of them passes a gradient on.
    """
    padded = functional.pad(x, [padding] * 4, value=-torch.inf)
    windows = padded.unfold(2, kernel, stride).unfold(3, kernel, stride).flatten(4)
    first, second = windows.topk(2, dim=-1).values.unbind(-1)
    return torch.where(first == 0, torch.inf, first - second).numpy()


def reference(
    model: nn.Module,
    trained: Iterable[str],
    x: Array,
    y: Array,
    *,
    double: bool = True,
    features: Mapping[str, Array] | None = None,
) -> Reference:
    """Return what torch's autograd finds for ``x`` [b, ...] and ``y`` [b], in float64 unless ``double`` is False.

    ``features`` maps names of modules to the outputs that are put in the place of their own.
    """
    kind = torch.float64 if double else torch.float32
    model = copy.deepcopy(model).to(kind).eval()
    wanted = {name: model.get_parameter(name) for name in trained}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in wanted)
    for name, value in (features or {}).items():
        replaced = torch.from_numpy(value).to(kind)
        model.get_submodule(name).register_forward_hook(lambda *_, replaced=replaced: replaced)
    with _Watch() as watch:
        loss = functional.cross_entropy(model(torch.from_numpy(x).to(kind)), torch.from_numpy(y))
    loss.backward()  # type: ignore[no-untyped-call]
    gradients = {}
    for name, parameter in wanted.items():
        assert parameter.grad is not None
        gradients[name] = parameter.grad.numpy()
    return Reference(float(loss.detach()), gradients, watch.kinks)


def margin_holds(exact: Reference, rounded: Reference) -> bool:
    """Tell whether every value is farther from its kink than twice the largest rounding error seen at that place.

    ``exact`` is the reference in float64, ``rounded`` the same in float32.
    """
    assert len(exact.kinks) == len(rounded.kinks) > 0
    for precise, rough in zip(exact.kinks, rounded.kinks, strict=True):
        finite = np.isfinite(precise) & np.isfinite(rough)
        if not finite.any():
            continue
        rounding = float(np.abs(precise[finite] - rough[finite]).max())
        if float(np.abs(precise[finite]).min()) <= 2 * rounding:
            return False
    return True


@dataclass(frozen=True)
class Sample:
    """A batch that keeps its distance from all kinks, and what torch finds for it in float64 and float32."""

    x: Array
    y: Array
    exact: Reference
    rounded: Reference


def sample_away_from_kinks(
    model: nn.Module,
    trained: Iterable[str],
    shape: Sequence[int],
    batch: int,
    classes: int,
    features: Callable[[Array], Mapping[str, Array]] | None = None,
) -> Sample:
    """Return the first of the batches drawn with the seeds 0, 1, 2 ... for which :func:`margin_holds`.

    ``features`` gives, for the inputs, the outputs of modules that torch is to start from.
    """
    trained = list(trained)
    for seed in range(40):
        x, y = batch_of(shape, batch, classes, seed)
        given = features(x) if features else None
        exact = reference(model, trained, x, y, features=given)
        rounded = reference(model, trained, x, y, features=given, double=False)
        if margin_holds(exact, rounded):
            return Sample(x, y, exact, rounded)
    raise AssertionError("every batch has a value within rounding of a kink: choose smaller inputs")


def batch_of(shape: Sequence[int], batch: int, classes: int, seed: int) -> tuple[Array, Array]:
    """Return inputs [batch, *shape], smooth over the last axes so that their spectra decay, and targets [batch]."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((batch, *shape))
    for axis in range(2, 1 + len(shape)):
        x = x + 0.9 * np.roll(x, 1, axis) + 0.7 * np.roll(x, 2, axis)
    return (x / x.std()).astype(np.float32), rng.integers(0, classes, batch)
