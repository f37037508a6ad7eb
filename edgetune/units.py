"""Byte quantities as people write them. Knows nothing but the standard library and the errors."""

from __future__ import annotations

import re

from edgetune.errors import UsageError

_FACTORS = {
    "": 1, "B": 1,
    "KB": 10**3, "MB": 10**6, "GB": 10**9,
    "KIB": 2**10, "MIB": 2**20, "GIB": 2**30,
}  # fmt: skip
MIB = 2**20


def parse_bytes(text: str | int, *, zero: bool = False) -> int:
    """Return the number of bytes that ``text`` names, such as ``512MiB``, ``1.5 GB`` or ``4096``.

    Args:
        zero: whether it may be nothing at all.

    Raises:
        UsageError: the text is not a positive quantity with a known unit.
    """
    if isinstance(text, int):
        value_bytes = text
    else:
        match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([A-Za-z]*)\s*", text)
        if match is None or match[2].upper() not in _FACTORS:
            raise UsageError(
                f"'{text}' is not a size: expected a number and a unit (B, KB, MB, GB, KiB, MiB, GiB), such as 512MiB"
            )
        value_bytes = int(float(match[1]) * _FACTORS[match[2].upper()])
    if value_bytes < 0 or (value_bytes == 0 and not zero):
        raise UsageError(f"'{text}' is not a size: it must be more than zero bytes")
    return value_bytes


def format_bytes(size_bytes: float) -> str:
    """Return ``size_bytes`` in the largest binary unit that keeps it readable, such as ``12.25 MiB``."""
    sign, size = ("-", -size_bytes) if size_bytes < 0 else ("", float(size_bytes))
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{sign}{size:.0f} B" if unit == "B" else f"{sign}{size:.2f} {unit}"
        size /= 1024
    return f"{sign}{size:.2f} GiB"
