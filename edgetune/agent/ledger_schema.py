"""The ledger's tables, and how those of an older version become today's. Knows SQLite; nothing of what rows mean."""

from __future__ import annotations

import sqlite3
from pathlib import Path

from edgetune.errors import StateError

SCHEMA_VERSION = 2
STATUSES = ("new", "heldout", "trained", "replayable", "quarantined")
COLUMNS = "id, path, sha256, size, mtime_ns, label, status, step, passes, reason, replays, task"
_COLUMNS_OF_1 = "id, path, sha256, size, mtime_ns, label, status, step, passes, reason, seen_at, changed_at"
_SAMPLES = """
CREATE TABLE samples (
    id INTEGER PRIMARY KEY, path TEXT NOT NULL, sha256 TEXT NOT NULL, size INTEGER NOT NULL, mtime_ns INTEGER NOT NULL,
    label INTEGER, status TEXT NOT NULL CHECK (status IN ('new', 'heldout', 'trained', 'replayable', 'quarantined')),
    step INTEGER, passes INTEGER NOT NULL DEFAULT 0, reason TEXT, seen_at REAL NOT NULL, changed_at REAL NOT NULL,
    replays INTEGER NOT NULL DEFAULT 0, task TEXT,
    UNIQUE (path, sha256))
"""
_REST = (
    "CREATE INDEX samples_by_content ON samples (sha256)",
    "CREATE INDEX samples_by_status ON samples (status)",
    "CREATE TABLE replayed (step INTEGER, sample INTEGER, PRIMARY KEY (step, sample))",
)
_OF_1 = (
    "CREATE TABLE visits (step INTEGER, sample INTEGER, previous_step INTEGER, PRIMARY KEY (step, sample))",
    "CREATE TABLE arrivals (label INTEGER PRIMARY KEY, count INTEGER NOT NULL)",
)


def bring_up_to_date(database: sqlite3.Connection, path: Path) -> None:
    """Make the tables, or bring those of version 1 to today's: all of it or nothing, whenever the power goes.

    Raises:
        StateError: of a version that is not known here.
    """
    version = version_of(database, path)
    if version == SCHEMA_VERSION:
        return
    database.execute("BEGIN IMMEDIATE")
    try:
        if version == 0:
            for statement in (_SAMPLES, *_REST, *_OF_1):
                database.execute(statement)
        else:  # SQLite cannot change a CHECK in place
            database.execute("ALTER TABLE samples RENAME TO samples_1")
            database.execute(_SAMPLES)
            database.execute(f"INSERT INTO samples ({_COLUMNS_OF_1}) SELECT {_COLUMNS_OF_1} FROM samples_1")
            database.execute("DROP TABLE samples_1")
            for statement in _REST:
                database.execute(statement)
        database.execute(f"PRAGMA user_version={SCHEMA_VERSION}")
        database.execute("COMMIT")
    except BaseException:
        if database.in_transaction:
            database.execute("ROLLBACK")
        raise


def version_of(database: sqlite3.Connection, path: Path) -> int:
    """Return the version of the tables; 0: there are none yet.

    Raises:
        StateError: of a version that is not known here.
    """
    version: int = database.execute("PRAGMA user_version").fetchone()[0]
    if not 0 <= version <= SCHEMA_VERSION:
        raise StateError(
            f"the ledger {path} has version {version}; this EdgeTune knows versions 1 to {SCHEMA_VERSION}: use the "
            "version that wrote it, or a new state directory"
        )
    return version


def columns_of(version: int) -> str:
    """Return the columns of a row as today's reader wants them, of a ledger of ``version`` that is only read."""
    return COLUMNS if version == SCHEMA_VERSION else COLUMNS.replace("replays, task", "0, NULL")
