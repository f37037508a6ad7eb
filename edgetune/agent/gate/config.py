"""The settings of the gate. Knows nothing of how it decides."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class GateConfig:
    """Settings of the gate.

    Attributes:
        automatic: promote what passes; false = only when told to (edgetune promote).
        every: steps between two evaluations; none = at each checkpoint.
        most_heldout: held-out samples that an evaluation looks at, at most.
        tolerance: by how much a candidate's accuracy may lie below that of the promoted model, in [0, 1].
        class_tolerance: the same for the accuracy of each class, rounded up to whole samples.
        least_heldout: while there are fewer held-out samples, nothing is promoted in the place of the first model.
        keep: promoted models that are kept on the disk, for a rollback.
    """

    automatic: bool = True
    every: int | None = None
    most_heldout: int = 1024
    tolerance: float = 0.0
    class_tolerance: float = 0.05
    least_heldout: int = 20
    keep: int = 3

    def check(self) -> list[str]:
        """Return what is wrong with the settings, a sentence each."""
        wrong = []
        for name, value, least in (
            ("every", self.every, 1),
            ("most_heldout", self.most_heldout, 1),
            ("least_heldout", self.least_heldout, 0),
            ("keep", self.keep, 2),
        ):
            if value is not None and value < least:
                wrong.append(f"gate.{name} is {value}; it must be at least {least}")
        for name, share in (("tolerance", self.tolerance), ("class_tolerance", self.class_tolerance)):
            if not 0 <= share <= 1:
                wrong.append(f"gate.{name} is {share}; it must lie in [0, 1]")
        return wrong
