"""How one saved activation is stored: one file per codec, and the table of them. Knows neither ONNX nor a runtime."""

from __future__ import annotations

from edgetune.codecs.asi import Asi
from edgetune.codecs.base import Codec, Encoded, Mode, Saved, Source, StoredTensor, Use, captured_energy
from edgetune.codecs.dct import Dct
from edgetune.codecs.dense import Dense
from edgetune.codecs.hosvd import Hosvd
from edgetune.codecs.hosvd_exact import HosvdExact
from edgetune.codecs.log8 import Log8
from edgetune.codecs.narrow import Half, Narrow, opened
from edgetune.codecs.patch import Patch
from edgetune.codecs.quantised import Int4, Int8
from edgetune.codecs.recompute import Recompute
from edgetune.codecs.sparse import Sparse, count_grid
from edgetune.codecs.svd import Svd
from edgetune.codecs.table import CODECS, codec_from, codec_named, identifier, label_of, menu_from, with_fallback
from edgetune.codecs.threshold import Threshold
from edgetune.codecs.wavelet import Db3, Haar

__all__ = [
    "CODECS",
    "Asi",
    "Codec",
    "Db3",
    "Dct",
    "Dense",
    "Encoded",
    "Haar",
    "Half",
    "Hosvd",
    "HosvdExact",
    "Int4",
    "Int8",
    "Log8",
    "Mode",
    "Narrow",
    "Patch",
    "Recompute",
    "Saved",
    "Source",
    "Sparse",
    "StoredTensor",
    "Svd",
    "Threshold",
    "Use",
    "captured_energy",
    "codec_from",
    "codec_named",
    "count_grid",
    "identifier",
    "label_of",
    "menu_from",
    "opened",
    "with_fallback",
]
