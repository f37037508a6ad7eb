"""Native kernels that stand in for model-local functions where they are faster.

A kernel is found by the function's name and signature. A function that does not look exactly as expected has none: then
its body is interpreted, which is always right. The agreement tests hold every kernel to that body.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence

import torch
from onnx import FunctionProto, numpy_helper
from torch import Tensor

from edgetune.engines.torch_ops.base import Call, Kernel, pad_spatial
from edgetune.engines.torch_ops.factors import FactorTaps, hosvd_encoder
from edgetune.engines.torch_ops.narrow import widened
from edgetune.engines.torch_ops.tucker import stored_modes, tucker_encoder

_PIECE_ELEMENTS = 1 << 18


def native_kernel(function: FunctionProto) -> Kernel | None:
    """Return the kernel that stands in for ``function``; None if its body is to be interpreted."""
    for find in _FINDERS:
        kernel = find(function)
        if kernel is not None:
            return kernel
    return None


# ConvWeightGrad_<geometry>_w<outputs>x<inputs per group>_<codec>[_<settings>][_<letters of the bases>]
_WEIGHT_GRADIENT = re.compile(
    r"ConvWeightGrad_g(?P<g>\d+)_i(?P<i>[\dx]+)_k(?P<k>[\dx]+)_s(?P<s>[\dx]+)_d(?P<d>[\dx]+)_p(?P<p>[\dx]+)"
    r"_w(?P<w>\d+x\d+)_(?P<codec>dense|svd|hosvd_exact|hosvd|asi)(?:_cut[czhw]+)?(?P<narrow>_storagelog8)?(?P<letters>(?:_[chw])*)"
)


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split("x")]


def _weight_gradient(function: FunctionProto) -> Kernel | None:
    found = _WEIGHT_GRADIENT.fullmatch(function.name)
    if found is None or len(function.output) != 1:
        return None
    letters = found["letters"].split("_")[1:]
    extents, (outputs, each) = _numbers(found["i"]), _numbers(found["w"])
    groups, spatial = int(found["g"]), len(extents)
    if letters and (found["codec"] != "hosvd" or spatial != 2):
        return None
    exact = found["codec"] in ("hosvd_exact", "asi")  # their factors are stored, so the name does not tell them
    if exact:
        letters = [letter for letter in stored_modes([groups * each, *extents], groups) if letter != "b"]
    inputs = {"dense": 2, "svd": 3}.get(found["codec"], 3 + len(letters))
    if len(function.input) != inputs + bool(found["narrow"]) or (exact and spatial != 2):
        return None
    kernel, strides, dilations, pads = (_numbers(found[key]) for key in "ksdp")
    factors = FactorTaps(extents, kernel, strides, dilations, pads, groups)
    in_factors = found["codec"] in ("hosvd", "hosvd_exact", "asi") and factors.serves(outputs, each)
    if math.prod(kernel) == 1 and not in_factors:
        return None  # one matrix product: the body is as fast
    taps = _Taps(extents, kernel, strides, dilations, pads, groups)
    shape = [outputs, each, *taps.kernel]

    # dW[o,c,k,l] = Σ_b,y,x X[b,c,y·s+k·d,x·s+l·d] · dY[b,o,y,x]
    def dense(n: Call, dy: Tensor, x: Tensor) -> Tensor:
        return taps.gradient(x.reshape(-1, groups * each, *extents), dy)

    # the same over the batch rank: X ≈ U·C, so dW = taps(C, Uᵀ·dY)
    def svd(n: Call, dy: Tensor, factor: Tensor, core: Tensor) -> Tensor:
        return taps.gradient(core.reshape(-1, groups * each, *extents), _batch_rank(factor, dy))

    # HOSVD paper, eq. 20 to 24; the core is [g, r2, r3, r1, r4]
    def hosvd(n: Call, dy: Tensor, factor: Tensor, core: Tensor, *given: Tensor) -> Tensor:
        bases = dict(zip(letters, (basis.reshape(-1, *basis.shape[-2:]) for basis in given), strict=True))
        if in_factors:
            return factors.gradient(dy, factor, core, bases)
        z = core @ bases["w"].transpose(1, 2) if "w" in bases else core
        z = z.permute(3, 0, 1, 2, 4)
        z = bases["h"] @ z if "h" in bases else z
        z4 = taps.gradient(z.reshape(z.shape[0], -1, *extents), _batch_rank(factor, dy))
        if "c" not in bases:
            return z4.reshape(shape)
        if groups == 1:  # a 1×1 convolution writes dW where it belongs
            return torch.convolution(z4, bases["c"][0][..., None, None], None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1)
        flat = z4.reshape(groups, outputs // groups, -1, math.prod(taps.kernel))
        return torch.matmul(bases["c"].unsqueeze(1), flat).reshape(shape)

    kernels: dict[str, Kernel] = {"dense": dense, "svd": svd, "hosvd": hosvd, "hosvd_exact": hosvd, "asi": hosvd}
    kernel_of = kernels[found["codec"]]

    def log8(
        n: Call, dy: Tensor, factor: Tensor, core: Tensor, unit: Tensor, *rest: Tensor
    ) -> Tensor | tuple[Tensor, ...]:
        return kernel_of(n, dy, factor, widened(core, unit), *rest)

    return log8 if found["narrow"] else kernel_of


def _batch_rank(factor: Tensor, dy: Tensor) -> Tensor:
    """Return Z1[r1,o,y,x] = Σ_b U[b,r1] · dY[b,o,y,x]."""
    return (factor.t() @ dy.flatten(1)).reshape(-1, *dy.shape[1:])


class _Taps:
    """The weight gradient of one convolution: torch's own, which needs no weight for it."""

    def __init__(
        self,
        extents: Sequence[int],
        kernel: list[int],
        strides: list[int],
        dilations: list[int],
        pads: list[int],
        groups: int,
    ) -> None:
        spatial = len(extents)
        begin, end = pads[:spatial], pads[spatial:]
        self.kernel, self.strides, self.dilations, self.groups = kernel, strides, dilations, groups
        self.common = [min(sides) for sides in zip(begin, end, strict=True)]
        self.begin = [b - c for b, c in zip(begin, self.common, strict=True)]
        self.end = [e - c for e, c in zip(end, self.common, strict=True)]

    def gradient(self, x: Tensor, dy: Tensor) -> Tensor:
        """Return [o, c / groups, *kernel] for ``x`` [b, c, *input] and ``dy`` [b, o, *output]."""
        x = pad_spatial(x, self.begin, self.end)
        # only the shape of the weight is read
        weight = x.new_empty(1).expand(dy.shape[1], x.shape[1] // self.groups, *self.kernel)
        made: tuple[Tensor, ...] = torch.ops.aten.convolution_backward(
            dy, x, weight, None, self.strides, self.common, self.dilations, False, [0] * len(self.kernel), self.groups,
            (False, True, False),
        )  # fmt: skip
        return made[1]


_SIGN_PACK = re.compile(r"SignPack_(?P<shape>[\dx]+)_\w+")
_SIGN_PACK_OPERATORS = {"Constant", "Greater", "Less", "And", "Cast", "Flatten", "Pad", "Reshape", "MatMulInteger"}


def _sign_pack(function: FunctionProto) -> Kernel | None:
    """[b, 1, ceil(n / 8)]: bit j of byte i tells whether element j·ceil(n/8) + i of a sample is between the bounds."""
    found = _SIGN_PACK.fullmatch(function.name)
    operators = [node.op_type for node in function.node]
    if found is None or len(function.input) != 1 or len(function.output) != 1:
        return None
    if not set(operators) <= _SIGN_PACK_OPERATORS or operators.count("MatMulInteger") != 1:
        return None
    # The name gives the bounds with six digits only, so they are read from the body.
    constants = {
        node.output[0]: node.attribute[0].t for node in function.node if node.op_type == "Constant" and node.attribute
    }
    bounds: dict[str, float] = {}
    for node in function.node:
        if node.op_type in ("Greater", "Less"):
            if node.input[0] != function.input[0] or node.input[1] not in constants or node.op_type in bounds:
                return None
            bounds[node.op_type] = float(numpy_helper.to_array(constants[node.input[1]]))
    size = math.prod(_numbers(found["shape"]))
    count = -(-size // 8)

    def pack(n: Call, x: Tensor) -> Tensor:
        packed = torch.empty([len(x), 1, count], dtype=torch.uint8, device=x.device)
        samples = len(x) if x.device.type != "cpu" else max(_PIECE_ELEMENTS // size, 1)  # its temporaries stay small
        for source, target in zip(torch.split(x, samples), torch.split(packed[:, 0], samples), strict=True):
            planes = bits(source)
            target.copy_(planes[:, 7])
            for bit in range(6, -1, -1):
                target.bitwise_left_shift_(1).bitwise_or_(planes[:, bit])
        return packed

    def bits(x: Tensor) -> Tensor:
        inside = x > bounds["Greater"] if "Greater" in bounds else x < bounds["Less"]
        if len(bounds) == 2:
            inside = inside.logical_and_(x < bounds["Less"])
        flat = inside.view(torch.uint8).reshape(len(x), size)
        flat = torch.nn.functional.pad(flat, [0, 8 * count - size]) if size % 8 else flat
        return flat.reshape(len(x), 8, count)

    return pack if bounds else None


_FINDERS: tuple[Callable[[FunctionProto], Kernel | None], ...] = (
    _weight_gradient,
    _sign_pack,
    tucker_encoder,
    hosvd_encoder,
)
