"""How one saved activation is stored: one file per codec, and the table of them. Knows neither ONNX nor a runtime."""

from __future__ import annotations

from edgetune.codecs.base import Codec, Encoded, Saved, Use, captured_energy
from edgetune.codecs.dense import Dense
from edgetune.codecs.hosvd import Hosvd
from edgetune.codecs.svd import Svd
from edgetune.errors import UsageError, choices

CODECS: dict[str, Codec] = {codec.name: codec for codec in (Dense(), Hosvd(), Svd())}


def codec_named(name: str) -> Codec:
    """Return the codec called ``name``.

    Raises:
        UsageError: there is none; the message lists those that there are.
    """
    if name not in CODECS:
        raise UsageError(f"there is no codec '{name}'; choose one of: {choices(CODECS)}")
    return CODECS[name]


__all__ = ["CODECS", "Codec", "Dense", "Encoded", "Hosvd", "Saved", "Svd", "Use", "captured_energy", "codec_named"]
