"""The knobs of a plan besides what each saved tensor is kept as: what they may be set to, and for which bundle.

This module may know the manifest; it must not know budgets, candidates or engines.
"""

from __future__ import annotations

from edgetune.bundle import TRACED, Manifest
from edgetune.errors import UsageError

ACCUMULATE = "accumulate"
"""The graph by which the gradients of the pieces of a batch become one."""
_PARTS = 8


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


def pieces_of(manifest: Manifest, batch: int, pinned: int | None = None) -> list[int]:
    """Return the pieces of a batch of which a planner chooses, descending: the whole, and the powers of two below it
    where the bundle allows pieces; or the one that is ``pinned``."""
    if pinned is not None:
        return [pinned]
    powers = [1 << k for k in reversed(range(batch.bit_length())) if 1 << k < batch]
    return [batch, *(powers if splits(manifest) else [])]


def trained_of(manifest: Manifest, pinned: int | None = None) -> list[int]:
    """Return how many layers a planner may train, descending: every number up to eight, and eighths of more; or the one
    that is ``pinned``."""
    most = layers_before_head(manifest)
    if pinned is not None or not manifest.graphs["train"].wires:
        return [most if pinned is None else pinned]
    parts = range(min(most, _PARTS) + 1)
    counts = sorted({round(most * part / len(parts[1:])) if most else 0 for part in parts}, reverse=True)
    # All of them always: a bundle may train biases and scales alone, and no layer.
    return [count for count in counts if count == most or count >= _least_trained(manifest)]


def _least_trained(manifest: Manifest) -> int:
    return 0 if any(layer.role == "head" for layer in manifest.layers) else 1


def check_samples(name: str, samples: int | None, batch: int) -> None:
    """Raise UsageError unless ``samples`` per run (None: not given) are 1 to ``batch``; ``name`` is the option's."""
    if samples is not None and not 1 <= samples <= batch:
        raise UsageError(f"{name} is {samples} samples; expected 1 to {batch}, the batch")


def check_trained(manifest: Manifest, trained: int | None) -> None:
    """Raise UsageError unless so many weight layers (None: not given) can be trained."""
    most = layers_before_head(manifest)
    least = _least_trained(manifest)
    if trained is None or trained == most:
        return
    if not least <= trained <= most:
        raise UsageError(
            f"--trained {trained}: expected {least} to {most}: the bundle was exported with {most} trained layers "
            "before its head"
        )
