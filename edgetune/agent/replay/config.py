"""The settings of replay. Knows nothing of how it is done."""

from __future__ import annotations

from dataclasses import dataclass

from edgetune.errors import choices

KINDS = ("none", "raw", "features")
PRECISIONS = ("float16", "int8")
CHOICES = ("balanced", "reservoir")


@dataclass(frozen=True)
class ReplayConfig:
    """Settings of replay.

    Attributes:
        kind: what is kept of samples that were trained: none; raw, their files; or features, of the trunk.
        limit_bytes: on the disk, at most.
        ratio: the share of a batch that is replayed, as far as there is enough.
        precision: of features: float16, or int8 with a scale per channel.
        choice: of samples that are kept: balanced among the classes, or reservoir, each with the same chance.
    """

    kind: str = "none"
    limit_bytes: int = 64 * 2**20
    ratio: float = 0.5
    precision: str = "float16"
    choice: str = "balanced"

    def check(self) -> list[str]:
        """Return what is wrong with the settings, a sentence each."""
        wrong = []
        for name, value, valid in (
            ("kind", self.kind, KINDS),
            ("precision", self.precision, PRECISIONS),
            ("choice", self.choice, CHOICES),
        ):
            if value not in valid:
                wrong.append(f"replay.{name} is '{value}'; choose one of: {choices(valid)}")
        if not 0 <= self.ratio < 1:
            wrong.append(f"replay.ratio is {self.ratio}; it must lie in [0, 1)")
        if self.limit_bytes < 0:
            wrong.append(f"replay.limit_bytes is {self.limit_bytes}; it must not be negative")
        return wrong
