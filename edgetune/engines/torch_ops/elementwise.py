"""Element-wise operators: arithmetic, comparisons, logic, activations, casts."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from edgetune.engines.torch_ops.arena import fresh
from edgetune.engines.torch_ops.base import Call, Kernel, broadcast
from edgetune.errors import EngineError


def _unary(function: Any) -> Kernel:
    return lambda n, x: function(x)


def _made(function: Any) -> Kernel:
    """Return the kernel of a ``function`` that can write its floating-point result to memory of ours."""

    def kernel(n: Call, x: Tensor) -> Tensor:
        out = fresh(x.shape, x.dtype, x.device) if x.is_floating_point() else None
        result: Tensor = function(x) if out is None else function(x, out=out)
        return result

    return kernel


def _binary(function: Any, dtype: torch.dtype | None = None) -> Kernel:
    """Return the kernel of a ``function`` of two tensors of one type; ``dtype`` is that of the result if another."""

    def kernel(n: Call, a: Tensor, b: Tensor) -> Tensor:
        shape = a.shape if a.shape == b.shape else broadcast(a.shape, b.shape)
        out = fresh(shape, dtype or a.dtype, a.device) if a.dtype == b.dtype else None
        result: Tensor = function(a, b) if out is None else function(a, b, out=out)
        return result

    return kernel


def _fold(function: Callable[[Tensor, Tensor], Tensor]) -> Kernel:
    def kernel(n: Call, *x: Tensor) -> Tensor:
        return x[0].clone() if len(x) == 1 else functools.reduce(function, x)

    return kernel


def _mean(n: Call, *x: Tensor) -> Tensor:
    return functools.reduce(torch.add, x) / len(x)


_quotient = _binary(torch.div)


def _div(n: Call, a: Tensor, b: Tensor) -> Tensor | tuple[Tensor, ...]:
    if a.dtype.is_floating_point:
        return _quotient(n, a, b)
    # integers: towards zero, as C does
    return torch.div(a, b, rounding_mode="trunc")


def _mod(n: Call, a: Tensor, b: Tensor) -> Tensor:
    # fmod=1: the sign of the dividend, as C; 0: of the divisor, as Python
    return torch.fmod(a, b) if n.get("fmod", 0) else torch.remainder(a, b)


def _pow(n: Call, base: Tensor, exponent: Tensor) -> Tensor:
    return torch.pow(base, exponent).to(base.dtype)


def _bit_shift(n: Call, x: Tensor, by: Tensor) -> Tensor:
    return (torch.bitwise_left_shift if n.get("direction") == "LEFT" else torch.bitwise_right_shift)(x, by)


def _clip(n: Call, x: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
    if n.opset < 11:
        return x.clamp(n.get("min"), n.get("max"))
    if low is None and high is None:
        return x.clone()
    out = fresh(x.shape, x.dtype, x.device)
    return torch.clamp(x, low, high) if out is None else torch.clamp(x, low, high, out=out)


def _relu(n: Call, x: Tensor) -> Tensor:
    out = fresh(x.shape, x.dtype, x.device)
    return torch.relu(x) if out is None else torch.clamp_min(x, 0, out=out)


def _leaky_relu(n: Call, x: Tensor) -> Tensor:
    return functional.leaky_relu(x, n.get("alpha", 0.01))


def _prelu(n: Call, x: Tensor, slope: Tensor) -> Tensor:
    return torch.where(x < 0, x * slope, x)


def _elu(n: Call, x: Tensor) -> Tensor:
    return functional.elu(x, n.get("alpha", 1.0))


def _selu(n: Call, x: Tensor) -> Tensor:
    gamma: float = n.get("gamma", 1.05070102214813232421875)
    return functional.elu(x, n.get("alpha", 1.67326319217681884765625)).mul_(gamma)


def _celu(n: Call, x: Tensor) -> Tensor:
    return functional.celu(x, n.get("alpha", 1.0))


def _softplus(n: Call, x: Tensor) -> Tensor:
    # torch's own becomes the identity above a threshold, which float64 can tell from the truth
    return torch.relu(x) + torch.log1p(torch.exp(-torch.abs(x)))


def _mish(n: Call, x: Tensor) -> Tensor:
    return x * torch.tanh(_softplus(n, x))


def _softsign(n: Call, x: Tensor) -> Tensor:
    return x / (1 + torch.abs(x))


def _thresholded_relu(n: Call, x: Tensor) -> Tensor:
    return torch.where(x > n.get("alpha", 1.0), x, torch.zeros_like(x))


def _hard_sigmoid(n: Call, x: Tensor) -> Tensor:
    alpha: float = n.get("alpha", 0.2)
    return (x * alpha).add_(n.get("beta", 0.5)).clamp_(0, 1)


def _shrink(n: Call, x: Tensor) -> Tensor:
    bias, bound = n.get("bias", 0.0), n.get("lambd", 0.5)
    zero = torch.zeros_like(x)
    return torch.where(x < -bound, (x + bias).to(x.dtype), torch.where(x > bound, (x - bias).to(x.dtype), zero))


def _is_inf(n: Call, x: Tensor) -> Tensor:
    found = torch.zeros_like(x, dtype=torch.bool)
    if n.get("detect_negative", 1):
        found = found | torch.isneginf(x)
    return found | torch.isposinf(x) if n.get("detect_positive", 1) else found


def _cast(n: Call, x: Tensor) -> Tensor:
    target = n.type_of(n.get("to"))
    out = None if target == x.dtype else fresh(x.shape, target, x.device)
    return x.to(target) if out is None else out.copy_(x)


def _cast_like(n: Call, x: Tensor, like: Tensor) -> Tensor:
    return x.to(like.dtype)


def _where(n: Call, condition: Tensor, a: Tensor, b: Tensor) -> Tensor:
    shape = broadcast(condition.shape, a.shape, b.shape)
    out = fresh(shape, a.dtype, a.device) if a.dtype == b.dtype else None
    return torch.where(condition, a, b) if out is None else torch.where(condition, a, b, out=out)


def _dropout(n: Call, x: Tensor, ratio: Tensor | None = None, training: Tensor | None = None) -> tuple[Tensor, ...]:
    """Pass ``x`` on; in training mode, drop what numpy's generator of that seed says, as ONNX's reference does."""
    share = 0.5 if ratio is None else float(n.numbers(1, ratio))
    if training is None or not bool(n.numbers(2, training)) or share == 0.0:
        return x, torch.ones_like(x, dtype=torch.bool)
    if "seed" not in n.attributes:
        raise EngineError(f"Dropout '{n.name}' draws without a seed; export the model in evaluation mode")
    import numpy as np

    drawn = np.random.RandomState(n.get("seed")).uniform(0, 1.0, tuple(x.shape))
    mask = torch.from_numpy(drawn >= share).to(x.device)
    return x * mask / (1 - share), mask


KERNELS: dict[str, Kernel] = {
    **{
        name: _made(function)
        for name, function in {
            "Abs": torch.abs, "Acos": torch.acos, "Acosh": torch.acosh, "Asin": torch.asin, "Asinh": torch.asinh,
            "Atan": torch.atan, "Atanh": torch.atanh, "Ceil": torch.ceil, "Cos": torch.cos, "Cosh": torch.cosh,
            "Erf": torch.erf, "Exp": torch.exp, "Floor": torch.floor, "Log": torch.log, "Neg": torch.neg,
            "Reciprocal": torch.reciprocal, "Round": torch.round, "Sigmoid": torch.sigmoid, "Sign": torch.sign,
            "Sin": torch.sin, "Sinh": torch.sinh, "Sqrt": torch.sqrt, "Tan": torch.tan, "Tanh": torch.tanh,
        }.items()
    },
    **{
        name: _unary(function)
        for name, function in {
            "BitwiseNot": torch.bitwise_not, "HardSwish": functional.hardswish, "IsNaN": torch.isnan,
            "Not": torch.logical_not,
        }.items()
    },
    **{
        name: _binary(function)
        for name, function in {
            "Add": torch.add, "BitwiseAnd": torch.bitwise_and, "BitwiseOr": torch.bitwise_or,
            "BitwiseXor": torch.bitwise_xor, "Mul": torch.mul, "Sub": torch.sub,
        }.items()
    },
    **{
        name: _binary(function, torch.bool)
        for name, function in {
            "And": torch.logical_and, "Equal": torch.eq, "Greater": torch.gt, "GreaterOrEqual": torch.ge,
            "Less": torch.lt, "LessOrEqual": torch.le, "Or": torch.logical_or, "Xor": torch.logical_xor,
        }.items()
    },
    "BitShift": _bit_shift,
    "Cast": _cast,
    "CastLike": _cast_like,
    "Celu": _celu,
    "Clip": _clip,
    "Div": _div,
    "Dropout": _dropout,
    "Elu": _elu,
    "HardSigmoid": _hard_sigmoid,
    "IsInf": _is_inf,
    "LeakyRelu": _leaky_relu,
    "Max": _fold(torch.maximum),
    "Mean": _mean,
    "Min": _fold(torch.minimum),
    "Mish": _mish,
    "Mod": _mod,
    "PRelu": _prelu,
    "Pow": _pow,
    "Relu": _relu,
    "Selu": _selu,
    "Shrink": _shrink,
    "Softplus": _softplus,
    "Softsign": _softsign,
    "Sum": _fold(torch.add),
    "ThresholdedRelu": _thresholded_relu,
    "Where": _where,
}  # fmt: skip


# The same, written over the first input, which nobody reads afterwards.
def _hard_sigmoid_(n: Call, x: Tensor) -> Tensor:
    return x.mul_(n.get("alpha", 0.2)).add_(n.get("beta", 0.5)).clamp_(0, 1)


def _clip_(n: Call, x: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
    return x if low is None and high is None else x.clamp_(low, high)


IN_PLACE: dict[str, Kernel] = {
    "Clip": _clip_,
    "HardSigmoid": _hard_sigmoid_,
    "Relu": _unary(torch.relu_),
    "Sigmoid": _unary(torch.sigmoid_),
    "Tanh": _unary(torch.tanh_),
}

# The same, written to a buffer that may be one of the inputs: what the last operators of an update are.
INTO: dict[str, Callable[..., Tensor]] = {"Add": torch.add, "Mul": torch.mul, "Sub": torch.sub, "Div": torch.div}
