"""Set-up of the whole suite: where several processes share the tests, each keeps to a core of its own."""

from __future__ import annotations

import os


def pytest_configure() -> None:
    """Pin a pytest-xdist worker, and all that it starts, to one core, before any library counts the cores.

    Two workers whose libraries each start a thread per core are slower than one after the other.
    """
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    if worker is not None and hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})
