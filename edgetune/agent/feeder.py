"""From ledger rows to features: decodes one micro-batch of files at a time and runs the trunk on it.

Never more than a micro-batch of decoded samples is in memory. Knows the source, the decoder, the ledger's rows and a
session; nothing of steps or checkpoints.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np

from edgetune.agent.augment import Augmentation
from edgetune.agent.cache import FeatureCache
from edgetune.agent.images import Decoder
from edgetune.agent.ledger import Sample
from edgetune.agent.parts import Meter, Session
from edgetune.agent.replay.buffer import FEATURES, RAW, Replay
from edgetune.agent.sources import Source
from edgetune.bundle import Array
from edgetune.errors import DataError

Computing: TypeAlias = "Callable[[str], AbstractContextManager[None]]"
"""Makes the block in which a session computes what is named."""


def _freely(what: str) -> AbstractContextManager[None]:
    return nullcontext()


def _unchanged(data: bytes, sample: Sample) -> bytes:
    if hashlib.sha256(data).hexdigest() != sample.sha256:
        raise DataError("its content changed after it was recorded")
    return data


@dataclass
class Fed:
    """One batch. ``features`` are [b, ...] arrays, ``labels`` [b] int64, ``samples`` the b rows; ``bad`` lists the
    rows that could not be read any more, each with the reason; ``seconds`` holds the phases decode and trunk."""

    features: tuple[Array, ...] = ()
    labels: Array = field(default_factory=lambda: np.empty(0, np.int64))
    samples: list[Sample] = field(default_factory=list)
    bad: list[tuple[Sample, str]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=lambda: {"decode": 0.0, "trunk": 0.0})


class Feeder:
    """Reads samples and turns them into features."""

    def __init__(
        self,
        source: Source,
        decoder: Decoder,
        cache: FeatureCache | None = None,
        replay: Replay | None = None,
        augment: Augmentation | None = None,
    ) -> None:
        self.source, self.decoder, self.cache, self.replay = source, decoder, cache, replay
        self.augment = augment
        self.decode_peak_bytes, self.decode_peak_path = 0, ""
        self._meter: Meter | None = None
        self._other_peak_bytes = self._phase_peak_bytes = 0

    def begin_measuring(self, meter: Meter) -> None:
        """Let ``meter`` start anew, and measure the unpacking of files apart from all else from now on."""
        meter.reset()
        self._meter = meter if meter.resettable else None
        self._other_peak_bytes = self._phase_peak_bytes = self.decode_peak_bytes = 0
        self.decode_peak_path = ""

    def peak_bytes(self, meter: Meter) -> int:
        """Return the peak since :meth:`begin_measuring`, without what unpacking files took."""
        return max(self._other_peak_bytes, meter.peak_bytes())

    def phase_peak_bytes(self) -> int | None:
        """Return the peak since the last call (or :meth:`begin_measuring`), without what unpacking files took; None
        where the meter cannot start anew. What :meth:`peak_bytes` returns stays the same."""
        if self._meter is None:
            return None
        self._note()
        found, self._phase_peak_bytes = self._phase_peak_bytes, 0
        return found

    def _note(self) -> None:
        """Keep what the meter shows, and let it start anew."""
        assert self._meter is not None
        peak_bytes = self._meter.peak_bytes()
        self._other_peak_bytes = max(self._other_peak_bytes, peak_bytes)
        self._phase_peak_bytes = max(self._phase_peak_bytes, peak_bytes)
        self._meter.reset()

    def load(self, sample: Sample, *, to_train: bool = False) -> Array:
        """Return one decoded sample; if it is ``to_train``, changed at random as the settings say.

        Raises:
            DataError: the file is gone, damaged, or not the one that was recorded.
        """
        data = self.read(sample)
        if not to_train or self.augment is None or not self.augment.kinds:
            return self.decoder.decode(data)
        # A replayed sample is another one in every step; steps are told apart from passes by their sign.
        epoch = -1 - self.replay.step if sample.replayed and self.replay is not None else sample.passes
        return self.decoder.decode(data, self.augment.of(epoch, sample.sha256))

    def read(self, sample: Sample) -> bytes:
        """Return a sample's content as it was recorded: of a replayed one, and of one that its source cannot give any
        more, from the replay buffer.

        Raises:
            DataError: it is gone, or not the one that was recorded.
        """
        if sample.replayed:
            assert self.replay is not None
            return _unchanged(self.replay.read(sample), sample)
        try:
            return _unchanged(self.source.read(sample.path), sample)
        except DataError:
            if self.replay is None or self.replay.kind != RAW or not self.replay.holds(sample):
                raise
            return _unchanged(self.replay.read(sample), sample)

    def feed(
        self,
        take: Callable[[], Sample | None],
        count: int,
        session: Session,
        micro_batch: int,
        computing: Computing = _freely,
        into: Fed | None = None,
    ) -> Fed:
        """Return a batch of up to ``count`` samples that ``take`` gives one by one (None: there are no more).

        The session runs in blocks ``computing(what)``; files are unpacked outside of them. What is found is in
        ``into`` even if an error ends it.

        A sample that cannot be read is listed as bad and replaced by the next, so a batch is short only where the
        samples end.
        """
        fed = Fed() if into is None else into
        images = np.empty((min(micro_batch, count), *self.decoder.shape), np.float32)
        while len(fed.samples) < count:
            found: list[Sample] = []  # in the order in which they were taken, which is that of their rows
            rows: list[int] = []
            waiting = self._fill(
                images, self._not_cached(take, count, fed, found), fed, found, rows, count, to_train=True
            )
            if not found:
                break
            started = time.perf_counter()
            if waiting:
                with computing("the trunk"):
                    outputs = session.features(images[: len(waiting)])
                    self._allocate(fed, count, outputs)
                    for whole, piece in zip(fed.features, outputs, strict=True):
                        whole[rows] = piece
                    if self.cache is not None:
                        for index, sample in enumerate(waiting):
                            if not sample.replayed:
                                self.cache.put(sample.sha256, [piece[index] for piece in outputs])
                del outputs
            fed.samples += found
            fed.seconds["trunk"] += time.perf_counter() - started
        fed.features = tuple(value[: len(fed.samples)] for value in fed.features)
        fed.labels = np.array([sample.label for sample in fed.samples], np.int64)
        return fed

    def _not_cached(
        self, take: Callable[[], Sample | None], count: int, fed: Fed, found: list[Sample]
    ) -> Callable[[], Sample | None]:
        """Return what gives the samples of ``take`` that are not in the cache, ``count`` of all at most; what is in it
        goes into its row of ``fed``, and the sample into ``found``."""

        def next_one() -> Sample | None:
            while len(fed.samples) + len(found) < count and (sample := take()) is not None:
                if sample.replayed and self.replay is not None and self.replay.kind == FEATURES:
                    self._from_the_buffer(sample, count, fed, found)
                    continue
                features = None if self.cache is None else self.cache.get(sample.sha256)
                if features is None:
                    return sample
                self._put(sample, features, count, fed, found)
            return None

        return next_one

    def _put(self, sample: Sample, features: Sequence[Array], count: int, fed: Fed, found: list[Sample]) -> None:
        self._allocate(fed, count, [value[None] for value in features])
        for whole, value in zip(fed.features, features, strict=True):
            whole[len(fed.samples) + len(found)] = value
        found.append(sample)

    def _from_the_buffer(self, sample: Sample, count: int, fed: Fed, found: list[Sample]) -> bool:
        """Take the features that the replay buffer has of a sample; return whether it gave them."""
        assert self.replay is not None
        try:
            self._put(sample, self.replay.features(sample), count, fed, found)
        except DataError as error:
            self.replay.lose(sample, str(error))
            return False
        return True

    def _stands_in(self, sample: Sample) -> bool:
        return self.replay is not None and self.replay.kind == FEATURES and self.replay.holds(sample)

    @staticmethod
    def _allocate(fed: Fed, count: int, like: Sequence[Array]) -> None:
        """Make room for the features of a batch, once: joining pieces at the end would hold them twice."""
        if not fed.features:
            fed.features = tuple(np.empty((count, *value.shape[1:]), value.dtype) for value in like)

    def batches(
        self,
        samples: Iterable[Sample],
        count: int,
        session: Session,
        micro_batch: int,
        computing: Computing = _freely,
    ) -> Iterator[tuple[Array, ...]]:
        """Yield the features of ``samples``, ``count`` at a time; those that cannot be read are left out."""
        rows = iter(samples)
        while True:
            fed = self.feed(lambda: next(rows, None), count, session, micro_batch, computing)
            if not fed.samples:
                return
            yield fed.features
            del fed  # before the next batch is made

    def labelled(
        self, samples: Iterable[Sample], count: int, session: Session, micro_batch: int
    ) -> list[tuple[tuple[Array, ...], Array]]:
        """Return features and labels of all ``samples``, ``count`` at a time; those that cannot be read are left
        out."""
        rows, found = iter(samples), list[tuple[tuple[Array, ...], Array]]()
        while (fed := self.feed(lambda: next(rows, None), count, session, micro_batch)).samples:
            found.append((fed.features, fed.labels))
        return found

    def images(self, samples: Iterable[Sample], micro_batch: int) -> Iterator[Fed]:
        """Yield decoded samples by the micro-batch: ``features`` is then the one array of images."""
        rows = iter(samples)
        images = np.empty((micro_batch, *self.decoder.shape), np.float32)
        while True:
            fed = Fed()
            fed.samples = self._fill(images, lambda: next(rows, None), fed, [], [], to_train=False)
            fed.features = (images[: len(fed.samples)],)
            fed.labels = np.array([sample.label for sample in fed.samples], np.int64)
            yield fed
            if len(fed.samples) < micro_batch:
                return

    def _fill(
        self,
        images: Array,
        take: Callable[[], Sample | None],
        fed: Fed,
        found: list[Sample],
        rows: list[int],
        count: int = 0,
        *,
        to_train: bool,
    ) -> list[Sample]:
        """Decode samples into ``images`` until it is full or there are no more; return the rows that are in it.

        They are put into ``found`` as well, and the places that they have in the batch of ``count`` into ``rows``. A
        sample whose source is gone may have its features in the replay buffer.
        """
        started, waiting = time.perf_counter(), list[Sample]()
        if self._meter is not None:
            self._note()
        while len(waiting) < len(images) and (sample := take()) is not None:
            try:
                images[len(waiting)] = self.load(sample, to_train=to_train)
                rows.append(len(fed.samples) + len(found))
                waiting.append(sample)
                found.append(sample)
            except DataError as error:
                if sample.replayed and self.replay is not None:
                    self.replay.lose(sample, str(error))
                    continue
                if (absent := self.source.absent()) is not None:
                    # Every sample would be "missing"; none of them is at fault.
                    raise DataError(f"{absent}; mount it and run again") from None
                if self._stands_in(sample) and self._from_the_buffer(sample, count, fed, found):
                    continue
                fed.bad.append((sample, str(error)))
        if self._meter is not None:
            if waiting and (peak_bytes := self._meter.peak_bytes()) > self.decode_peak_bytes:
                self.decode_peak_bytes = peak_bytes
                self.decode_peak_path = " to ".join(dict.fromkeys((waiting[0].path, waiting[-1].path)))
            self._meter.reset()
        fed.seconds["decode"] += time.perf_counter() - started
        return waiting
