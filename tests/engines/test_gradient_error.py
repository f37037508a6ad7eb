"""Gradient errors, against their definition: a session whose gradients are known."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import pytest

from edgetune.bundle import Array
from edgetune.engines.gradient_error import with_errors
from edgetune.errors import DataError
from edgetune.planning.plan import Plan
from edgetune.planning.rates import LEVELS
from edgetune.planning.spectra import Calibration
from tests.planning.menus import menu_calibration, menu_manifest

BATCH = 4
DESCRIBED = menu_manifest([(8, 12, 12), (4, 5, 5)])
EXACT = {"l0.weight": np.array([3.0, 4.0]), "l1.weight": np.array([1.0])}


class Known:
    """Its gradients are EXACT, scaled by the first feature; a lossy option moves them by a known part."""

    def __init__(self, spread: float = 0.0, exact: dict[str, Array] | None = None) -> None:
        self.spread, self.exact, self.plans = spread, exact or EXACT, list[Plan]()

    def set_plan(self, plan: Plan) -> None:
        self.plans.append(plan)

    def gradients_from(self, features: Sequence[Array], y: Array) -> tuple[float, dict[str, Array]]:
        plan, scale = self.plans[-1], float(features[0][0])
        found = {}
        for name, value in self.exact.items():
            moved = scale * value
            for saved in ("l0", "l1"):
                own = name.startswith(saved)
                part = self.lost(plan, saved) * (1.0 if own else self.spread)
                moved = moved + part * scale**2 * np.array([3.0, 4.0])[: len(value)]
            found[name] = moved
        return 0.0, found

    @staticmethod
    def lost(plan: Plan, saved: str) -> float:
        label = plan.selection[saved]
        if label == "int8":
            return 0.01
        return 0.0 if label == "dense" else 1.0 / sum(plan.ranks[saved].values())


def batches(*scales: float) -> list[tuple[tuple[Array, ...], Array]]:
    return [((np.full(BATCH, scale),), np.zeros(BATCH, np.int64)) for scale in scales]


def bare() -> Calibration:
    return dataclasses.replace(menu_calibration(DESCRIBED, BATCH), errors={})


def test_the_error_is_the_root_of_the_mean_square_over_batches() -> None:
    found = with_errors(Known(), DESCRIBED, bare(), batches(1.0, 2.0)).errors
    # Batch i moves W = s·(3, 4) by 0.01·s²·(3, 4): relatively by 0.01·s.
    assert found["l0"]["int8"].tolist() == [[1.0, pytest.approx(0.01 * np.sqrt((1 + 4) / 2))]]
    # W = s·(1), moved by 0.01·s²·(3): relatively 0.03·s.
    assert found["l1"]["int8"].tolist() == [[1.0, pytest.approx(0.03 * np.sqrt((1 + 4) / 2))]]
    assert found["l0"]["hosvd"][:, 0].tolist() == list(LEVELS)
    assert found["l0"]["hosvd"][0, 1] == pytest.approx(np.sqrt(2.5))  # rank 1
    # Where every coefficient would be kept the tensor is dense: no error is filed for the sparse form.
    assert found["l0"]["dct"][-1, 0] < 1.0
    assert "dense" not in found["l0"]


def test_all_layers_are_measured_in_the_same_runs() -> None:
    session = Known()
    with_errors(session, DESCRIBED, bare(), batches(1.0))
    lossy = [plan for plan in session.plans if set(plan.selection.values()) != {"dense"}]
    assert len(lossy) <= 2 * len(LEVELS) + 1
    assert set(lossy[-1].selection.values()) == {"int8"}


def test_the_error_of_a_value_is_summed_over_all_it_reaches() -> None:
    first, second = DESCRIBED.saved
    described = dataclasses.replace(DESCRIBED, saved=(first, dataclasses.replace(second, layers=())))
    found = with_errors(Known(spread=0.5), described, bare(), batches(1.0)).errors
    # l1 alone is kept as int8: l0's weight moves by 0.005 of its norm, l1's by 0.03.
    assert found["l1"]["int8"][0, 1] == pytest.approx(0.005 + 0.03)


def test_a_gradient_of_zero() -> None:
    exact = {"l0.weight": np.zeros(2), "l1.weight": np.array([1.0])}
    found = with_errors(Known(exact=exact), DESCRIBED, bare(), batches(1.0)).errors
    assert found["l0"]["int8"][0, 1] == 1.0


def test_what_is_not_finite_and_no_data() -> None:
    exact = {"l0.weight": np.array([np.nan, 1.0]), "l1.weight": np.array([1.0])}
    with pytest.raises(DataError, match="not finite"):
        with_errors(Known(exact=exact), DESCRIBED, bare(), batches(1.0))
    with pytest.raises(DataError, match="no calibration data"):
        with_errors(Known(), DESCRIBED, bare(), [])
