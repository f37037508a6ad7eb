"""The feature cache holds what it was given, and never more bytes than it may."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgetune.agent.cache import FeatureCache
from edgetune.agent.config import AgentConfig
from edgetune.agent.feeder import Fed, Feeder
from edgetune.agent.images import Decoder
from edgetune.agent.ledger import Sample
from edgetune.agent.loop import run_agent
from edgetune.agent.sources import FolderSource
from edgetune.agent.view import QuietView
from edgetune.bundle import Array, TensorSpec
from edgetune.planning.plan import make_plan
from edgetune.units import MIB
from tests.agent.fakes import FakeSession, Workshop, make_bundle, make_folder

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


def test_a_run_with_a_cache_ends_as_one_without_and_unpacks_every_file_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, unpacked = make_bundle(tmp_path / "bundle"), list[int]()
    make_folder(tmp_path / "data", 7)
    (tmp_path / "data" / "cat" / "bad.png").write_bytes(b"not an image")
    real = Decoder.decode

    def counting(self: Decoder, data: bytes) -> Array:
        unpacked[-1] += 1
        return real(self, data)

    monkeypatch.setattr(Decoder, "decode", counting)
    ends = []
    for cache_bytes in (None, 2 * MIB):
        unpacked.append(0)
        shop = Workshop()
        config = AgentConfig(
            data=tmp_path / "data", state=tmp_path / f"state{cache_bytes}", batch=4, once=True, quiet=True,
            epsilon=0.9, settle_seconds=0.1, epochs=4, holdout=0, micro_batch=3, cache_bytes=cache_bytes,
        )  # fmt: skip
        run_agent(bundle, config, parts=shop.parts(), view=QuietView())
        ends.append(shop.session.weight)
        assert shop.session.largest_micro_batch == 3
    assert np.array_equal(ends[0], ends[1])
    samples = 21
    # Taken in and trained; without a cache once more in each of three later passes, and to calibrate.
    assert unpacked[0] - unpacked[1] >= 3 * samples


def test_a_batch_is_in_the_order_in_which_it_was_taken_wherever_its_features_are_from(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    make_folder(tmp_path / "data", 3)
    decoder = Decoder(bundle.manifest)
    source = FolderSource(tmp_path / "data", bundle.manifest.classes, decoder.suffixes)
    session = FakeSession(bundle, make_plan(bundle.manifest, batch=9, calibration=None, epsilon=1.0, runtime_bytes=0))
    samples = [
        Sample(number, f.path, hashlib.sha256(source.read(f.path)).hexdigest(), 0, 0, f.label, "new", None, 0, None)
        for number, f in enumerate(source.scan())
    ]
    plain, cached = Feeder(source, decoder), Feeder(source, decoder, FeatureCache(bundle.manifest.features, 2 * MIB))

    def fed(feeder: Feeder, numbers: list[int]) -> Fed:
        rows = iter(numbers)
        return feeder.feed(lambda: next((samples[n] for n in rows), None), 9, session, 2)

    for numbers in ([4, 1], [0, 1, 2, 3, 4, 5, 6, 7, 8], [8, 3]):
        one, other = fed(plain, numbers), fed(cached, numbers)
        assert [sample.id for sample in other.samples] == numbers == [sample.id for sample in one.samples]
        assert np.array_equal(one.features[0], other.features[0]) and np.array_equal(one.labels, other.labels)
    assert cached.cache is not None and (cached.cache.hits, len(cached.cache)) == (4, 9)
