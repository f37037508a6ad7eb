"""What a calibration holds while it seeks eigenvectors, which is when it takes the most memory."""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import pytest

from edgetune.bundle import Array
from edgetune.engines import calibration
from edgetune.planning.calibration import Spectrum, spectrum_of
from edgetune.planning.sizes import evaluate
from tests.engines.workshop import bundle_of


def test_nothing_of_a_batch_is_held_while_eigenvectors_are_sought(monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = bundle_of("hosvd").manifest
    graph = manifest.graphs["calibrate"]
    shapes = {use.name: use.shape for use in graph.tensors if use.name in graph.outputs}
    given: list[weakref.ref[Any]] = []
    alive: list[int] = []

    class Session:
        def grams(self, features: tuple[Array, ...]) -> dict[str, dict[str, Array]]:
            found: dict[str, dict[str, Array]] = {}
            for name, shape in shapes.items():
                saved, letter = name.removeprefix("gram/").rsplit("/", 1)
                groups, size = (evaluate(extent, {"batch": 4}) for extent in shape[:2])
                gram = np.tile(np.eye(size, dtype=np.float32), (groups, 1, 1))
                found.setdefault(saved, {})[letter] = gram
                given.append(weakref.ref(gram))
            return found

    def watched(gram: Array, *, with_basis: bool = True) -> Spectrum:
        if with_basis:
            alive.append(sum(one() is not None for one in given))
        return spectrum_of(gram, with_basis=with_basis)

    monkeypatch.setattr(calibration, "spectrum_of", watched)
    made = calibration.calibrate(Session(), manifest, iter([(np.zeros((4, 1)),)] * 2))
    assert made is not None and made.samples == 8 and len(given) == 2 * len(shapes)
    assert alive and set(alive) == {0}
