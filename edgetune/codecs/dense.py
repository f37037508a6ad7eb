"""The baseline codec: the tensor itself. Knows numpy and the codec protocol."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from edgetune.codecs.base import Array, Emitter, Encoded, Mode, Saved, StoredTensor, check_finite


@dataclass(frozen=True)
class Dense:
    """Keeps the tensor as it is; nothing is emitted, the tensor merely stays alive."""

    name = "dense"
    lossy = False

    def applies(self, saved: Saved) -> bool:
        """To every tensor."""
        return True

    def modes(self, saved: Saved) -> tuple[Mode, ...]:
        """Nothing is decided at run time."""
        return ()

    def stored(self, saved: Saved) -> tuple[StoredTensor, ...]:
        """The tensor."""
        return (StoredTensor("value", ("batch", *saved.shape)),)

    def encode(self, x: Array, saved: Saved, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Return ``x``."""
        check_finite(x, saved)
        return {"value": x}

    def decode(self, stored: Mapping[str, Array], saved: Saved, inputs: Mapping[str, Array]) -> Array:
        """Return ``x``."""
        return stored["value"]

    def emit_encode(self, g: Emitter, x: str, saved: Saved, inputs: Mapping[str, str]) -> Encoded:
        """Emit nothing."""
        return Encoded((x,), {}, None)

    def emit_decode(self, g: Emitter, encoded: Encoded, saved: Saved) -> str:
        """Emit nothing."""
        return encoded.stored[0]
