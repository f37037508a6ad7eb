"""What the literature on continual learning measures. Pure: a matrix of accuracies in, numbers out.

``R[i][j]`` is the accuracy on task j, 0..1, after the tasks 0..i were learned, one after the other; None where it was
not measured. Terms that need an unknown entry are left out of their mean, and a mean without terms is None.

Average accuracy, backward and forward transfer: Lopez-Paz and Ranzato, "Gradient Episodic Memory for Continual
Learning", NeurIPS 2017, eq. 2-4. Forgetting: Chaudhry et al., "Riemannian Walk for Incremental Learning", ECCV 2018,
eq. 3-4.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeAlias

Matrix: TypeAlias = "Sequence[Sequence[float | None]]"


def average_accuracy(matrix: Matrix) -> float | None:
    """Return the mean accuracy over all tasks after the last one was learned: 1/T Σ_j R[T-1][j]."""
    return _mean(matrix[-1]) if matrix else None


def forgetting(matrix: Matrix) -> float | None:
    """Return by how much the tasks before the last have fallen from their best: the mean over j < T-1 of
    max_{l < T-1} R[l][j] - R[T-1][j]. It is negative where they have all become better still."""
    if not matrix:
        return None
    falls = []
    for task, now in enumerate(matrix[-1][:-1]):
        known = [found for row in matrix[:-1] if (found := row[task]) is not None]
        falls.append(_minus(max(known, default=None), now))
    return _mean(falls)


def backward_transfer(matrix: Matrix) -> float | None:
    """Return what learning later tasks did to earlier ones: the mean over j < T-1 of R[T-1][j] - R[j][j]."""
    if not matrix:
        return None
    return _mean(_minus(matrix[-1][task], matrix[task][task]) for task in range(len(matrix) - 1))


def forward_transfer(matrix: Matrix, before: Sequence[float | None]) -> float | None:
    """Return what earlier tasks did for those to come: the mean over j > 0 of R[j-1][j] - before[j].

    Args:
        before: the accuracy on each task before anything was learned.
    """
    return _mean(_minus(matrix[task - 1][task], before[task]) for task in range(1, len(matrix)))


def _minus(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
