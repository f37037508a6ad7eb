"""From a symbolic shape to a number of elements and bytes.

An expression is a product: integers and symbols joined by ``*``, such as ``7`` or ``4*batch*rank.layer4.1.conv1.c``.
This module may know the bundle's description of a tensor; it must not know graphs, lifetimes or plans.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import numpy as np

from edgetune.bundle import TensorUse
from edgetune.errors import BundleError, choices


def rank_symbol(saved: str, letter: str) -> str:
    """Return the symbol that stands for the rank of mode ``letter`` of the saved tensor ``saved``."""
    return f"rank.{saved}.{letter}"


def evaluate(expression: str, symbols: Mapping[str, int]) -> int:
    """Return the value of one expression.

    Raises:
        BundleError: the expression is not a product, or holds a symbol that ``symbols`` lacks; the known ones are
            listed.
    """
    return elements((expression,), symbols)


def elements(shape: tuple[str, ...], symbols: Mapping[str, int]) -> int:
    """Return the number of elements of a tensor of ``shape`` (one expression per axis; a scalar has none: 1).

    Raises:
        BundleError: as :func:`evaluate`.
    """
    value, names = _product(shape)
    for name in names:
        try:
            value *= symbols[name]
        except KeyError:
            raise BundleError(
                f"the shape '{' x '.join(shape)}' holds the unknown symbol '{name}'; known symbols: {choices(symbols)}"
            ) from None
    return value


def nbytes(use: TensorUse, symbols: Mapping[str, int]) -> int:
    """Return the bytes of one tensor.

    Raises:
        BundleError: as :func:`evaluate`, or the element type is not one of numpy's.
    """
    return elements(use.shape, symbols) * itemsize(use.dtype)


@functools.lru_cache(maxsize=256)
def itemsize(dtype: str) -> int:
    """Return the bytes of one element of the numpy type ``dtype``.

    Raises:
        BundleError: numpy knows no such type.
    """
    try:
        return np.dtype(dtype).itemsize
    except TypeError:
        raise BundleError(f"'{dtype}' is no element type of numpy, such as float32, float16 or uint8") from None


# A search evaluates the same few hundred shapes for many ranks: parse each once.
@functools.lru_cache(maxsize=1 << 16)
def _product(shape: tuple[str, ...]) -> tuple[int, tuple[str, ...]]:
    """Return the product of all integers in ``shape``, and its symbols."""
    value, names = 1, []
    for expression in shape:
        for part in expression.split("*"):
            factor = part.strip()
            if not factor:
                raise BundleError(f"'{expression}' is not a size: expected integers and symbols joined by '*'")
            if factor.isascii() and factor.isdigit():
                value *= int(factor)
            else:
                names.append(factor)
    return value, tuple(names)
