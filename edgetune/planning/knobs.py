"""The knobs of a plan besides what each saved tensor is kept as: what they may be set to, and for which bundle.

This module may know the manifest; it must not know budgets, candidates or engines.
"""

from __future__ import annotations

from edgetune.bundle import TRACED, Manifest
from edgetune.errors import UsageError

ACCUMULATE = "accumulate"
"""The graph by which the gradients of the pieces of a batch become one."""


def layers_before_head(manifest: Manifest) -> int:
    """Return how many trained weight layers there are before the head."""
    return sum(layer.role != "head" for layer in manifest.layers)


def splits(manifest: Manifest) -> bool:
    """Return whether a step may be made in pieces of its batch, with the same gradient as from the whole."""
    return ACCUMULATE in manifest.graphs


def check_splits(manifest: Manifest) -> None:
    """Raise UsageError, with the reason, unless a step may be made in pieces of its batch."""
    if splits(manifest):
        return
    if manifest.buffers:
        reason = "its trained batch-norm takes its statistics from the whole batch; export with --batch-norm frozen"
    elif manifest.loss.kind == TRACED:
        reason = "its own loss is neither a mean nor a sum over samples, or cannot be seen to be; name a loss instead"
    else:
        reason = f"it has no graph '{ACCUMULATE}'; export it again"
    raise UsageError(f"this bundle cannot be trained in pieces of a batch: {reason}; or leave out --tail-micro-batch")


def check_samples(name: str, samples: int | None, batch: int) -> None:
    """Raise UsageError unless ``samples`` per run (None: not given) are 1 to ``batch``; ``name`` is the option's."""
    if samples is not None and not 1 <= samples <= batch:
        raise UsageError(f"{name} is {samples} samples; expected 1 to {batch}, the batch")


def check_trained(manifest: Manifest, trained: int | None) -> None:
    """Raise UsageError unless so many weight layers (None: not given) can be trained."""
    most = layers_before_head(manifest)
    least = 0 if any(layer.role == "head" for layer in manifest.layers) else 1
    if trained is None or trained == most:
        return
    if not least <= trained <= most:
        raise UsageError(
            f"--trained {trained}: expected {least} to {most}: the bundle was exported with {most} trained layers "
            "before its head"
        )
