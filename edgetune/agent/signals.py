"""SIGTERM and SIGINT as a request to stop, not as an interruption. Knows the standard library only."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Stoppable(Protocol):
    """Something that looks at ``stop_reason`` between two steps."""

    stop_reason: str | None


@contextmanager
def stopping_on_signals(target: Stoppable) -> Iterator[None]:
    """Within the block SIGTERM and SIGINT set ``target.stop_reason``; a second SIGINT raises KeyboardInterrupt.

    Does nothing outside of the main thread, where Python does not deliver signals.
    """

    def stop(number: int, frame: object) -> None:
        if target.stop_reason is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        target.stop_reason = f"received {signal.Signals(number).name}"

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
