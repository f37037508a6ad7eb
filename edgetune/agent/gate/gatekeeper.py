"""The gate at work in a run: judges the present weights, and puts them into use where the gate lets them.

1. The weights are judged on the held-out set. 2. They become a checkpoint. 3. What has passed is made into a version
out of that checkpoint, and put into use. A crash after 2 is made good at the next start: the checkpoint says that its
step was judged, and the history does not know of it. Nothing here changes what is trained. Knows a run's work.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from edgetune.agent import checkpoint as checkpoints
from edgetune.agent.checkpoint import Checkpoint
from edgetune.agent.gate import onnxfile
from edgetune.agent.gate.decision import Decision, decide, tally
from edgetune.agent.gate.heldout import choose
from edgetune.agent.gate.tasks import Tasks
from edgetune.agent.gate.versions import Candidate, Version, Versions
from edgetune.agent.ledger import Sample
from edgetune.bundle import Array, Place, places_in
from edgetune.errors import BundleError, MemoryExhaustedError, StateError, StorageError

if TYPE_CHECKING:
    from edgetune.agent.work import Work

_KEY_DIGITS = 16  # of a content's hash: 64 bits tell the held-out samples of a run apart


class Gatekeeper:
    """The gate of the run ``work``. ``judged_step`` is that of the last evaluation."""

    def __init__(self, work: Work) -> None:
        self._work, self._config = work, work.config.gate
        self.versions = Versions(work.keeper.path)
        self.judged_step: int | None = None
        self.tasks = Tasks()
        self._verdicts: dict[str, int] = {}
        self._rows: dict[str, Sample] = {}

    # -- the first version ------------------------------------------------------------------------------------------
    def open(self) -> None:
        """Make sure that there is an intact model in use: the exported one, if there was none yet."""
        try:
            with self.versions.locked():
                self._mend()
                self.versions.drop_unused()
                self._remember()
                if self.versions.in_use() is None:
                    bundle = self._work.bundle
                    first = Version(self.versions.next_number(), None, 0, bundle.digest, reason="the exported model")
                    self._put_into_use(first, onnxfile.inference_places(bundle))
                self.versions.tidy(self._config.keep)
        except (StorageError, StateError, BundleError) as error:
            self._failed(error)

    def _mend(self) -> None:
        """Go back to the newest intact version where the one in use is damaged."""
        versions, journal = self.versions, self._work.journal
        try:
            at = versions.in_use()
            if at is None or versions.intact(versions.version(at)):
                return
            text = f"{versions.file(at).name} is not the file that was promoted (its SHA-256 differs)"
        except StateError as error:
            at, text = None, str(error)
        for number in reversed(versions.numbers()):
            try:
                if number != at and versions.intact(versions.version(number)):
                    versions.use(number)
                    break
            except StateError:
                continue
        else:
            number = 0
            versions.model.unlink(missing_ok=True)
        instead = f"version {number}" if number else "the exported model"
        journal.event("promoted_damaged", f"{text}; {instead} is used", version=number or None)

    def _remember(self) -> None:
        """Write into the history what is in use, if a crash came before that was done."""
        at = self.versions.in_use()
        if at is not None and at not in {entry.get("version") for entry in self.versions.history.read()}:
            self.versions.history.append("promoted", **self.versions.version(at).entry())

    # -- evaluation -------------------------------------------------------------------------------------------------
    def due(self, step: int) -> bool:
        """Return whether the weights after ``step`` are to be judged."""
        every = self._config.every
        return every is None or self.judged_step is None or step - self.judged_step >= every

    def evaluate(self) -> float | None:
        """Judge the present weights on the held-out set and return their accuracy; None if there is no sample.

        Where memory runs out the evaluation is left out, and the last accuracy is returned.
        """
        work = self._work
        rows = self._heldout()
        if not rows:
            return None
        started = time.perf_counter()
        work.begin_measuring()
        try:
            verdicts = self._judge(rows)
        except MemoryExhaustedError as error:
            text = str(error)
        else:
            self._verdicts, self._rows, self.judged_step = verdicts, rows, work.step
            score = tally(verdicts, self._labels())
            work.accuracy = score.accuracy
            by_task = self._by_task()
            self.tasks.judged(by_task)
            peak_bytes = work.feeder.peak_bytes(work.parts.meter)
            work.journal.event(
                "evaluated", "" if score.accuracy is None else f"held-out accuracy {score.accuracy:.1%}",
                step=work.step, accuracy=score.accuracy, correct=score.right, samples=score.samples,
                classes=score.plain(work.bundle.manifest.classes)["classes"], tasks=by_task,
                measured_peak_bytes=max(peak_bytes, work.feeder.decode_peak_bytes),
                seconds={"evaluate": round(time.perf_counter() - started, 6)},
            )  # fmt: skip
            work.judge("the evaluation", peak_bytes)
            return work.accuracy
        work.enforcer.exhausted(f"at step {work.step}, in the evaluation, which is left out: {text}")
        return work.accuracy

    def _heldout(self) -> dict[str, Sample]:
        """Return the held-out set by content."""
        ledger = self._work.ledger
        rows = ((row, content, (task, label)) for row, content, label, task in ledger.heldout())
        chosen = choose(rows, self._work.seed, self._config.most_heldout)
        return {sample.sha256[:_KEY_DIGITS]: sample for sample in map(ledger.get, chosen)}

    def _labels(self) -> dict[str, int]:
        return {content: sample.label for content, sample in self._rows.items() if sample.label is not None}

    def _by_task(self) -> dict[str, tuple[int, int]]:
        """Return how many of the judged samples of each task are right, and how many there are."""
        labels = self._labels()
        names = {row.task for row in self._rows.values() if row.task is not None}
        found = {}
        for task in sorted(names):
            own = {content: labels[content] for content, row in self._rows.items() if row.task == task}
            score = tally(self._verdicts, own)
            if score.samples:
                found[task] = (score.right, score.samples)
        return found

    def _judge(self, rows: Mapping[str, Sample]) -> dict[str, int]:
        """Return the verdicts of the session's present weights; what cannot be read any more is quarantined."""
        work, found = self._work, dict[str, int]()
        for fed in work.feeder.images(list(rows.values()), work.budgeter.plan.micro_batch):
            work.supply.quarantine(fed.bad)
            if fed.samples:
                with work.computing("the evaluation"):
                    outputs = work.session.predict(fed.features[0])
                for sample, verdict in zip(fed.samples, verdicts_of(outputs), strict=True):
                    found[sample.sha256[:_KEY_DIGITS]] = verdict
        return found

    # -- the decision -----------------------------------------------------------------------------------------------
    def consider(self) -> None:
        """Decide on the weights of the newest checkpoint, if they were judged: put them into use, or say why not."""
        work = self._work
        if self.judged_step != work.step or work.keeper.saved_step != work.step:
            return
        try:
            at = self._promoted()
            with self.versions.locked():
                self._settle(at)
        except MemoryExhaustedError as error:
            text = str(error)
        except (StorageError, StateError, BundleError) as error:
            self._failed(error)
            return
        else:
            return
        work.enforcer.exhausted(f"at step {work.step}, in judging the promoted model, which is left out: {text}")

    def catch_up(self) -> None:
        """Decide on a checkpoint that was judged, but nobody knows with what result: a crash came in between."""
        work = self._work
        if self.judged_step != work.step or work.keeper.saved_step != work.step:
            return
        digest = work.bundle.digest
        entries = (entry for entry in self.versions.history.read() if entry.get("bundle") == digest)
        if work.step and work.step not in {entry.get("step") for entry in entries}:
            self.evaluate()
            self.consider()

    def _promoted(self) -> Version:
        """Return the version in use, with a verdict on every sample of the held-out set if that can be had."""
        number = self.versions.in_use()
        if number is None:
            self.open()
            number = self.versions.in_use()
        if number is None:
            raise StateError(f"there is no model in {self.versions.path}")
        at, work = self.versions.version(number), self._work
        missing = {content: row for content, row in self._rows.items() if content not in at.verdicts}
        if not missing or at.bundle != work.bundle.digest:
            return at
        if at.step == work.step:
            fresh: Mapping[str, int] = self._verdicts
        else:
            fresh = self._judged_by(at, missing)
        # Only what may still be asked: months of held-out samples would fill the file.
        known = {content: verdict for content, verdict in at.verdicts.items() if content in self._rows}
        return dataclasses.replace(at, verdicts={**known, **{c: v for c, v in fresh.items() if c in missing}})

    def _judged_by(self, version: Version, rows: Mapping[str, Sample]) -> dict[str, int]:
        """Return the verdicts of ``version``: its weights are in the session for a while, in the place of those that
        the checkpoint holds."""
        work = self._work
        found = self._checkpoint()
        stored = onnxfile.open_model(self.versions.file(version.number)).weights
        work.begin_measuring()
        try:
            work.session.load_state(_Replaced(found.tensors, {name: place.read for name, place in stored.items()}))
            verdicts = self._judge(rows)
            peak_bytes = work.feeder.peak_bytes(work.parts.meter)
        finally:
            work.session.load_state(found.tensors)
        work.judge("the evaluation of the promoted model", peak_bytes)
        return verdicts

    def _checkpoint(self) -> Checkpoint:
        """Return the checkpoint of this step, its hash verified."""
        found = self._work.keeper.newest()
        if found is None or found.step != self._work.step:
            raise StateError(f"the checkpoint of step {self._work.step} is gone or damaged")
        return found

    def _settle(self, at: Version) -> None:
        work, versions, labels = self._work, self.versions, self._labels()
        digest, checkpoint = work.bundle.digest, checkpoints.listed(work.keeper.path)[0][1]
        settings = dataclasses.asdict(self._config)
        versions.set_candidate(Candidate(work.step, digest, checkpoint.name, self._verdicts, labels, settings))
        if versions.in_use() != at.number:
            return  # somebody rolled back meanwhile; the next candidate is compared with what is in use then
        versions.note(at)
        if (at.step, at.bundle) == (work.step, digest):
            return
        decision = decide(self._config, work.bundle.manifest.classes, labels, self._verdicts, at.verdicts)
        names = work.bundle.manifest.classes
        score, against = decision.candidate.plain(names), at.compared(decision.promoted, names)
        refused = self._refused(decision)
        if refused is not None:
            versions.history.append(
                "refused", step=work.step, bundle=digest, score=score, against=against, reason=refused, by="agent"
            )
            work.journal.event("not_promoted", step=work.step, reason=refused)
            return
        fresh = Version(
            versions.next_number(), at.number, work.step, digest, score=score, against=against, reason=decision.reason,
            verdicts=self._verdicts,
        )  # fmt: skip
        self._put_into_use(fresh, onnxfile.inference_places(work.bundle, places_in(self._checkpoint().path)))

    def _refused(self, decision: Decision) -> str | None:
        if not decision.passes:
            return decision.reason
        held = self.versions.held()
        if held is not None:
            return (
                f"held since a rollback ({held}; 'edgetune promote' ends that), though it would pass: {decision.reason}"
            )
        if not self._config.automatic:
            return f"gate.automatic is false ('edgetune promote' promotes it), though it would pass: {decision.reason}"
        return None

    def _put_into_use(self, version: Version, weights: Mapping[str, Place]) -> None:
        work, versions = self._work, self.versions
        started = time.perf_counter()
        written = versions.add(version, onnxfile.skeleton_of(work.bundle), weights, onnxfile.about(work.bundle))
        versions.use(written.number)
        versions.history.append("promoted", **written.entry())
        versions.tidy(self._config.keep)
        work.journal.event(
            "promoted", f"version {written.number} is in use: {written.reason}", step=work.step, version=written.number,
            bytes=versions.model.stat().st_size, seconds={"promote": round(time.perf_counter() - started, 6)},
        )  # fmt: skip

    def _failed(self, error: Exception) -> None:
        """Training goes on without the gate; what was in use still is."""
        self._work.journal.event("promotion_failed", str(error), step=self._work.step)

    # -- the checkpoint's part --------------------------------------------------------------------------------------
    def to_plain(self) -> dict[str, Any]:
        """Return what a checkpoint holds of the gate, as JSON data."""
        return {"judged_step": self.judged_step, "tasks": self.tasks.to_plain()}

    def from_plain(self, told: Mapping[str, Any] | None) -> None:
        """Take what :meth:`to_plain` returned; None: a checkpoint from before there was a gate."""
        self.judged_step = None if told is None else told["judged_step"]
        self.tasks = Tasks() if told is None else Tasks.from_plain(told["tasks"])


def verdicts_of(outputs: Array) -> list[int]:
    """Return the class of each row [b, classes]; -1 where the row is not finite."""
    return [int(np.argmax(row)) if np.isfinite(row).all() else -1 for row in outputs]


class _Replaced(Mapping[str, Array]):
    """The tensors of a checkpoint with other weights in the places of some, each read when it is asked for."""

    def __init__(self, tensors: Mapping[str, Array], weights: Mapping[str, Callable[[], Array]]) -> None:
        self._tensors, self._weights = tensors, weights

    def __getitem__(self, name: str) -> Array:
        read = self._weights.get(name.removeprefix("buffer/"))
        return self._tensors[name] if read is None else read()

    def __iter__(self) -> Any:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)
