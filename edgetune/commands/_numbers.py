"""Lists of numbers on the command line. Knows nothing but the errors."""

from __future__ import annotations

from edgetune.errors import UsageError


def integers(text: str | None, option: str) -> tuple[int, ...]:
    """Return the positive integers of ``3,224,224``; empty for None.

    Raises:
        UsageError: something else.
    """
    try:
        values = tuple(int(part) for part in text.split(",")) if text else ()
    except ValueError:
        values = (0,)
    if any(value < 1 for value in values):
        raise UsageError(f"{option} {text}: expected positive integers separated by commas, such as 3,224,224")
    return values


def floats(text: str | None, option: str) -> tuple[float, ...]:
    """Return the numbers of ``0.485,0.456,0.406``; empty for None.

    Raises:
        UsageError: something else.
    """
    try:
        return tuple(float(part) for part in text.split(",")) if text else ()
    except ValueError:
        raise UsageError(f"{option} {text}: expected numbers separated by commas, such as 0.485,0.456,0.406") from None
