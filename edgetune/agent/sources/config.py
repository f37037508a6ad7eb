"""The settings of where samples come from, and in which order and form they are trained. Knows nothing of how."""

from __future__ import annotations

import math
from dataclasses import dataclass

from edgetune.errors import choices
from edgetune.units import MIB

KINDS = "a folder, FILE.npz, FILE.tar, a pattern such as 'shards/*.tar', module:function, file.py:function, or camera:0"
"""What --data may be, for messages and help."""
AUGMENTATIONS = ("crop", "flip", "colour")


@dataclass(frozen=True)
class IntakeConfig:
    """Settings of the intake.

    Attributes:
        window: shuffle within blocks of so many arrivals, each used when complete; none = within all that is there.
        augment: what is done at random to samples that are trained, of crop, flip and colour.
        spool_bytes: room on the disk for the samples of a stream, and as much for those of a compressed .npz archive.
        max_pending: a stream is not read further while so many samples wait to be trained.
        labeller: module:function or file.py:function that returns the label of a camera's picture, or None for none.
        camera_interval_s: seconds between two pictures of a camera; 0 = every picture.
    """

    window: int | None = None
    augment: tuple[str, ...] = ()
    spool_bytes: int = 256 * MIB
    max_pending: int = 1024
    labeller: str | None = None
    camera_interval_s: float = 1.0

    def check(self) -> list[str]:
        """Return what is wrong with the settings, a sentence each."""
        wrong = []
        if self.window is not None and self.window < 1:
            wrong.append(f"intake.window is {self.window}; it must be at least 1")
        for name in self.augment:
            if name not in AUGMENTATIONS:
                wrong.append(f"intake.augment names '{name}'; choose of: {choices(AUGMENTATIONS)}")
        if self.spool_bytes < MIB:
            wrong.append(f"intake.spool_bytes is {self.spool_bytes}; it must be at least 1MiB")
        if self.max_pending < 1:
            wrong.append(f"intake.max_pending is {self.max_pending}; it must be at least 1")
        if self.window is not None and self.window > self.max_pending:
            wrong.append(
                f"intake.window is {self.window}, more than the {self.max_pending} samples that may wait "
                "(intake.max_pending): a stream would stop before the window is full; raise one or lower the other"
            )
        if not 0 <= self.camera_interval_s < math.inf:
            wrong.append(f"intake.camera_interval_s is {self.camera_interval_s}; it must not be negative")
        return wrong
