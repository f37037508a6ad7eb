"""Who lies above whom at equal memory, and what the page says of it."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ElementTree

import pytest

from tools.accuracy_curves import KIB, MIB, MIX, Point, Run, contest_lines, contests, paired, points, svg, table
from tools.accuracy_curves import target_lines as targets


def point(
    series: str, knob: str, peak: float, after: tuple[float, ...], error: float | None = 0.1, held: float = 10.0
) -> Point:
    seeds = tuple(range(len(after)))
    return Point(
        series, knob, "onnxruntime", seeds, after, peak * MIB, held * KIB, 6 * KIB, 3 * KIB, KIB, error, 0.9, "2 int8"
    )


def run(seed: int, after: float, series: str = "dct") -> Run:
    return Run("t", seed, series, "λ = 8", "onnxruntime", 0.1, after, 8 * MIB, KIB, 7, 2, 1, 0.2, 0.5, 0, "2 dct", 1.0)


def test_seeds_are_joined_in_order() -> None:
    (one,) = points([run(2, 0.7), run(0, 0.8), run(1, 0.9)])
    assert (one.seeds, one.after) == ((0, 1, 2), (0.8, 0.9, 0.7))
    assert one.mean == pytest.approx(0.8) and one.deviation == pytest.approx(0.1)
    assert math.isnan(points([run(0, 0.8)])[0].deviation)


def test_the_mix_is_judged_at_equal_or_less_memory() -> None:
    mixes = [point(MIX, "a", 4, (0.7, 0.7), error=0.3), point(MIX, "b", 8, (0.9, 0.9), error=0.1)]
    singles = [
        point("at-equal-peak", "", 8 * 0.995, (0.85, 0.95)),  # one per cent less is still equal
        point("smaller", "", 7.9, (0.75, 0.65)),
        point("better", "", 5, (0.8, 0.82)),
        point("noisy", "", 5, (0.60, 0.86)),
        point("tiny", "", 3.9, (0.1, 0.1)),
    ]
    found = contests(singles, mixes, "peak_bytes")
    assert [c.mix and c.mix.knob for c in found] == ["b", "a", "a", "a", None]
    assert [c.verdict for c in found] == ["above", "above", "below", "within noise", "no mix so small"]
    assert found[2].difference == pytest.approx(-0.11) and found[2].doubt == pytest.approx(0.02)
    text = "\n".join(contest_lines(found, "measured peak"))
    assert "**not met** (of 5 plans: 2 above, 1 below, 1 no mix so small, 1 within noise)" in text
    assert "  - below: `better`" in text and "-11.0 ± 2.0 points" in text and "2 int8" in text
    met = contest_lines([c for c in found if c.verdict in ("above", "no mix so small")], "x")
    assert ": met (" in met[0] and "no mix so small was planned" in met[1]


def test_the_mix_is_chosen_by_the_planner_and_not_by_accuracy() -> None:
    mixes = [point(MIX, "lucky", 4, (0.99,), error=0.3), point(MIX, "planned", 5, (0.8,), error=0.1)]
    (one,) = contests([point("dct", "", 6, (0.9,))], mixes, "peak_bytes")
    assert one.mix is not None and one.mix.knob == "planned"
    assert one.verdict == "below", "one seed tells nothing of the noise"


def test_differences_are_by_seed() -> None:
    one = Point("a", "", "torch", (0, 2), (0.5, 0.6), 1, 1, 1, 1, 1, None, None, "")
    other = Point("b", "", "torch", (2, 3), (0.4, 0.9), 1, 1, 1, 1, 1, None, None, "")
    assert paired(one, other)[0] == pytest.approx(0.2)
    with pytest.raises(ValueError, match="no seed in common"):
        paired(one, point("c", "", 1, (0.1,) * 0))


@pytest.mark.parametrize(("accuracy", "autograd", "met"), [(0.895, 310, 2), (0.88, 310, 1), (0.88, 290, 0)])
def test_targets(accuracy: float, autograd: float, met: int) -> None:
    every = [point("dense", "—", 9, (0.9, 0.9), held=100), point("hosvd", "ε = 0.9", 5, (accuracy, accuracy))]
    text = "\n".join(targets(every, autograd * KIB))
    assert text.count(": met") == met and text.count("**not met**") == 2 - met
    assert "10.0 ×" in text and "Masks are 30%" in text
    assert ("least that any plan within 1 point of dense leaves: `hosvd`" in text) == (accuracy > 0.89)
    assert ("No plan other than dense" in text) == (accuracy < 0.89)
    assert ("The best accuracy with at least 30 times fewer saved bytes: `hosvd`" in text) == (autograd >= 300)
    narrow = point("hosvd:storage=log8", "ε = 0.9", 5, (0.9, 0.9), held=5)
    both = "\n".join(targets([*every, narrow], autograd * KIB))
    assert "`hosvd:storage=log8` at ε = 0.9 within 1 point of dense: met" in both
    assert "least that any plan within 1 point of dense leaves: `hosvd:storage=log8`" in both
    assert "was not measured" in targets(every[:1], 1.0)[0]


def test_the_table_and_the_picture() -> None:
    every = [point("dense", "—", 9, (0.9, 0.92), held=100), point("int8", "—", 6, (0.88, 0.9))]
    every.append(point(MIX, "a", 4, (0.8, 0.9)))
    rows = table(every, 300 * KIB)
    assert rows[3] == "| `int8` | — | 10 | 6 + 3 + 1 | 10 | 30.0 | 6.00 | 89.0 | 1.4 | -2.0 | 0.90 | 2 |"
    picture = ElementTree.fromstring(svg(every, MIX, "a < b"))
    kinds = [child.tag.rpartition("}")[2] for child in picture]
    assert kinds.count("polyline") == 3 and kinds.count("circle") == 6
    assert any(child.text == "a < b" for child in picture)
