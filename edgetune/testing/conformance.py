"""Runs every law on a codec: all at once, or as single checks for a test runner. Knows the laws and the codec table."""

from __future__ import annotations

import unittest
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from edgetune.codecs.base import Codec, Saved, config_of
from edgetune.codecs.table import CODECS, codec_from
from edgetune.testing import forms, laws
from edgetune.testing.cases import GEOMETRIES, LARGE
from edgetune.testing.coders import ENGINES, ORACLE, coder_for, why_missing
from edgetune.testing.laws import Bench, Tolerance

LARGE_LAWS = ("held", "exact")
"""What is tried on the large tensor as well, if integers are stored: whether indices are wide enough."""

FEW_LAWS = ("monotone", "repeatable", "batches", "extremes", "not_finite", "carries")
"""What is tried on every third shape: these depend on the shape little, and take the most time."""


class BrokenLawError(AssertionError):
    """A codec breaks a law. ``law`` and ``place`` are names."""

    def __init__(self, codec: Codec, law: str, place: str, saved: Saved | None, reason: str) -> None:
        on = f" on {place}" if place else ""
        shape = f", for '{saved.name}' {_described(saved)}" if saved else ""
        super().__init__(f"{codec!r} breaks the law '{law}'{on}{shape}: {reason}")
        self.law, self.place = law, place


def _described(saved: Saved) -> str:
    order = "channels last" if saved.channels_last else f"groups {saved.groups}"
    return f"{list(saved.shape)} ({order})"


@dataclass(frozen=True)
class Check:
    """One law at one place, on every shape of tensor that the codec applies to; call it to run it."""

    codec: Codec
    law: str
    place: str
    hold: Callable[[Saved | None], None]
    cases: tuple[Saved | None, ...]

    def __str__(self) -> str:
        return f"{self.law}-{self.place}" if self.place else self.law

    def __call__(self) -> None:
        """Run it.

        Raises:
            BrokenLawError: the law does not hold; the message says where, on what, and what was found.
            unittest.SkipTest: its engine is not installed; unittest and pytest count that as skipped.
        """
        missing = why_missing(self.place) if self.place in ENGINES else None
        if missing:
            raise unittest.SkipTest(missing)
        saved: Saved | None = None
        try:
            with registered(self.codec):
                for saved in self.cases:
                    self.hold(saved)
        except Exception as error:  # whatever a codec under test may raise
            reason = str(error) if type(error) is AssertionError else f"{type(error).__name__}: {error}"
            raise BrokenLawError(self.codec, self.law, self.place, saved, reason) from error


@contextmanager
def registered(codec: Codec) -> Iterator[None]:
    """Have the class of ``codec`` in the table of codecs meanwhile, with its default settings, if it is not there.

    Raises:
        AssertionError: the name belongs to another codec, or a setting has no default.
        UsageError: the name belongs to another codec, which has other settings.
    """
    if codec.name in CODECS:
        known = codec_from(codec.name, config_of(codec))
        if known != codec:
            raise AssertionError(f"the table makes {known!r} of its name and settings; is '{codec.name}' taken?")
        yield
        return
    try:
        default = type(codec)()
    except TypeError as error:
        raise AssertionError(f"every setting of '{codec.name}' needs a default: {error}") from error
    CODECS[codec.name] = default
    try:
        yield
    finally:
        del CODECS[codec.name]


def checks(
    codec: Codec,
    *,
    engines: Sequence[str] = ENGINES,
    geometries: Sequence[Saved] | None = None,
    tolerance: Tolerance | None = None,
    seed: int = 0,
) -> list[Check]:
    """Return every law as a check of its own.

    Args:
        codec: with the settings that are to be tried.
        engines: of ``ENGINES``; one that is not installed is skipped with its reason when the check is run.
        geometries: what is saved; None tries ``GEOMETRIES`` and a large one. Left out where the codec does not apply.
        tolerance: None takes that of the stored element types.
        seed: decides all contents, bases, sketches and ranks.

    Raises:
        ValueError: the codec applies to none of ``geometries``.
    """
    tried = tuple(saved for saved in (geometries or GEOMETRIES) if codec.applies(saved))
    if not tried:
        raise ValueError(f"the codec {codec.name} applies to none of the tensors; give some to which it does")
    large = (LARGE,) if geometries is None and codec.applies(LARGE) and _stores_integers(codec) else ()
    found = [Check(codec, name, "", _of_codec(law, codec), (None,)) for name, law in forms.CODEC_LAWS.items()]
    found += [Check(codec, name, "", _of_saved(law, codec), tried) for name, law in forms.GEOMETRY_LAWS.items()]
    for place in (ORACLE, *engines):
        bench = Bench(codec, place, coder_for(codec, place), seed, tolerance)
        table = laws.LAWS | (laws.ORACLE_LAWS if place == ORACLE else laws.ENGINE_LAWS)
        for name, law in table.items():
            cases = tried[::3] if geometries is None and name in FEW_LAWS else tried
            cases += large if name in LARGE_LAWS else ()
            found.append(Check(codec, name, place, _placed(law, bench), cases))
    return found


def _stores_integers(codec: Codec) -> bool:
    return any(np.issubdtype(tensor.dtype, np.integer) for tensor in codec.stored(LARGE))


def _of_codec(law: Callable[[Codec], None], codec: Codec) -> Callable[[Saved | None], None]:
    return lambda _: law(codec)


def _of_saved(law: Callable[[Codec, Saved], None], codec: Codec) -> Callable[[Saved | None], None]:
    return lambda saved: law(codec, saved) if saved else None


def _placed(law: Callable[[Bench, Saved], None], bench: Bench) -> Callable[[Saved | None], None]:
    return lambda saved: law(bench, saved) if saved else None


def check_codec(
    codec: Codec,
    *,
    engines: Sequence[str] = ENGINES,
    geometries: Sequence[Saved] | None = None,
    tolerance: Tolerance | None = None,
    seed: int = 0,
) -> list[str]:
    """Run every law on ``codec``; see :func:`checks`. Returns why checks were skipped, and warns of it.

    Raises:
        BrokenLawError: of the first law that does not hold.
    """
    skipped: dict[str, None] = {}
    for check in checks(codec, engines=engines, geometries=geometries, tolerance=tolerance, seed=seed):
        try:
            check()
        except unittest.SkipTest as reason:
            skipped[str(reason)] = None
    for text in skipped:
        warnings.warn(text, stacklevel=2)
    return list(skipped)
