"""From ε, and from a rate, to how many elements are kept; and where the dense tensor takes over."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgetune.codecs import count_grid
from edgetune.errors import BundleError, StateError, UsageError
from edgetune.planning.plan import make_plan
from edgetune.planning.rates import at_rate, exact_option, interpolated, rated
from edgetune.planning.spectra import (
    Calibration,
    breakpoints,
    captured_energy_bound,
    count_at,
    energy_of_count,
    identity_calibration,
    most_useful,
)
from tests.planning.menus import menu_calibration, menu_manifest

BATCH = 4
SHAPES = [(8, 12, 12), (4, 5, 5)]


@given(st.integers(40, 3000), st.integers(0, 99), st.floats(0.01, 0.999))
def test_a_count_holds_epsilon_and_is_near_the_least_that_does(size: int, seed: int, epsilon: float) -> None:
    squares = np.sort(np.random.default_rng(seed).exponential(size=size) ** 4)[::-1]
    held = np.cumsum(squares)
    energies = np.append(held[np.array(count_grid(size)) - 1], held[-1])
    count, least = count_at(energies, size, epsilon), int(np.searchsorted(held / held[-1], epsilon)) + 1
    if least > most_useful(size):
        assert count == size
        return
    assert held[count - 1] / held[-1] >= epsilon - 1e-12
    assert least <= count <= least + max(2, 0.3 * least)  # as far apart as the grid's counts are, at most
    assert energy_of_count(energies, size, count) <= held[count - 1] / held[-1] + 1e-12


def test_the_ends_of_epsilon() -> None:
    size = 500
    energies = np.append(np.linspace(0.5, 0.9, len(count_grid(size))), 1.0)
    assert count_at(energies, size, 1.0) == size
    assert count_at(energies, size, 0.95) == size  # beyond the largest count that is worth it
    assert count_at(energies, size, 0.9) == most_useful(size)
    assert count_at(energies, size, 1e-9) == 1
    assert count_at(np.zeros_like(energies), size, 0.5) == 1
    assert energy_of_count(energies, size, size) == 1.0
    with pytest.raises(UsageError):
        count_at(energies, size, 0.0)


def test_where_a_sparse_form_is_no_smaller_the_dense_tensor_is_kept() -> None:
    described = menu_manifest(SHAPES)
    calibration = menu_calibration(described, BATCH)
    spec = described.saved[0]
    assert rated(spec, "dct", 0.5, calibration, BATCH).label == "dct"
    assert (rated(spec, "dct", 1.0, calibration, BATCH).label, exact_option(spec).label) == ("dense", "dense")
    plan = make_plan(described, batch=BATCH, calibration=calibration, epsilon=1.0, runtime_bytes=0, codec="dct")
    assert set(plan.selection.values()) == {"dense"}
    assert plan.saved_bytes == plan.dense_saved_bytes
    # Without a dense option, an exact one at full rank.
    other = menu_manifest(SHAPES, ("dct", "hosvd"))
    taken = rated(other.saved[0], "dct", 1.0, calibration, BATCH)
    assert (taken.label, dict(taken.ranks)) == ("hosvd", {"c": 8})


def test_float16_is_exact_at_no_rank() -> None:
    spec = menu_manifest(SHAPES, ("hosvd",)).saved[0]
    assert exact_option(spec).label == "hosvd"
    half = dataclasses.replace(spec.options[0], config={"storage": "float16"})
    with pytest.raises(BundleError, match="no option keeps 'l0' exactly"):
        exact_option(dataclasses.replace(spec, options=(half,)))


@pytest.mark.parametrize("rate", [1.0, 10.0, 1000.0])
def test_a_rate_keeps_one_element_of_so_many(rate: float) -> None:
    described = menu_manifest(SHAPES)
    calibration = menu_calibration(described, BATCH)
    plan = make_plan(described, batch=BATCH, calibration=calibration, rate=rate, runtime_bytes=0, codec="dct")
    sizes = {spec.name: int(np.prod(spec.shape)) for spec in described.saved}
    expected = {name: max(1, int(size / rate)) for name, size in sizes.items()}
    kept = {name: ranks["k"] for name, ranks in plan.ranks.items()}
    assert kept == ({} if rate == 1 else expected)
    assert plan.epsilon is None
    for row in plan.rows:
        if rate > 1:
            assert row.stored_bytes == BATCH * 6 * expected[row.layer]  # a float32 and two bytes of index
            assert row.error is not None and row.error > 0


def test_the_error_of_a_rate_is_that_of_the_energy_it_keeps() -> None:
    described = menu_manifest(SHAPES)
    calibration = menu_calibration(described, BATCH)
    spec = described.saved[0]
    by_epsilon = rated(spec, "dct", 0.8, calibration, BATCH)
    by_rate = at_rate(spec, "dct", int(np.prod(spec.shape)) / by_epsilon.ranks["k"], calibration, BATCH)
    assert dict(by_rate.ranks) == dict(by_epsilon.ranks)
    assert by_rate.error == pytest.approx(by_epsilon.error, rel=0.05)


def test_the_largest_epsilon_that_fits() -> None:
    described = menu_manifest(SHAPES)
    calibration = menu_calibration(described, BATCH)

    def saved(epsilon: float) -> int:
        plan = make_plan(described, batch=BATCH, calibration=calibration, epsilon=epsilon, runtime_bytes=0, codec="dct")
        return plan.saved_bytes

    steps = breakpoints(calibration).tolist()
    budget = (saved(steps[0]) + saved(1.0)) // 2
    plan = make_plan(
        described,
        batch=BATCH,
        calibration=calibration,
        activation_budget_bytes=budget,
        runtime_bytes=0,
        codec="dct",
        trained=len(SHAPES),
    )
    assert plan.epsilon == max(step for step in steps if saved(step) <= budget)
    assert plan.epsilon is not None
    for row in plan.rows:
        assert row.captured_energy is None or row.captured_energy >= plan.epsilon - 1e-9


def test_errors_between_levels_never_fall_with_epsilon() -> None:
    table = np.array([[0.1, 0.5], [0.5, 0.6], [0.9, 0.2], [1.0, 0.0]])
    found = [interpolated(table, epsilon) for epsilon in np.linspace(0.05, 1.0, 50)]
    assert found == sorted(found, reverse=True)
    assert interpolated(table, 0.9) == 0.2
    assert 0.0 < interpolated(table, 0.99) < 0.2
    assert interpolated(np.array([[1.0, 0.3]]), 0.4) == 0.3


def test_a_calibration_keeps_counts_and_errors(tmp_path: Path) -> None:
    described = menu_manifest(SHAPES)
    calibration = menu_calibration(described, BATCH)
    calibration.save(tmp_path / "c.safetensors")
    again = Calibration.load(tmp_path / "c.safetensors")
    for kind in ("counts", "errors"):
        for name, tables in getattr(calibration, kind).items():
            assert {k: v.tolist() for k, v in tables.items()} == {
                k: v.tolist() for k, v in getattr(again, kind)[name].items()
            }


def test_no_data_and_foreign_data() -> None:
    described = menu_manifest(SHAPES)
    calibration = identity_calibration(described, BATCH)
    spec = dataclasses.replace(described.saved[0], options=described.saved[0].options[1:2])
    assert rated(spec, "dct", 0.25, calibration, BATCH).ranks == {"k": spec.shape[0] * 36}
    assert captured_energy_bound(spec, calibration, {"k": 3}, BATCH) is None
    other = menu_calibration(menu_manifest([(2, 3, 3), (4, 5, 5)]), BATCH)
    with pytest.raises(StateError, match="another bundle"):
        rated(spec, "dct", 0.25, other, BATCH)
