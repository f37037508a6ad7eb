"""What the Tucker codecs have in common whose factors, all of them, come from the batch itself and are stored with it.

    X ≈ S ×₁U¹ ×₂U² ×₃U³ ...        S = X ×₁U¹ᵀ ×₂U²ᵀ ×₃U³ᵀ ...        (HOSVD paper, eq. 6-8)

Core and factors lie as in ``codecs/hosvd.py``; the factors of c and the positions are stored, not resident. What a
codec adds is how it finds the factor of one mode from its unfolding. Knows numpy and the codec protocol.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import numpy as np

from edgetune.codecs.base import Array, Emitter, Encoded, Mode, Saved, Source, StoredTensor, check_finite
from edgetune.codecs.hosvd import Hosvd, core_of, emit_core, emit_project, project
from edgetune.codecs.tucker import emit_unfolding


class BatchTucker(ABC):
    """Stores the factor U¹ [b, r1], the core, and the factor [n, r] of every other mode that is cut.

    A mode of extent one stays whole; so does the channel mode of a grouped convolution.
    """

    lossy = True
    name: str
    source: Source
    """Of the run-time input of every mode."""

    @abstractmethod
    def factor(self, unfolding: Array, given: Array) -> Array:
        """Return the orthonormal factor [n, r] of a mode from its ``unfolding`` [n, N] and its run-time input."""

    @abstractmethod
    def emit_factor(self, g: Emitter, unfolding: str, transposed: bool, given: str) -> str:
        """Emit :meth:`factor`; ``transposed``: the unfolding is given as [N, n]."""

    def applies(self, saved: Saved) -> bool:
        """To every tensor."""
        return True

    def modes(self, saved: Saved) -> tuple[Mode, ...]:
        """b, and every other mode that is cut."""
        sizes = {"b": None, **saved.extents()}
        return tuple(Mode(letter, self.source, sizes[letter], 1, letter) for letter in cut_axes(saved))

    def stored(self, saved: Saved) -> tuple[StoredTensor, ...]:
        """The factor of the batch mode, the core, and the other factors."""
        cut = cut_axes(saved)
        *others, last = (letter if letter in cut else size for letter, size in saved.extents().items())
        core = (*others, "b", last) if saved.rows else (saved.groups, *others, "b", last)
        factors = (
            StoredTensor(f"factor_{letter}", (size, letter))
            for letter, size in saved.extents().items()
            if letter in cut
        )
        return StoredTensor("factor", ("batch", "b")), StoredTensor("core", core), *factors

    def encode(self, x: Array, saved: Saved, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Return ``factor`` [b, r1], ``core`` and ``factor_c`` [c, r2], ``factor_h`` [h, r3] ...

        Where the source is CARRIED, these factors are what the next step gets.
        """
        check_finite(x, saved)
        factors = {}
        for letter, axis in cut_axes(saved).items():
            unfolding = np.moveaxis(x, axis, 0).reshape(x.shape[axis], -1)
            factors[letter] = self.factor(unfolding, inputs[letter]).astype(x.dtype)
        first = factors.pop("b")
        projected = project(x, saved, {letter: factor[None] for letter, factor in factors.items()})
        others = {f"factor_{letter}": factor for letter, factor in factors.items()}
        return {"factor": first, "core": core_of(projected, first), **others}

    def decode(self, stored: Mapping[str, Array], saved: Saved, inputs: Mapping[str, Array]) -> Array:
        """Return S ×₁U¹ ×₂U² ×₃U³ ... (eq. 8)."""
        bases = {letter: stored[f"factor_{letter}"][None] for letter in cut_axes(saved) if letter != "b"}
        return Hosvd().decode(stored, saved, bases)

    def emit_encode(self, g: Emitter, x: str, saved: Saved, inputs: Mapping[str, str]) -> Encoded:
        """Emit the factor of every mode from its own unfolding of ``x``, then the projections."""
        factors = {}
        for letter, axis in cut_axes(saved).items():
            unfolding, transposed = emit_unfolding(g, x, axis, 1 + len(saved.shape))
            factors[letter] = self.emit_factor(g, unfolding, transposed, inputs[letter])
        bases = {letter: _emit_basis(g, factor) for letter, factor in factors.items() if letter != "b"}
        projected = emit_project(g, x, saved, bases)
        core, energy = emit_core(g, projected, factors["b"], x, saved)
        carried = {}
        if self.source is Source.CARRIED:  # a batch with NaN costs its own step, not all that follow
            for letter, factor in factors.items():
                unknown = g.op("IsNaN", factor, hint="unknown")
                carried[letter] = g.op("Where", unknown, inputs[letter], factor, hint=f"next_{letter}")
        others = (factor for letter, factor in factors.items() if letter != "b")
        return Encoded((factors["b"], core, *others), {}, energy, carried)

    def emit_decode(self, g: Emitter, encoded: Encoded, saved: Saved) -> str:
        """Emit eq. 8."""
        return Hosvd().emit_decode(g, emit_as_hosvd(g, encoded, saved), saved)


def cut_axes(saved: Saved) -> dict[str, int]:
    """Return the axis in X of every mode that is cut, by letter; b comes first."""
    axes = {letter: 1 + i for i, letter in enumerate(saved.extents())}
    sizes = saved.extents() | ({"c": 1} if saved.groups > 1 else {})
    return {"b": 0, **{letter: axis for letter, axis in axes.items() if sizes[letter] > 1}}


def emit_as_hosvd(g: Emitter, encoded: Encoded, saved: Saved) -> Encoded:
    """Emit what the codec hosvd would hold: the factors but that of b as bases [1, n, r]. What it does hold stays."""
    factor, core, *others = encoded.stored
    if not others:
        return encoded
    letters = [letter for letter in cut_axes(saved) if letter != "b"]
    bases = {letter: _emit_basis(g, name) for letter, name in zip(letters, others, strict=True)}
    return Encoded((factor, core), bases, encoded.energy)


def _emit_basis(g: Emitter, factor: str) -> str:
    return str(g.op("Unsqueeze", factor, g.const([0]), hint="basis"))
