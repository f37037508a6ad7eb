"""The gate's pure parts: the held-out set, the decision, the history; each against a slower way to the same."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Hashable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgetune.agent.gate import history as history_file
from edgetune.agent.gate.config import GateConfig
from edgetune.agent.gate.decision import Score, decide, tally
from edgetune.agent.gate.heldout import choose, share
from edgetune.agent.gate.history import History
from edgetune.agent.order import key
from edgetune.errors import StorageError

NAMES = ("cat", "dog", "owl")


# ---- the held-out set -----------------------------------------------------------------------------------------------
def brute_share(counts: list[int], most: int) -> int:
    level = 0
    while level < max(counts) and sum(min(count, level + 1) for count in counts) <= most:
        level += 1
    return level


@given(st.lists(st.integers(1, 40), min_size=1, max_size=12), st.integers(0, 200))
def test_the_share_is_the_largest_that_fits(counts: list[int], most: int) -> None:
    assert share(dict[Hashable, int](enumerate(counts)), most) == brute_share(counts, most)


@settings(max_examples=60)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=300), st.integers(1, 60), st.integers(0, 5), st.randoms())
def test_the_set_is_the_least_keys_of_every_stratum(labels: list[int], most: int, seed: int, rng: object) -> None:
    rows: list[tuple[int, str, Hashable]] = [(i, f"content{i}", label) for i, label in enumerate(labels)]
    level = max(1, brute_share(list(Counter(labels).values()), most))
    expected = []
    for label in set(labels):
        inside = sorted((key(seed, -1, content), i) for i, content, stratum in rows if stratum == label)
        expected += inside[:level]
    wanted = sorted(i for _, i in sorted(expected)[:most])
    assert choose(rows, seed, most) == wanted
    rng.shuffle(rows)  # type: ignore[attr-defined]
    assert choose(rows, seed, most) == wanted


def test_a_long_row_of_samples_is_cut_on_the_way_and_nothing_is_lost() -> None:
    rows = [(i, f"c{i}", i % 7 if i % 3 else "rare" if i % 900 == 0 else i % 7) for i in range(6000)]
    found = choose(iter(rows), 3, 70)
    by_stratum = Counter(rows[i][2] for i in found)
    # 7 rare ones, all of them taken; 63 places are left for the 7 others.
    assert by_stratum.pop("rare") == 7 and by_stratum == dict.fromkeys(range(7), 9)
    for stratum in range(7):
        keys = sorted((key(3, -1, content), i) for i, content, other in rows if other == stratum)
        assert {i for _, i in keys[:9]} == {i for i in found if rows[i][2] == stratum}


# ---- the decision ---------------------------------------------------------------------------------------------------
def verdicts(labels: dict[str, int], wrong: set[int]) -> dict[str, int]:
    return {content: (label + 1) % 3 if i in wrong else label for i, (content, label) in enumerate(labels.items())}


LABELS = {f"s{i}": i % 3 for i in range(60)}  # 20 of each class


@pytest.mark.parametrize(
    ("candidate", "promoted", "changed", "passes", "said"),
    [
        (set(), {0}, {}, True, "100.00%, promoted model 98.33%, on 60 samples"),
        ({0}, {1}, {}, True, "98.33%, promoted model 98.33%"),  # one class lost 1 of 20: 0.05, not more
        ({0, 3}, {1, 4}, {}, False, r"classes lower .*class_tolerance \(0.05\): cat \(18 of 20 right, before 20\)"),
        ({0, 3}, {1, 4}, {"class_tolerance": 0.1}, True, "promoted model 96.67%"),
        ({0}, set(), {}, False, r"lower by more than gate.tolerance \(0\)"),
        ({0}, set(), {"tolerance": 0.02}, True, "98.33%"),
        ({0, 1}, set(), {"tolerance": 0.02}, False, r"gate.tolerance \(0.02\)"),
        ({0, 1, 2}, set(), {"tolerance": 0.05}, True, "95.00%"),  # 0.05 exactly, whatever floats make of it
        (set(range(60)), set(), {"tolerance": 1.0, "class_tolerance": 1.0}, True, "0.00%"),
        (set(), {0}, {"least_heldout": 61}, False, "60 held-out samples are too few to judge by; .* is 61"),
        (set(), {0}, {"least_heldout": 60}, True, ""),
    ],
)
def test_the_gate(candidate: set[int], promoted: set[int], changed: dict[str, float], passes: bool, said: str) -> None:
    import re

    config = GateConfig(**changed)  # type: ignore[arg-type]
    found = decide(config, NAMES, LABELS, verdicts(LABELS, candidate), verdicts(LABELS, promoted))
    assert found.passes is passes and re.search(said, found.reason), found.reason
    assert (found.candidate.right, found.candidate.samples) == (60 - len(candidate), 60)


@pytest.mark.parametrize(
    ("lost", "of", "tolerance", "passes"),
    [(1, 12, 0.05, True), (2, 12, 0.05, False), (1, 12, 0.0, False), (2, 21, 0.05, True), (3, 21, 0.05, False)],
)
def test_a_class_may_lose_its_tolerance_in_whole_samples(lost: int, of: int, tolerance: float, passes: bool) -> None:
    labels = {f"s{i}": int(i < 100) for i in range(100 + of)}  # 100 of class 1, a few of class 0
    new = {
        content: 1 if content in {f"s{100 + i}" for i in range(lost)} else label for content, label in labels.items()
    }
    old = {content: label if int(content[1:]) > 9 else 2 for content, label in labels.items()}  # worse elsewhere
    found = decide(GateConfig(class_tolerance=tolerance), NAMES, labels, new, old)
    assert found.passes is passes, found.reason


def test_models_are_compared_on_what_both_have_seen_and_on_nothing_else() -> None:
    new = verdicts(LABELS, set())
    old = {content: verdict for content, verdict in verdicts(LABELS, {0, 1}).items() if int(content[1:]) < 30}
    found = decide(GateConfig(), NAMES, LABELS, new, old)
    assert found.candidate.samples == found.promoted.samples == 30 and found.promoted.right == 28
    nothing = decide(GateConfig(least_heldout=0), NAMES, LABELS, new, {})
    assert not nothing.passes and "no held-out sample" in nothing.reason
    assert not decide(GateConfig(least_heldout=0), NAMES, {}, new, old).passes


@given(st.dictionaries(st.sampled_from([f"s{i}" for i in range(20)]), st.integers(-1, 2)), st.randoms())
def test_a_score_counts_what_is_right(found: dict[str, int], rng: object) -> None:
    score = tally(found, LABELS)
    right = [content for content, verdict in found.items() if verdict == LABELS[content]]
    assert (score.right, score.samples) == (len(right), len(found))
    assert sum(right for right, _ in score.classes.values()) == score.right
    assert score.accuracy == (None if not found else len(right) / len(found))
    assert score.plain(NAMES)["samples"] == len(found)


def test_an_output_that_is_not_finite_is_never_right() -> None:
    assert tally({"s0": -1}, LABELS) == Score(0, 1, {0: (0, 1)})


# ---- the history ----------------------------------------------------------------------------------------------------
def test_a_line_that_was_cut_short_never_happened(tmp_path: Path) -> None:
    history = History(tmp_path / "h.jsonl")
    for step in range(3):
        history.append("refused", step=step)
    whole = history.path.read_bytes()
    for cut in range(1, len(whole.splitlines()[-1]) + 1):
        history.path.write_bytes(whole[:-cut])
        assert [entry["step"] for entry in history.read()] == [0, 1]
        history.append("promoted", step=9)
        assert [entry["step"] for entry in history.read()] == [0, 1, 9]
    history.path.write_bytes(b"no line end")
    history.append("promoted", step=1)
    assert [entry["step"] for entry in history.read()] == [1]


def test_a_damaged_line_is_left_out(tmp_path: Path) -> None:
    history = History(tmp_path / "h.jsonl")
    history.append("refused", step=1, reason="ε\n")
    history.path.write_bytes(history.path.read_bytes() + b'{"event": 5}\n[]\n\xff\xfe\n{"x": 1}\n')
    history.append("promoted", step=2)
    assert [entry["step"] for entry in history.read()] == [1, 2]
    assert all(entry["time"] > 1e9 for entry in history.read())


def test_the_history_of_years_does_not_fill_a_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history_file, "MOST_BYTES", 2000)
    history = History(tmp_path / "h.jsonl")
    for step in range(200):
        history.append("refused", step=step, reason="x" * 20)
        assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 4000
    steps = [entry["step"] for entry in history.read()]
    assert steps == list(range(steps[0], 200)) and len(steps) > 15
    assert len(list(tmp_path.iterdir())) == 2


def test_a_full_disk_leaves_no_half_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    history = History(tmp_path / "h.jsonl")
    history.append("refused", step=1)
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: real(fd, data[:5], at))
    with pytest.raises(StorageError, match="cannot write the history"):
        history.append("promoted", step=2)
    monkeypatch.undo()
    history.append("promoted", step=3)
    assert [json.loads(line)["step"] for line in history.path.read_text().splitlines()] == [1, 3]
