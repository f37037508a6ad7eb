"""The effective budget: the least of what the user said and of what there is. Asked between two steps, so it is cheap.

What there is: what this process has, and what the system could still give it, less a reserve for everybody else. The
user's part may change while an agent runs: ``edgetune budget STATE 300MiB`` writes the file ``budget`` in the state
directory, and the agent reads it when it has changed. Knows that file and the telemetry's numbers; nothing of plans.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from edgetune.agent.storage import write_atomic
from edgetune.errors import EdgeTuneError, StateError, UsageError
from edgetune.telemetry.available import Available
from edgetune.units import MIB, format_bytes, parse_bytes

FILE = "budget"
NONE = "none"
MOST_RESERVE_BYTES = 256 * MIB


def default_reserve_bytes(whole_bytes: int) -> int:
    """Return what is left to others of the ``whole_bytes`` that this process could have: 1/16, at most 256 MiB."""
    return min(MOST_RESERVE_BYTES, whole_bytes // 16)


@dataclass(frozen=True)
class Allowance:
    """What a process may take at one instant, in bytes.

    Attributes:
        asked: what the user said; None: nothing.
        resident: what the process has. available: what it could still take. source: what says so.
        reserve: what is left to others.
    """

    asked: int | None
    resident: int
    available: int
    source: str
    reserve: int

    @property
    def room(self) -> int:
        """What there is, whatever the user said."""
        return max(0, self.resident + self.available - self.reserve)

    @property
    def limit(self) -> int:
        """The effective budget."""
        return self.room if self.asked is None else min(self.asked, self.room)

    def __str__(self) -> str:
        said = "no budget given" if self.asked is None else f"budget {format_bytes(self.asked)}"
        return (
            f"{said}; resident {format_bytes(self.resident)}, available {format_bytes(self.available)} "
            f"({self.source}), reserve {format_bytes(self.reserve)}: effective {format_bytes(self.limit)}"
        )


class AllowanceReader:
    """Reads the allowance of one run.

    Args:
        state: the state directory. asked: ``--budget``, which the file ``budget`` replaces where there is one.
        reserve: ``--reserve``; None: :func:`default_reserve_bytes` of what there is at the first look.
        refused: called with the reason when the file holds no size; the budget before stays.
    """

    def __init__(
        self,
        state: Path,
        asked: int | None,
        reserve: int | None,
        *,
        available: Callable[[], Available],
        resident_bytes: Callable[[], int],
        refused: Callable[[str], None],
    ) -> None:
        self._file, self._given, self._asked, self._reserve = state / FILE, asked, asked, reserve
        self._available, self._resident_bytes, self._refused = available, resident_bytes, refused
        self._seen: tuple[int, int, int] | None = None

    def read(self) -> Allowance:
        """Return the allowance now."""
        self._look()
        resident, found = self._resident_bytes(), self._available()
        if self._reserve is None:
            self._reserve = default_reserve_bytes(resident + found.bytes)
        return Allowance(self._asked, resident, found.bytes, found.source, self._reserve)

    def _look(self) -> None:
        try:
            stat = self._file.stat()
            seen = (stat.st_mtime_ns, stat.st_ino, stat.st_size)
        except OSError:  # there is none, or none any more
            if self._seen is not None:
                self._seen, self._asked = None, self._given
            return
        if seen == self._seen:
            return
        self._seen = seen
        try:
            self._asked = read_budget(self._file)
        except EdgeTuneError as error:
            self._refused(str(error))


def read_budget(file: Path) -> int | None:
    """Return the bytes that the file ``budget`` names; None: no limit.

    Raises:
        UsageError: it holds no size. StateError: it cannot be read.
    """
    try:
        text = file.read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise StateError(f"the budget in {file} cannot be read ({error}); write it with 'edgetune budget'") from None
    return parse_budget(text)


def parse_budget(text: str) -> int | None:
    """Return the bytes that ``text`` names, such as ``300MiB``; None for ``none``.

    Raises:
        UsageError: it is neither.
    """
    if text.strip().lower() == NONE:
        return None
    try:
        return parse_bytes(text)
    except UsageError as error:
        raise UsageError(f"{error}; or '{NONE}' for no limit") from None


def write_budget(state: Path, text: str) -> int | None:
    """Put a new budget into the state directory, at once and whole; return its bytes (None: no limit).

    Raises:
        UsageError: ``text`` is no size. StorageError: the disk refused.
    """
    budget_bytes = parse_budget(text)
    write_atomic(state / FILE, f"{text.strip()}\n".encode())
    return budget_bytes
