"""From the source to the ledger: every entry is read once, checked, and becomes a sample or a quarantined entry.

Knows the source, the decoder and the ledger; nothing of training.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeAlias

from edgetune.agent.images import Decoder
from edgetune.agent.ledger import Ledger, Sample
from edgetune.agent.sources import Found, Source
from edgetune.errors import DataError

_ROWS_PER_COMMIT = 256
_Write: TypeAlias = "tuple[str, Callable[[], Sample | None]]"
"""The name of an entry, and what records it."""


def _known() -> None:
    """Stand for the write of what needs none."""


def _finished() -> None:
    """The same, for what was trained or quarantined before."""


@dataclass
class Taken:
    """What one look at the folder brought: new rows of the ledger, and how many files are not settled yet."""

    accepted: list[Sample] = field(default_factory=list)
    quarantined: list[Sample] = field(default_factory=list)
    unsettled: int = 0


@dataclass
class _Unsettled:
    stat: tuple[int, int]
    since: float


class Intake:
    """Looks at the folder and records what is new in it.

    A file that cannot be decoded may still be written: it is tried again at every look until it has not changed for
    ``settle_seconds`` (by its own modification time, or since it was first seen so), then quarantined.
    """

    def __init__(
        self, source: Source, decoder: Decoder, ledger: Ledger, *, holdout: int, settle_seconds: float
    ) -> None:
        self.source, self.decoder, self.ledger = source, decoder, ledger
        self.holdout = holdout
        self.settle_seconds = settle_seconds
        self._unsettled: dict[str, _Unsettled] = {}

    def look(self, stopping: Callable[[], bool]) -> Taken:
        """Record everything new; stop early (between files) when ``stopping()``.

        Raises:
            StorageError: the ledger could not be written; what was not recorded is found again at the next look.
        """
        taken, ready = Taken(), list[_Write]()
        before, self._unsettled = self._unsettled, {}
        for found in self.source.scan():
            if stopping():
                self._unsettled = {**before, **self._unsettled}
                break
            step = self._examine(found, before.get(found.path))
            if step in (_known, _finished):
                self.source.recorded([found.path], finished=step is _finished)
            elif step is not None:
                ready.append((found.path, step))
            if len(ready) >= _ROWS_PER_COMMIT:
                self._commit(ready, taken)
        self._commit(ready, taken)
        taken.unsettled = len(self._unsettled)
        return taken

    def look_until_settled(self, stopping: Callable[[], bool], sleep: Callable[[float], None] = time.sleep) -> Taken:
        """Look until every file is settled one way or the other: what ``--once`` does."""
        total = self.look(stopping)
        while total.unsettled and not stopping():
            sleep(max(0.05, self.settle_seconds / 5))
            more = self.look(stopping)
            total = Taken(total.accepted + more.accepted, total.quarantined + more.quarantined, more.unsettled)
        return total

    def _commit(self, ready: list[_Write], taken: Taken) -> None:
        if not ready:
            return
        rows = []
        with self.ledger.transaction():
            for _, record in ready:
                rows.append(record())
        for (path, _), row in zip(ready, rows, strict=True):
            self.source.recorded([path], finished=row is not None and row.status == "quarantined")
            if row is not None:
                (taken.quarantined if row.status == "quarantined" else taken.accepted).append(row)
        ready.clear()

    def _examine(self, found: Found, before: _Unsettled | None) -> Callable[[], Sample | None] | None:
        """Return the write that records ``found``; ``_known`` or ``_finished`` where there is
        nothing to record, None: not yet."""
        path, known = found.path, self.ledger.by_path(found.path)
        nothing = _known if known is None or known.status in ("new", "heldout") else _finished
        if found.problem is not None:
            if known is not None and (known.status != "quarantined" or known.reason == found.problem):
                return nothing
            return self._refused(found, self._stat_or_nothing(path), found.problem, before, lasting=not found.mending)
        assert found.label is not None
        label, task = found.label, found.task
        stat = (-1, -1)
        try:
            stat = self.source.stat(path)
            if known is not None and (known.size, known.mtime_ns) == stat:
                # A quarantined file is looked at again if its label changed, or if it could not be reached before (the
                # folder may have been unmounted); a damaged one stays damaged.
                absent = (known.reason or "").startswith(("missing", "cannot be read"))
                if known.status != "quarantined" or (known.label == label and not absent):
                    return nothing
            data = self.source.read(path)
            sha256 = hashlib.sha256(data).hexdigest()
            if known is not None and known.sha256 == sha256 and known.status != "quarantined":
                row_id = known.id
                return lambda: self.ledger.touch(row_id, stat)
            self.decoder.decode(data)
        except DataError as error:
            reason = str(error)
            if known is not None and known.status == "quarantined" and known.reason == reason and stat == (-1, -1):
                return nothing
            lasting = found.final or reason.startswith("refused")
            return self._refused(found, stat, reason, before, lasting=lasting)
        return lambda: self._record(path, sha256, stat, label, task)

    def _record(self, path: str, sha256: str, stat: tuple[int, int], label: int, task: str | None) -> Sample | None:
        # Looked up here, inside the transaction, because the original may have been recorded a moment ago.
        original = self.ledger.by_content(sha256)
        if original is None:
            return self.ledger.accept(path, sha256, stat, label, holdout=self.holdout, task=task)
        if original.path == path:  # listed twice, or back at a content that it had before
            self.ledger.touch(original.id, stat)
            return None
        reason = f"duplicate of {original.path}"
        if original.label is not None and original.label != label:
            reason += f", which is labelled {self.source.classes[original.label]}"
        return self.ledger.refuse(path, sha256, stat, label, reason)

    def _stat_or_nothing(self, path: str) -> tuple[int, int]:
        try:
            return self.source.stat(path)
        except DataError:
            return 0, 0

    def _refused(
        self, found: Found, stat: tuple[int, int], reason: str, before: _Unsettled | None, *, lasting: bool
    ) -> Callable[[], Sample | None] | None:
        """Return the write that quarantines ``found``; None if it may still be written, and has not settled.

        Args:
            before: what was known at the last look of an entry that had not settled.
        """
        path = found.path
        if not lasting:
            now = time.monotonic()
            seen = before if before is not None and before.stat == stat else _Unsettled(stat, now)
            age_seconds = time.time() - stat[1] / 1e9 if stat[1] > 0 else 0.0
            if age_seconds < self.settle_seconds and now - seen.since < self.settle_seconds:
                self._unsettled[path] = seen
                return None
        return lambda: self.ledger.refuse(path, "", stat, found.label, reason)
