"""How good a model is on a source of samples, class by class, measured as a serving process would use it.

The promoted file says itself how an image becomes an input. Knows sources, decoding, and plain ONNX files.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgetune.agent import checkpoint as checkpoints
from edgetune.agent.gate import onnxfile
from edgetune.agent.gate.decision import Score
from edgetune.agent.gate.gatekeeper import verdicts_of
from edgetune.agent.gate.manual import base_of, opened, with_checkpoint
from edgetune.agent.gate.versions import Versions
from edgetune.agent.images import Decoder
from edgetune.agent.ledger import Ledger
from edgetune.agent.samples import every
from edgetune.agent.sources import open_source
from edgetune.bundle import PreprocessSpec
from edgetune.engines.serving import ServedModel
from edgetune.errors import DataError, StateError, UsageError, choices

_BATCH = 32


@dataclass(frozen=True)
class Scored:
    """What :func:`score` found.

    Attributes:
        model: which one, in words. classes: their names. score: on the samples that count.
        statuses: how many of those samples this run's ledger has under which status (``unknown``: not in it).
        skipped: how many entries could not be used, by reason.
    """

    model: str
    classes: tuple[str, ...]
    score: Score
    statuses: dict[str, int]
    skipped: dict[str, int]

    def plain(self) -> dict[str, Any]:
        """Return it as JSON data."""
        told = self.score.plain(self.classes)
        return {"model": self.model, **told, "statuses": self.statuses, "skipped": self.skipped}


def score(
    state: Path, data: str, *, version: int | None = None, candidate: bool = False, heldout: bool = False
) -> Scored:
    """Return how good a model of the run in ``state`` is on the samples of ``data``.

    Args:
        version: a promoted version; None = the one in use.
        candidate: the weights of the newest checkpoint instead, promoted or not.
        heldout: only samples that the run holds out.

    Raises:
        UsageError, DataError, StateError, EngineError: as their names say.
    """
    if candidate and version is not None:
        raise UsageError("a candidate has no version yet; give --version or --candidate, not both")
    versions = opened(state)
    with _model(versions, state, version, candidate) as (name, path):
        said = onnxfile.open_model(path)
        classes, served = onnxfile.classes_of(said), ServedModel(path)
        decoder = Decoder.of(served.shape, _preprocess(said))
        right, of = Counter[int](), Counter[int]()
        statuses, skipped = Counter[str](), Counter[str]()
        x, labels = np.empty((_BATCH, *served.shape), np.float32), list[int]()

        def judge() -> None:
            for label, verdict in zip(labels, verdicts_of(served.predict(x[: len(labels)])), strict=True):
                of[label] += 1
                right[label] += int(verdict == label)
            labels.clear()

        with _ledger(state) as ledger, closing(open_source(data, classes, decoder.suffixes)) as source:
            for entry in every(source):
                try:
                    if entry.problem is not None or entry.label is None:
                        raise DataError(entry.problem or "no label")
                    content = source.read(entry.path)
                    status = _status(ledger, content)
                    if heldout and status != "heldout":
                        continue
                    x[len(labels)] = decoder.decode(content)
                except DataError as error:
                    skipped[str(error)] += 1
                    continue
                statuses[status] += 1
                labels.append(entry.label)
                if len(labels) == _BATCH:
                    judge()
            if labels:
                judge()
    if not of:
        what = "held-out sample of this run" if heldout else "readable sample"
        raise DataError(f"'{data}' holds no {what} of the classes {choices(classes[:20])}")
    by_class = {label: (right[label], of[label]) for label in sorted(of)}
    found = Score(sum(right.values()), sum(of.values()), by_class)
    return Scored(name, classes, found, dict(statuses), dict(skipped))


@contextmanager
def _model(versions: Versions, state: Path, version: int | None, candidate: bool) -> Iterator[tuple[str, Path]]:
    """Have the model that is asked for as a file; told with a name for it."""
    if not candidate:
        number = versions.in_use() if version is None else version
        if number is None or number not in versions.numbers():
            known = choices(map(str, versions.numbers()))
            raise UsageError(f"there is no version {number} on the disk; choose one of: {known}")
        yield f"version {number}", versions.file(number)
        return
    found = checkpoints.load_newest(state, lambda path: None)
    if found is None:
        raise StateError(f"'{state}' has no checkpoint yet; run the agent first")
    base = base_of(versions, str(found.position["bundle"]))
    with tempfile.TemporaryDirectory(prefix="edgetune-") as folder:
        path = Path(folder) / "candidate.onnx"
        onnxfile.write_model(path, base.skeleton, with_checkpoint(base, found.path), base.metadata)
        yield f"the candidate of step {found.step}", path


def _preprocess(model: onnxfile.ModelFile) -> PreprocessSpec:
    try:
        told = json.loads(model.metadata["preprocess"])
        return PreprocessSpec(str(told["color"]), tuple(map(float, told["mean"])), tuple(map(float, told["std"])))
    except (KeyError, ValueError, TypeError) as error:
        raise StateError(f"{model.skeleton.path} does not say how images become inputs ({error})") from None


@contextmanager
def _ledger(state: Path) -> Iterator[Ledger | None]:
    file = state / "ledger.sqlite"
    if not file.is_file():
        yield None
        return
    ledger = Ledger(file, read_only=True)
    try:
        yield ledger
    finally:
        ledger.close()


def _status(ledger: Ledger | None, content: bytes) -> str:
    row = None if ledger is None else ledger.by_content(hashlib.sha256(content).hexdigest())
    return "unknown" if row is None else row.status
