"""What codecs cost in accuracy: relative errors of weight gradients, measured at calibration.

Definition. ``W_g`` are the gradients of a group g of trained tensors: the weights of the layers that one saved tensor
serves, joined; of trained tensors that no saved tensor serves by itself (biases, scales), those of one layer. With
``W_g`` the exact gradients of batch i and ``W̃_g`` those of the same batch with lossily saved tensors, the relative
error of g is::

    e_g = sqrt( mean_i ( ‖W̃_g - W_g‖² / ‖W_g‖² ) )          (Frobenius norms; where W_g is zero: 0, or 1 if W̃_g is not)

The error of an option of a saved tensor s is the e_g of its own group if s serves weight gradients alone: that error
never travels. If s is kept for its value (``SavedSpec.layers`` is empty), errors travel through the backward pass: it
is then Σ_g e_g with only s kept lossily. The total error of a plan is Σ_g e_g; the sum of its options' errors is that
total where no error travels, and its first-order upper bound (triangle inequality) where some do.

Knows plans, and a session's gradients; nothing of budgets.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

import numpy as np

from edgetune.bundle import Array, Manifest, SavedSpec
from edgetune.errors import DataError
from edgetune.planning.candidates import Candidate, Limits, Workbench
from edgetune.planning.plan import Plan, plan_of
from edgetune.planning.rates import LEVELS, Rated, exact_option, ranked, rated
from edgetune.planning.spectra import Calibration
from edgetune.planning.uniform import labels_of


class Differentiates(Protocol):
    """The part of a session that is needed here."""

    def set_plan(self, plan: Plan) -> None:
        """Put a plan into force."""

    def gradients_from(self, features: Sequence[Array], y: Array) -> tuple[float, dict[str, Array]]:
        """Return the loss and the gradient per trained tensor."""


Batch = tuple[tuple[Array, ...], Array]
"""The trunk's outputs [b, ...] and the targets [b, ...]."""


def with_errors(
    session: Differentiates,
    manifest: Manifest,
    calibration: Calibration,
    batches: Iterable[Batch],
    levels: Sequence[float] = LEVELS,
    fits: Callable[[Candidate], bool] | None = None,
) -> Calibration:
    """Return ``calibration`` with the error of every lossy option at each ε of ``levels``.

    ``fits`` is asked before a candidate runs for the first time; what does not fit is not measured. The candidates with
    the least predicted peak come first.

    All saved tensors that serve weight gradients alone are measured at once, in one run per option, level and batch;
    each of the others takes a run of its own.

    Raises:
        DataError: a gradient is not finite, or there is no batch.
    """
    gauge = GradientGauge(session, manifest, calibration, batches, fits)
    errors: dict[str, dict[str, list[tuple[float, float]]]] = {}

    def note(spec: SavedSpec, label: str, one: Rated, epsilon: float, error: float) -> None:
        if one.label == label:  # else the option was not useful at this ε, and another stood in for it
            errors.setdefault(spec.name, {}).setdefault(label, []).append((epsilon, error))

    together = [spec for spec in manifest.saved if spec.layers]
    alone = [spec for spec in manifest.saved if not spec.layers]
    for label in gauge.cheapest_first(labels_of(manifest), levels):
        for specs in ([together] if together else []) + [[spec] for spec in alone]:
            lossy = [s for s in specs if any(o.label == label and o.lossy for o in s.options)]
            if not lossy:
                continue
            knobs = any(ranked(spec.option(label)) for spec in lossy)
            before, found = None, {}
            for epsilon in levels if knobs else (1.0,):
                rates = {s.name: rated(s, label, epsilon, calibration, gauge.batch) for s in lossy}
                if all(one.label != label for one in rates.values()):
                    continue
                given = {name: (one.label, dict(one.ranks)) for name, one in rates.items()}
                if given != before:  # else the same ranks, hence the same gradients
                    if not gauge.fits(rates):
                        break  # a larger ε takes no less
                    before, found = given, gauge.errors(rates)
                for spec in lossy:
                    error = found[spec.name] if spec.layers else sum(found.values())
                    note(spec, label, rates[spec.name], epsilon, error)
    tables = {
        name: {label: np.array(rows, np.float64) for label, rows in by_label.items()}
        for name, by_label in errors.items()
    }
    return dataclasses.replace(calibration, errors=tables)


class GradientGauge:
    """Compares gradients with the exact ones, over the same batches each time."""

    def __init__(
        self,
        session: Differentiates,
        manifest: Manifest,
        calibration: Calibration | None,
        batches: Iterable[Batch],
        fits: Callable[[Candidate], bool] | None = None,
    ) -> None:
        """Find the exact gradients, with every saved tensor kept by an option that loses nothing.

        Raises:
            DataError: a gradient is not finite, or there is no batch.
        """
        self._fits = fits
        self._session, self._batches = session, [(tuple(features), y) for features, y in batches]
        if not self._batches:
            raise DataError("there is no calibration data: give one batch of (inputs, targets) at least")
        self.batch = max(len(y) for _, y in self._batches)
        self._calibration = calibration
        self._bench = Workbench(manifest, calibration, Limits(self.batch, 0))
        self._exact_rates = exact_rates(manifest, calibration, self.batch)
        self._groups = _groups(manifest)
        self._exact = list(self._gradients({}))

    def cheapest_first(self, labels: Sequence[str], levels: Sequence[float]) -> list[str]:
        """Return ``labels`` by the predicted peak of all tensors kept so; as given where all fit."""
        if self._fits is None:
            return list(labels)
        return sorted(labels, key=lambda label: self._bench.uniform(label, levels[-1]).cost().peak_bytes)

    def fits(self, rates: Mapping[str, Rated]) -> bool:
        """Tell whether :meth:`errors` may run ``rates``."""
        return self._fits is None or self._fits(self._bench.mixed({**self._exact_rates, **rates}))

    def errors(self, rates: Mapping[str, Rated]) -> dict[str, float]:
        """Return e_g by group (named as the saved tensor it belongs to) with ``rates``; what they lack stays exact.

        Raises:
            DataError: a gradient is not finite.
        """
        squares = dict.fromkeys(self._groups, 0.0)
        for exact, found in zip(self._exact, self._gradients(rates), strict=True):
            for group, names in self._groups.items():
                norm = sum(_square(exact[name]) for name in names)
                gone = sum(_square(found[name].astype(np.float64) - exact[name]) for name in names)
                squares[group] += gone / norm if norm > 0 else float(gone > 0)
        return {group: float(np.sqrt(total / len(self._exact))) for group, total in squares.items()}

    def _gradients(self, rates: Mapping[str, Rated]) -> Iterable[dict[str, Array]]:
        candidate = self._bench.mixed({**self._exact_rates, **rates})
        self._session.set_plan(plan_of(candidate, self._calibration))
        for features, y in self._batches:
            _, gradients = self._session.gradients_from(features, y)
            if not all(np.isfinite(value).all() for value in gradients.values()):
                raise DataError("a gradient is not finite; look for NaN or infinity in the calibration data")
            yield gradients


def exact_rates(manifest: Manifest, calibration: Calibration | None, batch: int) -> dict[str, Rated]:
    """Return what loses nothing of any saved tensor.

    Raises:
        BundleError: a saved tensor has no such option.
    """
    return {spec.name: rated(spec, exact_option(spec).label, 1.0, calibration, batch) for spec in manifest.saved}


def _groups(manifest: Manifest) -> dict[str, list[str]]:
    """Return the names of the trained tensors by group."""
    weights = {layer.name: layer.weight for layer in manifest.layers}
    groups = {
        spec.name: names
        for spec in manifest.saved
        if (names := [weights[layer] for layer in spec.layers if layer in weights])
    }
    served = {name for names in groups.values() for name in names}
    for parameter in manifest.parameters:
        if parameter.name not in served:
            groups.setdefault(f"rest of {parameter.layer}", []).append(parameter.name)
    return groups


def _square(values: Array) -> float:
    return float(np.sum(np.square(values, dtype=np.float64)))
