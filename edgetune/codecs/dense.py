"""The baseline codec: the tensor itself. Knows numpy and the codec protocol."""

from __future__ import annotations

from collections.abc import Mapping

from edgetune.codecs.base import Array, Emitter, Encoded, Saved


class Dense:
    """Keeps the tensor as it is; nothing is emitted, the tensor merely stays alive."""

    name = "dense"
    lossy = False

    def letters(self, saved: Saved) -> tuple[str, ...]:
        """No mode has a rank."""
        return ()

    def encode(self, x: Array, saved: Saved, bases: Mapping[str, Array]) -> dict[str, Array]:
        """Return ``x``."""
        return {"value": x}

    def decode(self, stored: Mapping[str, Array], saved: Saved, bases: Mapping[str, Array]) -> Array:
        """Return ``x``."""
        return stored["value"]

    def emit_encode(self, g: Emitter, x: str, saved: Saved, bases: Mapping[str, str]) -> Encoded:
        """Emit nothing."""
        return Encoded((x,), {}, None)

    def emit_decode(self, g: Emitter, encoded: Encoded, saved: Saved) -> str:
        """Emit nothing."""
        return encoded.stored[0]
