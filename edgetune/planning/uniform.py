"""One codec and one ε for all saved tensors: the largest ε that is within the limits, and what to say where none is.

This module may know candidates and calibrations; it must not know how a mixed choice is found, or engines.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from edgetune.bundle import Manifest
from edgetune.errors import BudgetError, UsageError
from edgetune.planning.candidates import Candidate, Limits, Workbench
from edgetune.planning.rates import ranked
from edgetune.planning.selection import default_selection
from edgetune.planning.spectra import COUNT, breakpoints
from edgetune.units import format_bytes


def largest_uniform(
    bench: Workbench, codec: str | None = None, epsilon: float | None = None, rate: float | None = None
) -> Candidate:
    """Return the candidate of ``codec`` with the largest ε that fits; with ``epsilon`` or ``rate``, of just that.

    Raises:
        BudgetError: it does not fit; ``least_bytes`` is the least budget that does.
        UsageError: no tensor has an option ``codec``, or none of its options counts although there is a ``rate``.
    """
    selection = default_selection(bench.manifest, codec)
    options = [spec.option(selection[spec.name]) for spec in bench.manifest.saved]
    if rate is not None and not any(mode.source == COUNT for option in options for mode in option.modes):
        raise UsageError(f"a rate is for codecs that count elements; '{codec or bench.manifest.codec}' has none")
    values: Sequence[float | None] = [None]
    if any(ranked(option) for option in options) and bench.calibration is not None and rate is None:
        values = [epsilon] if epsilon is not None else breakpoints(bench.calibration).tolist()
    chosen = last_that(lambda index: bench.uniform(codec, values[index], rate).fits(), len(values))
    if chosen is None:
        raise infeasible(bench.uniform(codec, values[0], rate), epsilon=epsilon, rate=rate)
    return bench.uniform(codec, values[chosen], rate)


def uniform_of_every_codec(bench: Workbench) -> list[Candidate]:
    """Return, for each codec of the menu that can fit, the candidate with its largest ε."""
    found = []
    for label in labels_of(bench.manifest):
        try:
            found.append(largest_uniform(bench, label))
        except BudgetError:
            continue
    return found


def labels_of(manifest: Manifest) -> list[str]:
    """Return the labels of all options, each once, in the order of the menus."""
    return list(dict.fromkeys(option.label for spec in manifest.saved for option in spec.options))


def last_that(holds: Callable[[int], bool], count: int) -> int | None:
    """Return the last index below ``count`` that ``holds``, which no index after a failing one may; None if none."""
    low, high = -1, count  # `low` holds, `high` fails; neither end is ever asked
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low if low >= 0 else None


def infeasible(least: Candidate, *, epsilon: float | None = None, rate: float | None = None) -> BudgetError:
    """Return the error for budgets that not even ``least``, at a micro-batch of 1, fits; ``epsilon``, ``rate``: as
    given."""
    limits = least.limits
    setting, lower = f"a batch of {limits.batch} samples", ""
    if least.ranks:
        given = f"epsilon = {epsilon:g}" if epsilon is not None else "" if rate is None else f"rate = {rate:g}"
        setting += f", {given} as given" if given else ", the least ranks"
        lower = "lower epsilon, " if epsilon is not None else "" if rate is None else "raise the rate, "
    return refusal(limits, least, setting, f"raise it, {lower}")


def refusal(limits: Limits, least: Candidate, setting: str, advice: str) -> BudgetError:
    """Return the error for budgets that not even ``least`` fits; ``setting`` says what that is."""
    messages, least_bytes = [], 0
    activation, budget = limits.activation_budget_bytes, limits.budget_bytes
    if activation is not None and least.saved_bytes > activation:
        least_bytes = least.saved_bytes
        messages.append(
            f"the activation budget of {_exact(activation)} is too small: the least is {_exact(least_bytes)}, with "
            f"{setting}"
        )
    if budget is not None and least.needed_bytes() > budget:
        least_bytes, prediction = least.needed_bytes(), least.cost()
        largest = sorted(prediction.ledger.items(), key=lambda line: -line[1])[:3]
        messages.append(
            f"the budget of {_exact(budget)} is too small: the least is {_exact(least_bytes)}, with {setting} "
            f"and a micro-batch of 1; its largest parts are "
            f"{', '.join(f'{name} {format_bytes(size)}' for name, size in largest)}; "
            f"the peak is at {prediction.bottleneck}"
        )
    advice += "choose a smaller batch, or export with fewer trained layers"
    return BudgetError("; ".join(reversed(messages)) + f"; {advice}", least_bytes=least_bytes)


def _exact(size_bytes: int) -> str:
    return f"{format_bytes(size_bytes)} ({size_bytes} bytes)"
