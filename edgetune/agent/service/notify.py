"""What a service manager is told: systemd's protocol of datagrams (man 3 sd_notify), in the standard library.

Without a manager, so without ``NOTIFY_SOCKET``, nothing is done. A manager that is gone is no reason to stop training.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Mapping

STATUS_SECONDS = 5.0
EXTENSION_SECONDS = 120
"""While it starts or ends, every ping asks for so much more time."""


class Notifier:
    """Tells readiness, signs of life and a line of status. ``watchdog_s``: within this time a sign is due; None: nobody
    watches.

    Args:
        environment: where ``NOTIFY_SOCKET``, ``WATCHDOG_USEC`` and ``WATCHDOG_PID`` stand. clock: in seconds.
    """

    def __init__(
        self, environment: Mapping[str, str] = os.environ, clock: Callable[[], float] = time.monotonic
    ) -> None:
        address = environment.get("NOTIFY_SOCKET", "")
        # An abstract address begins with a NUL byte, which the environment writes as "@".
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self._socket: socket.socket | None = None
        if self._address:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
            self._socket.setblocking(False)
        self.watchdog_s = _watchdog_s(environment)
        self._clock, self._steady = clock, False
        self._ping_at, self._status_at, self._status = 0.0, 0.0, ""

    def ready(self) -> None:
        """Say that the start is done."""
        self._steady = True
        self._send("READY=1")

    def stopping(self) -> None:
        """Say that the end has begun."""
        self._steady = False
        self._send("STOPPING=1")

    def status(self, text: str, *, now: bool = False) -> None:
        """Tell a line of status, if it is another one: at once, or at most every few seconds."""
        due = now or self._clock() >= self._status_at
        if due and text != self._status:
            self._status, self._status_at = text, self._clock() + STATUS_SECONDS
            self._send("STATUS=" + " ".join(text.split()))

    def alive(self) -> None:
        """Give a sign of life, if one is due. Cheap: it may be called as often as one likes."""
        now = self._clock()
        if self._socket is None or now < self._ping_at:
            return
        self._ping_at = now + min(EXTENSION_SECONDS, self.watchdog_s or EXTENSION_SECONDS) / 4
        self._send("WATCHDOG=1" if self._steady else f"WATCHDOG=1\nEXTEND_TIMEOUT_USEC={EXTENSION_SECONDS}000000")

    def close(self) -> None:
        """Say nothing more."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _send(self, text: str) -> None:
        if self._socket is not None:
            try:
                self._socket.sendto(text.encode(), self._address)
            except OSError:  # nobody listens, or not fast enough: the next sign says as much
                pass


def _watchdog_s(environment: Mapping[str, str]) -> float | None:
    """Return within which time a sign of life is due (man 3 sd_watchdog_enabled); None: nobody watches."""
    given, whose = environment.get("WATCHDOG_USEC", ""), environment.get("WATCHDOG_PID", "")
    # The process that systemd started is the supervisor; its worker speaks for both.
    ours = {"", str(os.getpid()), environment.get("EDGETUNE_SUPERVISOR", "")}
    return int(given) / 1e6 if given.isdigit() and int(given) > 0 and whose in ours else None
