"""The laws of what a codec declares and emits: they need no data and no engine. Knows onnx and the codec table.

A law raises AssertionError with a sentence that says what was found.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterator

import onnx

from edgetune.codecs.base import Codec, Saved, Source, config_of
from edgetune.codecs.table import codec_from, codec_named, identifier, label_of, menu_from
from edgetune.testing.coders import decoder_model, encoder_model

LETTERS = ("b", "c", "z", "h", "w", "k", "u")


def require(condition: bool, text: str) -> None:
    """Raise AssertionError with ``text`` unless ``condition``."""
    if not condition:
        raise AssertionError(text)


def declarations(codec: Codec, saved: Saved) -> None:
    """Modes, stored tensors and attributes are of the form that the protocol asks for."""
    modes, stored = codec.modes(saved), codec.stored(saved)
    letters = [mode.letter for mode in modes]
    require(len(set(letters)) == len(letters), f"the modes {letters} are not distinct")
    require(set(letters) <= set(LETTERS), f"the modes {letters} are not all of {LETTERS}")
    extents = saved.extents()
    order = [letter for letter in ("b", *extents) if letter in letters]
    found = [letter for letter in letters if letter in ("b", *extents)]
    require(order == found, f"the ranks are in the order {found}, not in that of the axes, {order}")
    for mode in modes:
        kind = {Source.COUNT: "k", Source.NOISE: "u"}.get(mode.source)
        require(
            kind in (None, mode.letter),
            f"the mode with the source {mode.source.name} has the letter '{mode.letter}'; expected '{kind}'",
        )
        if mode.letter in extents:
            whole = extents[mode.letter] * (saved.groups // mode.groups if mode.letter == "c" else 1)
            require(mode.size == whole, f"mode {mode.letter} has the size {mode.size}, not {whole}")
        elif mode.letter == "b":
            require(mode.size is None, f"the batch is not known at export, but its mode has the size {mode.size}")
        require(mode.letter == "b" or mode.size is not None, f"mode {mode.letter} has no size")
        require(bool(mode.spectrum) or not mode.ranked, f"mode {mode.letter} has a rank, but files no spectrum")
    require(codec.lossy or not any(m.ranked for m in modes), "a lossless codec has nothing to cut, but modes of a rank")
    names = [tensor.name for tensor in stored]
    require(len(set(names)) == len(names), f"the names of the stored tensors {names} are not distinct")
    known = {"batch", *letters}
    for tensor_ in stored:
        factors = {f for extent in tensor_.shape for f in str(extent).split("*") if not f.isdigit()}
        require(
            factors <= known, f"stored '{tensor_.name}' has extents in {sorted(factors - known)}, which are no mode"
        )


def config(codec: Codec) -> None:
    """The settings round-trip through JSON, and so does the spelling."""
    params = getattr(type(codec), "__dataclass_params__", None)
    require(dataclasses.is_dataclass(codec) and bool(params and params.frozen), "it is not a frozen dataclass")
    settings = json.loads(json.dumps(config_of(codec)))
    again = codec_from(codec.name, settings)
    require(again == codec and hash(again) == hash(codec), f"the config {settings} gives {again!r}, not {codec!r}")
    label = label_of(codec)
    require(codec_named(label) == codec, f"the label '{label}' gives {codec_named(label)!r}, not {codec!r}")
    require(menu_from(label) == (codec,), f"the label '{label}' cannot stand in a menu")
    name = identifier(codec)
    require(re.fullmatch(r"[A-Za-z]\w*", name) is not None, f"'{name}' cannot be part of a function's name")


def emission(codec: Codec, saved: Saved) -> None:
    """Only standard operators, none that a runtime would hoist or that counts the batch; the same nodes every time."""
    if not codec.stored(saved) or codec.name == "dense":
        return
    for make in (encoder_model, decoder_model):
        model = make(codec, saved)
        for function in model.functions:
            inside = set(function.input)
            for node in _nodes(function.node):
                require(node.domain in ("", "ai.onnx"), f"the operator {node.domain}.{node.op_type} is no standard one")
                require(node.op_type not in ("Shape", "Size"), f"a {node.op_type} node: runtimes hoist these")
            for node in function.node:
                free = [name for name in node.input if name and name not in inside]
                require(not free, f"{function.name} reads {free}, which is neither stored nor one of its inputs")
                inside.update(node.output)
        onnx.checker.check_model(model)
        same = make(codec, saved).SerializeToString(deterministic=True) == model.SerializeToString(deterministic=True)
        require(same, "two emissions differ")


def _nodes(nodes: object) -> Iterator[onnx.NodeProto]:
    for node in nodes:  # type: ignore[attr-defined]
        yield node
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from _nodes(attribute.g.node)


CODEC_LAWS: dict[str, Callable[[Codec], None]] = {"config": config}
GEOMETRY_LAWS: dict[str, Callable[[Codec, Saved], None]] = {"declarations": declarations, "emission": emission}
