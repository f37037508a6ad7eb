"""Every error a user can meet, each with its exit code. Knows nothing but the standard library.

A message says what happened, what was expected, and what to do; where a choice was wrong it lists the valid ones.
"""

from __future__ import annotations

from collections.abc import Iterable


class EdgeTuneError(Exception):
    """Base of all errors meant for a user. ``exit_code`` is what the command line returns."""

    exit_code = 1


class UsageError(EdgeTuneError):
    """An option or argument is wrong."""

    exit_code = 2


class UnsupportedOperatorError(EdgeTuneError):
    """A model needs an operator for which there is no rule."""

    exit_code = 3


class ExportError(EdgeTuneError):
    """A model cannot be captured, split or emitted."""

    exit_code = 4


class BundleError(EdgeTuneError):
    """A bundle is missing, damaged, tampered with, or of another format version."""

    exit_code = 5


class BudgetError(EdgeTuneError):
    """No plan fits the budget. ``least_bytes`` is the smallest budget that does."""

    exit_code = 6

    def __init__(self, message: str, *, least_bytes: int) -> None:
        super().__init__(message)
        self.least_bytes = least_bytes


class EngineError(EdgeTuneError):
    """A runtime is absent, or does not do what the bundle requires."""

    exit_code = 7


class DataError(EdgeTuneError):
    """The data source is empty, unreadable, or does not match the bundle."""

    exit_code = 8


class StateError(EdgeTuneError):
    """The agent's state directory is damaged, in use, or belongs to another bundle."""

    exit_code = 9


class StorageError(EdgeTuneError):
    """The disk refused a write: full, read-only, or failing."""

    exit_code = 10


class MemoryExhaustedError(EngineError):
    """An allocation failed during a step, whatever the runtime calls that."""

    exit_code = 11


class NotAliveError(EdgeTuneError):
    """No agent works on the state directory, or it has failed. (12 is the supervisor's code for giving up.)"""

    exit_code = 13


class GateError(EdgeTuneError):
    """A model is not promoted: the held-out samples do not speak for it."""

    exit_code = 14


def choices(values: Iterable[str]) -> str:
    """Return ``values`` sorted and joined, for the end of an error message."""
    return ", ".join(sorted(values))
