"""The checkpointing baseline: nothing is stored, the tensor is computed again. Knows the codec protocol."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NoReturn

from edgetune.codecs.base import Array, Emitter, Encoded, Mode, Saved, StoredTensor, check_finite
from edgetune.errors import UsageError


@dataclass(frozen=True)
class Recompute:
    """Stores nothing (Chen et al. 2016, "Training deep nets with sublinear memory cost").

    The backward pass computes the tensor again from the nearest ones upstream that are kept exactly in any case: the
    tail's inputs, and tensors that no codec may touch. So this codec alone can not decode: reverse mode emits the
    forward pass of that stretch a second time (``autodiff.rebuild``).
    """

    name = "recompute"
    lossy = False

    def applies(self, saved: Saved) -> bool:
        """To every tensor."""
        return True

    def modes(self, saved: Saved) -> tuple[Mode, ...]:
        """Nothing is decided at run time."""
        return ()

    def stored(self, saved: Saved) -> tuple[StoredTensor, ...]:
        """Nothing."""
        return ()

    def encode(self, x: Array, saved: Saved, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Return nothing."""
        check_finite(x, saved)
        return {}

    def decode(self, stored: Mapping[str, Array], saved: Saved, inputs: Mapping[str, Array]) -> NoReturn:
        """Raise UsageError: only the graph can compute the tensor again."""
        raise UsageError(f"'{saved.name}' is not stored; the codec recompute works inside a train graph only")

    def emit_encode(self, g: Emitter, x: str, saved: Saved, inputs: Mapping[str, str]) -> Encoded:
        """Emit nothing."""
        return Encoded((), {}, None)

    def emit_decode(self, g: Emitter, encoded: Encoded, saved: Saved) -> NoReturn:
        """Raise UsageError, as :meth:`decode`."""
        self.decode({}, saved, {})
