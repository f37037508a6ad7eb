"""The feature cache holds what it was given, and never more bytes than it may."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from edgetune.agent.cache import FeatureCache
from edgetune.bundle import Array, TensorSpec
from edgetune.units import MIB

SPECS = (TensorSpec("a", (300, 256)), TensorSpec("b", (5,), "int64"))  # three samples to a chunk
CHUNK_BYTES = 3 * (300 * 256 * 4 + 40)


def features(number: int) -> tuple[Array, Array]:
    return np.full((300, 256), number, np.float32), np.full(5, number, np.int64)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.sampled_from(["put", "forget", "resize"]), st.integers(0, 12)), max_size=40))
def test_what_is_there_is_what_was_put_there_within_the_limit(actions: list[tuple[str, int]]) -> None:
    cache, model = FeatureCache(SPECS, 2 * CHUNK_BYTES), dict[str, int]()
    for action, number in actions:
        if action == "put":
            cache.put(str(number), features(number))
            if len(model) < 3 * (cache.limit_bytes // CHUNK_BYTES):
                model[str(number)] = number
        elif action == "forget":
            cache.forget([str(number), "unknown"])
            model.pop(str(number), None)
        else:
            cache.resize(number * CHUNK_BYTES // 3)
            model = {key: value for key, value in model.items() if cache.get(key) is not None}
        assert len(cache) == len(model) and cache.bytes <= cache.limit_bytes
        for key, value in model.items():
            found = cache.get(key)
            assert found is not None
            assert all(np.array_equal(one, other) for one, other in zip(found, features(value), strict=True))


def test_nothing_is_evicted_and_what_does_not_fit_is_not_kept() -> None:
    cache = FeatureCache(SPECS, CHUNK_BYTES)
    for number in range(5):
        cache.put(str(number), features(number))
    assert len(cache) == 3 and cache.get("4") is None and (cache.hits, cache.misses) == (0, 1)
    cache.forget(["0"])
    cache.put("4", features(4))
    assert cache.get("4") is not None and cache.get("0") is None
    small = FeatureCache(SPECS, CHUNK_BYTES - 1)
    small.put("0", features(0))
    assert len(small) == small.bytes == 0
    large = FeatureCache((TensorSpec("a", (MIB,)),), 10 * MIB)  # one sample to a chunk
    for number in range(5):
        large.put(str(number), (np.zeros(MIB, np.float32),))
    assert len(large) == 2 and large.bytes == 8 * MIB
