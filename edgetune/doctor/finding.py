"""One line of the doctor's report."""

from __future__ import annotations

from dataclasses import dataclass

OK, WARNING, ERROR = "ok", "warning", "error"


@dataclass(frozen=True)
class Finding:
    """``level``: ``ok``; ``warning``, it works but not as it should; ``error``, training cannot work like this.

    ``text`` says what was found, ``advice`` what to do about it (never empty unless ``ok``).
    """

    topic: str
    level: str
    text: str
    advice: str = ""

    def __post_init__(self) -> None:
        """Hold every line that is not ``ok`` to having advice."""
        if self.level != OK and not self.advice:
            raise ValueError(f"the finding on {self.topic} has no advice")
