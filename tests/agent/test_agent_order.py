"""The order of samples: laws, as properties."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from edgetune.agent.order import Pool, order

CONTENTS = st.lists(st.text("0123456789abcdef", min_size=4, max_size=8), unique=True, max_size=30)
SEEDS = st.integers(0, 2**31)


@given(SEEDS, st.integers(0, 5), CONTENTS)
def test_each_pass_is_a_permutation_and_a_function_of_its_arguments(seed: int, epoch: int, contents: list[str]) -> None:
    found = order(seed, epoch, contents)
    assert sorted(found) == list(range(len(contents)))
    assert found == order(seed, epoch, contents)


@given(SEEDS, CONTENTS, st.data())
def test_taking_a_sample_away_leaves_the_order_of_the_rest(seed: int, contents: list[str], data: st.DataObject) -> None:
    kept = data.draw(st.lists(st.sampled_from(contents), unique=True)) if contents else []
    whole = [contents[i] for i in order(seed, 0, contents)]
    assert [content for content in whole if content in kept] == [kept[i] for i in order(seed, 0, kept)]


def drain(pool: Pool, contents: list[str], batch: int, steps: int | None = None) -> list[list[tuple[int, int]]]:
    batches: list[list[tuple[int, int]]] = []
    while len(pool) and (steps is None or len(batches) < steps):
        epoch, taken = pool.epoch, list[tuple[int, int]]()
        while len(taken) < batch and (entry := pool.take(epoch)) is not None:
            taken.append(entry)
        for sample, passes in taken:
            pool.add(sample, contents[sample], passes + 1)
        batches.append(taken)
    return batches


@given(SEEDS, CONTENTS, st.integers(1, 7), st.integers(1, 3), st.integers(0, 12))
def test_a_pool_rebuilt_after_any_step_continues_exactly(
    seed: int, contents: list[str], batch: int, epochs: int, stop: int
) -> None:
    def filled(passes: list[int]) -> Pool:
        pool = Pool(seed, epochs)
        for sample, content in enumerate(contents):
            pool.add(sample, content, passes[sample])
        return pool

    whole = drain(filled([0] * len(contents)), contents, batch)
    before = drain(filled([0] * len(contents)), contents, batch, stop)
    passes = [0] * len(contents)
    for taken in before:
        for sample, _ in taken:
            passes[sample] += 1
    assert before + drain(filled(passes), contents, batch) == whole
    # Each pass is the permutation of `order`, cut into batches that do not cross into the next pass.
    for epoch in range(epochs if contents else 0):
        visited = [sample for taken in whole for sample, made in taken if made == epoch]
        assert visited == order(seed, epoch, contents)
    assert all(len({made for _, made in taken}) == 1 and len(taken) <= batch for taken in whole)


def test_different_seeds_and_passes_give_different_orders() -> None:
    contents = [str(number) for number in range(50)]
    assert len({tuple(order(seed, epoch, contents)) for seed in range(3) for epoch in range(3)}) == 9


def test_peek_is_what_take_gives() -> None:
    pool = Pool(1, 1)
    for sample in range(9):
        pool.add(sample, str(sample))
    ahead = pool.peek(4)
    assert ahead == [pool.take() for _ in range(4)]
