"""The state directory: everything a run leaves behind, and the lock that gives it to one agent at a time.

    lock                     held (fcntl) while an agent runs
    state.json               which bundle, seed and batch the directory was made with, and what its samples are
    ledger.sqlite            every sample and what became of it
    checkpoint-*.safetensors, calibration-*.safetensors
    replay/                  what the replay buffer keeps of trained samples
    log.jsonl, log.jsonl.*   the run log, and its files that are full

Knows files; nothing of training.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from edgetune.agent.config import DEFAULT_BATCH, DEFAULT_SEED
from edgetune.agent.storage import guard, write_atomic
from edgetune.bundle import Bundle, sync_directory
from edgetune.errors import StateError

SCHEMA_VERSION = 1
LOCK = "lock"
"""The file that is locked while an agent runs; its time is the agent's last sign of life."""


class StateDirectory:
    """The state directory at ``path``, locked until :meth:`close` (or the death of the process).

    Args:
        digest: identity of the bundle (``Bundle.digest``). model: its name, for messages.
        batch, seed: None = as stored, or the defaults for a new directory.
        samples: what a sample is (:func:`samples_of`), noted for :func:`replace_bundle`.

    Raises:
        StateError: in use by another agent; made with another bundle, batch or seed; of another version.
        StorageError: it cannot be created.
    """

    def __init__(
        self,
        path: Path,
        *,
        digest: str,
        model: str,
        batch: int | None,
        seed: int | None,
        samples: Mapping[str, Any] | None = None,
    ) -> None:
        self.path = path
        with guard(f"cannot use the state directory {path}"):
            new = not path.exists()
            path.mkdir(parents=True, exist_ok=True)
            if new:
                sync_directory(path.parent)
        self._lock = _acquire(path)
        try:
            self.batch, self.seed = self._identify(digest, model, batch, seed, samples)
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

    def _identify(
        self, digest: str, model: str, batch: int | None, seed: int | None, samples: Mapping[str, Any] | None
    ) -> tuple[int, int]:
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
                "samples": samples,
            }
            write_atomic(file, json.dumps(made, indent=1).encode())
        known = read_identity(self.path)
        if known["bundle"] != digest:
            raise StateError(
                f"the state directory {self.path} was made with another bundle (model '{known['model']}', manifest "
                f"{known['bundle'][:12]}; this one is '{model}', {digest[:12]}): give the bundle it was made with, "
                "another --state, or --replace-bundle to go on with this one's weights"
            )
        for name, asked in (("batch", batch), ("seed", seed)):
            if asked is not None and asked != known[name]:
                raise StateError(
                    f"the state directory {self.path} was made with --{name} {known[name]}, not {asked}: leave "
                    f"--{name} away, or give another --state"
                )
        if samples is not None and known.get("samples") is None:  # made by an older version
            write_atomic(file, json.dumps({**known, "samples": samples}, indent=1).encode())
        return int(known["batch"]), int(known["seed"])


def samples_of(bundle: Bundle) -> dict[str, Any]:
    """Return what a sample is to a bundle, as JSON data: what two bundles must agree in to share a state directory."""
    manifest = bundle.manifest
    inputs = [[list(spec.shape), spec.dtype] for spec in manifest.inputs]
    return {"classes": list(manifest.classes), "inputs": inputs, "color": manifest.preprocess.color}


def replace_bundle(path: Path, bundle: Bundle) -> bool:
    """Let the state directory go on with another bundle: ledger and replay buffer stay, the weights are the bundle's.

    All that changes is ``state.json``, at once; the next run finds a checkpoint of another bundle and begins with the
    new weights. Return False where there is nothing to replace.

    Raises:
        StateError: in use by an agent; the bundle has other classes or another input. StorageError: the disk refused.
    """
    if not (path / "state.json").exists() or read_identity(path)["bundle"] == bundle.digest:
        return False
    lock = _acquire(path)
    try:
        known, wanted = read_identity(path), samples_of(bundle)
        if known.get("samples") is None:
            raise StateError(
                f"{path} was made by a version that did not note its classes; run once with the bundle it was made "
                "with, then replace that"
            )
        other = [name for name, value in wanted.items() if known["samples"].get(name) != value]
        if other:
            told = "; ".join(f"{name}: {known['samples'].get(name)}, here {wanted[name]}" for name in other)
            raise StateError(
                f"the bundle cannot take the place of the one that {path} was made with, whose samples are other ones "
                f"({told}): export it with the same classes and input, or give another --state"
            )
        changed = {**known, "bundle": bundle.digest, "model": bundle.manifest.model}
        write_atomic(path / "state.json", json.dumps(changed, indent=1).encode())
    finally:
        os.close(lock)
    return True


def _acquire(path: Path) -> int:
    """Return the descriptor of the directory's lock, held until it is closed.

    Raises:
        StateError: an agent has it. StorageError: it cannot be made.
    """
    with guard(f"cannot use the state directory {path}"):
        lock = os.open(path / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    if not _locked(lock):
        os.close(lock)
        raise StateError(
            f"the state directory {path} is in use by another agent; stop that one, or give another --state"
        )
    return lock


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
