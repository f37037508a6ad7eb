"""Checkpoints: the whole state of a run in one safetensors file whose name holds its SHA-256.

``checkpoint-<step>.<sha256>.safetensors`` appears by a rename, so it is complete or absent, and any later damage shows.
The last two are kept; one that cannot be used is set aside, not deleted. The file is written piece by piece (the format
is a length, a JSON header and raw bytes), because a library that first joins everything in memory would double the
state's size just when the budget is tight.
Knows arrays and JSON; nothing of what they mean.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from edgetune.agent.storage import guard
from edgetune.bundle import Array, sha256_of, sync_directory
from edgetune.errors import StateError

SCHEMA_VERSION = 3
READABLE = (2, 3)
"""Version 2 holds no state of replay, of the gate or of drift; those begin anew."""
KEPT = 2
PARTS = "agent/"
"""Tensors whose names begin so belong to the agent, not to the session."""
_NAME = re.compile(r"checkpoint-(\d{8,})\.([0-9a-f]{64})\.safetensors")
_PIECE_BYTES = 1 << 20
_DTYPES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "int64": "I64", "int32": "I32", "int16": "I16",
    "int8": "I8", "uint64": "U64", "uint32": "U32", "uint16": "U16", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip
_NUMPY = {name: dtype for dtype, name in _DTYPES.items()}


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint: ``tensors`` is the session's state, each read from the file when it is asked for,
    ``parts`` are arrays of the agent's own, and ``position`` is all else (plain JSON data)."""

    path: Path
    step: int
    tensors: Mapping[str, Array]
    position: Mapping[str, Any]
    parts: Mapping[str, Array] = field(default_factory=dict)


def write(
    directory: Path,
    step: int,
    tensors: Mapping[str, Array],
    position: Mapping[str, Any],
    parts: Mapping[str, Array] | None = None,
) -> Path:
    """Write a checkpoint and return its path; it is on the disk, under its final name, when this returns.

    Raises:
        StorageError: the disk refused; every earlier checkpoint is untouched.
    """
    temporary = directory / f"checkpoint-{step:08d}.tmp"
    tensors = {**tensors, **{PARTS + name: value for name, value in (parts or {}).items()}}
    with guard(f"cannot write a checkpoint into {directory}"):
        try:
            digest = hashlib.sha256()
            with temporary.open("wb") as stream:

                def put(piece: bytes | memoryview) -> None:
                    digest.update(piece)
                    stream.write(piece)

                put(_header(tensors, {"schema": SCHEMA_VERSION, "step": step, **position}))
                for name in sorted(tensors):
                    raw = np.ascontiguousarray(tensors[name]).reshape(-1).view(np.uint8).data
                    for start in range(0, len(raw), _PIECE_BYTES):
                        put(raw[start : start + _PIECE_BYTES])
                stream.flush()
                os.fsync(stream.fileno())
            final = directory / f"checkpoint-{step:08d}.{digest.hexdigest()}.safetensors"
            os.replace(temporary, final)
            sync_directory(directory)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
    return final


def listed(directory: Path) -> list[tuple[int, Path]]:
    """Return (step, path) of every file named as a checkpoint, the newest first; nothing is verified."""
    found = []
    for path in directory.glob("checkpoint-*.safetensors"):
        match = _NAME.fullmatch(path.name)
        if match is not None:
            found.append((int(match[1]), path.stat().st_mtime_ns, path))
    return [(step, path) for step, _, path in sorted(found, reverse=True)]


def verified(path: Path) -> bool:
    """Return whether the file's content is the one its name promises."""
    match = _NAME.fullmatch(path.name)
    try:
        return match is not None and sha256_of(path) == match[2]
    except OSError:
        return False


def problem_of(path: Path) -> str | None:
    """Return why the checkpoint ``path`` cannot be used; None: it can."""
    if not verified(path):
        return "its content is not what its name promises"
    try:
        read_position(path)
    except StateError as error:
        return str(error)
    return None


def load_newest(directory: Path, damaged: Callable[[Path], None]) -> Checkpoint | None:
    """Return the newest checkpoint that can be used, or None when there is none at all.

    Args:
        damaged: called with every newer file that cannot, once one is found that can.

    Raises:
        StateError: there are checkpoints but none can be used.
    """
    refused: dict[Path, str] = {}
    for _, path in listed(directory):
        reason = problem_of(path)
        if reason is None:
            for other in refused:
                damaged(other)
            return load(path)
        refused[path] = reason
    if refused:
        raise none_intact(directory, refused)
    return None


def load(path: Path) -> Checkpoint:
    """Return the checkpoint ``path``, whose content is not verified again."""
    position = read_position(path)
    return Checkpoint(path, int(position["step"]), _Stored(path, ""), position, _Stored(path, PARTS))


def none_intact(directory: Path, refused: Mapping[Path, str]) -> StateError:
    """Return the error for a directory whose checkpoints are all refused."""
    why = "; ".join(f"{path.name}: {reason}" for path, reason in refused.items())
    return StateError(
        f"none of the {len(refused)} checkpoints in {directory} is intact ({why}); restore them from a copy, or move "
        "the directory away to start anew"
    )


class _Stored(Mapping[str, Array]):
    """The tensors of a file, each read when it is asked for: all of them at once would double a run's state.

    Those whose names begin with ``prefix``, without it; an empty one stands for those of the session.
    """

    def __init__(self, path: Path, prefix: str) -> None:
        self._path = path
        with path.open("rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            header: dict[str, Any] = json.loads(stream.read(size))
        header.pop("__metadata__", None)
        mine = (name for name in header if name.startswith(PARTS) == bool(prefix))
        self._entries, self._begin = {name[len(prefix) :]: header[name] for name in mine}, 8 + size

    def __getitem__(self, name: str) -> Array:
        entry = self._entries[name]
        begin, end = entry["data_offsets"]
        dtype = np.dtype(_NUMPY[entry["dtype"]])
        count = (end - begin) // dtype.itemsize
        values: Array = np.fromfile(self._path, dtype, count, offset=self._begin + begin)
        if len(values) != count:
            raise StateError(f"the checkpoint {self._path} ends too early; restore it from a copy")
        return values.reshape(entry["shape"])

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def read_position(path: Path) -> dict[str, Any]:
    """Return the position that a checkpoint holds, without loading its tensors.

    Raises:
        StateError: unreadable, or of another version.
    """
    try:
        with safe_open(path, framework="numpy") as stream:
            metadata = stream.metadata() or {}
        position: dict[str, Any] = json.loads(metadata.get("edgetune", "{}"))
    except (SafetensorError, OSError, ValueError) as error:
        raise StateError(f"the checkpoint {path} cannot be read ({error})") from None
    if position.get("schema") not in READABLE:
        raise StateError(
            f"the checkpoint {path} has version {position.get('schema')!r}; this EdgeTune knows versions "
            f"{READABLE[0]} to {READABLE[-1]}: use the version that wrote it, or a new state directory"
        )
    return position


def prune(directory: Path, written: Path) -> int:
    """Delete all but the newest :data:`KEPT` checkpoints and return the step of the oldest one left.

    Of those of the same step, ``written`` (just now) is the newest, whatever the clock says; the others are deleted.
    """
    paths = listed(directory)
    mine = next((step for step, path in paths if path == written), None)
    for path in [path for step, path in paths if step == mine and path != written]:
        path.unlink(missing_ok=True)
    paths = [(step, path) for step, path in paths if step != mine or path == written]
    for _, path in paths[KEPT:]:
        path.unlink(missing_ok=True)
    return paths[min(len(paths), KEPT) - 1][0] if paths else 0


def set_aside(path: Path) -> None:
    """Rename a checkpoint that cannot be used, so that it is neither read nor counted again; the last such are kept."""
    with guard(f"cannot rename the damaged checkpoint {path}"):
        os.replace(path, path.with_suffix(".damaged"))
        for other in sorted(path.parent.glob("checkpoint-*.damaged"))[:-KEPT]:
            other.unlink(missing_ok=True)


def remove_unfinished(directory: Path) -> None:
    """Delete what a process that was killed while it wrote has left behind."""
    # The last is what the library of safetensors writes into.
    for pattern in ("checkpoint-*.tmp", "calibration-*.tmp", "calibration-*.unnamed", ".tmp??????"):
        for path in directory.glob(pattern):
            path.unlink(missing_ok=True)


def _header(tensors: Mapping[str, Array], position: Mapping[str, Any]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"edgetune": json.dumps(position, sort_keys=True)}}
    offset = 0
    for name in sorted(tensors):
        value = tensors[name]
        entries[name] = {
            "dtype": _DTYPES[value.dtype.name],
            "shape": list(value.shape),
            "data_offsets": [offset, offset + value.nbytes],
        }
        offset += value.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the data begins at a multiple of 8
    return len(text).to_bytes(8, "little") + text
