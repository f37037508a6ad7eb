"""The weight gradient of a depthwise convolution in the factors: the one that the taps give, without any taps."""

from __future__ import annotations

import pytest

from edgetune.autodiff.rules import depthwise_tucker
from tests.autodiff.layers import Emitted, LayerCase, conv
from tests.autodiff.parity import relative_error

CASES: dict[str, LayerCase] = {
    "1-D": conv((4, 9), 4, (3,), groups=4, pads=(2, 0)),
    "2-D": conv((4, 7, 7), 4, (3, 3), groups=4, pads=(1, 1, 1, 1)),
    "everything": conv((4, 7, 6), 4, (3, 2), groups=4, strides=(2, 1), dilations=(1, 2), pads=(1, 0, 2, 3)),
    "one row": conv((3, 1, 6), 3, (3, 3), groups=3, pads=(1, 1, 1, 1)),
    "one column": conv((3, 6, 1), 3, (1, 1), groups=3),
    "3-D": conv((3, 4, 3, 5), 3, (3, 3, 3), groups=3, pads=(1,) * 6),
}


@pytest.mark.parametrize("name", CASES)
def test_it_is_the_one_of_the_taps(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made, operators, bases = [], [], None
    for most in (depthwise_tucker.MOST_PAIRS, 0):
        monkeypatch.setattr(depthwise_tucker, "MOST_PAIRS", most)
        emitted = Emitted.of(CASES[name], "hosvd")
        bases = bases or emitted.bases(0.6)
        made.append(emitted.run(bases)["weight"])
        model = emitted.model(list(emitted.made.parameters.values()))
        operators.append([node.op_type for node in model.graph.node])
    assert relative_error(made[0], made[1]) <= 2e-6
    assert operators[0] != operators[1] and not {"Slice", "Pad"} & set(operators[0])
