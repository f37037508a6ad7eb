"""Fixtures of the export's tests."""

from __future__ import annotations

import pytest

from tests.autodiff.parity import Bundles


@pytest.fixture(scope="session")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Bundles:
    """Bundles, each exported once per run."""
    return Bundles(tmp_path_factory.mktemp("bundles"))
