"""The settings of where samples come from, and in which order and form they are trained. Knows nothing of how."""

from __future__ import annotations

from dataclasses import dataclass

from edgetune.errors import choices
from edgetune.units import MIB

AUGMENTATIONS = ("crop", "flip", "colour")


@dataclass(frozen=True)
class IntakeConfig:
    """Settings of the intake.

    Attributes:
        window: shuffle within so many samples that arrive one after the other; none = within all that is there.
        augment: what is done at random to samples that are trained, of crop, flip and colour.
        spool_bytes: the samples of a stream, which cannot be read twice, are kept on the disk in so much room.
        max_pending: a stream is not read further while so many samples wait to be trained.
        labeller: module:function or file.py:function that returns the label of a camera's picture, or None for none.
        camera_interval_s: seconds between two pictures of a camera.
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
        if self.camera_interval_s < 0:
            wrong.append(f"intake.camera_interval_s is {self.camera_interval_s}; it must not be negative")
        return wrong
