"""A few batches from a source, without a ledger: for planning before any agent runs.

Knows sources and decoding; remembers nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from edgetune.agent.images import Decoder
from edgetune.agent.sources import Found, Source, open_source
from edgetune.bundle import Array, Manifest
from edgetune.errors import DataError


def labelled_batches(manifest: Manifest, data: str | Path, batch: int, count: int) -> Iterator[tuple[Array, Array]]:
    """Yield up to ``count`` batches (inputs [b, ...], targets int64 [b]) of readable samples, evenly spread.

    Raises:
        DataError: it holds no readable sample.
    """
    decoder = Decoder(manifest)
    with ExitStack() as stack:
        source = open_source(data, manifest.classes, decoder.suffixes)
        stack.callback(source.close)
        yield from _spread(decoder, source, batch, count)


def entries(source: Source, count: int) -> list[Found]:
    """Return what can be used of a source: all there is, or of a stream at least ``count`` entries.

    Raises:
        DataError: the source failed. StorageError: there is no room for a stream's samples.
    """
    found, waiter = dict[str, Found](), None if source.growing else source.waiter(1.0)
    while True:
        found.update((entry.path, entry) for entry in source.scan() if entry.problem is None)
        source.check()
        if waiter is None or source.ended() or source.stalled() or len(found) >= count:
            return list(found.values())
        source.recorded(found)
        waiter.wait(1.0, lambda: False)


def every(source: Source) -> Iterator[Found]:
    """Yield all entries of a source once; of a stream until it ends, each to be read before the next is asked for.

    Raises:
        DataError: the source failed. StorageError: there is no room for a stream's samples.
    """
    waiter = None if source.growing else source.waiter(1.0)
    while True:
        for found in source.scan():
            yield found
            source.recorded([found.path], finished=True)
        source.check()
        if waiter is None or source.ended():
            return
        waiter.wait(1.0, lambda: False)


def _spread(decoder: Decoder, source: Source, batch: int, count: int) -> Iterator[tuple[Array, Array]]:
    found = entries(source, batch * count)
    # Evenly spread, so that a folder sorted by class gives every class.
    order = np.argsort(np.arange(len(found)) * 0.6180339887498949 % 1.0, kind="stable")
    x: list[Array] = []
    y: list[int] = []
    given = 0
    for index in order:
        entry = found[int(index)]
        try:
            x.append(decoder.decode(source.read(entry.path)))
        except DataError:
            continue  # the agent says what is wrong with a file; here another one serves as well
        assert entry.label is not None
        y.append(entry.label)
        if len(y) == batch:
            yield np.stack(x), np.array(y, np.int64)
            x, y, given = [], [], given + 1
            if given == count:
                return
    if y and not given:
        yield np.stack(x), np.array(y, np.int64)
    elif not given:
        raise DataError(f"'{source.spec}' holds no readable sample of the classes {', '.join(source.classes[:20])}")
