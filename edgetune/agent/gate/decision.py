"""May a candidate take the place of the promoted model? Pure: verdicts in, a decision with its reason out.

A verdict is the class that a model gave to a held-out sample (-1: its output was not finite). Both models are compared
on the same samples: those on which both have a verdict.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from edgetune.agent.gate.config import GateConfig

_ROUNDING = 1e-9


@dataclass(frozen=True)
class Score:
    """How many of ``samples`` a model got right; ``classes`` holds the same two numbers by class."""

    right: int = 0
    samples: int = 0
    classes: Mapping[int, tuple[int, int]] = field(default_factory=dict)

    @property
    def accuracy(self) -> float | None:
        """The share that is right, 0..1; None without samples."""
        return self.right / self.samples if self.samples else None

    def plain(self, names: Sequence[str]) -> dict[str, Any]:
        """Return the score as JSON data: ``accuracy``, ``samples``, ``classes`` (name: right, samples)."""
        classes = {names[label]: list(found) for label, found in sorted(self.classes.items())}
        return {"accuracy": self.accuracy, "samples": self.samples, "classes": classes}


def tally(verdicts: Mapping[str, int], labels: Mapping[str, int]) -> Score:
    """Return the score of ``verdicts`` (class by content) on the samples of ``labels`` that have one."""
    right, samples, classes = 0, 0, dict[int, tuple[int, int]]()
    for content, label in labels.items():
        if content in verdicts:
            hit = int(verdicts[content] == label)
            hits, of = classes.get(label, (0, 0))
            classes[label] = (hits + hit, of + 1)
            right, samples = right + hit, samples + 1
    return Score(right, samples, classes)


@dataclass(frozen=True)
class Decision:
    """Whether the candidate ``passes``, and why (not); the scores of both on the samples that they have in common."""

    passes: bool
    reason: str
    candidate: Score
    promoted: Score


def decide(
    config: GateConfig,
    names: Sequence[str],
    labels: Mapping[str, int],
    candidate: Mapping[str, int],
    promoted: Mapping[str, int],
) -> Decision:
    """Return the decision.

    Args:
        names: of the classes. labels: class of every held-out sample by its content.
        candidate, promoted: the verdicts of both models.
    """
    common = {content: label for content, label in labels.items() if content in candidate and content in promoted}
    new, old = tally(candidate, common), tally(promoted, common)

    def told(passes: bool, reason: str) -> Decision:
        return Decision(passes, reason, new, old)

    if new.accuracy is None or old.accuracy is None:
        return told(False, "no held-out sample on which both models were judged")
    if new.samples < config.least_heldout:
        few = f"{new.samples} held-out samples are too few to judge by; gate.least_heldout is {config.least_heldout}"
        return told(False, few)
    both = f"held-out accuracy {new.accuracy:.2%}, promoted model {old.accuracy:.2%}, on {new.samples} samples"
    if old.accuracy - new.accuracy > config.tolerance + _ROUNDING:
        return told(False, f"{both}: lower by more than gate.tolerance ({config.tolerance:g})")
    worse = []
    for label, (right, of) in sorted(new.classes.items()):
        before = old.classes[label][0]
        # Whole samples: of 12, a tolerance of 0.05 would be 0.6 of one, and a single sample would decide.
        if before - right > math.ceil(config.class_tolerance * of - _ROUNDING):
            worse.append(f"{names[label]} ({right} of {of} right, before {before})")
    if worse:
        rest = f" and {len(worse) - 5} more" if len(worse) > 5 else ""
        shown = f"{', '.join(worse[:5])}{rest}"
        limit = f"gate.class_tolerance ({config.class_tolerance:g})"
        return told(False, f"{both}: classes lower by more than {limit}: {shown}")
    return told(True, both)
