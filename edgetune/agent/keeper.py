"""Keeps a run's progress: ledger marks, calibration and checkpoint, in the one order that survives a crash anywhere.

1. The ledger's marks are committed. 2. The calibration is written, if new. 3. The checkpoint appears by a rename: from
this instant the steps up to it are done. A crash before 3 leaves marks later than the newest checkpoint; the next start
takes them back. Knows files and the ledger; nothing of training.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from edgetune.agent import calibration as calibrations
from edgetune.agent import checkpoint as checkpoints
from edgetune.agent.checkpoint import Checkpoint
from edgetune.agent.journal import Journal
from edgetune.agent.ledger import Ledger
from edgetune.bundle import Array
from edgetune.errors import StateError, StorageError
from edgetune.planning.spectra import Calibration


class Keeper:
    """Saves to and restores from the state directory ``path``. ``saved_step`` is that of the newest checkpoint."""

    def __init__(self, path: Path, ledger: Ledger, journal: Journal) -> None:
        self.path, self.ledger, self.journal = path, ledger, journal
        self.saved_step: int | None = None
        self._oldest_step = -1
        self._calibration: tuple[str, Calibration] | None = None
        self._calibration_saved = True

    @property
    def calibration(self) -> Calibration | None:
        """The calibration in force."""
        return None if self._calibration is None else self._calibration[1]

    def set_calibration(self, step: int, calibration: Calibration | None) -> None:
        """Put a new calibration, made after ``step`` steps, in force; the next save writes it."""
        self._calibration = None if calibration is None else (calibrations.file_name(step), calibration)
        self._calibration_saved = calibration is None

    def save(self, step: int, tensors: Callable[[], Mapping[str, Array]], position: Mapping[str, Any]) -> bool:
        """Make everything up to ``step`` permanent; return whether the disk let it happen (else the journal says so).

        Args:
            tensors: called for the session's state. position: JSON data that goes with it.
        """
        started = time.perf_counter()
        try:
            self.ledger.flush(prune_through_step=self._oldest_step)
            name = None
            if self._calibration is not None:
                name = self._calibration[0]
                if not self._calibration_saved:
                    self._calibration[1].save(self.path / name)
                    self._calibration_saved = True
            written = checkpoints.write(self.path, step, tensors(), {**position, "calibration": name})
            self.saved_step = step  # it is on the disk, whatever becomes of the tidying
            self._oldest_step = checkpoints.prune(self.path)
            kept = [checkpoints.read_position(path) for _, path in checkpoints.listed(self.path)]
            calibrations.prune(self.path, kept)
        except StorageError as error:
            self.journal.storage_error(error)
            return False
        except OSError as error:  # deleting old files failed: no harm to the new one
            self.journal.storage_error(StorageError(f"cannot tidy {self.path}: {error.strerror or error}"))
            return False
        except StateError as error:  # an older checkpoint is damaged; the new one is not
            self.journal.event("tidy_failed", str(error), step=step)
        self.journal.storage_back()
        seconds = {"checkpoint": round(time.perf_counter() - started, 6)}
        self.journal.event("checkpoint", step=step, file=written.name, bytes=written.stat().st_size, seconds=seconds)
        return True

    def restore(self) -> Checkpoint | None:
        """Return the newest intact checkpoint (None: there is none), with the ledger rolled back to its step.

        Raises:
            StateError: no checkpoint is intact, or the calibration that it names is gone or damaged.
        """
        found = checkpoints.load_newest(self.path, self._damaged)
        step = 0 if found is None else found.step
        marks = self.ledger.rollback(step)
        self.saved_step = None if found is None else step
        self._oldest_step = min((number for number, _ in checkpoints.listed(self.path)), default=-1)
        self._calibration, self._calibration_saved = None, True
        if found is not None and found.position.get("calibration"):
            name = str(found.position["calibration"])
            self._calibration = (name, Calibration.load(self.path / name))
        if found is not None:
            self.journal.event("restored", f"resumed at step {step}", step=step, marks_taken_back=marks)
        return found

    def newest(self) -> Checkpoint | None:
        """Return the newest intact checkpoint, whatever has happened since; None: there is none."""
        return checkpoints.load_newest(self.path, self._damaged)

    def _damaged(self, path: Path) -> None:
        self.journal.event("damaged", f"{path.name} is damaged; the checkpoint before it is used", file=path.name)
        try:
            checkpoints.set_aside(path)
        except StorageError as error:
            self.journal.storage_error(error)
