"""A window of hours in local time, such as ``22:00-06:00``. Knows clocks; nothing of who asks."""

from __future__ import annotations

import re
from dataclasses import dataclass

from edgetune.errors import UsageError

_WINDOW = re.compile(r"(\d{1,2}):(\d{2})\s*-\s*(\d{1,2}):(\d{2})")


@dataclass(frozen=True)
class Hours:
    """From minute ``begin`` of the day up to, without, minute ``end``; over midnight where ``end`` is not later."""

    begin: int
    end: int

    @staticmethod
    def parse(text: str) -> Hours:
        """Return the window that ``text`` describes.

        Raises:
            UsageError: it is none.
        """
        match = _WINDOW.fullmatch(text.strip())
        numbers = [] if match is None else [int(part) for part in match.groups()]
        # 24:00 is the end of a day, as people write it.
        if len(numbers) == 4 and all(0 <= h * 60 + m <= 1440 and m < 60 for h, m in (numbers[:2], numbers[2:])):
            begin, end = numbers[0] * 60 + numbers[1], numbers[2] * 60 + numbers[3]
            if begin % 1440 != end % 1440:
                return Hours(begin % 1440, end % 1440)
        raise UsageError(f"'{text}' is no window of hours; write two different times of the day, such as 22:00-06:00")

    def contains(self, hour: int, minute: int) -> bool:
        """Return whether the window is open at this time of the day."""
        now = hour * 60 + minute
        return self.begin <= now < self.end if self.begin < self.end else now >= self.begin or now < self.end
