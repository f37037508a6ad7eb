"""The replay buffer of a run: what is kept of trained samples, on the disk, and handed out again in later batches.

What is in it follows from what was trained (``index``), so a run that is killed and goes on from a checkpoint ends
with the same buffer. Its order of writing is that of a checkpoint: files first, synced before the checkpoint that names
them, deleted when no checkpoint names them any more. Knows the ledger's rows, files and features; nothing of sessions.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from edgetune.agent.checkpoint import Checkpoint
from edgetune.agent.journal import Journal
from edgetune.agent.ledger import Ledger, Sample
from edgetune.agent.replay.config import ReplayConfig
from edgetune.agent.replay.index import Contents, Entry, Index, entries_of
from edgetune.agent.replay.packing import pack, packed_bytes, unpack
from edgetune.agent.replay.store import Store, disk_bytes
from edgetune.agent.replay.trunk import trunk_digest
from edgetune.bundle import Array, Bundle
from edgetune.errors import DataError, StorageError, UsageError
from edgetune.units import format_bytes

RAW, FEATURES, NONE = "raw", "features", "none"
DIRECTORY, PART = "replay", "replay"
_STEPS_PER_LIMIT = 16
"""Of raw samples, a step takes in at most this part of the limit: the size of a file is not known beforehand."""
_SUFFIXES = {"float16": "f16", "int8": "i8"}


@dataclass
class _Step:
    """What the step that is being made has written so far, and could not read."""

    written: dict[int, int] = field(default_factory=dict)  # sample -> bytes of its file
    lost: dict[int, str] = field(default_factory=dict)  # sample -> why


class Replay:
    """The buffer in ``state``/replay.

    On the disk it takes at most ``config.limit_bytes``, with what waits for its deletion: the samples in it leave room
    for what four steps can take in, and :attr:`crowded` asks for a checkpoint when what waits has taken half of that.

    Args:
        batch: samples per step.

    Raises:
        UsageError: the limit is too small for the features of this bundle.
    """

    def __init__(
        self,
        state: Path,
        config: ReplayConfig,
        bundle: Bundle,
        journal: Journal,
        ledger: Ledger,
        *,
        batch: int,
        seed: int,
    ) -> None:
        self.config, self.journal, self.ledger, self.batch = config, journal, ledger, batch
        self.kind = config.kind if config.limit_bytes and config.ratio else NONE
        self.step = 0
        self._specs = bundle.manifest.features
        self._identity = {"kind": self.kind}
        suffix = ".raw"
        most_bytes = step_bytes = config.limit_bytes // _STEPS_PER_LIMIT
        if self.kind == FEATURES:
            trunk = trunk_digest(bundle)
            self._identity |= {"precision": config.precision, "trunk": trunk}
            suffix = f".{trunk[:16]}.{_SUFFIXES[config.precision]}"
            most_bytes = disk_bytes(packed_bytes(self._specs, config.precision))
            step_bytes = batch * most_bytes
            if config.limit_bytes < 5 * step_bytes:
                raise UsageError(
                    f"replay.limit_bytes is {format_bytes(config.limit_bytes)}; the features of a batch take "
                    f"{format_bytes(step_bytes)}, and the buffer needs five times that: give at least "
                    f"{format_bytes(5 * step_bytes)}, int8, raw samples, or a smaller batch"
                )
        self._most_bytes, self._step_bytes = most_bytes, step_bytes
        self._suffix = suffix
        self._classes = len(bundle.manifest.classes) if config.choice == "balanced" else 0
        self._seed = seed
        self._store = Store(state / DIRECTORY, suffix)
        self._index = self._new_index()
        self._now = _Step()
        self._leaving: dict[int, int] = {}  # sample -> the step before which it leaves
        self._told_large = False

    def __len__(self) -> int:
        return len(self._index)

    @property
    def share(self) -> int:
        """How many samples of the next batch are replayed."""
        return self.share_of(len(self._index))

    def share_of(self, kept: int) -> int:
        """Return how many samples of a batch are replayed while ``kept`` are in the buffer."""
        if self.kind == NONE:
            return 0
        return min(round(self.config.ratio * self.batch), self.batch - 1, kept)

    @property
    def taken_bytes(self) -> int:
        """What the buffer takes on the disk, with what waits for its deletion."""
        return self._index.bytes + self._store.waiting_bytes + sum(map(disk_bytes, self._now.written.values()))

    @property
    def memory_bytes(self) -> int:
        """What the buffer takes in memory."""
        return self._index.memory_bytes

    @property
    def crowded(self) -> bool:
        """Whether so much waits for its deletion that a checkpoint should be made, from which on it is not needed."""
        return self._store.waiting_bytes > 0 and self.taken_bytes > self.config.limit_bytes - 2 * self._step_bytes

    # ---- a step --------------------------------------------------------------------------------------------------
    def draw(self, without: Collection[int]) -> Iterator[Sample]:
        """Yield the samples to be replayed in the next step, in the order in which they are drawn: all of the buffer
        but those in ``without``; the caller takes as many as it needs."""
        for entry in self._index.draw(self.step + 1, without):
            yield replace(self.ledger.get(entry.sample), replayed=True)

    @property
    def lost(self) -> int:
        """How many samples of this step's draw could not be read."""
        return len(self._now.lost)

    def begin_step(self) -> None:
        """Forget what a step that came to nothing has written, and let go of what was quarantined."""
        for sample in self._now.written:
            self._store.drop(self.ledger.get(sample).sha256, 0, self.step)
        gone = [sample for sample, step in self._leaving.items() if step <= self.step + 1]
        self._drop(self._index.remove([*gone, *self._now.lost]), self.step + 1)
        for sample in gone:
            del self._leaving[sample]
        self._now = _Step()

    def quarantined(self, sample: int, step: int | None) -> None:
        """Note that a sample is out of use from ``step`` on (None: the next one).

        Until then it stays: a run that goes on from an earlier checkpoint has to draw what was drawn.
        """
        if self.kind != NONE and self._index.find(sample) is not None:
            self._leaving[sample] = self.step + 1 if step is None else step

    def read(self, sample: Sample) -> bytes:
        """Return the file of a raw sample, whatever has become of it in the source.

        Raises:
            DataError: it is damaged or gone.
        """
        return self._store.read(sample.sha256)

    def features(self, sample: Sample) -> tuple[Array, ...]:
        """Return the features of a sample, without a batch axis.

        Raises:
            DataError: they are damaged or gone.
        """
        return unpack(self._store.read(sample.sha256), self._specs, self.config.precision)

    def holds(self, sample: Sample) -> bool:
        """Return whether the sample is in the buffer."""
        return self.kind != NONE and self._index.find(sample.id) is not None

    def lose(self, sample: Sample, reason: str) -> None:
        """Note that a sample could not be read back; it leaves the buffer."""
        self._now.lost[sample.id] = reason
        text = f"{sample.path} cannot be replayed any more: {reason}"
        self.journal.event("replay_lost", text, path=sample.path, reason=reason)

    def keep(
        self,
        samples: Sequence[Sample],
        features: Sequence[Array],
        rows: Sequence[int],
        read: Callable[[Sample], bytes],
    ) -> None:
        """Write what may come into the buffer, of samples that are trained for the first time in this step.

        Args:
            features: [b, ...] each; the samples' are in ``rows`` of them. read: returns a sample's content as it was
                recorded.
        """
        if self.kind == NONE:
            return
        for row, sample in zip(rows, samples, strict=True):
            assert sample.label is not None
            if not self._index.would_take(sample.sha256, sample.label):
                continue
            if not self._fits(sample, disk_bytes(self._file_bytes(sample))):
                continue
            try:
                content = (
                    read(sample)
                    if self.kind == RAW
                    else pack([value[row] for value in features], self.config.precision)
                )
                if self._fits(sample, disk_bytes(len(content))):
                    self._store.write(sample.sha256, content)
                    self._now.written[sample.id] = len(content)
            except DataError as error:
                self.journal.event("replay_lost", f"{sample.path} cannot be kept: {error}", path=sample.path)
            except StorageError as error:
                self.journal.storage_error(error)

    def commit(self, step: int, first: Iterable[Sample], replayed: Iterable[Sample]) -> None:
        """Take note of a step that is made: the samples trained for the first time come into the buffer, or not."""
        self.step = step
        if self.kind == NONE:
            return
        self.ledger.mark_replayed((sample.id for sample in replayed), step)
        for sample in first:
            size_bytes = self._now.written.pop(sample.id, None)
            known_bytes = disk_bytes(self._file_bytes(sample) if size_bytes is None else size_bytes)
            assert sample.label is not None
            entry = Entry(sample.id, sample.sha256, sample.label, known_bytes)
            taken, left = self._index.offer(entry, stored=size_bytes is not None)
            if taken:
                self.ledger.mark_kept(sample.id, True)
            elif size_bytes is not None:
                self._store.drop(sample.sha256, 0, step)
            self._drop(left, step)
        self._drop(self._index.remove(list(self._now.lost)), step)
        self.begin_step()

    # ---- a checkpoint --------------------------------------------------------------------------------------------
    def sync(self) -> None:
        """Put all files on the disk, before a checkpoint refers to them.

        Raises:
            StorageError: the disk refused.
        """
        self._store.sync()

    def to_plain(self) -> dict[str, Any]:
        """Return the state but for the entries as JSON data."""
        return {**self._identity, "suffix": self._suffix, **self._index.to_plain()}

    def arrays(self) -> dict[str, Array]:
        """Return the entries, for a checkpoint."""
        return {} if self.kind == NONE else {PART: self._index.array()}

    def tidy(self, oldest_step: int) -> None:
        """Delete files that no checkpoint refers to, now that none before ``oldest_step`` is kept."""
        self._store.tidy(oldest_step, self._index.holds)

    def restore(self, found: Checkpoint | None, others: Iterable[Checkpoint]) -> None:
        """Take up the state that a checkpoint holds; None: begin empty. What cannot be used is named in the log.

        Args:
            others: the other checkpoints that are kept.

        Raises:
            StateError: the checkpoint contradicts itself. StorageError: the ledger could not be written.
        """
        self._index, self._now = self._new_index(), _Step()
        self.step = 0 if found is None else found.step
        known: Mapping[str, Any] = {} if found is None else found.position.get("replay") or {}
        unused: list[tuple[str, Contents]] = []
        for checkpoint in (*(() if found is None else (found,)), *others):
            if PART in checkpoint.parts:
                held = Contents(entries_of(checkpoint.parts[PART]))
                unused.append((checkpoint.position["replay"]["suffix"], held))
        if found is not None and PART in found.parts:
            if {name: known.get(name) for name in self._identity} == self._identity:
                self._index.load(known, found.parts[PART])
            else:
                self._tell_dropped(known, len(unused[0][1]))
        there = self._store.begin(self._index.contents(), unused, self.step)
        if not there.all():
            gone = self._index.remove(self._index.samples()[~there])
            text = f"{len(gone)} files of the replay buffer are missing; it goes on without them"
            self.journal.event("replay_lost", text, samples=len(gone))
        self._leaving = {}
        for sample in self.ledger.set_replayable(self._index.samples()):
            row = self.ledger.find(sample)
            if row is None:  # forgotten since, by a checkpoint that is lost
                self._drop(self._index.remove([sample]), self.step + 1)
            else:
                self.quarantined(sample, row.step)

    # ---- within --------------------------------------------------------------------------------------------------
    def _new_index(self) -> Index:
        capacity_bytes = 0 if self.kind == NONE else self.config.limit_bytes - 4 * self._step_bytes
        return Index(capacity_bytes, self._most_bytes, self._classes, self._seed)

    def _file_bytes(self, sample: Sample) -> int:
        return sample.size if self.kind == RAW else packed_bytes(self._specs, self.config.precision)

    def _fits(self, sample: Sample, size_bytes: int) -> bool:
        """Return whether a file may be written: not if it is too large, or if the disk refused to make room."""
        if size_bytes > self._most_bytes and not self._told_large:
            self._told_large = True
            text = (
                f"{sample.path} takes {format_bytes(size_bytes)}; the replay buffer takes no sample beyond "
                f"{format_bytes(self._most_bytes)}: give a larger replay.limit_bytes for such (this is said once)"
            )
            self.journal.event("replay_too_large", text, path=sample.path, bytes=size_bytes)
        step_bytes = sum(map(disk_bytes, self._now.written.values())) + size_bytes
        return (
            size_bytes <= self._most_bytes
            and step_bytes <= self._step_bytes
            and (self.taken_bytes + size_bytes <= self.config.limit_bytes)
        )

    def _drop(self, entries: Iterable[Entry], step: int) -> None:
        """Let go of the files of what left the index before the checkpoint of ``step``."""
        for entry in entries:
            self._store.drop(entry.digest, entry.bytes, step)
            self.ledger.mark_kept(entry.sample, False)

    def _tell_dropped(self, known: Mapping[str, Any], count: int) -> None:
        changed = [name for name, value in self._identity.items() if known.get(name) != value]
        if changed == ["trunk"]:
            why = f"they were made by another trunk ({known['trunk'][:16]}; now {self._identity['trunk'][:16]})"
        else:
            why = ", ".join(f"{name} was {known.get(name)}, is {self._identity[name]}" for name in changed)
        text = f"the replay buffer's {count} samples are dropped: {why}"
        self.journal.event("replay_dropped", text, samples=count, reason=why)
