"""Truncated higher-order SVD with lazily refreshed bases (HOSVD paper, eq. 6-8 and 18; DESIGN.md section 4).

The bases of c, z, h and w come from calibration and are run-time inputs: their column count is the rank. The factor of
b is found inside the step, after the other modes are projected, where the matrix is small. Knows numpy and the codec
protocol.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from edgetune.codecs.base import (
    POSITIONS,
    Array,
    Emitter,
    Encoded,
    Mode,
    Saved,
    Source,
    StoredTensor,
    check_finite,
)
from edgetune.codecs.energy import emit_captured_energy
from edgetune.codecs.subspace import emit_top_subspace, top_subspace
from edgetune.codecs.tucker import (
    emit_along,
    emit_expand_positions,
    emit_joined,
    emit_matrix,
    emit_project_positions,
)
from edgetune.errors import UsageError, choices

# Up to so many positions the basis of h is multiplied as a matrix over h and w: with [64, 960, 7, 7] the encoder then
# takes 0.83 of the time, for a depthwise layer 0.7; with [64, 256, 14, 14] it takes longer (onnxruntime, one core).
JOINED_POSITIONS = 64

MODES = f"c{POSITIONS}"


@dataclass(frozen=True)
class Hosvd:
    """Stores the core and the batch factor U¹ [b, r1]; the other factors are resident bases.

    The core of a convolution's input [b, c, *positions] is [g, rc, *ranks, r1, rank], that of a linear layer's input
    [b, *positions, c] is [*ranks, r1, rc]: the batch rank stands second to last. Convolutions have one channel factor
    per group. A mode of extent one stays whole; so does the channel mode of a depthwise convolution.

    Attributes:
        cut: the letters of the modes that are cut beside b, where they can be. What a mode that keeps six of seven
            positions saves may be less than what projecting on it costs.

    Raises:
        UsageError: ``cut`` is empty, has a letter twice, or one of no mode.
    """

    cut: str = MODES

    name = "hosvd"
    lossy = True

    def __post_init__(self) -> None:
        if not self.cut or len(set(self.cut)) < len(self.cut) or not set(self.cut) <= set(MODES):
            raise UsageError(
                f"cut={self.cut} of the codec hosvd: expected letters of modes, each once, such as cut=c; "
                f"choose among: {choices(MODES)}"
            )

    def applies(self, saved: Saved) -> bool:
        """To every tensor."""
        return True

    def modes(self, saved: Saved) -> tuple[Mode, ...]:
        """b, and every other mode of ``cut`` that is longer than one."""
        others = (
            Mode(letter, Source.BASIS, size, saved.groups if letter == "c" else 1, letter)
            for letter, size in saved.extents().items()
            if letter in self.cut and size > 1
        )
        return (Mode("b", Source.SKETCH, None, 1, "b"), *others)

    def stored(self, saved: Saved) -> tuple[StoredTensor, ...]:
        """The factor of the batch mode, and the core."""
        cut = {mode.letter for mode in self.modes(saved)}
        order = [letter if letter in cut else size for letter, size in saved.extents().items()]
        core = (*order[:-1], "b", order[-1])
        return StoredTensor("factor", ("batch", "b")), StoredTensor(
            "core", core if saved.rows else (saved.groups, *core)
        )

    def encode(self, x: Array, saved: Saved, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Return ``factor`` [b, r1] and ``core``."""
        check_finite(x, saved)
        projected = project(x, saved, inputs)
        flat = projected.reshape(len(x), -1)
        factor = top_subspace(flat @ flat.T, inputs["b"])
        return {"factor": factor, "core": core_of(projected, factor)}

    def decode(self, stored: Mapping[str, Array], saved: Saved, inputs: Mapping[str, Array]) -> Array:
        """Return S ×₁U¹ ×₂U² ×₃U³ ... (eq. 18)."""
        expanded = _multiply(np.moveaxis(stored["core"], -2, 0), saved, inputs, back=True)
        return np.asarray(np.tensordot(stored["factor"], expanded, axes=1).reshape(-1, *saved.shape))

    def emit_encode(self, g: Emitter, x: str, saved: Saved, inputs: Mapping[str, str]) -> Encoded:
        """Emit the projections of c and the positions (each a product with no transposed copy), then b."""
        projected = emit_project(g, x, saved, inputs)
        flat = g.op("Flatten", projected, axis=1, hint="flat")
        factor = emit_top_subspace(g, g.op("Gemm", flat, flat, transB=1, hint="gram"), inputs["b"])
        core, energy = emit_core(g, projected, factor, x, saved)
        return Encoded((factor, core), {k: v for k, v in inputs.items() if k != "b"}, energy)

    def emit_decode(self, g: Emitter, encoded: Encoded, saved: Saved) -> str:
        """Emit eq. 18."""
        if saved.rows:
            expanded = emit_expand_positions(
                g, emit_batch_first(g, encoded, saved), saved.positions, encoded.bases, lead=1, trail=(-1,)
            )
            if "c" in encoded.bases:
                matrix = emit_matrix(g, encoded.bases["c"], saved.channels)
                transposed = g.op("Transpose", matrix, perm=[1, 0], hint="c_t")
                expanded = g.op("MatMul", expanded, transposed, hint="channels")
        else:
            expanded = emit_spatial(g, encoded, saved)  # [r1, g, rc, *positions]
            if "c" in encoded.bases:
                planes = g.op("Reshape", expanded, g.const([0, 0, 0, -1]), hint="planes")
                expanded = g.op("MatMul", encoded.bases["c"], planes, hint="channels")
        flat = g.op("Flatten", expanded, axis=1, hint="flat")
        decoded = g.op("MatMul", encoded.stored[0], flat, hint="decoded_flat")
        return str(g.op("Reshape", decoded, g.const([-1, *saved.shape]), hint="decoded"))


def project(x: Array, saved: Saved, bases: Mapping[str, Array]) -> Array:
    """Return ``x`` projected on the basis [g, n, r] of every mode but b: [b, *ranks, rc], or [b, g, rc, *ranks]."""
    whole = x if saved.rows else x.reshape(len(x), saved.groups, -1, *saved.positions)
    return _multiply(whole, saved, bases, back=False)


def core_of(projected: Array, factor: Array) -> Array:
    """Return the core: what :func:`project` gives, projected on ``factor`` [b, r1] and with r1 second to last."""
    return np.moveaxis(np.tensordot(factor.T, projected, axes=1), 0, -2)


def emit_project(g: Emitter, x: str, saved: Saved, bases: Mapping[str, str]) -> str:
    """Emit :func:`project`."""
    return (_emit_project_rows if saved.rows else _emit_project_planes)(g, x, saved, bases)


def emit_core(g: Emitter, projected: str, factor: str, x: str, saved: Saved) -> tuple[str, str]:
    """Emit :func:`core_of`, and the captured energy of ``x``."""
    axes = len(saved.shape) + (1 if saved.rows else 2)
    transposed = g.op("Transpose", factor, perm=[1, 0], hint="factor_t")
    if axes > 2:
        projected = g.op("Transpose", projected, perm=[*range(1, axes - 1), 0, axes - 1], hint="batch_inside")
    core = str(g.op("MatMul", transposed, projected, hint="core"))
    return core, emit_captured_energy(g, core, axes, x, 1 + len(saved.shape))


def emit_batch_first(g: Emitter, encoded: Encoded, saved: Saved) -> str:
    """Emit the core of a linear layer's input as [r1, *ranks, rc]."""
    core, inside = encoded.stored[1], len(saved.positions)
    if not inside:
        return core
    return str(g.op("Transpose", core, perm=[inside, *range(inside), inside + 1], hint="batch_first"))


def emit_spatial(g: Emitter, encoded: Encoded, saved: Saved) -> str:
    """Emit Z3[r1, g, rc, *positions] = Σ_ranks S · U³ · U⁴ ... (eq. 21-22): the decoded tensor but for b and c."""
    bases, inside = encoded.bases, len(saved.positions) + 1
    z = encoded.stored[1]
    if "w" in bases:
        z = emit_along(g, z, bases["w"], lead=inside + 1, trail=(), back=True, hint="expand_w")
    z = g.op("Transpose", z, perm=[inside, *range(inside), inside + 1], hint="batch_first")
    if _joins(saved, bases):
        height, width = saved.positions
        joined = g.op("Transpose", emit_joined(g, bases["h"], height, width), perm=[1, 0], hint="joined_t")
        flat = g.op("MatMul", g.op("Reshape", z, g.const([0, 0, 0, -1]), hint="rows"), joined, hint="expand_h")
        return str(g.op("Reshape", flat, g.const([0, 0, 0, height, width]), hint="expand_h"))
    rest = {letter: name for letter, name in bases.items() if letter != "w"}
    return emit_expand_positions(g, z, saved.positions, rest, lead=3)


def _multiply(x: Array, saved: Saved, bases: Mapping[str, Array], *, back: bool) -> Array:
    """Return ``x`` times the basis of every mode but b: projected on it, or (``back``) expanded by it."""
    order = "".join(saved.extents())
    axes = f"b{order}" if saved.rows else f"bg{order}"
    for letter in order:
        if letter in bases:
            grouped = letter == "c" and "g" in axes
            pair = ("g" if grouped else "") + (f"n{letter}" if back else f"{letter}n")
            basis = bases[letter] if grouped else bases[letter][0]
            x = np.einsum(f"{axes},{pair}->{axes.replace(letter, 'n')}", x, basis)
    return x


def _joins(saved: Saved, bases: Mapping[str, str]) -> bool:
    """Tell whether h is cut, w is there, and both are short."""
    two = len(saved.positions) == 2 and saved.positions[1] > 1
    return two and "h" in bases and math.prod(saved.positions) <= JOINED_POSITIONS


def _emit_project_planes(g: Emitter, x: str, saved: Saved, bases: Mapping[str, str]) -> str:
    """Emit the projections of a convolution's input: [b, g, rc, *ranks]; c first, or h where that is cheap."""
    size, joins = saved.channels // saved.groups, _joins(saved, bases)
    if joins or "c" in bases:
        planes = g.const([0, saved.groups, size, math.prod(saved.positions)])
        x = g.op("Reshape", x, planes, hint="grouped")
    if joins:
        height, width = saved.positions
        x = g.op("MatMul", x, emit_joined(g, bases["h"], height, width), hint="project_h")
    if "c" in bases:
        x = g.op("MatMul", g.op("Transpose", bases["c"], perm=[0, 2, 1], hint="c_t"), x, hint="project_c")
    if joins:
        x = g.op("Reshape", x, g.const([0, 0, 0, -1, width]), hint="planes")
        return emit_along(g, x, bases["w"], lead=4, trail=(), back=False, hint="project_w") if "w" in bases else x
    planes = g.const([0, saved.groups, -1, *saved.positions])
    return emit_project_positions(g, g.op("Reshape", x, planes, hint="planes"), saved.positions, bases, lead=3)


def _emit_project_rows(g: Emitter, x: str, saved: Saved, bases: Mapping[str, str]) -> str:
    """Emit the projections of a linear layer's input: [b, *ranks, rc].

    The positions come first: with 50 positions of 768 channels that is 1.2 to 3 times as fast as c first; with 197 of
    192 one is as good as the other, depending on the ranks (measured with onnxruntime on one core).
    """
    x = emit_project_positions(g, x, saved.positions, bases, lead=1, trail=(saved.channels,))
    if "c" in bases:
        x = g.op("MatMul", x, emit_matrix(g, bases["c"], saved.channels), hint="project_c")
    return x
