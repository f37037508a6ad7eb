"""Which samples come next: the pool of samples with passes to make, filled from the source through the intake.

Knows the ledger, the intake and the journal; nothing of training.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice

from edgetune.agent.config import AgentConfig
from edgetune.agent.intake import Intake, Taken
from edgetune.agent.journal import Journal
from edgetune.agent.ledger import Ledger, Sample
from edgetune.agent.order import HELDOUT, Pool, key
from edgetune.agent.refresher import LEAST_SAMPLES
from edgetune.agent.replay.buffer import NONE, Replay
from edgetune.agent.sources import Source
from edgetune.errors import DataError, StorageError

_MOST_REPORTED = 50
_MOST_CONSIDERED = 1024  # rows to be forgotten, per look


def _gone(source: Source, path: str) -> bool:
    """Return whether the source says that the entry is not there; one that cannot be read now may come back."""
    try:
        source.stat(path)
    except DataError as error:
        return str(error).startswith("missing")
    return False


class Supply:
    """Hands out samples.

    Args:
        batch: how many samples make a batch. stopping: whether the agent was asked to stop.
    """

    def __init__(
        self,
        config: AgentConfig,
        intake: Intake,
        ledger: Ledger,
        journal: Journal,
        *,
        replay: Replay,
        batch: int,
        seed: int,
        stopping: Callable[[], bool],
    ) -> None:
        self.config, self.intake, self.ledger, self.journal, self.replay = config, intake, ledger, journal, replay
        self.batch, self.seed, self.stopping = batch, seed, stopping
        # Before the first look, so that nothing that arrives in between goes unseen.
        source = intake.source
        self._waiter = None if config.once and source.growing else source.waiter(config.rescan_seconds)
        self._look_failed = False
        self._considered = 0
        self._unsettled = 0
        self._told_waiting = False
        self.quarantined = ledger.counts()["quarantined"]
        self._told_full = self._gave_in = False
        self._newest_step = 0
        self.pool = self._empty_pool()

    def steps_left(self) -> int | None:
        """Return how many steps remain with ``once``: each pass is cut into batches of its own. None: nobody knows."""
        if not self.over:
            return None
        made = Counter(passes for _, _, passes in self.ledger.trainable())
        steps, kept = 0, len(self.replay)
        for epoch in range(self.config.epochs):
            left = sum(count for passes, count in made.items() if passes <= epoch)
            while left > 0:
                new = min(left, self.batch - self.replay.share_of(kept))
                steps, left, kept = steps + 1, left - new, kept + (new if self.replay.kind != NONE else 0)
        return steps

    @property
    def needed(self) -> int:
        """How many new samples the next batch has."""
        return self.batch - self.replay.share

    @property
    def _wanted(self) -> int:
        """How many samples of the pool there must be before a batch is drawn."""
        if self.config.intake.window is None:
            return self.needed
        # Calibrations look ahead. With a window they must always see as much, or what they find depends on arrivals.
        return self.batch * max(self.config.calibration_batches, -(-LEAST_SAMPLES // self.batch))

    @property
    def epoch(self) -> int:
        """The pass (0-based) of the next sample."""
        return self.pool.epoch

    @property
    def over(self) -> bool:
        """Whether nothing new will be taken in any more."""
        source = self.intake.source
        return (self.config.once or not source.growing) and source.ended()

    @property
    def stalled(self) -> bool:
        """Whether the source gives nothing more before something is trained, and stored."""
        return self.intake.source.stalled()

    def ready(self) -> bool:
        """Return whether there is a batch: a full one, or whatever is left when nothing more comes."""
        if len(self.pool) >= self._wanted or (self._gave_in and len(self.pool)):
            return True
        if not self.over:
            return False
        if not len(self.pool) and self._look_failed:
            self.look()
        self.pool.end()
        return len(self.pool) > 0

    def taker(self, passes: dict[int, int], bad: Sequence[object] = ()) -> Callable[[], Sample | None]:
        """Return what hands out the samples of one batch: those of the pool, then those that are replayed.

        With ``once`` a batch does not reach into the next pass, so the last one of each pass may be short. Nothing is
        replayed where there is nothing new.

        Args:
            passes: receives the samples of the pool, with how often each was trained before. bad: grows by those of
                them that cannot be read.
        """
        epoch = self.pool.epoch if self.config.once else None
        needed, share = self.needed, self.replay.share
        replayed: Iterator[Sample] | None = None
        handed = 0
        self.replay.begin_step()

        def take() -> Sample | None:
            nonlocal replayed, handed
            good = len(passes) - len(bad)
            if good < needed and (entry := self.pool.take(epoch)) is not None:
                passes[entry[0]] = entry[1]
                return self._row(entry)
            if good == 0 or handed - self.replay.lost >= share:
                return None
            replayed = self.replay.draw(passes) if replayed is None else replayed
            handed += 1
            return next(replayed, None)

        return take

    def preview(self, count: int) -> list[Sample]:
        """Return the next ``count`` samples without handing them out; where there are fewer, replayed ones besides."""
        rows = [self._row(entry) for entry in self.pool.peek(count)]
        if len(rows) < count and self.replay.share:
            rows += islice(self.replay.draw({row.id for row in rows}), count - len(rows))
        return rows

    def _row(self, entry: tuple[int, int]) -> Sample:
        """Return the row of a sample with the number of its passes so far, of which the disk does not know yet."""
        return replace(self.ledger.get(entry[0]), passes=entry[1])

    def trained(self, samples: Iterable[Sample], passes: dict[int, int], step: int) -> None:
        """Note that ``step`` trained ``samples`` and put those of the pool back for their next pass."""
        rows = list(samples)
        mine = [row for row in rows if not row.replayed]
        self.ledger.mark_trained((row.id for row in mine), step)
        for row in mine:
            self.pool.add(row.id, row.sha256, passes[row.id] + 1)
        self.replay.commit(step, (row for row in mine if not passes[row.id]), (row for row in rows if row.replayed))
        self._gave_in = False
        self._tell_the_source()

    def kept(self, oldest_step: int, newest_step: int) -> None:
        """Let the source give up its copies of what is trained for good: every checkpoint that is kept has it, and they
        are of ``oldest_step`` and ``newest_step``."""
        self._newest_step = newest_step
        self._let_go(oldest_step)

    def _let_go(self, through_step: int) -> int:
        """Release what was trained for good up to ``through_step``, and what is quarantined; return how many."""
        source, done, heldout = self.intake.source, list[str](), list[Sample]()
        held = source.held()
        for path in held:
            row = self.ledger.by_path(path)
            if row is None or row.status == "quarantined":
                done.append(path)
            elif row.status == "heldout":
                heldout.append(row)
            elif row.passes >= self.config.epochs and row.step is not None and row.step <= through_step:
                done.append(path)
        left_bytes, surplus = self.config.intake.spool_bytes // 2, list[Sample]()
        for row in sorted(heldout, key=lambda row: key(self.seed, HELDOUT, row.sha256)):
            left_bytes -= held[row.path]
            if left_bytes < 0:
                surplus.append(row)
        self.quarantine((row, "held out, but half of intake.spool_bytes is full of such samples") for row in surplus)
        done += [row.path for row in surplus]
        source.release(done)
        return len(done)

    def _make_room(self) -> None:
        """End a standstill: there is no batch, and the source gives nothing more before something is trained."""
        # Both checkpoints ought to hold what is given up. Here it is that, or nothing goes on.
        if self._let_go(self._newest_step):
            return
        self.pool.give_in()
        self._gave_in = True
        if not self._told_full:
            self._told_full = True
            count = len(self.pool)
            text = "the source is full, and there is no batch: "
            text += "a short one is trained" if count else "nothing can be let go of"
            self.journal.event("source_full", f"{text}; raise intake.spool_bytes or intake.max_pending", samples=count)

    def _tell_the_source(self) -> None:
        self.intake.source.heed(max(0, len(self.pool) + self.pool.waiting - self._wanted))

    def _empty_pool(self) -> Pool:
        strict = self.config.once and not self.intake.source.growing
        return Pool(self.seed, self.config.epochs, self.config.intake.window, strict=strict)

    def give_back(self, samples: Iterable[Sample], passes: dict[int, int]) -> None:
        """Put samples that were handed out, but not trained, back in their places."""
        for row in samples:
            self.pool.add(row.id, row.sha256, passes[row.id])

    def rebuild(self) -> None:
        """Fill the pool from the ledger: at the start, and after training marks were taken back."""
        self.pool = self._empty_pool()
        for sample, content, passes in self.ledger.trainable():
            self.pool.add(sample, content, passes)
        self.pool.arrived(self.ledger.last_id())
        self._tell_the_source()

    def look(self) -> None:
        """Take in what is new in the source; with ``once``, until every file is settled.

        Raises:
            DataError: the source failed, and with ``once`` nobody waits for it.
        """
        try:
            taken = (self.intake.look_until_settled if self.config.once else self.intake.look)(self.stopping)
            self.intake.source.check()
        except DataError as error:
            if self.config.once:
                raise
            self.journal.event("source_failed", f"{error}; it is opened again", reason=str(error))
            self.rebuild()
            return
        except StorageError as error:
            self._look_failed = True
            self.journal.storage_error(error)
            self.rebuild()  # rows recorded before the disk refused are in the ledger already
            return
        self._look_failed = False
        self._absorb(taken)
        self._forget()

    def wait(self) -> None:
        """Wait for a change in the source (or a while), then look."""
        if not self._told_waiting:
            self._told_waiting = True
            needed, waiting = self._wanted - len(self.pool), self.pool.waiting
            text = f"waiting for {needed} more samples"
            text += f"; {waiting} wait until their shuffle window of {self.pool.window} is full" if waiting else ""
            self.journal.event("waiting", text, samples=needed, window=waiting)
        timeout_seconds = self.config.settle_seconds / 2 if self._unsettled else self.config.rescan_seconds
        if self._waiter is None:
            return
        self._waiter.wait(timeout_seconds, self.stopping)
        if not self.stopping():
            self.look()
        if self.ready():
            self._told_waiting = False
        elif self.stalled:
            self._make_room()

    def quarantine(self, samples: Iterable[tuple[Sample, str]], step: int | None = None) -> None:
        """Take samples out of use, each with its reason."""
        for sample, reason in samples:
            try:
                self.ledger.quarantine([sample.id], reason, step)
            except StorageError as error:
                self.journal.storage_error(error)
            self.replay.quarantined(sample.id, step)
            self._report([(sample.path, reason)])

    def no_data(self) -> DataError | StorageError:
        """Return the error for a run that has nothing to train on."""
        if self._look_failed:
            return StorageError("the samples could not be recorded: the disk refuses writes to the state directory")
        counts = self.ledger.counts()
        convention = "put images into folder/<label>/ or list them in folder/metadata.jsonl"
        if not any(counts.values()):
            return DataError(f"the data folder '{self.intake.source.spec}' holds no samples: {convention}")
        text = f"nothing to train on: {counts['quarantined']} files are quarantined, {counts['heldout']} held out"
        first = next((row for row in self.ledger.samples() if row.status == "quarantined"), None)
        return DataError(text if first is None else f"{text}; the first: {first.path}: {first.reason}; {convention}")

    def _forget(self) -> None:
        """Forget the oldest finished rows that the source does not give any more, beyond what is to be remembered.

        A look considers so many rows at most, and the next one goes on behind them.
        """
        excess, source = len(self.ledger) - self.config.remember, self.intake.source
        if excess <= 0 or source.absent() is not None:
            return
        rows = self.ledger.finished(self.config.epochs, self._considered, _MOST_CONSIDERED)
        gone = [sample for sample, path, newer in rows if newer or _gone(source, path)][:excess]
        self._considered = rows[-1][0] if len(rows) == _MOST_CONSIDERED else 0
        if not gone:
            return
        try:
            self.ledger.forget(gone)
            self.journal.event("forgot", samples=len(gone), remembered=len(self.ledger))
        except StorageError as error:
            self.journal.storage_error(error)

    def _absorb(self, taken: Taken) -> None:
        self._unsettled = taken.unsettled
        self.pool.arrived(max((row.id for row in (*taken.accepted, *taken.quarantined)), default=0))
        for row in taken.accepted:
            if row.status == "new":
                self.pool.add(row.id, row.sha256, row.passes)
        self._tell_the_source()
        self._report([(row.path, row.reason or "") for row in taken.quarantined])
        if taken.accepted:
            held = sum(1 for row in taken.accepted if row.status == "heldout")
            message = f"{len(taken.accepted)} new samples, {held} of them held out"
            self.journal.event("arrived", message, samples=len(taken.accepted), heldout=held)

    def _report(self, refused: list[tuple[str, str]]) -> None:
        self.quarantined += len(refused)
        for path, reason in refused[:_MOST_REPORTED]:
            self.journal.event("quarantined", f"quarantined {path}: {reason}", path=path, reason=reason)
        if len(refused) > _MOST_REPORTED:
            more = len(refused) - _MOST_REPORTED
            self.journal.event("quarantined", f"quarantined {more} more files; see 'edgetune status'", samples=more)
