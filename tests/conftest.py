"""Set-up of the whole suite: its processes keep to a core each, and to a cache of their own."""

from __future__ import annotations

import os
import tempfile

_WORKER = os.environ.get("PYTEST_XDIST_WORKER")

if _WORKER is None:
    # No test reads or writes what this user's own runs have remembered; workers share the suite's.
    _SHELF = tempfile.TemporaryDirectory(prefix="edgetune-cache-")  # removed when the interpreter ends
    os.environ["XDG_CACHE_HOME"] = _SHELF.name


def pytest_configure() -> None:
    """Pin a pytest-xdist worker, and all that it starts, to one core, before any library counts the cores.

    Two workers whose libraries each start a thread per core are slower than one after the other.
    """
    if _WORKER is not None and hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[int(_WORKER.removeprefix("gw")) % len(cores)]})
