"""The memory that the torch engine's large tensors take turns in: whose it is, and how much of it there may be."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from edgetune.agent.ceiling import SLACK_BYTES, ceiling
from edgetune.engines import heap
from edgetune.engines.torch_ops.arena import ARENA, LEAST_BYTES, Arena, empty

CPU = torch.device("cpu")
MIB = 1 << 20


@pytest.fixture
def arena() -> Arena:
    made = Arena()
    if made.take([1], torch.uint8) is None:
        pytest.skip("no addresses can be reserved here")
    return Arena()


def taken(arena: Arena, mebibytes: float) -> Tensor:
    tensor = arena.take([round(mebibytes * MIB)], torch.uint8)
    assert tensor is not None
    return tensor


def resident_bytes() -> int:
    found = re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


def test_living_tensors_never_overlap_and_no_more_is_kept_than_was_ever_used(arena: Arena) -> None:
    draw = random.Random(0)
    living: list[tuple[int, Tensor]] = []
    for turn in range(400):
        if len(living) < 8 and draw.random() < 0.55:
            tensor = taken(arena, draw.uniform(0.01, 0.5))
            living.append((turn % 256, tensor.fill_(turn % 256)[7:]))  # a view alone keeps the memory
        elif living:
            value, tensor = living.pop(draw.randrange(len(living)))
            assert bool((tensor == value).all())
        assert arena.resident_bytes <= arena.peak_bytes
    del tensor
    living.clear()
    arena.release()
    assert arena.used_bytes == arena.resident_bytes == 0


def test_what_a_tensor_leaves_behind_serves_the_next_one(arena: Arena) -> None:
    first = taken(arena, 2)
    place = first.data_ptr()
    view = first[MIB:]
    del first
    assert taken(arena, 1).data_ptr() != place, "a view is alive"
    del view
    assert taken(arena, 2).data_ptr() == place
    smaller = [taken(arena, 1), taken(arena, 1)]
    assert {t.data_ptr() for t in smaller} == {place, place + MIB}
    assert arena.peak_bytes == 3 * MIB


def test_memory_above_the_peak_goes_back_to_the_system(arena: Arena) -> None:
    before = resident_bytes()
    small = [taken(arena, 4).fill_(1) for _ in range(8)]
    del small[::2]
    large = taken(arena, 16).fill_(1)  # fits into no gap
    assert arena.resident_bytes == arena.peak_bytes == 32 * MIB
    assert resident_bytes() - before == pytest.approx(32 * MIB, abs=2 * MIB)
    small.clear()
    del large
    arena.release()
    assert resident_bytes() - before < 2 * MIB


def test_only_large_tensors_on_the_cpu_take_part_and_trimming_the_heap_gives_all_back() -> None:
    used = ARENA.used_bytes
    small = empty([LEAST_BYTES // 4 - 1], torch.float32, CPU)
    odd = empty([LEAST_BYTES], torch.complex64, CPU)
    elsewhere = empty([LEAST_BYTES], torch.float32, torch.device("meta"))
    assert ARENA.used_bytes == used and elsewhere.device.type == "meta" and small.is_contiguous() and len(odd)
    large = empty([LEAST_BYTES // 4], torch.float32, CPU)
    if ARENA.used_bytes == used:
        pytest.skip("no addresses can be reserved here")
    del large
    heap.trim()
    assert ARENA.resident_bytes == ARENA.used_bytes


def test_without_addresses_to_reserve_torch_serves_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr("edgetune.engines.torch_ops.arena.mmap.mmap", refuse)
    monkeypatch.setattr("edgetune.engines.torch_ops.arena.ARENA", Arena())
    assert empty([LEAST_BYTES], torch.float32, CPU).shape == (LEAST_BYTES,)


def test_a_confined_arena_takes_no_more_than_it_may(arena: Arena) -> None:
    size = (MIB,)
    held = [arena.take(size, torch.uint8)]
    arena.confine(MIB)
    held.append(arena.take(size, torch.uint8))
    with pytest.raises(MemoryError, match="where 0 may be taken"):
        arena.take(size, torch.uint8)
    held.pop()
    held.append(arena.take(size, torch.uint8))  # pages that were given back may be taken again
    arena.confine(None)
    held.append(arena.take(size, torch.uint8))
    assert arena.used_bytes == 3 * MIB and None not in held


def test_the_hard_stop_reaches_the_arena() -> None:
    with ceiling(0), pytest.raises(MemoryError):
        empty((SLACK_BYTES + ARENA.resident_bytes + MIB,), torch.uint8, CPU)
