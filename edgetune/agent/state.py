"""The state directory: everything a run leaves behind, and the lock that gives it to one agent at a time.

    lock                     held (fcntl) while an agent runs
    state.json               which bundle, seed and batch the directory was made with
    ledger.sqlite            every sample and what became of it
    checkpoint-*.safetensors, calibration-*.safetensors
    log.jsonl                the run log

Knows files; nothing of training.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from edgetune.agent.config import DEFAULT_BATCH, DEFAULT_SEED
from edgetune.agent.storage import guard, write_atomic
from edgetune.errors import StateError

SCHEMA_VERSION = 1
LOCK = "lock"
"""The file that is locked while an agent runs; its time is the agent's last sign of life."""


class StateDirectory:
    """The state directory at ``path``, locked until :meth:`close` (or the death of the process).

    Args:
        digest: identity of the bundle (``Bundle.digest``). model: its name, for messages.
        batch, seed: None = as stored, or the defaults for a new directory.

    Raises:
        StateError: in use by another agent; made with another bundle, batch or seed; of another version.
        StorageError: it cannot be created.
    """

    def __init__(self, path: Path, *, digest: str, model: str, batch: int | None, seed: int | None) -> None:
        self.path = path
        with guard(f"cannot use the state directory {path}"):
            path.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(path / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        if not _locked(self._lock):
            os.close(self._lock)
            raise StateError(
                f"the state directory {path} is in use by another agent; stop that one, or give another --state"
            )
        try:
            self.batch, self.seed = self._identify(digest, model, batch, seed)
        except BaseException:
            self.close()
            raise

    ledger_path = property(lambda self: self.path / "ledger.sqlite")
    log_path = property(lambda self: self.path / "log.jsonl")

    def close(self) -> None:
        """Give the directory free."""
        os.close(self._lock)

    def __enter__(self) -> StateDirectory:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _identify(self, digest: str, model: str, batch: int | None, seed: int | None) -> tuple[int, int]:
        file = self.path / "state.json"
        if not file.exists():
            if (self.path / "ledger.sqlite").exists():
                raise StateError(f"{self.path} holds a ledger but no state.json: it is damaged; use another --state")
            made = {
                "schema": SCHEMA_VERSION,
                "bundle": digest,
                "model": model,
                "batch": DEFAULT_BATCH if batch is None else batch,
                "seed": DEFAULT_SEED if seed is None else seed,
                "made_at": time.time(),
            }
            write_atomic(file, json.dumps(made, indent=1).encode())
        known = read_identity(self.path)
        if known["bundle"] != digest:
            raise StateError(
                f"the state directory {self.path} was made with another bundle (model '{known['model']}', manifest "
                f"{known['bundle'][:12]}; this one is '{model}', {digest[:12]}): give the bundle it was made with, or "
                "another --state"
            )
        for name, asked in (("batch", batch), ("seed", seed)):
            if asked is not None and asked != known[name]:
                raise StateError(
                    f"the state directory {self.path} was made with --{name} {known[name]}, not {asked}: leave "
                    f"--{name} away, or give another --state"
                )
        return int(known["batch"]), int(known["seed"])


def _locked(descriptor: int) -> bool:
    """Lock the file for this process; return whether that worked. Who only looks whether an agent is alive
    (``service/life.py``) holds it for an instant, and is waited for."""
    for pause_seconds in (0.02, 0.1, 0.3, 0.0):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError:
            time.sleep(pause_seconds)
    return False


def read_identity(path: Path) -> dict[str, Any]:
    """Return what ``state.json`` holds: schema, bundle, model, batch, seed, made_at.

    Raises:
        StateError: not a state directory, damaged, or of another version.
    """
    try:
        known = json.loads((path / "state.json").read_text("utf-8"))
    except OSError:
        raise StateError(f"'{path}' is not a state directory: it has no state.json; 'edgetune run' makes one") from None
    except ValueError as error:
        raise StateError(f"{path / 'state.json'} is damaged ({error}); restore it, or use another --state") from None
    if not isinstance(known, dict) or known.get("schema") != SCHEMA_VERSION:
        raise StateError(f"{path / 'state.json'} is of another version; this EdgeTune knows version {SCHEMA_VERSION}")
    return known
