"""Which samples the replay buffer keeps and draws, how it packs features, and what lies on its disk."""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgetune.agent.replay.index import ENTRY, Contents, Entry, Index, digests_of, level_bytes
from edgetune.agent.replay.packing import pack, packed_bytes, unpack
from edgetune.agent.replay.store import Store
from edgetune.bundle import TensorSpec
from edgetune.errors import DataError, StateError

CLASSES = 3
samples = st.lists(st.tuples(st.integers(0, CLASSES - 1), st.integers(1, 12)), max_size=40)


def entries(told: list[tuple[int, int]]) -> list[Entry]:
    return [
        Entry(number, hashlib.sha256(str(number).encode()).hexdigest(), label, 4096 * size)
        for number, (label, size) in enumerate(told)
    ]


def priority(seed: int, digest: str) -> int:
    return int.from_bytes(hashlib.blake2b(f"replay:{seed}:{digest}".encode(), digest_size=8).digest(), "big")


def oracle(offered: list[Entry], capacity: int, balanced: bool, seed: int) -> set[int]:
    """Sort everything, share the bytes by trying every level, and take what fits."""
    groups: dict[int, list[Entry]] = {}
    for entry in offered:
        groups.setdefault(entry.label if balanced else 0, []).append(entry)
    wanted = [sum(entry.bytes for entry in group) for group in groups.values()]
    levels = range(0, capacity + max(wanted, default=0) + 1, 1024)
    level = max((one for one in levels if sum(min(want, one) for want in wanted) <= capacity), default=0)
    kept = set()
    for group in groups.values():
        room = level
        for entry in sorted(group, key=lambda entry: priority(seed, entry.digest)):
            room -= entry.bytes
            if room < 0:
                break
            kept.add(entry.sample)
    return kept


@settings(max_examples=60, deadline=None)
@given(
    told=samples, capacity=st.integers(0, 60), balanced=st.booleans(), seed=st.integers(0, 3), order=st.randoms(),
    cut=st.integers(0, 40),
)  # fmt: skip
def test_the_buffer_is_a_function_of_what_was_offered(
    told: list[tuple[int, int]], capacity: int, balanced: bool, seed: int, order: random.Random, cut: int
) -> None:
    """Whatever the order, and whether or not it went through a checkpoint on the way."""
    offered = entries(told)
    shuffled = list(offered)
    order.shuffle(shuffled)
    most = 10 * 4096
    index = Index(capacity * 3072, most, CLASSES if balanced else 0, seed)
    inside = set[int]()
    for place, entry in enumerate(shuffled):
        if place == cut:
            again = Index(capacity * 3072, most, CLASSES if balanced else 0, seed)
            assert again.load(index.to_plain(), index.array()) == [] and list(again) == list(index)
            index = again
        refused_at_once = not index.would_take(entry.digest, entry.label)
        taken, left = index.offer(entry)
        assert not (taken and refused_at_once)
        inside = (inside | ({entry.sample} if taken else set())) - {other.sample for other in left}
        assert index.bytes <= index.capacity_bytes and inside == set(index.samples().tolist())
    assert inside == oracle([entry for entry in offered if entry.bytes <= most], capacity * 3072, balanced, seed)
    assert {d for d, _ in digests_of(index.array())} == {entry.digest for entry in index}


@given(st.lists(st.integers(0, 30), min_size=1, max_size=8), st.integers(0, 100))
def test_the_level_shares_all_there_is_and_no_more(wanted: list[int], capacity: int) -> None:
    level = level_bytes(np.array(wanted), capacity)
    assert sum(min(one, level) for one in wanted) <= capacity
    assert sum(min(one, level + 1) for one in wanted) > capacity or level >= max(wanted)


def test_classes_that_have_few_leave_room_to_the_others() -> None:
    index = Index(60 * 4096, 4096 * 10, CLASSES, 0)
    for entry in entries([(0, 1)] * 5 + [(1, 1)] * 500 + [(2, 1)] * 100):
        index.offer(entry)
    assert Counter(entry.label for entry in index) == {0: 5, 1: 27, 2: 27}
    plain = Index(60 * 4096, 4096 * 10, 0, 0)
    for entry in entries([(0, 1)] * 5 + [(1, 1)] * 500 + [(2, 1)] * 100):
        plain.offer(entry)
    assert Counter(entry.label for entry in plain)[1] > 35 and len(plain) == 60


def test_every_sample_has_the_same_chance_and_every_draw_is_even() -> None:
    """A reservoir of 20 out of 100, over 300 seeds: each is kept 60 times, give or take four standard deviations."""
    kept, drawn = Counter[int](), Counter[int]()
    for seed in range(300):
        index = Index(20 * 4096, 4096, 0, seed)
        for entry in entries([(0, 1)] * 100):
            index.offer(entry)
        kept.update(index.samples().tolist())
        few = [entry.sample for entry, _ in zip(index.draw(7, ()), range(5), strict=False)]
        assert len(set(few)) == 5
        drawn.update(index.samples().tolist().index(sample) for sample in few)
    assert len(kept) == 100 and max(abs(count - 60) for count in kept.values()) < 4 * (300 * 0.2 * 0.8) ** 0.5
    assert len(drawn) == 20 and max(abs(count - 75) for count in drawn.values()) < 4 * (300 * 0.25 * 0.75) ** 0.5


def test_a_draw_depends_on_the_step_alone() -> None:
    index = Index(50 * 4096, 4096, 0, 3)
    for entry in entries([(0, 1)] * 50):
        index.offer(entry)
    whole = [entry.sample for entry in index.draw(9, ())]
    assert sorted(whole) == list(range(50)) and whole == [entry.sample for entry in index.draw(9, ())]
    assert whole != [entry.sample for entry in index.draw(10, ())]
    without = set(whole[::3])
    assert [entry.sample for entry in index.draw(9, without)] == [one for one in whole if one not in without]


def test_removed_samples_are_gone_and_another_capacity_is_obeyed() -> None:
    index = Index(50 * 4096, 4096, CLASSES, 3)
    for entry in entries([(n % 3, 1) for n in range(90)]):
        index.offer(entry)
    some = index.samples().tolist()[:7]
    assert sorted(entry.sample for entry in index.remove(some)) == sorted(some)
    assert not set(some) & set(index.samples().tolist()) and index.find(some[0]) is None
    less = Index(20 * 4096, 4096, CLASSES, 3)
    left = less.load(index.to_plain(), index.array())
    assert less.bytes <= 20 * 4096 and len(left) + len(less) == len(index)
    other = Index(20 * 4096, 4096, 0, 3)
    other.load(index.to_plain(), index.array())
    assert len(other) == 20, "another choice keeps what it can"
    assert index.memory_bytes <= 51 * ENTRY.itemsize
    with pytest.raises(StateError, match="uint8"):
        less.load(index.to_plain(), np.zeros((3, 4), np.uint8))
    with pytest.raises(StateError, match="contradicts"):
        less.load({**index.to_plain(), "dropped": []}, index.array())


def test_an_index_grows_beyond_its_first_entries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgetune.agent.replay.index._FIRST_ENTRIES", 3)
    index = Index(100 * 4096, 4096, 0, 0)
    for entry in entries([(0, 1)] * 90):
        index.offer(entry)
    assert sorted(index.samples().tolist()) == list(range(90))


# ---- packing -------------------------------------------------------------------------------------------------------
SPECS = (TensorSpec("a", (3, 4, 4)), TensorSpec("b", (7,)), TensorSpec("c", (2, 2), "int64"))


def features(seed: int, scale: float) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    a = (rng.standard_normal((3, 4, 4)) * scale * np.array([1, 0, 1000])[:, None, None]).astype(np.float32)
    return [a, (rng.standard_normal(7) * scale).astype(np.float32), rng.integers(-9, 9, (2, 2))]


@pytest.mark.parametrize("scale", [1e-6, 1.0, 30.0])
def test_packed_features_come_back_within_the_precision(scale: float) -> None:
    given = features(1, scale)
    for precision in ("float16", "int8"):
        data = pack(given, precision)
        assert len(data) == packed_bytes(SPECS, precision)
        back = unpack(data, SPECS, precision)
        assert [(v.shape, v.dtype) for v in back] == [(v.shape, v.dtype) for v in given]
        np.testing.assert_array_equal(back[2], given[2])
        for value, found in zip(given[:2], back[:2], strict=True):
            rows = value.reshape(3 if value.ndim == 3 else 1, -1)
            most = np.abs(rows).max(axis=1) / 254 if precision == "int8" else np.abs(rows).max(axis=1) / 2**11
            error = np.abs(found - value).reshape(len(rows), -1).max(axis=1)
            assert (error <= most * 1.001 + 2**-25).all()
    assert np.isfinite(unpack(pack([given[0] * 1e9, *given[1:]], "float16"), SPECS, "float16")[0]).all()


@pytest.mark.parametrize("precision", ["float16", "int8"])
def test_damaged_features_are_refused(precision: str) -> None:
    data = bytearray(pack(features(0, 1.0), precision))
    for harm in (bytes(data[:-1]), b"", bytes(data) + b"x"):
        with pytest.raises(DataError, match="bytes; expected"):
            unpack(harm, SPECS, precision)
    for place in (0, 40, len(data) - 1):
        flipped = bytearray(data)
        flipped[place] ^= 4
        with pytest.raises(DataError, match="checksum"):
            unpack(bytes(flipped), SPECS, precision)


# ---- the store -----------------------------------------------------------------------------------------------------
def names(path: Path) -> set[str]:
    return {entry.name for entry in path.iterdir()}


def test_a_file_is_deleted_when_no_checkpoint_refers_to_it(tmp_path: Path) -> None:
    store = Store(tmp_path / "r", ".raw")
    for digest in "abc":
        store.write(digest, digest.encode())
    store.drop("a", 4096, 1)
    assert names(store.directory) == {"b.raw", "c.raw"}, "no checkpoint has seen it"
    store.sync()
    store.drop("b", 4096, 5)
    store.drop("c", 4096, 6)
    store.tidy(4, lambda digest: False)
    assert names(store.directory) == {"b.raw", "c.raw"} and store.waiting_bytes == 8192
    store.tidy(5, lambda digest: False)
    assert names(store.directory) == {"c.raw"} and store.waiting_bytes == 4096
    store.tidy(6, lambda digest: digest == "c")
    assert names(store.directory) == {"c.raw"} and store.waiting_bytes == 0, "it has come back"
    assert store.read("c") == b"c"


def contents(*letters: str) -> Contents:
    index = Index(4096 * 9, 4096, 0, 0)
    for number, letter in enumerate(letters):
        index.offer(Entry(number, digest_of(letter), 0, 4096))
    return index.contents()


def digest_of(letter: str) -> str:
    return hashlib.sha256(letter.encode()).hexdigest()


def test_at_the_start_what_nobody_refers_to_is_deleted(tmp_path: Path) -> None:
    store = Store(tmp_path / "r", ".raw")
    for letter in "abcd":
        store.write(digest_of(letter), b"x")
    for stray in ("e.raw.tmp", f"{digest_of('a')}.f16", "noise", f"{digest_of('a')[:-2]}.raw"):
        (store.directory / stray).write_bytes(b"half")
    again = Store(tmp_path / "r", ".raw")
    kept = contents("z", "a")
    there = again.begin(kept, [(".f16", contents("c")), (".raw", contents("y", "a", "b"))], 8)
    assert there.tolist() == [False, True]
    assert names(again.directory) == {f"{digest_of(letter)}.raw" for letter in "ab"} and again.waiting_bytes == 4096
    again.tidy(8, lambda digest: False)
    assert names(again.directory) == {f"{digest_of('a')}.raw"}
    with pytest.raises(DataError, match="cannot be read"):
        again.read(digest_of("b"))


def test_contents_whose_hashes_begin_alike_are_told_apart() -> None:
    index = Index(4096 * 9, 4096, 0, 0)
    alike = ["00" * 8 + f"{number:02d}" * 24 for number in range(5)]
    for number, digest in enumerate(alike[:4]):
        index.offer(Entry(number, digest, 0, 4096))
    assert [index.contents().find(digest) for digest in alike] == [0, 1, 2, 3, None]
    assert [index.holds(digest) for digest in alike] == [True] * 4 + [False]
    assert index.contents().find("not a hash") is None
