"""How good a run is on each of its tasks, and was: what ``agent.continual`` makes its figures of.

A task is what the source's metadata say that a sample belongs to. Tasks count from the first sample of theirs that was
trained; the last evaluation before the next one begins is what was reached with it. Knows names and numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from edgetune.agent.continual import Matrix, average_accuracy, backward_transfer, forgetting, forward_transfer
from edgetune.agent.ledger import Sample

MOST_TASKS = 64
"""Of more tasks the first are forgotten, so that a checkpoint stays small."""


@dataclass
class Tasks:
    """The tasks of a run.

    Attributes:
        order: the tasks, in the order in which their training began.
        before: accuracy on each task before anything was trained.
        reached: by task that was the newest: the accuracy on every task at the last evaluation then.
    """

    order: list[str] = field(default_factory=list)
    before: dict[str, float] = field(default_factory=dict)
    reached: dict[str, dict[str, float]] = field(default_factory=dict)

    def trained(self, samples: Iterable[Sample]) -> None:
        """Note which tasks the samples of a step belong to."""
        for sample in samples:
            if sample.task is not None and sample.task not in self.order:
                self.order.append(sample.task)
        for gone in self.order[:-MOST_TASKS]:
            self.reached.pop(gone, None)
        del self.order[:-MOST_TASKS]

    def judged(self, found: Mapping[str, tuple[int, int]]) -> None:
        """Note an evaluation: how many of its held-out samples were right, by task."""
        accuracies = {task: right / of for task, (right, of) in found.items()}
        if self.order:
            self.reached[self.order[-1]] = accuracies
        else:
            self.before = accuracies

    def to_plain(self) -> dict[str, Any]:
        """Return it as JSON data."""
        return {"order": self.order, "before": self.before, "reached": self.reached}

    @staticmethod
    def from_plain(told: Mapping[str, Any]) -> Tasks:
        """Return what :meth:`to_plain` returned."""
        return Tasks(
            list(told["order"]), dict(told["before"]), {task: dict(row) for task, row in told["reached"].items()}
        )

    def report(self) -> dict[str, Any] | None:
        """Return the accuracy matrix and the figures, as JSON data; None where no sample names a task.

        Keys: tasks, before, matrix (R[i][j]: on task j after task i), average_accuracy, forgetting, backward_transfer,
        forward_transfer (None: not known).
        """
        if not self.order:
            return None
        matrix: Matrix = [[self.reached.get(i, {}).get(j) for j in self.order] for i in self.order]
        before = [self.before.get(task) for task in self.order]
        return {
            "tasks": self.order,
            "before": before,
            "matrix": matrix,
            "average_accuracy": average_accuracy(matrix),
            "forgetting": forgetting(matrix),
            "backward_transfer": backward_transfer(matrix),
            "forward_transfer": forward_transfer(matrix, before),
        }
