"""The promoted models on the disk, and which of them is in use.

    promoted/model.onnx     the one in use, for a serving process; a link to one of the next, replaced by a rename
    promoted/<n>.onnx       version n
    promoted/<n>.json       where it is from, its SHA-256, its score and its verdicts on held-out samples
    promoted/candidate.json the verdicts of the newest candidate, and the checkpoint that holds it
    promoted/hold.json      there after a rollback: nothing is promoted by itself until somebody promotes
    promoted/history.jsonl  what became of every candidate
    promoted/lock           held while any of this changes: the agent and a command may be at it at once

``model.onnx`` itself says which version it is, so one rename changes all. Knows files; nothing of training.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgetune.agent.gate.decision import Score
from edgetune.agent.gate.history import History
from edgetune.agent.gate.onnxfile import copy, open_model, write_model
from edgetune.agent.storage import guard, write_atomic
from edgetune.bundle import Place, sha256_of, sync_directory
from edgetune.errors import StateError

_MODEL = re.compile(r"(\d{1,15})\.onnx")


@dataclass(frozen=True)
class Version:
    """One promoted model.

    Attributes:
        number: 1 is the exported model.
        previous: the version that was in use before it; None for the first.
        step: of the checkpoint that it was made from; 0 for an exported model.
        bundle: digest of the bundle. sha256: of the file.
        score: ``Score.plain`` at its promotion; None where there were no held-out samples yet. against: that of the
            version before, on the same samples, with its ``version`` and ``step``.
        reason: why it was promoted. by: ``agent`` or ``user``. forced: whether the gate would have refused it.
        verdicts: the class that it gives to held-out samples, by content.
    """

    number: int
    previous: int | None
    step: int
    bundle: str
    sha256: str = ""
    score: Mapping[str, Any] | None = None
    against: Mapping[str, Any] | None = None
    reason: str = ""
    by: str = "agent"
    forced: bool = False
    verdicts: Mapping[str, int] = field(default_factory=dict)

    def entry(self) -> dict[str, Any]:
        """Return what the history says of it."""
        kept = ("previous", "step", "bundle", "score", "against", "reason", "by", "forced")
        return {"version": self.number, **{name: getattr(self, name) for name in kept}}

    def compared(self, score: Score, names: Sequence[str]) -> dict[str, Any]:
        """Return what is said of this version where another one was compared with it."""
        return {"version": self.number, "step": self.step, "score": score.plain(names)}


@dataclass(frozen=True)
class Candidate:
    """The newest candidate: ``checkpoint`` is the name of its file; ``labels`` are the true classes by content, on
    which it gave ``verdicts``; ``config`` are the settings of the gate that judged it."""

    step: int
    bundle: str
    checkpoint: str
    verdicts: Mapping[str, int]
    labels: Mapping[str, int]
    config: Mapping[str, Any]


class Versions:
    """The directory ``promoted`` of a state directory."""

    def __init__(self, state: Path) -> None:
        self.path = state / "promoted"
        self.model = self.path / "model.onnx"
        self.history = History(self.path / "history.jsonl")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Have the directory alone inside the block; waits for who has it. It is made where it is missing.

        Raises:
            StorageError: the disk refused.
        """
        with guard(f"cannot use {self.path}"):
            self.path.mkdir(exist_ok=True)
            descriptor = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def file(self, number: int) -> Path:
        """Return where version ``number`` lies."""
        return self.path / f"{number}.onnx"

    def numbers(self) -> list[int]:
        """Return the versions that are on the disk, ascending."""
        names = (_MODEL.fullmatch(path.name) for path in self.path.glob("*.onnx"))
        return sorted(int(name[1]) for name in names if name is not None)

    def in_use(self) -> int | None:
        """Return the number of the version in use; None: there is none yet.

        Raises:
            StateError: the file is damaged.
        """
        if not self.model.exists():
            return None
        number = open_model(self.model).metadata.get("version", "")
        if not number.isdecimal():
            raise StateError(f"the model {self.model} does not say which version it is; restore it, or roll back")
        return int(number)

    def version(self, number: int) -> Version:
        """Return what is known of version ``number``.

        Raises:
            StateError: nothing is, or what is known is damaged.
        """
        path = self.path / f"{number}.json"
        return Version(**_read(path, Version, f"version {number} of the promoted models"))

    def intact(self, version: Version) -> bool:
        """Return whether the file of ``version`` is the one that was written."""
        try:
            return sha256_of(self.file(version.number)) == version.sha256
        except OSError:
            return False

    def add(
        self, version: Version, skeleton: Place, weights: Mapping[str, Place], metadata: Mapping[str, str]
    ) -> Version:
        """Write the files of ``version``, not yet in use; return it with its hash.

        Raises:
            StorageError: the disk refused; nothing is left of it. BundleError: it is too large.
        """
        score = version.score or {}
        accuracy = score.get("accuracy")
        said = {
            **metadata, "version": str(version.number), "step": str(version.step),
            "score": "" if accuracy is None else f"{accuracy:.6f}",
        }  # fmt: skip
        temporary = self.path / f"{version.number}.onnx.tmp"
        digest = write_model(temporary, skeleton, weights, said)
        written = dataclasses.replace(version, sha256=digest)
        try:
            self.note(written)
            with guard(f"cannot write the model {self.file(version.number)}"):
                os.replace(temporary, self.file(version.number))
                sync_directory(self.path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            (self.path / f"{version.number}.json").unlink(missing_ok=True)
            raise
        return written

    def note(self, version: Version) -> None:
        """Write what is known of ``version``. StorageError: the disk refused."""
        write_atomic(self.path / f"{version.number}.json", json.dumps(dataclasses.asdict(version)).encode())

    def use(self, number: int) -> None:
        """Put version ``number`` into use: from one instant to the next ``model.onnx`` is another file.

        Raises:
            StorageError: the disk refused; what was in use still is.
        """
        temporary = self.path / ".model.tmp"
        with guard(f"cannot put version {number} into use in {self.path}"):
            temporary.unlink(missing_ok=True)
            try:
                os.link(self.file(number), temporary)
            except OSError:  # a file system without hard links
                copy(self.file(number), temporary)
            os.replace(temporary, self.model)
            temporary.unlink(missing_ok=True)  # two names of one file: then a rename does nothing
            sync_directory(self.path)

    def next_number(self) -> int:
        """Return the number of the next version. The newest one stays on the disk, so no number comes twice."""
        return max(self.numbers(), default=0) + 1

    def tidy(self, keep: int) -> None:
        """Delete all but the version in use, those before it (``keep`` in all), and the newest.

        Raises:
            StorageError: the disk refused.
        """
        numbers = self.numbers()
        kept, at = set(numbers[-1:]), self.in_use()
        for _ in range(keep):
            if at is None:
                break
            kept.add(at)
            try:
                at = self.version(at).previous
            except StateError:
                break
        self._delete(number for number in numbers if number not in kept)

    def drop_unused(self) -> None:
        """Delete what a crash left before it was in use: versions that the history does not know."""
        at = self.in_use()
        newer = [number for number in self.numbers() if at is None or number > at]
        if newer:
            known = {entry.get("version") for entry in self.history.read()}
            self._delete(number for number in newer if number not in known)
        with guard(f"cannot tidy {self.path}"):
            for path in self.path.glob("*.tmp"):
                path.unlink(missing_ok=True)

    def _delete(self, numbers: Iterator[int]) -> None:
        with guard(f"cannot tidy {self.path}"):
            for number in numbers:
                self.file(number).unlink(missing_ok=True)
                (self.path / f"{number}.json").unlink(missing_ok=True)

    # -- the candidate and the hold --------------------------------------------------------------------------------
    def set_candidate(self, candidate: Candidate) -> None:
        """Write the newest candidate. StorageError: the disk refused."""
        write_atomic(self.path / "candidate.json", json.dumps(dataclasses.asdict(candidate)).encode())

    def candidate(self) -> Candidate:
        """Return the newest candidate.

        Raises:
            StateError: there is none.
        """
        return Candidate(**_read(self.path / "candidate.json", Candidate, "candidate"))

    def held(self) -> str | None:
        """Return why nothing is promoted by itself; None: it is."""
        try:
            told = json.loads((self.path / "hold.json").read_text("utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError):
            return "hold.json cannot be read"
        return str(told.get("reason", "")) if isinstance(told, dict) else ""

    def hold(self, reason: str) -> None:
        """Have nothing promoted by itself from now on. StorageError: the disk refused."""
        write_atomic(self.path / "hold.json", json.dumps({"reason": reason}).encode())

    def release(self) -> None:
        """Let the agent promote again. StorageError: the disk refused."""
        with guard(f"cannot delete {self.path / 'hold.json'}"):
            (self.path / "hold.json").unlink(missing_ok=True)
            sync_directory(self.path)


def _read(path: Path, kind: type, what: str) -> dict[str, Any]:
    """Return the fields of a dataclass that ``path`` holds as JSON."""
    try:
        told = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise StateError(f"there is no {what}: {path} is missing") from None
    except (OSError, ValueError) as error:
        raise StateError(f"{path} cannot be read ({error}); restore it from a copy") from None
    names = {entry.name for entry in dataclasses.fields(kind)}
    if not isinstance(told, dict) or set(told) != names:
        raise StateError(f"{path} is damaged: it should hold {', '.join(sorted(names))}; restore it from a copy")
    return told
