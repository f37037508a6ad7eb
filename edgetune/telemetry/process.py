"""What the operating system says of this process's memory, read from ``/proc``.

Readers take the root of the file system they read, so that captured files can stand in for a board. This module may
know the errors and Linux's proc files; it must not know what the memory is for.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from edgetune.errors import EngineError

PROC = Path("/proc")
_RESET_PEAK = b"5"  # man 5 proc_pid_clear_refs: reset the peak resident set size to the current one


def resident_bytes(root: Path = PROC) -> int:
    """Return the resident bytes of this process now (VmRSS).

    Raises:
        EngineError: ``root`` holds no process status.
    """
    return _status_bytes(root, "VmRSS")


def proportional_bytes(root: Path = PROC) -> int | None:
    """Return the bytes of this process with shared pages counted by their share (PSS); None: this kernel does not tell.

    Pages of libraries that several processes map count for each of them in what is resident, and once in all here.
    """
    try:
        text = (root / "self" / "smaps_rollup").read_text("ascii", errors="replace")
    except OSError:
        return None
    match = re.search(r"^Pss:\s*([0-9]+) kB$", text, re.MULTILINE)
    return None if match is None else int(match[1]) * 1024


def data_bytes(root: Path = PROC) -> int:
    """Return what counts against this process's resource limit on data now (VmData): mapped, resident or not.

    Raises:
        EngineError: ``root`` holds no process status.
    """
    return _status_bytes(root, "VmData")


class PeakMeter:
    """The process's own high-water mark of resident memory, since the last :meth:`reset` where the kernel allows one.

    ``resettable`` is None until the first :meth:`reset`, and then whether it took effect; where it is not True,
    :meth:`peak_bytes` means "since the process started". Nothing is sampled, so no peak is missed.
    """

    def __init__(self, root: Path = PROC) -> None:
        self.root = root
        self.resettable: bool | None = None

    def reset(self) -> None:
        """Lower the high-water mark to what is resident now, if the kernel allows it (see ``resettable``)."""
        try:
            # Without O_CREAT: a kernel built without this file must not be mistaken for one that has it.
            descriptor = os.open(self.root / "self" / "clear_refs", os.O_WRONLY)
        except OSError:
            self.resettable = False
            return
        try:
            os.write(descriptor, _RESET_PEAK)
            self.resettable = True
        except OSError:
            self.resettable = False
        finally:
            os.close(descriptor)

    def peak_bytes(self) -> int:
        """Return the most bytes that were resident at once (VmHWM).

        Raises:
            EngineError: ``root`` holds no process status.
        """
        return _status_bytes(self.root, "VmHWM")


def _status_bytes(root: Path, field: str) -> int:
    """Return one memory field of ``self/status``, which is in KiB there."""
    path = root / "self" / "status"
    try:
        text = path.read_text("ascii", errors="replace")
    except OSError as error:
        raise EngineError(f"'{path}' cannot be read ({error}); measuring memory needs Linux and its /proc") from None
    match = re.search(rf"^{field}:\s*([0-9]+) kB$", text, re.MULTILINE)
    if match is None:
        raise EngineError(f"'{path}' has no field {field}; measuring memory needs Linux and its /proc")
    return int(match[1]) * 1024
