"""The options of ``plan`` and ``run`` that pin a knob of the plan, and what a plan says of its knobs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from edgetune.planning.plan import Plan

MicroBatch = Annotated[
    int | None, typer.Option("--micro-batch", help="Fix the samples per run of the trunk (default: chosen).")
]
TailMicroBatch = Annotated[
    int | None,
    typer.Option(
        "--tail-micro-batch", help="Fix the samples per run of the train graph; the gradient is of the whole batch."
    ),
]
Trained = Annotated[
    int | None, typer.Option("--trained", help="Train only the last TRAINED of the exported layers, and the head.")
]
Cache = Annotated[
    str | None, typer.Option("--cache", help="Keep features from pass to pass in so much memory, such as 64MiB.")
]
Memory = Annotated[
    str | None,
    typer.Option(
        "--memory", help="lean: the least. fast: more memory, and a faster step. auto (default): fast where it fits."
    ),
]


def lines(plan: Plan, layers: int) -> list[str]:
    """Return the knobs of ``plan`` in words, and why: ``layers`` is how many were exported before the head."""
    from edgetune.planning.plan import MOST_SAMPLES_PER_RUN
    from edgetune.units import format_bytes

    pieces = "whole" if plan.tail_micro_batch == plan.batch else f"in pieces of {plan.tail_micro_batch}"
    cache = format_bytes(plan.cache_bytes) if plan.cache_bytes else "none"
    knobs = (
        f"knobs: micro-batch {plan.micro_batch}; batch of {plan.batch} trained {pieces}; {plan.trained} of {layers} "
        f"layers trained; feature cache {cache}; memory {plan.memory}"
    )
    reasons = list(plan.reasons)
    if plan.budget_bytes is not None or plan.activation_budget_bytes is not None:
        if plan.epsilon is not None and plan.epsilon < 1:
            reasons.append(f"ε is {plan.epsilon:.4f}: a larger one does not fit, unless it was given")
        if plan.micro_batch < min(MOST_SAMPLES_PER_RUN, plan.tail_micro_batch):
            reasons.append(f"the trunk runs on {plan.micro_batch} at a time: more do not fit, unless they were given")
    return [knobs, *(f"why: {reason}" for reason in reasons)]
