"""Small right codecs, one per kind of run-time input that they need, to be made wrong in single points."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from edgetune.codecs.base import Array, Emitter, Encoded, Mode, Saved, Source, StoredTensor, check_finite
from edgetune.codecs.energy import TINY, emit_captured_energy
from edgetune.codecs.subspace import emit_top_subspace, top_subspace
from edgetune.codecs.svd import Svd
from edgetune.errors import UsageError

INT32, INT64, FLOAT, FLOAT16, INT8 = 6, 7, 1, 10, 3  # onnx.TensorProto


@dataclass(frozen=True)
class Largest:
    """COUNT: the k largest magnitudes of every sample, with their indices."""

    name = "largest"
    lossy = True
    index = "int32"
    code = INT32

    def applies(self, saved: Saved) -> bool:
        return True

    def modes(self, saved: Saved) -> tuple[Mode, ...]:
        return (Mode("k", Source.COUNT, math.prod(saved.shape), 1, "k"),)

    def stored(self, saved: Saved) -> tuple[StoredTensor, ...]:
        return StoredTensor("values", ("batch", "k")), StoredTensor("indices", ("batch", "k"), self.index)

    def order(self, magnitudes: Array) -> Array:
        return np.argsort(-magnitudes, axis=1, kind="stable")

    def encode(self, x: Array, saved: Saved, inputs: Mapping[str, Array]) -> dict[str, Array]:
        check_finite(x, saved)
        flat = x.reshape(len(x), -1)
        indices = self.order(np.abs(flat))[:, : int(inputs["k"][0])]
        return {"values": np.take_along_axis(flat, indices, 1), "indices": indices.astype(self.index)}

    def decode(self, stored: Mapping[str, Array], saved: Saved, inputs: Mapping[str, Array]) -> Array:
        values = stored["values"]
        flat = np.zeros((len(values), math.prod(saved.shape)), values.dtype)
        np.put_along_axis(flat, stored["indices"].astype(np.int64), values, 1)
        return flat.reshape(-1, *saved.shape)

    def emit_encode(self, g: Emitter, x: str, saved: Saved, inputs: Mapping[str, str]) -> Encoded:
        flat = g.op("Flatten", x, axis=1)
        _, indices = g.op("TopK", g.op("Abs", flat), inputs["k"], axis=1, outputs=2)
        values = g.op("GatherElements", flat, indices, axis=1)
        narrow = g.op("Cast", indices, to=self.code)
        return Encoded((values, narrow), {}, emit_captured_energy(g, values, 2, x, 1 + len(saved.shape)))

    def emit_decode(self, g: Emitter, encoded: Encoded, saved: Saved) -> str:
        values, indices = encoded.stored
        column = g.op("ReduceMax", g.op("Cast", indices, to=FLOAT), g.const([1]), keepdims=1)
        zeros = g.op("Mul", column, g.const(np.zeros((1, math.prod(saved.shape)), np.float32)))
        flat = g.op("ScatterElements", zeros, g.op("Cast", indices, to=INT64), values, axis=1)
        return str(g.op("Reshape", flat, g.const([-1, *saved.shape])))


@dataclass(frozen=True)
class Rounded:
    """NOISE: bytes and one scale per sample, rounded up with the probability of the fraction."""

    levels: int = 127

    name = "rounded"
    lossy = True

    def applies(self, saved: Saved) -> bool:
        return True

    def modes(self, saved: Saved) -> tuple[Mode, ...]:
        return (Mode("u", Source.NOISE, math.prod(saved.shape)),)

    def stored(self, saved: Saved) -> tuple[StoredTensor, ...]:
        return StoredTensor("codes", ("batch", math.prod(saved.shape)), "int8"), StoredTensor("scale", ("batch", 1))

    def encode(self, x: Array, saved: Saved, inputs: Mapping[str, Array]) -> dict[str, Array]:
        check_finite(x, saved)
        flat = x.reshape(len(x), -1)
        scale = np.maximum(np.abs(flat).max(1, keepdims=True) / np.float32(self.levels), np.float32(1e-37))
        return {"codes": np.floor(flat / scale + inputs["u"]).astype(np.int8), "scale": scale}

    def decode(self, stored: Mapping[str, Array], saved: Saved, inputs: Mapping[str, Array]) -> Array:
        return np.asarray((stored["codes"] * stored["scale"]).reshape(-1, *saved.shape))

    def emit_encode(self, g: Emitter, x: str, saved: Saved, inputs: Mapping[str, str]) -> Encoded:
        flat = g.op("Flatten", x, axis=1)
        largest = g.op("ReduceMax", g.op("Abs", flat), g.const([1]), keepdims=1)
        scale = g.op("Max", g.op("Div", largest, g.const(float(self.levels))), g.const(1e-37))
        codes = g.op("Cast", g.op("Floor", g.op("Add", g.op("Div", flat, scale), inputs["u"])), to=INT8)
        lost = g.op("Sub", flat, g.op("Mul", g.op("Cast", codes, to=FLOAT), scale))
        norms = [g.op("ReduceSum", g.op("ReduceSumSquare", t, g.const([1])), keepdims=0) for t in (lost, flat)]
        fraction = g.op("Div", norms[0], g.op("Add", norms[1], g.const(TINY)))
        return Encoded((codes, scale), {}, g.op("Sub", g.const(1.0), fraction))

    def emit_decode(self, g: Emitter, encoded: Encoded, saved: Saved) -> str:
        codes, scale = encoded.stored
        flat = g.op("Mul", g.op("Cast", codes, to=FLOAT), scale)
        return str(g.op("Reshape", flat, g.const([-1, *saved.shape])))


@dataclass(frozen=True)
class Warm:
    """CARRIED: the leading subspace of the channels, found from that of the step before."""

    name = "warm"
    lossy = True

    def applies(self, saved: Saved) -> bool:
        return saved.channels_last and saved.channels > 1

    def modes(self, saved: Saved) -> tuple[Mode, ...]:
        return (Mode("c", Source.CARRIED, saved.channels, 1, "c"),)

    def stored(self, saved: Saved) -> tuple[StoredTensor, ...]:
        factor = StoredTensor("factor", (saved.channels, "c"))
        return factor, StoredTensor("core", ("batch", *saved.shape[:-1], "c"))

    def encode(self, x: Array, saved: Saved, inputs: Mapping[str, Array]) -> dict[str, Array]:
        check_finite(x, saved)
        rows = x.reshape(-1, saved.channels)
        factor = top_subspace(rows.T @ rows, inputs["c"])
        return {"factor": factor, "core": x @ factor}

    def decode(self, stored: Mapping[str, Array], saved: Saved, inputs: Mapping[str, Array]) -> Array:
        return np.asarray(stored["core"] @ stored["factor"].T)

    def emit_encode(self, g: Emitter, x: str, saved: Saved, inputs: Mapping[str, str]) -> Encoded:
        rows = g.op("Reshape", x, g.const([-1, saved.channels]))
        factor = emit_top_subspace(g, g.op("Gemm", rows, rows, transA=1), inputs["c"])
        core = g.op("MatMul", x, factor)
        axes = 1 + len(saved.shape)
        return Encoded((factor, core), {}, emit_captured_energy(g, core, axes, x, axes), {"c": self.next(g, factor)})

    def next(self, g: Emitter, factor: str) -> str:
        return str(g.op("Identity", factor))

    def emit_decode(self, g: Emitter, encoded: Encoded, saved: Saved) -> str:
        factor, core = encoded.stored
        return str(g.op("MatMul", core, g.op("Transpose", factor, perm=[1, 0])))


@dataclass(frozen=True)
class Halved(Svd):
    """float16: the factors of svd, rounded. Numbers beyond 65504 become infinite."""

    name = "halved"

    def stored(self, saved: Saved) -> tuple[StoredTensor, ...]:
        return tuple(replace(tensor, dtype="float16") for tensor in super().stored(saved))

    def encode(self, x: Array, saved: Saved, inputs: Mapping[str, Array]) -> dict[str, Array]:
        return {name: value.astype(np.float16) for name, value in super().encode(x, saved, inputs).items()}

    def decode(self, stored: Mapping[str, Array], saved: Saved, inputs: Mapping[str, Array]) -> Array:
        return super().decode({name: value.astype(np.float32) for name, value in stored.items()}, saved, inputs)

    def emit_encode(self, g: Emitter, x: str, saved: Saved, inputs: Mapping[str, str]) -> Encoded:
        encoded = super().emit_encode(g, x, saved, inputs)
        return replace(encoded, stored=tuple(g.op("Cast", name, to=FLOAT16) for name in encoded.stored))

    def emit_decode(self, g: Emitter, encoded: Encoded, saved: Saved) -> str:
        wide = tuple(g.op("Cast", name, to=FLOAT) for name in encoded.stored)
        return super().emit_decode(g, replace(encoded, stored=wide), saved)


@dataclass(frozen=True)
class Absent:
    """Stores nothing."""

    name = "absent"
    lossy = False

    def applies(self, saved: Saved) -> bool:
        return True

    def modes(self, saved: Saved) -> tuple[Mode, ...]:
        return ()

    def stored(self, saved: Saved) -> tuple[StoredTensor, ...]:
        return ()

    def encode(self, x: Array, saved: Saved, inputs: Mapping[str, Array]) -> dict[str, Array]:
        check_finite(x, saved)
        return {}

    def decode(self, stored: Mapping[str, Array], saved: Saved, inputs: Mapping[str, Array]) -> Array:
        raise UsageError("nothing is stored")

    def emit_encode(self, g: Emitter, x: str, saved: Saved, inputs: Mapping[str, str]) -> Encoded:
        return Encoded((), {}, None)

    def emit_decode(self, g: Emitter, encoded: Encoded, saved: Saved) -> str:
        raise UsageError("nothing is stored")
