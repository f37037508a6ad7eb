"""What a user may choose of an adapter, as text and as a value. Knows the errors; nothing of tensors.

    csg:slice=16x16x3x3,code=128,map=learned,freeze=no,residual=yes,kernels=same,seed=0

Every setting has a default, so ``csg`` alone is complete; ``bcsg`` is ``csg`` with ``map=binary``. Several shapes of
slices, each with a code size and a map of its own, are joined by ``+``: ``slice=16x16x3x3+16x16x1x1,code=128+16``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from edgetune.errors import UsageError, choices

LEARNED, BINARY = "learned", "binary"
SAME, ANY = "same", "any"
KINDS: Mapping[str, str] = {"csg": LEARNED, "bcsg": BINARY}
"""Kind of adapter -> the map that it has unless told otherwise."""
RATIO = 18
"""Elements of a slice per element of its code (Omidvar et al. 2021, section 3.3)."""


@dataclass(frozen=True)
class AdapterSettings:
    """What is chosen of an adapter.

    Attributes:
        slices: the shapes of slices [filters, channels, *kernel]; each has its own map.
        codes: elements of a code, one number per shape.
        map: ``learned``, ``binary`` (-1 and +1, from ``seed``), or the path of a .safetensors file (:mod:`maps`).
        freeze: keep the map as it is. A binary map is never trained; one from a file only if ``freeze`` is no.
        residual: W = W₀ + csg(c), starting from c = 0, rather than W = csg(c), starting from random codes.
        kernels: ``same``: a slice serves the kernels that have its extents, and other layers are left alone. ``any``:
            the first slice also serves all other kernels, as fractional slices.
        seed: of the maps and of random codes.
    """

    slices: tuple[tuple[int, ...], ...] = ((16, 16, 3, 3),)
    codes: tuple[int, ...] = (128,)
    map: str = LEARNED
    freeze: bool = False
    residual: bool = True
    kernels: str = SAME
    seed: int = 0

    def __post_init__(self) -> None:
        """Raise UsageError where settings contradict each other."""
        problems = []
        if len(self.slices) != len(self.codes):
            problems.append(f"{len(self.slices)} shapes of slices and {len(self.codes)} code sizes; give one for each")
        if len(set(self.slices)) != len(self.slices):
            problems.append("the same shape of slice twice")
        if any(len(shape) not in (3, 4, 5) or min(shape) < 1 for shape in self.slices):
            problems.append("a slice is filters x channels x kernel, such as 16x16x3x3, each 1 or more")
        if any(code < 1 for code in self.codes):
            problems.append("a code has 1 element or more")
        if self.map == BINARY and not self.freeze:
            problems.append("a binary map is never trained: freeze=no does not go with map=binary")
        if self.kernels not in (SAME, ANY):
            problems.append(f"kernels={self.kernels}: choose one of: {choices((SAME, ANY))}")
        if self.seed < 0:
            problems.append(f"seed={self.seed}: 0 or more")
        if problems:
            raise UsageError("adapter: " + "; ".join(problems))

    def slice_for(self, shape: tuple[int, ...]) -> int | None:
        """Return the index of the slice that serves filters of ``shape``, None if they are left alone."""
        for index, part in enumerate(self.slices):
            if part[2:] == shape[2:]:
                return index
        if self.kernels == ANY and len(self.slices[0]) == len(shape):
            return 0
        return None

    def __str__(self) -> str:
        """Return the compact spelling, every setting written out; :func:`parse` reads it back equal."""
        slices = "+".join("x".join(map(str, shape)) for shape in self.slices)
        codes = "+".join(map(str, self.codes))
        return (
            f"csg:slice={slices},code={codes},map={self.map},freeze={_word(self.freeze)},"
            f"residual={_word(self.residual)},kernels={self.kernels},seed={self.seed}"
        )


def _word(flag: bool) -> str:
    return "yes" if flag else "no"


def _flag(text: str) -> bool:
    if text not in ("yes", "no"):
        raise ValueError("choose one of: no, yes")
    return text == "yes"


def _shapes(text: str) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(int(extent) for extent in shape.split("x")) for shape in text.split("+"))


def _name(text: str) -> str:
    if not text:
        raise ValueError("it is empty")
    return text


_READERS: Mapping[str, tuple[str, Callable[[str], Any]]] = {
    "slice": ("slices", _shapes),
    "code": ("codes", lambda text: tuple(int(size) for size in text.split("+"))),
    "map": ("map", _name),
    "freeze": ("freeze", _flag),
    "residual": ("residual", _flag),
    "kernels": ("kernels", _name),
    "seed": ("seed", int),
}


def parse(text: str) -> AdapterSettings:
    """Return the settings that ``text`` spells: ``csg`` or ``bcsg``, then maybe ``:name=value,...``.

    A code has an eighteenth of its slice's elements unless ``code`` says otherwise; the map is frozen unless it is
    learned.

    Raises:
        UsageError: an unknown kind, name or value; the message lists the valid ones.
    """
    kind, _, rest = text.partition(":")
    if kind not in KINDS:
        raise UsageError(f"there is no adapter '{kind}'; choose one of: {choices(KINDS)}")
    given: dict[str, Any] = {}
    for part in rest.split(",") if rest else ():
        name, _, value = part.partition("=")
        if name not in _READERS:
            raise UsageError(f"adapter {kind}: no setting is called '{name}'; choose one of: {choices(_READERS)}")
        field, read = _READERS[name]
        if field in given:
            raise UsageError(f"adapter {kind}: '{name}' is given twice")
        try:
            given[field] = read(value)
        except ValueError as error:
            raise UsageError(f"adapter {kind}: {name}={value} cannot be read ({error})") from None
    given.setdefault("map", KINDS[kind])
    given.setdefault("freeze", given["map"] != LEARNED)
    if "slices" in given:
        given.setdefault("codes", tuple(max(1, round(math.prod(shape) / RATIO)) for shape in given["slices"]))
    return AdapterSettings(**given)
