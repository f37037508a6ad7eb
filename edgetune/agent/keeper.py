"""Keeps a run's progress: ledger marks, calibration and checkpoint, in the one order that survives a crash anywhere.

1. The replay buffer's new files are synced, and the ledger's marks committed. 2. The calibration is written, if new. 3.
The checkpoint appears by a rename: from
this instant the steps up to it are done. A crash before 3 leaves marks later than the newest checkpoint; the next start
takes them back. At the start both kept checkpoints are verified; one that cannot be used is named and set aside, as
long as another can. Knows files and the ledger; nothing of training.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from edgetune.agent import calibration as calibrations
from edgetune.agent import checkpoint as checkpoints
from edgetune.agent.checkpoint import Checkpoint
from edgetune.agent.journal import Journal
from edgetune.agent.ledger import Ledger
from edgetune.agent.replay.buffer import Replay
from edgetune.bundle import Array
from edgetune.errors import StateError, StorageError
from edgetune.planning.spectra import Calibration


class Keeper:
    """Saves to and restores from the state directory ``path``.

    ``saved_step`` is that of the newest checkpoint. ``foreign``: the one that was restored belongs to the bundle
    before; its step and the replay buffer count, its weights do not.
    """

    def __init__(self, path: Path, ledger: Ledger, journal: Journal, replay: Replay, bundle: str) -> None:
        """Keep the state of the bundle whose digest is ``bundle``."""
        self.path, self.ledger, self.journal, self.replay, self.bundle = path, ledger, journal, replay, bundle
        self.foreign = False
        self.saved_step: int | None = None
        self._oldest_step = -1
        self._calibration: Calibration | None = None
        self._calibration_step = 0
        self._calibration_name: str | None = None  # of its file; None: it is not on the disk yet

    @property
    def oldest_step(self) -> int:
        """The step of the oldest checkpoint that is kept; -1: there is none."""
        return self._oldest_step

    @property
    def calibration(self) -> Calibration | None:
        """The calibration in force."""
        return self._calibration

    def set_calibration(self, step: int, calibration: Calibration | None) -> None:
        """Put a new calibration, made after ``step`` steps, in force; the next save writes it."""
        self._calibration, self._calibration_step, self._calibration_name = calibration, step, None

    def save(self, step: int, tensors: Callable[[], Mapping[str, Array]], position: Mapping[str, Any]) -> bool:
        """Make everything up to ``step`` permanent; return whether the disk let it happen (else the journal says so).

        Args:
            tensors: called for the session's state. position: JSON data that goes with it.
        """
        started = time.perf_counter()
        try:
            self.replay.sync()
            self.ledger.flush(prune_through_step=self._oldest_step)
            if self._calibration is not None and self._calibration_name is None:
                self._calibration_name = calibrations.save(self.path, self._calibration_step, self._calibration)
            told = {**position, "calibration": self._calibration_name, "replay": self.replay.to_plain()}
            written = checkpoints.write(self.path, step, tensors(), told, self.replay.arrays())
            self.saved_step = step  # it is on the disk, whatever becomes of the tidying
            self._oldest_step = checkpoints.prune(self.path, written)
            kept = [checkpoints.read_position(path) for _, path in checkpoints.listed(self.path)]
            calibrations.prune(self.path, kept)
            self.replay.tidy(self._oldest_step)
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

    def begin(self) -> None:
        """Verify every checkpoint that is kept, before the first :meth:`restore`; name and set aside what cannot be
        used, and delete what was left unfinished.

        Raises:
            StateError: there are checkpoints, but none can be used: nothing is set aside, so that nothing is lost.
        """
        refused = {path: reason for _, path in checkpoints.listed(self.path) if (reason := self._problem_of(path))}
        if refused and len(refused) == len(checkpoints.listed(self.path)):
            raise checkpoints.none_intact(self.path, refused)
        for path, reason in refused.items():
            self._set_aside(path, reason)
        with suppress(OSError):  # a disk that refuses is told of when something is to be written
            checkpoints.remove_unfinished(self.path)

    def restore(self) -> Checkpoint | None:
        """Return the newest intact checkpoint (None: there is none), with the ledger rolled back to its step.

        Raises:
            StateError: no checkpoint is intact, or there is none although the ledger knows of trained samples.
        """
        found = self.newest()
        step = 0 if found is None else found.step
        marks = self.ledger.rollback(step)
        if found is None and (trained := self.ledger.trained()):
            raise StateError(
                f"{self.path} has no checkpoint, but its ledger says that {trained} samples were trained: restore the "
                "checkpoints from a copy, or move the directory away to start anew"
            )
        self.saved_step = None if found is None else step
        self._oldest_step = min((number for number, _ in checkpoints.listed(self.path)), default=-1)
        others = (checkpoints.load(path) for _, path in checkpoints.listed(self.path) if found and path != found.path)
        self.replay.restore(found, others)
        self._calibration = self._calibration_name = None
        self.foreign = found is not None and found.position.get("bundle", self.bundle) != self.bundle
        if self.foreign:
            self.saved_step = None
            text = f"the bundle was replaced: its weights go on at step {step}"
            self.journal.event("bundle_replaced", text, step=step, bundle=self.bundle)
        elif found is not None and found.position.get("calibration"):
            self._calibration_name = str(found.position["calibration"])
            self._calibration = calibrations.load(self.path, self._calibration_name)
        if found is not None and not self.foreign:
            self.journal.event("restored", f"resumed at step {step}", step=step, marks_taken_back=marks)
        return found

    def newest(self) -> Checkpoint | None:
        """Return the newest intact checkpoint, whatever has happened since; None: there is none."""
        return checkpoints.load_newest(
            self.path, lambda path: self._set_aside(path, checkpoints.problem_of(path) or "")
        )

    def _problem_of(self, path: Path) -> str | None:
        """Return why the checkpoint ``path``, with the calibration that it names, cannot be used; None: it can."""
        if reason := checkpoints.problem_of(path):
            return reason
        name = checkpoints.read_position(path).get("calibration")
        try:
            if name:
                calibrations.verify(self.path, str(name))
        except StateError as error:
            return f"its calibration: {error}"
        return None

    def _set_aside(self, path: Path, reason: str) -> None:
        self.journal.event(
            "damaged", f"{path.name} cannot be used, another one is: {reason}", file=path.name, reason=reason
        )
        try:
            checkpoints.set_aside(path)
        except StorageError as error:
            self.journal.storage_error(error)
