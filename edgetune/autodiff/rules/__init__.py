"""Reverse rules: one file per family of operators, and the table of them all."""

from __future__ import annotations

from edgetune.autodiff.rule import Rule
from edgetune.autodiff.rules import (
    activation,
    arithmetic,
    conv,
    conv_transpose,
    linear,
    losses,
    matmul,
    normalise,
    pool,
    reduce,
    resize,
    select,
    shape,
)
from edgetune.errors import UnsupportedOperatorError, choices

RULES: dict[str, Rule] = {
    **activation.RULES,
    **arithmetic.RULES,
    **conv.RULES,
    **conv_transpose.RULES,
    **linear.RULES,
    **losses.RULES,
    **matmul.RULES,
    **normalise.RULES,
    **pool.RULES,
    **reduce.RULES,
    **resize.RULES,
    **select.RULES,
    **shape.RULES,
}


def rule_for(op: str, name: str) -> Rule:
    """Return the rule of operator ``op`` (of the node ``name``).

    Raises:
        UnsupportedOperatorError: there is none; the message lists the operators that have one.
    """
    if op not in RULES:
        raise UnsupportedOperatorError(
            f"operator {op} (node '{name}') has no backward rule, and a trained layer lies before it; train fewer "
            f"layers (--last) or rewrite that part of the model. Operators with a rule: {choices(RULES)}"
        )
    return RULES[op]
