"""The ledger: what became of every sample. SQLite in WAL mode with synchronous=FULL, so a commit survives power loss.

A sample is ``new`` (to be trained), ``heldout``, ``trained``, ``replayable`` (trained, and in the replay buffer) or
``quarantined`` (with a reason). What training did to samples is kept in memory and written by :meth:`Ledger.flush` just
before a checkpoint; :meth:`Ledger.rollback` takes back whatever the newest intact checkpoint does not contain. Knows
nothing of images, models or checkpoints' contents.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgetune.agent.ledger_schema import (
    COLUMNS,
    STATUSES,
    bring_up_to_date,
    columns_of,
    version_of,
)
from edgetune.agent.storage import guard
from edgetune.bundle import Array
from edgetune.errors import StateError


@dataclass(frozen=True)
class Sample:
    """One row. ``path`` is relative to the data folder; ``label`` indexes the bundle's classes (None: unknown);
    ``step`` is the last step that trained it (or in which it was quarantined); ``passes`` counts its trainings,
    ``replays`` how often it was trained again out of the replay buffer; ``task`` is what the source says it belongs to.
    ``replayed``: handed out by the replay buffer, to be read from there."""

    id: int
    path: str
    sha256: str
    size: int
    mtime_ns: int
    label: int | None
    status: str
    step: int | None
    passes: int
    reason: str | None
    replays: int = 0
    task: str | None = None
    replayed: bool = False


class Ledger:
    """The ledger in the file ``path``; created when missing. One writer at a time (the state directory's lock).

    Raises:
        StorageError: the disk refused. StateError: damaged, or of another version.
    """

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        self.path = path
        self._visits: list[tuple[int, int]] = []  # (step, sample) not yet on the disk
        self._replays: list[tuple[int, int]] = []  # (step, sample) not yet on the disk
        self._kept: dict[int, bool] = {}  # sample -> whether it is in the buffer now, where that is not yet on the disk
        self._quarantines: list[tuple[str, int | None, int]] = []  # (reason, step, sample) not yet on the disk
        self._columns = COLUMNS
        with guard(f"cannot open the ledger {path}"):
            if read_only:
                self._db = self._open_read_only(path)
                self._columns = columns_of(version_of(self._db, path))
                return
            self._db = sqlite3.connect(path, isolation_level=None)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
            self._db.execute("PRAGMA cache_size=-256")  # KiB; by default 2 MB fill up slowly and look like a leak
            bring_up_to_date(self._db, path)

    @staticmethod
    def _open_read_only(path: Path) -> sqlite3.Connection:
        # WAL needs a writable directory even to read, unless SQLite is told that nobody writes: true if nobody can.
        target = path.resolve().as_uri()
        database = sqlite3.connect(f"{target}?mode=ro", uri=True, isolation_level=None)
        try:
            database.execute("SELECT COUNT(*) FROM samples").fetchone()
        except sqlite3.OperationalError:
            database.close()
            database = sqlite3.connect(f"{target}?mode=ro&immutable=1", uri=True, isolation_level=None)
        return database

    def close(self) -> None:
        """Close the file. Marks that were not flushed are forgotten, as the checkpoint forgets their steps."""
        self._db.close()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Make the writes inside the block visible all at once, or not at all (StorageError when the disk refuses)."""
        with guard(f"cannot write the ledger {self.path}"):
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    # ---- reading -------------------------------------------------------------------------------------------------
    def by_path(self, path: str) -> Sample | None:
        """Return the latest row of the file ``path``."""
        return self._one("WHERE path = ? ORDER BY id DESC LIMIT 1", path)

    def by_content(self, sha256: str) -> Sample | None:
        """Return the first accepted (not quarantined) row with this content."""
        return self._one("WHERE sha256 = ? AND status != 'quarantined' ORDER BY id LIMIT 1", sha256)

    def find(self, sample: int) -> Sample | None:
        """Return the row ``sample``; None: it was forgotten."""
        return self._one("WHERE id = ?", sample)

    def get(self, sample: int) -> Sample:
        """Return the row ``sample``, which is there."""
        row = self.find(sample)
        if row is None:
            raise StateError(f"the ledger {self.path} has no sample {sample}: it was changed by another program")
        return row

    def last_id(self) -> int:
        """Return the number of the row that was made last (0: there is none)."""
        found = self._db.execute("SELECT MAX(id) FROM samples").fetchone()[0]
        return 0 if found is None else int(found)

    def trainable(self) -> Iterator[tuple[int, str, int]]:
        """Yield (id, sha256, passes) of every sample that may be trained, marks in memory included."""
        extra: dict[int, int] = {}
        for _, sample in self._visits:
            extra[sample] = extra.get(sample, 0) + 1
        gone = {sample for _, _, sample in self._quarantines}
        query = "SELECT id, sha256, passes FROM samples WHERE status IN ('new', 'trained', 'replayable') ORDER BY id"
        for sample, sha256, passes in self._db.execute(query):
            if sample not in gone:
                yield sample, sha256, passes + extra.get(sample, 0)

    def heldout(self) -> Iterator[tuple[int, str, int, str | None]]:
        """Yield id, sha256, label and task of every held-out sample, the oldest first."""
        gone = {sample for _, _, sample in self._quarantines}
        query = "SELECT id, sha256, label, task FROM samples WHERE status = 'heldout' ORDER BY id"
        for row in self._db.execute(query):
            if row[0] not in gone:
                yield row

    def counts(self) -> dict[str, int]:
        """Return how many samples have each status (on the disk: as of the last checkpoint)."""
        found = dict(self._db.execute("SELECT status, COUNT(*) FROM samples GROUP BY status").fetchall())
        return {status: found.get(status, 0) for status in STATUSES}

    def trained(self) -> int:
        """Return how many samples were trained, and are not quarantined."""
        count: int = self._db.execute(
            "SELECT COUNT(*) FROM samples WHERE status IN ('trained', 'replayable')"
        ).fetchone()[0]
        return count

    def finished(self, epochs: int, after: int, limit: int) -> list[tuple[int, str, bool]]:
        """Return up to ``limit`` rows with which nothing happens any more unless their source gives them
        again: (id, path, whether a newer content has the same path), the oldest first.

        Not among them: what has passes to make, what is in the replay buffer, what a rollback to a kept checkpoint may
        still change, and the newest row, whose number would be given once more.

        Args:
            epochs: passes that a sample makes. after: ids up to this one are left out.
        """
        rows = self._db.execute(
            "SELECT id, path, EXISTS (SELECT 1 FROM samples AS newer WHERE newer.path = samples.path AND "
            "newer.id > samples.id) FROM samples WHERE id > ? AND id < (SELECT MAX(id) FROM samples) AND "
            "(status IN ('quarantined', 'heldout') OR (status = 'trained' AND passes >= ?)) AND id NOT IN "
            "(SELECT sample FROM visits) AND id NOT IN (SELECT sample FROM replayed) ORDER BY id LIMIT ?",
            (after, epochs, limit),
        )
        marked = {mark[1] for mark in (*self._visits, *self._replays)} | set(self._kept)
        return [(sample, path, bool(newer)) for sample, path, newer in rows if sample not in marked]

    def forget(self, samples: Iterable[int]) -> None:
        """Delete rows for good: should their content come again, it is new."""
        with self.transaction():
            self._db.executemany("DELETE FROM samples WHERE id = ?", ((sample,) for sample in samples))

    def __len__(self) -> int:
        count: int = self._db.execute("SELECT COUNT(*) FROM samples").fetchone()[0]
        return count

    def samples(self) -> Iterator[Sample]:
        """Yield every row, oldest first."""
        for row in self._db.execute(f"SELECT {self._columns} FROM samples ORDER BY id"):
            yield Sample(*row)

    # ---- taking in (inside ``transaction``) ----------------------------------------------------------------------
    def accept(
        self, path: str, sha256: str, stat: tuple[int, int], label: int, *, holdout: int, task: str | None = None
    ) -> Sample:
        """Record a good sample: every ``holdout``-th of its class is held out (0 = none), the others are new.

        Args:
            stat: size in bytes and modification time in ns of the file. task: what the source says it belongs to.
        """
        self._db.execute(
            "INSERT INTO arrivals VALUES (?, 1) ON CONFLICT (label) DO UPDATE SET count = count + 1", (label,)
        )
        count = self._db.execute("SELECT count FROM arrivals WHERE label = ?", (label,)).fetchone()[0]
        status = "heldout" if holdout and count % holdout == 0 else "new"
        return self._put(path, sha256, stat, label, status, None, task)

    def refuse(self, path: str, sha256: str, stat: tuple[int, int], label: int | None, reason: str) -> Sample:
        """Record a file that will not be used, and why. An accepted row of the same content is left alone."""
        return self._put(path, sha256, stat, label, "quarantined", reason)

    def touch(self, sample: int, stat: tuple[int, int]) -> None:
        """Record that the file was written again with the same content."""
        self._db.execute("UPDATE samples SET size = ?, mtime_ns = ? WHERE id = ?", (*stat, sample))

    # ---- training ------------------------------------------------------------------------------------------------
    def mark_trained(self, samples: Iterable[int], step: int) -> None:
        """Note in memory that ``step`` trained ``samples``; :meth:`flush` writes it."""
        self._visits += [(step, sample) for sample in samples]

    def mark_replayed(self, samples: Iterable[int], step: int) -> None:
        """Note in memory that ``step`` trained ``samples`` once more, out of the replay buffer."""
        self._replays += [(step, sample) for sample in samples]

    def mark_kept(self, sample: int, kept: bool) -> None:
        """Note in memory that a trained sample came into the replay buffer, or left it."""
        self._kept[sample] = kept

    def quarantine(self, samples: Iterable[int], reason: str, step: int | None = None) -> None:
        """Take samples out of use at once; what the disk refuses now is written by the next flush.

        Raises:
            StorageError: the disk refused; the samples are out of use nevertheless, in memory.
        """
        self._quarantines += [(reason, step, sample) for sample in samples]
        with self.transaction():
            self._write_quarantines()
        self._quarantines.clear()

    def flush(self, *, prune_through_step: int = -1) -> None:
        """Write all marks; forget the history up to ``prune_through_step`` (older than any checkpoint kept).

        Raises:
            StorageError: the disk refused; nothing was written and all marks are still in memory.
        """
        now = time.time()
        with self.transaction():
            self._write_quarantines()
            for step, sample in self._visits:
                self._db.execute(
                    "INSERT INTO visits SELECT ?, id, step FROM samples WHERE id = ? AND status != 'quarantined'",
                    (step, sample),
                )
                self._db.execute(
                    "UPDATE samples SET status = CASE status WHEN 'replayable' THEN status ELSE 'trained' END, "
                    "step = ?, passes = passes + 1, changed_at = ? WHERE id = ? AND status != 'quarantined'",
                    (step, now, sample),
                )
            for step, sample in self._replays:
                self._db.execute("INSERT INTO replayed VALUES (?, ?)", (step, sample))
                self._db.execute("UPDATE samples SET replays = replays + 1 WHERE id = ?", (sample,))
            for sample, kept in self._kept.items():
                status, before = ("replayable", "trained") if kept else ("trained", "replayable")
                self._db.execute("UPDATE samples SET status = ? WHERE id = ? AND status = ?", (status, sample, before))
            for table in ("visits", "replayed"):
                self._db.execute(f"DELETE FROM {table} WHERE step <= ?", (prune_through_step,))
        self._forget_marks()

    @property
    def dirty(self) -> bool:
        """Whether something waits in memory for the next flush."""
        return bool(self._visits or self._replays or self._kept or self._quarantines)

    def rollback(self, step: int) -> int:
        """Take back every training mark later than ``step``; return how many there were. Quarantines stay.

        Which samples are in the replay buffer is what the checkpoint says: see :meth:`set_replayable`.
        """
        dropped = sum(1 for mark in self._visits if mark[0] > step)
        self._visits = [mark for mark in self._visits if mark[0] <= step]
        self._replays = [mark for mark in self._replays if mark[0] <= step]
        self._kept.clear()
        later = self._db.execute(
            "SELECT step, sample, previous_step FROM visits WHERE step > ? ORDER BY step DESC", (step,)
        ).fetchall()
        replayed = self._db.execute("SELECT sample FROM replayed WHERE step > ?", (step,)).fetchall()
        if later or replayed:
            with self.transaction():
                for _, sample, previous_step in later:
                    self._db.execute(
                        "UPDATE samples SET passes = passes - 1, step = ?, "
                        "status = CASE WHEN passes > 1 THEN status ELSE 'new' END "
                        "WHERE id = ? AND status IN ('trained', 'replayable')",
                        (previous_step, sample),
                    )
                self._db.executemany("UPDATE samples SET replays = replays - 1 WHERE id = ?", replayed)
                for table in ("visits", "replayed"):
                    self._db.execute(f"DELETE FROM {table} WHERE step > ?", (step,))
        return dropped + len(later)

    def set_replayable(self, samples: Iterable[int]) -> list[int]:
        """Make ``replayable`` of the trained samples those in ``samples`` and no other: what a checkpoint's buffer
        holds. Return those of ``samples`` that are no trained ones, as they were quarantined since.

        Raises:
            StorageError: the disk refused; nothing was changed.
        """
        self._kept.clear()
        wanted, there = np.unique(np.fromiter(samples, np.int64)), self._replayable()
        added, gone = np.setdiff1d(wanted, there, assume_unique=True), np.setdiff1d(there, wanted, assume_unique=True)
        if len(added) or len(gone):
            change = "UPDATE samples SET status = ? WHERE id = ? AND status = ?"
            with self.transaction():
                self._db.executemany(change, (("trained", int(sample), "replayable") for sample in gone))
                self._db.executemany(change, (("replayable", int(sample), "trained") for sample in added))
            there = self._replayable()
        others: list[int] = np.setdiff1d(wanted, there, assume_unique=True).tolist()
        return others

    def _replayable(self) -> Array:
        rows = self._db.execute("SELECT id FROM samples WHERE status = 'replayable' ORDER BY id")
        return np.fromiter((row[0] for row in rows), np.int64)

    def _forget_marks(self) -> None:
        self._visits.clear()
        self._replays.clear()
        self._kept.clear()
        self._quarantines.clear()

    def _write_quarantines(self) -> None:
        self._db.executemany(
            "UPDATE samples SET status = 'quarantined', reason = ?, step = ?, changed_at = ? WHERE id = ?",
            [(reason, step, time.time(), sample) for reason, step, sample in self._quarantines],
        )

    def _put(
        self,
        path: str,
        sha256: str,
        stat: tuple[int, int],
        label: int | None,
        status: str,
        reason: str | None,
        task: str | None = None,
    ) -> Sample:
        now = time.time()
        self._db.execute(
            "INSERT INTO samples (path, sha256, size, mtime_ns, label, status, reason, seen_at, changed_at, task) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (path, sha256) DO UPDATE SET size = excluded.size, "
            "mtime_ns = excluded.mtime_ns, label = excluded.label, status = excluded.status, reason = excluded.reason, "
            "changed_at = excluded.changed_at, task = excluded.task WHERE samples.status = 'quarantined'",
            (path, sha256, *stat, label, status, reason, now, now, task),
        )
        row = self._one("WHERE path = ? AND sha256 = ?", path, sha256)
        assert row is not None
        return row

    def _one(self, where: str, *values: object) -> Sample | None:
        row = self._db.execute(f"SELECT {self._columns} FROM samples {where}", values).fetchone()
        return None if row is None else Sample(*row)
