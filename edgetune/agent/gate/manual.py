"""What a person does about the promoted models: promote, roll back, look. Works while an agent runs, and without one.

Needs the state directory alone: the frozen weights and the graph are in the promoted files. Knows files.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from edgetune.agent import checkpoint as checkpoints
from edgetune.agent.gate import onnxfile
from edgetune.agent.gate.config import GateConfig
from edgetune.agent.gate.decision import decide
from edgetune.agent.gate.versions import Candidate, Version, Versions
from edgetune.agent.state import read_identity
from edgetune.agent.storage import guard
from edgetune.bundle import Place, places_in
from edgetune.errors import GateError, StateError


def opened(state: Path) -> Versions:
    """Return the promoted models of the state directory ``state``.

    Raises:
        StateError: it is no state directory, or nothing was ever promoted in it.
    """
    read_identity(state)
    versions = Versions(state)
    if not versions.path.is_dir() or not versions.numbers():
        raise StateError(f"'{state}' has no promoted model yet; 'edgetune run' makes the first one when it starts")
    return versions


def rollback(state: Path) -> tuple[Version, Version]:
    """Put the version before the one in use back into use, and hold the agent's own promotion; return both, the one
    that was in use first.

    Raises:
        StateError: there is none before, or it is damaged. StorageError: the disk refused; all is as it was.
    """
    versions = opened(state)
    with versions.locked():
        number = versions.in_use()
        at = versions.version(versions.next_number() - 1 if number is None else number)
        if at.previous is None:
            raise StateError(f"version {at.number} is the first; there is none before it to go back to")
        before = versions.version(at.previous)
        if not versions.intact(before):
            raise StateError(
                f"version {before.number}, which was in use before, is gone or damaged; gate.keep says how many stay"
            )
        reason = f"rolled back from version {at.number} to {before.number}"
        versions.hold(reason)
        versions.use(before.number)
        versions.history.append("rolled_back", version=before.number, of=at.number, reason=reason, by="user")
    return at, before


def release(state: Path) -> bool:
    """Let the agent promote by itself again; return whether it was held.

    Raises:
        StateError, StorageError: as their names say.
    """
    versions = opened(state)
    with versions.locked():
        if versions.held() is None:
            return False
        versions.release()
        versions.history.append("released", version=versions.in_use(), reason="promotion is automatic again", by="user")
    return True


def promote(state: Path, *, force: bool = False) -> Version:
    """Put the newest candidate into use, as the agent's gate would, and end a hold; return its version.

    Args:
        force: whatever the gate says.

    Raises:
        GateError: the gate refuses. StateError: there is no candidate, or its checkpoint is gone.
        StorageError: the disk refused; what was in use still is.
    """
    versions = opened(state)
    with versions.locked():
        number = versions.in_use()
        if number is None:
            raise StateError(f"there is no {versions.model}; run the agent, which makes one")
        at, candidate = versions.version(number), versions.candidate()
        if (at.step, at.bundle) == (candidate.step, candidate.bundle):
            _released(versions)
            return at
        classes, config = _classes(versions, at), GateConfig(**candidate.config)
        decision = decide(config, classes, candidate.labels, candidate.verdicts, at.verdicts)
        if not decision.passes and not force:
            raise GateError(
                f"the candidate of step {candidate.step} is not promoted: {decision.reason}; --force promotes it all "
                "the same"
            )
        score = decision.candidate if decision.candidate.samples else None
        fresh = Version(
            versions.next_number(), at.number, candidate.step, candidate.bundle,
            score=None if score is None else score.plain(classes), against=at.compared(decision.promoted, classes),
            reason=decision.reason, by="user", forced=not decision.passes, verdicts=candidate.verdicts,
        )  # fmt: skip
        with _pinned(versions, state, candidate) as checkpoint:
            base = base_of(versions, candidate.bundle)
            weights = with_checkpoint(base, checkpoint)
            said = {key: value for key, value in base.metadata.items() if key not in ("version", "step", "score")}
            fresh = versions.add(fresh, base.skeleton, weights, said)
        versions.use(fresh.number)
        versions.history.append("promoted", **fresh.entry())
        _released(versions)
        versions.tidy(config.keep)
    return fresh


def _released(versions: Versions) -> None:
    if versions.held() is not None:
        versions.release()


def _classes(versions: Versions, version: Version) -> tuple[str, ...]:
    return onnxfile.classes_of(onnxfile.open_model(versions.file(version.number)))


def base_of(versions: Versions, bundle: str) -> onnxfile.ModelFile:
    """Return the newest version of the bundle with this digest: it has the graph, and the weights that are not trained.

    Raises:
        StateError: none is intact.
    """
    for number in reversed(versions.numbers()):
        version = versions.version(number)
        if version.bundle == bundle and versions.intact(version):
            return onnxfile.open_model(versions.file(number))
    raise StateError(
        "no version of the candidate's bundle is intact, and the graph is in none of the others; run the agent with "
        "gate.automatic = true, which has the bundle"
    )


def with_checkpoint(base: onnxfile.ModelFile, checkpoint: Path) -> dict[str, Place]:
    """Return where the weights lie of the model that ``checkpoint`` holds: those that it lacks are in ``base``."""
    own = places_in(checkpoint)
    return {name: own.get(name) or own.get(f"buffer/{name}") or place for name, place in base.weights.items()}


@contextmanager
def _pinned(versions: Versions, state: Path, candidate: Candidate) -> Iterator[Path]:
    """Have the candidate's checkpoint, under a name of its own: the agent deletes old ones."""
    source, pinned = state / candidate.checkpoint, versions.path / ".checkpoint.tmp"
    with guard(f"cannot use {versions.path}"):
        pinned.unlink(missing_ok=True)
        try:
            os.link(source, pinned)
        except FileNotFoundError:
            raise StateError(
                f"the checkpoint of step {candidate.step}, the newest that was judged, is gone; run the agent on"
            ) from None
        except OSError:  # a file system without hard links
            onnxfile.copy(source, pinned)
    try:
        if not checkpoints.verified(source):
            raise StateError(f"{source} is damaged; run the agent, which goes back to the checkpoint before")
        yield pinned
    finally:
        pinned.unlink(missing_ok=True)


def listing(state: Path) -> dict[str, Any]:
    """Return the promoted models as JSON data: ``in_use`` (a number), ``held`` (why, or None), ``versions`` (those on
    the disk: version, previous, step, score, reason, by, forced), ``history`` (all entries, the oldest first).

    Raises:
        StateError: as its name says.
    """
    versions = opened(state)
    found: list[Mapping[str, Any]] = []
    for number in versions.numbers():
        try:
            found.append(versions.version(number).entry())
        except StateError as error:
            found.append({"version": number, "damaged": str(error)})
    return {
        "model": str(versions.model),
        "in_use": versions.in_use(),
        "held": versions.held(),
        "versions": found,
        "history": list(versions.history.read()),
    }
