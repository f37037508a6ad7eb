"""The map from ε to ranks, and the file that keeps a calibration."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.numpy import save_file

from edgetune.bundle import Array, SavedSpec
from edgetune.codecs import Saved
from edgetune.errors import DataError, StateError, StorageError, UsageError
from edgetune.planning.spectra import (
    Calibration,
    Spectrum,
    breakpoints,
    captured_energy_bound,
    fractions,
    identity_calibration,
    rank_at,
    ranks_at,
    spectrum_of,
)
from tests.planning.synthetic import decaying_calibration, manifest, saved_spec

VALUES = st.one_of(st.just(0.0), st.floats(1e-12, 1e6))
EIGENVALUES = hnp.arrays(np.float64, hnp.array_shapes(min_dims=2, max_dims=2, max_side=6), elements=VALUES).map(
    lambda values: np.sort(values, axis=1)[:, ::-1]
)
EPSILONS = st.floats(0.01, 1.0)


def gram_of(values: Array) -> Array:
    return np.asarray(values @ values.swapaxes(-1, -2))


@given(EIGENVALUES, st.floats(0.01, 0.999))
def test_rank_is_the_least_that_holds_epsilon(eigenvalues: Array, epsilon: float) -> None:
    rank, total = rank_at(Spectrum(eigenvalues, None), epsilon), float(eigenvalues.sum())
    if total == 0:
        assert rank == 1
        return
    held = [float(eigenvalues[:, :k].sum()) / total for k in range(eigenvalues.shape[1] + 1)]
    assert held[rank] >= epsilon - 1e-12
    assert held[rank - 1] < epsilon + 1e-12


@given(EIGENVALUES, EPSILONS, EPSILONS)
def test_rank_never_falls_as_epsilon_rises(eigenvalues: Array, one: float, other: float) -> None:
    spectrum = Spectrum(eigenvalues, None)
    low, high = sorted((one, other))
    assert 1 <= rank_at(spectrum, low) <= rank_at(spectrum, high) <= spectrum.size


@given(EIGENVALUES)
def test_epsilon_one_is_full_rank(eigenvalues: Array) -> None:
    assert rank_at(Spectrum(eigenvalues, None), 1.0) == eigenvalues.shape[1]


@pytest.mark.parametrize("epsilon", [0.0, -0.5, 1.0001, float("nan")])
def test_epsilon_is_a_fraction(epsilon: float) -> None:
    with pytest.raises(UsageError, match="epsilon"):
        rank_at(Spectrum(np.ones((1, 3)), None), epsilon)


@given(st.lists(EIGENVALUES, min_size=1, max_size=4))
def test_ranks_change_at_every_breakpoint_and_nowhere_else(several: list[Array]) -> None:
    spectra = {f"s{i}": {"c": Spectrum(values, None)} for i, values in enumerate(several)}
    steps = breakpoints(Calibration(spectra, 1, 1))

    def ranks(epsilon: float) -> list[int]:
        return [rank_at(modes["c"], epsilon) for modes in spectra.values()]

    assert (np.diff(steps) > 0).all()
    assert steps[-1] == 1.0
    for left, right in itertools.pairwise(steps):
        assert ranks(np.nextafter(left, 2.0)) == ranks(right)
        assert ranks(left) != ranks(right)
    assert ranks(steps[0] / 2) == ranks(steps[0])


def test_breakpoints_of_nothing() -> None:
    assert breakpoints(Calibration({}, 0, 1)).size == 0


def test_spectrum_diagonalises_each_group() -> None:
    rng = np.random.default_rng(0)
    factors = rng.normal(size=(3, 5, 2))  # rank 2: the other eigenvalues are rounding, of either sign
    gram = gram_of(factors).astype(np.float32)
    found = spectrum_of(gram)
    assert found.basis is not None
    assert (str(found.eigenvalues.dtype), str(found.basis.dtype)) == ("float64", "float32")
    assert (found.eigenvalues >= 0).all()
    assert (np.diff(found.eigenvalues, axis=1) <= 0).all()
    rebuilt = np.einsum("gik,gk,gjk->gij", found.basis, found.eigenvalues, found.basis)
    np.testing.assert_allclose(rebuilt, gram, atol=1e-5)
    np.testing.assert_allclose(found.basis.swapaxes(1, 2) @ found.basis, np.tile(np.eye(5), (3, 1, 1)), atol=1e-6)
    without = spectrum_of(gram, with_basis=False)
    assert without.basis is None
    np.testing.assert_allclose(without.eigenvalues, found.eigenvalues, atol=1e-6)


def test_a_gram_matrix_must_be_finite() -> None:
    with pytest.raises(DataError, match="finite"):
        spectrum_of(np.full((1, 2, 2), np.nan))


@pytest.mark.parametrize("groups", [1, 2])
@given(seed=st.integers(0, 2**32 - 1), epsilon=st.floats(0.3, 1.0))
def test_the_energy_kept_is_at_least_the_bound(groups: int, seed: int, epsilon: float) -> None:
    """Project a tensor onto its own leading bases in all four modes and measure what is left of it."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(4, 6, 5, 3)) * np.exp(-rng.uniform(0, 2, (4, 1, 1, 1)) * np.arange(6)[:, None, None])
    described = manifest([(6, 5, 3)], groups=groups)
    spec = described.saved[0]
    unfolded = {
        "b": x.reshape(1, 4, -1),
        "c": np.stack([part.swapaxes(0, 1).reshape(6 // groups, -1) for part in np.split(x, groups, axis=1)]),
        "h": x.transpose(2, 0, 1, 3).reshape(1, 5, -1),
        "w": x.transpose(3, 0, 1, 2).reshape(1, 3, -1),
    }
    spectra = {letter: spectrum_of(gram_of(matrix)) for letter, matrix in unfolded.items()}
    calibration = Calibration({spec.name: spectra}, samples=4, batch=4)
    ranks = ranks_at(described, calibration, epsilon, batch=4)[spec.name]
    kept = x
    for axis, letter in enumerate("bchw"):
        basis = spectra[letter].basis
        assert basis is not None
        blocks = [group[:, : ranks[letter]] @ group[:, : ranks[letter]].T for group in basis]
        size = blocks[0].shape[0]
        projector = np.zeros((size * len(blocks), size * len(blocks)))
        for i, block in enumerate(blocks):
            projector[i * size : (i + 1) * size, i * size : (i + 1) * size] = block
        kept = np.moveaxis(np.tensordot(projector, kept, axes=(1, axis)), 0, axis)
    bound = captured_energy_bound(spec, calibration, ranks, batch=4)
    assert bound is not None
    assert 0.0 <= bound <= np.sum(kept**2) / np.sum(x**2) + 1e-5


def test_energy_is_unknown_without_data_and_one_at_full_rank() -> None:
    described = manifest([(6, 5, 3)])
    nothing = identity_calibration(described, batch=4)
    (spec,) = described.saved
    assert captured_energy_bound(spec, nothing, ranks_at(described, nothing, 0.5, 4)["l0"], 4) is None
    assert captured_energy_bound(spec, nothing, ranks_at(described, nothing, 1.0, 4)["l0"], 4) == 1.0
    assert captured_energy_bound(saved_spec("x", (6, 5, 3), "", 1), nothing, {}, 4) is None


def test_identity_calibration_is_flat_and_orthonormal() -> None:
    described = manifest([(6, 5, 3)], groups=2)
    found = identity_calibration(described, batch=8)
    assert (found.samples, found.batch) == (0, 8)
    assert ranks_at(described, found, 0.5, 8) == {"l0": {"b": 4, "c": 2, "h": 3, "w": 2}}
    basis = found.spectra["l0"]["c"].basis
    assert basis is not None
    np.testing.assert_array_equal(basis, np.tile(np.eye(3), (2, 1, 1)))
    assert found.spectra["l0"]["b"].basis is None


@given(st.integers(1, 40), st.integers(1, 40), EPSILONS, st.integers(0, 9))
def test_batch_rank_fits_the_planned_batch(measured: int, planned: int, epsilon: float, seed: int) -> None:
    described = manifest([(4, 2, 2)], letters="b")
    calibration = decaying_calibration(described, measured, seed)
    rank = ranks_at(described, calibration, epsilon, planned)["l0"]["b"]
    assert 1 <= rank <= planned
    assert ranks_at(described, calibration, 1.0, planned)["l0"]["b"] == min(planned, max(measured, planned))
    bound = captured_energy_bound(described.saved[0], calibration, {"b": rank}, planned)
    assert bound is not None
    assert bound >= epsilon - 1e-9 or measured > planned


def without_mode(calibration: Calibration, spec: SavedSpec) -> Calibration:
    modes = {k: v for k, v in calibration.spectra[spec.name].items() if k != "h"}
    return Calibration({**calibration.spectra, spec.name: modes}, calibration.samples, calibration.batch)


def test_a_calibration_of_another_bundle_is_refused() -> None:
    described, other = manifest([(6, 5, 3)]), manifest([(8, 5, 3)])
    calibration = decaying_calibration(described, 4, 0)
    with pytest.raises(StateError, match="another bundle"):
        ranks_at(other, calibration, 0.9, 4)
    with pytest.raises(StateError, match=r"mode 'h' of 'l0'.*l0\.b, l0\.c, l0\.w"):
        ranks_at(described, without_mode(calibration, described.saved[0]), 0.9, 4)


def test_save_and_load_are_inverse(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    path = tmp_path / "calibration.safetensors"
    spectrum = spectrum_of(gram_of(rng.normal(size=(2, 4, 9))))
    batch = spectrum_of(gram_of(rng.normal(size=(1, 3, 9))), with_basis=False)
    calibration = Calibration({"a/b.c": {"c": spectrum, "b": batch}, "d": {"h": spectrum}}, samples=77, batch=3)
    identity_calibration(manifest([(4, 2, 2)]), 2).save(path)
    calibration.save(path)
    found = Calibration.load(path)
    assert (found.samples, found.batch) == (77, 3)
    assert {saved: set(modes) for saved, modes in found.spectra.items()} == {"a/b.c": {"b", "c"}, "d": {"h"}}
    for saved, modes in calibration.spectra.items():
        for letter, expected in modes.items():
            actual = found.spectra[saved][letter]
            np.testing.assert_array_equal(actual.eigenvalues, expected.eigenvalues)
            assert (actual.basis is None) == (expected.basis is None)
            if actual.basis is not None and expected.basis is not None:
                np.testing.assert_array_equal(actual.basis, expected.basis)
    assert list(tmp_path.iterdir()) == [path]


def test_a_bad_file_is_a_state_error(tmp_path: Path) -> None:
    path = tmp_path / "calibration.safetensors"
    with pytest.raises(StateError, match="cannot be read"):
        Calibration.load(path)
    path.write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00 not a header")
    with pytest.raises(StateError, match="cannot be read"):
        Calibration.load(path)
    save_file({"x": np.zeros(1)}, path)
    with pytest.raises(StateError, match="format is None"):
        Calibration.load(path)


def test_a_refused_write_keeps_the_old_file(tmp_path: Path) -> None:
    calibration = identity_calibration(manifest([(4, 2, 2)]), 2)
    with pytest.raises(StorageError, match="absent"):
        calibration.save(tmp_path / "absent" / "calibration.safetensors")
    path = tmp_path / "calibration.safetensors"
    calibration.save(path)
    before = path.read_bytes()
    (tmp_path / "calibration.safetensors.tmp").mkdir()  # what the write needs is in its way
    with pytest.raises(StorageError):
        calibration.save(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("shape", "letters", "last"),
    [
        ((6, 9), "bcw", False),
        ((6, 3, 4, 5), "bczhw", False),
        ((6,), "bc", True),
        ((7, 6), "bwc", True),
        ((3, 4, 5, 6), "bzhwc", True),
    ],
)
def test_every_mode_of_any_layer_has_a_rank_and_a_share_of_the_energy(
    shape: tuple[int, ...], letters: str, last: bool
) -> None:
    described = manifest([(4, 4, 4)])
    spec = saved_spec("l0", shape, letters, 1, last=last)
    described = dataclasses.replace(described, saved=(spec,))
    full = {"b": 8, **Saved("l0", shape, channels_last=last).extents()}
    assert ranks_at(described, identity_calibration(described, 8), 1.0, 8) == {"l0": full}
    calibration = decaying_calibration(described, 8, seed=1)
    ranks = ranks_at(described, calibration, 0.7, 8)["l0"]
    assert list(ranks) == list(letters) and all(1 <= ranks[letter] <= full[letter] for letter in letters)
    bound = captured_energy_bound(spec, calibration, ranks, 8)
    lost = [1 - fractions(spectrum)[ranks[k] - 1] for k, spectrum in calibration.spectra["l0"].items()]
    assert bound == pytest.approx(max(0.0, 1 - sum(lost)))
