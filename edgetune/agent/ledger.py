"""The ledger: what became of every sample. SQLite in WAL mode with synchronous=FULL, so a commit survives power loss.

A sample is ``new`` (to be trained), ``heldout``, ``trained`` or ``quarantined`` (with a reason). What training did to
samples is kept in memory and written by :meth:`Ledger.flush` just before a checkpoint; :meth:`Ledger.rollback` takes
back whatever the newest intact checkpoint does not contain. Knows nothing of images, models or checkpoints' contents.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from edgetune.agent.storage import guard
from edgetune.errors import StateError

SCHEMA_VERSION = 1
STATUSES = ("new", "heldout", "trained", "quarantined")
_SCHEMA = """
CREATE TABLE IF NOT EXISTS samples (
    id INTEGER PRIMARY KEY, path TEXT NOT NULL, sha256 TEXT NOT NULL, size INTEGER NOT NULL, mtime_ns INTEGER NOT NULL,
    label INTEGER, status TEXT NOT NULL CHECK (status IN ('new', 'heldout', 'trained', 'quarantined')),
    step INTEGER, passes INTEGER NOT NULL DEFAULT 0, reason TEXT, seen_at REAL NOT NULL, changed_at REAL NOT NULL,
    UNIQUE (path, sha256));
CREATE INDEX IF NOT EXISTS samples_by_content ON samples (sha256);
CREATE INDEX IF NOT EXISTS samples_by_status ON samples (status);
CREATE TABLE IF NOT EXISTS visits (step INTEGER, sample INTEGER, previous_step INTEGER, PRIMARY KEY (step, sample));
CREATE TABLE IF NOT EXISTS arrivals (label INTEGER PRIMARY KEY, count INTEGER NOT NULL);
"""
_COLUMNS = "id, path, sha256, size, mtime_ns, label, status, step, passes, reason"


@dataclass(frozen=True)
class Sample:
    """One row. ``path`` is relative to the data folder; ``label`` indexes the bundle's classes (None: unknown);
    ``step`` is the last step that trained it (or in which it was quarantined); ``passes`` counts its trainings."""

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


class Ledger:
    """The ledger in the file ``path``; created when missing. One writer at a time (the state directory's lock).

    Raises:
        StorageError: the disk refused. StateError: damaged, or of another version.
    """

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        self.path = path
        self._visits: list[tuple[int, int]] = []  # (step, sample) not yet on the disk
        self._quarantines: list[tuple[str, int | None, int]] = []  # (reason, step, sample) not yet on the disk
        with guard(f"cannot open the ledger {path}"):
            if read_only:
                self._db = self._open_read_only(path)
                return
            self._db = sqlite3.connect(path, isolation_level=None)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
            self._db.execute("PRAGMA cache_size=-256")  # KiB; by default 2 MB fill up slowly and look like a leak
            version = self._db.execute("PRAGMA user_version").fetchone()[0]
            if version not in (0, SCHEMA_VERSION):
                raise StateError(
                    f"the ledger {path} has version {version}; this EdgeTune knows version {SCHEMA_VERSION}: use the "
                    "version that wrote it, or a new state directory"
                )
            if version == 0:
                self._db.executescript(_SCHEMA)
                self._db.execute(f"PRAGMA user_version={SCHEMA_VERSION}")

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

    def get(self, sample: int) -> Sample:
        """Return the row ``sample``."""
        row = self._one("WHERE id = ?", sample)
        if row is None:
            raise StateError(f"the ledger {self.path} has no sample {sample}: it was changed by another program")
        return row

    def trainable(self) -> Iterator[tuple[int, str, int]]:
        """Yield (id, sha256, passes) of every new or trained sample, marks in memory included."""
        extra: dict[int, int] = {}
        for _, sample in self._visits:
            extra[sample] = extra.get(sample, 0) + 1
        gone = {sample for _, _, sample in self._quarantines}
        query = "SELECT id, sha256, passes FROM samples WHERE status IN ('new', 'trained') ORDER BY id"
        for sample, sha256, passes in self._db.execute(query):
            if sample not in gone:
                yield sample, sha256, passes + extra.get(sample, 0)

    def heldout(self, limit: int) -> list[int]:
        """Return the ids of the held-out samples, the oldest ``limit`` of them."""
        gone = {sample for _, _, sample in self._quarantines}
        rows = self._db.execute("SELECT id FROM samples WHERE status = 'heldout' ORDER BY id LIMIT ?", (limit,))
        return [row[0] for row in rows if row[0] not in gone]

    def counts(self) -> dict[str, int]:
        """Return how many samples have each status (on the disk: as of the last checkpoint)."""
        found = dict(self._db.execute("SELECT status, COUNT(*) FROM samples GROUP BY status").fetchall())
        return {status: found.get(status, 0) for status in STATUSES}

    def samples(self) -> Iterator[Sample]:
        """Yield every row, oldest first."""
        for row in self._db.execute(f"SELECT {_COLUMNS} FROM samples ORDER BY id"):
            yield Sample(*row)

    # ---- taking in (inside ``transaction``) ----------------------------------------------------------------------
    def accept(self, path: str, sha256: str, stat: tuple[int, int], label: int, *, holdout: int) -> Sample:
        """Record a good sample: every ``holdout``-th of its class is held out (0 = none), the others are new.

        Args:
            stat: size in bytes and modification time in ns of the file.
        """
        self._db.execute(
            "INSERT INTO arrivals VALUES (?, 1) ON CONFLICT (label) DO UPDATE SET count = count + 1", (label,)
        )
        count = self._db.execute("SELECT count FROM arrivals WHERE label = ?", (label,)).fetchone()[0]
        status = "heldout" if holdout and count % holdout == 0 else "new"
        return self._put(path, sha256, stat, label, status, None)

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
                    "UPDATE samples SET status = 'trained', step = ?, passes = passes + 1, changed_at = ? "
                    "WHERE id = ? AND status != 'quarantined'",
                    (step, now, sample),
                )
            self._db.execute("DELETE FROM visits WHERE step <= ?", (prune_through_step,))
        self._visits.clear()
        self._quarantines.clear()

    @property
    def dirty(self) -> bool:
        """Whether something waits in memory for the next flush."""
        return bool(self._visits or self._quarantines)

    def rollback(self, step: int) -> int:
        """Take back every training mark later than ``step``; return how many there were. Quarantines stay."""
        dropped = sum(1 for mark in self._visits if mark[0] > step)
        self._visits = [mark for mark in self._visits if mark[0] <= step]
        later = self._db.execute(
            "SELECT step, sample, previous_step FROM visits WHERE step > ? ORDER BY step DESC", (step,)
        ).fetchall()
        if later:
            with self.transaction():
                for _, sample, previous_step in later:
                    self._db.execute(
                        "UPDATE samples SET passes = passes - 1, step = ?, "
                        "status = CASE WHEN passes > 1 THEN 'trained' ELSE 'new' END "
                        "WHERE id = ? AND status = 'trained'",
                        (previous_step, sample),
                    )
                self._db.execute("DELETE FROM visits WHERE step > ?", (step,))
        return dropped + len(later)

    def _write_quarantines(self) -> None:
        self._db.executemany(
            "UPDATE samples SET status = 'quarantined', reason = ?, step = ?, changed_at = ? WHERE id = ?",
            [(reason, step, time.time(), sample) for reason, step, sample in self._quarantines],
        )

    def _put(
        self, path: str, sha256: str, stat: tuple[int, int], label: int | None, status: str, reason: str | None
    ) -> Sample:
        now = time.time()
        self._db.execute(
            "INSERT INTO samples (path, sha256, size, mtime_ns, label, status, reason, seen_at, changed_at) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (path, sha256) DO UPDATE SET size = excluded.size, "
            "mtime_ns = excluded.mtime_ns, label = excluded.label, status = excluded.status, reason = excluded.reason, "
            "changed_at = excluded.changed_at WHERE samples.status = 'quarantined'",
            (path, sha256, *stat, label, status, reason, now, now),
        )
        row = self._one("WHERE path = ? AND sha256 = ?", path, sha256)
        assert row is not None
        return row

    def _one(self, where: str, *values: object) -> Sample | None:
        row = self._db.execute(f"SELECT {_COLUMNS} FROM samples {where}", values).fetchone()
        return None if row is None else Sample(*row)
