"""The table of operators: what each one's backward pass keeps, and whether the torch engine runs it.

    python tools/operators.py > docs/operators.md

Everything is read from the tables that the code itself uses, so a new rule needs no word here.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from edgetune.autodiff.lowering import OWN  # noqa: E402
from edgetune.autodiff.rules import RULES  # noqa: E402
from edgetune.engines.torch_ops import OPERATORS  # noqa: E402


def runs_in_torch(op: str) -> str:
    """Return ``yes`` or ``no``, or for an operator that no bundle has that it is written out before."""
    return "written out" if op in OWN else "yes" if op in OPERATORS else "no"


def markdown() -> str:
    """Return the page for the documentation."""
    lines = [
        "# Operators",
        "",
        "Written by `python tools/operators.py > docs/operators.md`; a test holds this page to the code.",
        "",
        f"{len(RULES)} operators have a backward rule: a trained layer may lie before them. An operator without one "
        "may stand in the frozen part of a model, if the engine runs it; behind a trained layer it is refused at "
        "export, by name.",
        "",
        "The second column is what stays in memory from the forward to the backward pass, once per tensor however many "
        "operators ask for it. Where a gradient needs less than the table says (a factor that is not trained, a "
        "constant), less is kept. What goes *through a codec* is where a lossy codec saves memory (docs/codecs.md); "
        "everything else is exact.",
        "",
        "| operator | its backward pass keeps | runs in the torch engine |",
        "|---|---|---|",
        *(f"| {op} | {rule.doc} | {runs_in_torch(op)} |" for op, rule in sorted(RULES.items())),
        "",
        "`Linear` is this project's own: a product with a weight of two axes over inputs of three or more. It is "
        "written out as Flatten, Gemm and Reshape, which both engines run. `Gelu` (by erf or by tanh) and `Swish` "
        "(SiLU) are recognised in whatever operators a model writes them, are one operator for the backward pass, and "
        "are written out again too.",
        "",
        "## The torch engine alone",
        "",
        f"The torch engine runs {len(OPERATORS)} operators. These have no backward rule, so a model may have them in "
        "its frozen part only (Constant and Dropout vanish at export):",
        "",
        f"{', '.join(sorted(set(OPERATORS) - set(RULES)))}.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(markdown())
