"""The laws of codecs/base.py, one function each. Knows the cases and the coders; knows no codec by name.

A law raises AssertionError with a sentence that says what was found and on what. It tries one :class:`Saved` at a time.
Where a law runs: ``CODEC_LAWS`` need no place; ``ORACLE_LAWS`` are about the numpy code, ``ENGINE_LAWS`` about the
emitted nodes, and ``LAWS`` hold for both alike.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx

from edgetune.codecs.base import Array, Codec, Saved, Source, captured_energy, config_of
from edgetune.codecs.table import codec_from, codec_named, identifier, label_of, menu_from
from edgetune.errors import DataError, UsageError
from edgetune.testing.cases import CONTENTS, full_ranks, inputs_for, shape_of, some_ranks, symbols, tensor
from edgetune.testing.coders import ORACLE, Coded, Coder, Oracle, coder_for, decoder_model, encoder_model

LETTERS = ("b", "c", "z", "h", "w", "k", "u")
BATCH, SHORT = 4, 3
"""The batch that most cases have, and a last one that is shorter."""


@dataclass(frozen=True)
class Tolerance:
    """How far results may be from what a law says, as parts of ‖x‖ (energies: as parts of ‖x‖²).

    Attributes:
        exact: the decoded tensor from ``x`` where every rank is full.
        energy: the energy from that of the decoded tensor.
        agreement: one side's decoded tensor from the other's, where both decode the same stored tensors.
        subspace: the same where each side encodes for itself.
    """

    exact: float = 1e-5
    energy: float = 1e-5
    agreement: float = 1e-5
    subspace: float = 1e-4

    @staticmethod
    def of(codec: Codec, saved: Saved) -> Tolerance:
        """Return the tolerance that the precision of the stored tensors asks for: float16 has eleven bits."""
        if any(tensor.dtype == "float16" for tensor in codec.stored(saved)):
            return Tolerance(exact=2e-3, energy=2e-3, subspace=2e-3)
        return Tolerance()


@dataclass(frozen=True)
class Bench:
    """One codec at one place; see :func:`edgetune.testing.coders.coder_for`."""

    codec: Codec
    place: str
    coder: Coder
    seed: int = 0
    tolerance: Tolerance | None = None

    def within(self, saved: Saved) -> Tolerance:
        """Return the tolerance for ``saved``."""
        return self.tolerance or Tolerance.of(self.codec, saved)

    def stores(self, saved: Saved) -> bool:
        """Whether anything is stored: a codec that stores nothing has nothing to decode."""
        return bool(self.codec.stored(saved))

    @property
    def is_bound(self) -> bool:
        """Whether the energy is a lower bound."""
        return bool(getattr(self.codec, "energy_is_bound", False))

    def exact_at(self, saved: Saved) -> bool:
        """Whether the decoded tensor equals ``x`` when every rank is full."""
        if not self.codec.lossy:
            return True
        return bool(getattr(self.codec, "exact", True)) and any(m.ranked for m in self.codec.modes(saved))


def distance(a: Array, b: Array, scale: Array) -> float:
    """Return ‖a - b‖ / ‖scale‖, or ‖a - b‖ where the scale is zero; computed in float64."""
    norm = float(np.linalg.norm(scale.astype(np.float64)))
    return float(np.linalg.norm(a.astype(np.float64) - b.astype(np.float64))) / (norm or 1.0)


def _require(condition: bool, text: str) -> None:
    if not condition:
        raise AssertionError(text)


def _inputs(bench: Bench, saved: Saved, batch: int, ranks: Mapping[str, int] | None = None) -> dict[str, Array]:
    return inputs_for(bench.codec, saved, batch, bench.seed, ranks)


def _both_ranks(bench: Bench, saved: Saved, batch: int) -> Iterator[dict[str, int]]:
    """Yield the full ranks, and some smaller ones."""
    full = full_ranks(bench.codec, saved, batch)
    yield full
    some = some_ranks(bench.codec, saved, batch, bench.seed)
    if some != full:
        yield some


def _contents(bench: Bench, saved: Saved) -> Iterator[tuple[str, Array]]:
    """Yield two contents per shape; over all shapes each content comes several times."""
    turn = sum(saved.shape) + bench.seed
    for content in dict.fromkeys(CONTENTS[(turn + step) % len(CONTENTS)] for step in (0, 2)):
        yield content, tensor(content, saved, BATCH, bench.seed)


def _of(content: str, x: Array, ranks: Mapping[str, int]) -> str:
    return f"with the content '{content}', batch {len(x)}" + (f", ranks {dict(ranks)}" if ranks else "")


# -- one codec, no place ----------------------------------------------------------------------------------------------


def declarations(codec: Codec, saved: Saved) -> None:
    """Modes, stored tensors and attributes are of the form that the protocol asks for."""
    modes, stored = codec.modes(saved), codec.stored(saved)
    letters = [mode.letter for mode in modes]
    _require(len(set(letters)) == len(letters), f"the modes {letters} are not distinct")
    _require(set(letters) <= set(LETTERS), f"the modes {letters} are not all of {LETTERS}")
    extents = saved.extents()
    order = [letter for letter in ("b", *extents) if letter in letters]
    found = [letter for letter in letters if letter in ("b", *extents)]
    _require(order == found, f"the ranks are in the order {found}, not in that of the axes, {order}")
    for mode in modes:
        kind = {Source.COUNT: "k", Source.NOISE: "u"}.get(mode.source)
        _require(kind in (None, mode.letter), f"a mode with the source {mode.source.name} has the letter '{kind}'")
        if mode.letter in extents:
            whole = extents[mode.letter] * (saved.groups // mode.groups if mode.letter == "c" else 1)
            _require(mode.size == whole, f"mode {mode.letter} has the size {mode.size}, not {whole}")
        elif mode.letter == "b":
            _require(mode.size is None, f"the batch is not known at export, but its mode has the size {mode.size}")
        _require(mode.letter == "b" or mode.size is not None, f"mode {mode.letter} has no size")
        _require(bool(mode.spectrum) or not mode.ranked, f"mode {mode.letter} has a rank, but files no spectrum")
    _require(
        codec.lossy or not any(m.ranked for m in modes), "a lossless codec has nothing to cut, but modes of a rank"
    )
    names = [tensor.name for tensor in stored]
    _require(len(set(names)) == len(names), f"the names of the stored tensors {names} are not distinct")
    known = {"batch", *letters}
    for tensor_ in stored:
        factors = {f for extent in tensor_.shape for f in str(extent).split("*") if not f.isdigit()}
        _require(
            factors <= known, f"stored '{tensor_.name}' has extents in {sorted(factors - known)}, which are no mode"
        )


def config(codec: Codec) -> None:
    """The settings round-trip through JSON, and so does the spelling."""
    params = getattr(type(codec), "__dataclass_params__", None)
    _require(dataclasses.is_dataclass(codec) and bool(params and params.frozen), "it is not a frozen dataclass")
    settings = json.loads(json.dumps(config_of(codec)))
    again = codec_from(codec.name, settings)
    _require(again == codec and hash(again) == hash(codec), f"the config {settings} gives {again!r}, not {codec!r}")
    label = label_of(codec)
    _require(codec_named(label) == codec, f"the label '{label}' gives {codec_named(label)!r}, not {codec!r}")
    _require(menu_from(label) == (codec,), f"the label '{label}' cannot stand in a menu")
    name = identifier(codec)
    _require(re.fullmatch(r"[A-Za-z]\w*", name) is not None, f"'{name}' cannot be part of a function's name")


# -- the emitted nodes, no engine -------------------------------------------------------------------------------------


def emission(codec: Codec, saved: Saved) -> None:
    """Only standard operators, none that a runtime would hoist or that counts the batch; the same nodes every time."""
    if not codec.stored(saved) or codec.name == "dense":
        return
    for make in (encoder_model, decoder_model):
        model = make(codec, saved)
        for function in model.functions:
            inside = set(function.input)
            for node in _nodes(function.node):
                _require(
                    node.domain in ("", "ai.onnx"), f"the operator {node.domain}.{node.op_type} is no standard one"
                )
                _require(node.op_type not in ("Shape", "Size"), f"a {node.op_type} node: runtimes hoist these")
            for node in function.node:
                free = [name for name in node.input if name and name not in inside]
                _require(not free, f"{function.name} reads {free}, which is neither stored nor one of its inputs")
                inside.update(node.output)
        onnx.checker.check_model(model)
        same = make(codec, saved).SerializeToString(deterministic=True) == model.SerializeToString(deterministic=True)
        _require(same, "two emissions differ")


def _nodes(nodes: object) -> Iterator[onnx.NodeProto]:
    for node in nodes:  # type: ignore[attr-defined]
        yield node
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from _nodes(attribute.g.node)


# -- the oracle -------------------------------------------------------------------------------------------------------


def empty(bench: Bench, saved: Saved) -> None:
    """A batch of no samples is refused, in words."""
    x = np.zeros((0, *saved.shape), np.float32)
    inputs = _inputs(bench, saved, 0, dict.fromkeys(full_ranks(bench.codec, saved, 0), 1) | {"b": 0})
    try:
        bench.codec.encode(x, saved, inputs)
    except DataError:
        return
    raise AssertionError("encode takes a batch of no samples; expected a DataError (check_finite raises it)")


def double(bench: Bench, saved: Saved) -> None:
    """In float64 the round trip at full rank is exact to 1e-6: the oracle's formulas are right, not merely close."""
    if not bench.stores(saved) or not bench.exact_at(saved):
        return
    within = min(bench.within(saved).exact, 1e-6) if _wide(bench.codec, saved) else bench.within(saved).exact
    for content, x in _contents(bench, saved):
        wide, inputs = x.astype(np.float64), _inputs(bench, saved, len(x))
        inputs = {k: v.astype(np.float64) if v.dtype == np.float32 else v for k, v in inputs.items()}
        decoded = bench.coder.decode(bench.codec.encode(wide, saved, inputs), saved, inputs)
        off = distance(decoded, wide, wide)
        _require(off <= within, f"in float64 the decoded tensor is {off:.2g} of ‖x‖ away {_of(content, x, {})}")


def _wide(codec: Codec, saved: Saved) -> bool:
    return all(t.dtype != "float16" for t in codec.stored(saved))


def nothing_to_decode(bench: Bench, saved: Saved) -> None:
    """A codec that stores nothing works inside a train graph only, and says so."""
    if bench.stores(saved):
        return
    try:
        bench.codec.decode({}, saved, {})
    except UsageError:
        return
    raise AssertionError("it stores nothing, and yet decodes; expected a UsageError")


# -- the oracle and the engines alike ---------------------------------------------------------------------------------


def exact(bench: Bench, saved: Saved) -> None:
    """At full ranks the decoded tensor equals ``x`` (lossless codecs: bit for bit), and the energy is 1."""
    if not bench.stores(saved):
        return
    within = bench.within(saved)
    for content, x in _contents(bench, saved):
        inputs = _inputs(bench, saved, len(x))
        coded = bench.coder.encode(x, saved, inputs)
        decoded = bench.coder.decode(coded.stored, saved, inputs)
        where = "at full rank " + _of(content, x, {})
        _require(decoded.shape == x.shape, f"the decoded tensor is {list(decoded.shape)}, not {list(x.shape)} {where}")
        if not bench.codec.lossy:
            _require(np.array_equal(decoded, x), f"a lossless codec changes the tensor {where}")
        elif bench.exact_at(saved):
            off = distance(decoded, x, x)
            _require(off <= within.exact, f"the decoded tensor is {off:.2g} of ‖x‖ away {where}")
            _energy_is(bench, coded, 1.0, within.energy, where)


def energy(bench: Bench, saved: Saved) -> None:
    """The energy is 1 - ‖x - decoded‖²/‖x‖²: between 0 and 1, and never more than what is really there."""
    if not bench.codec.lossy or not bench.stores(saved):
        return
    within = bench.within(saved).energy
    for content, x in _contents(bench, saved):
        ranks = some_ranks(bench.codec, saved, len(x), bench.seed)
        inputs = _inputs(bench, saved, len(x), ranks)
        coded = bench.coder.encode(x, saved, inputs)
        decoded = bench.coder.decode(coded.stored, saved, inputs)
        where = _of(content, x, ranks)
        _require(decoded.shape == x.shape, f"the decoded tensor is {list(decoded.shape)}, not {list(x.shape)} {where}")
        real = captured_energy(x, decoded)
        _require(-within <= real <= 1 + within, f"the decoded tensor has the captured energy {real} {where}")
        _energy_is(bench, coded, real, within, where)


def _energy_is(bench: Bench, coded: Coded, real: float, within: float, where: str) -> None:
    told = coded.energy
    if told is None:
        raise AssertionError(f"a lossy codec tells no energy {where}")
    _require(math.isfinite(told), f"the energy is {told} {where}")
    _require(told <= real + within, f"the energy is {told:.7g}, but only {real:.7g} is captured {where}")
    _require(
        told >= (min(0.0, real) if bench.is_bound else real) - within,
        f"the energy is {told:.7g}, but {real:.7g} is captured {where}",
    )


def monotone(bench: Bench, saved: Saved) -> None:
    """A larger rank or count, the others full, never loses more."""
    full = full_ranks(bench.codec, saved, BATCH)
    x = tensor("random", saved, BATCH, bench.seed)
    if not full or not bench.stores(saved):
        return
    for letter, most in full.items():
        before = -math.inf
        for rank in sorted({1, (most + 1) // 2, most}):
            inputs = _inputs(bench, saved, BATCH, full | {letter: rank})
            decoded = bench.coder.decode(bench.coder.encode(x, saved, inputs).stored, saved, inputs)
            now = captured_energy(x, decoded)
            _require(
                now >= before - bench.within(saved).energy,
                f"with {letter} = {rank} the captured energy is {now:.7g}, with a smaller one it was {before:.7g}",
            )
            before = now


def held(bench: Bench, saved: Saved) -> None:
    """The arrays that are stored are those that ``stored`` tells: names, shapes, element types, so bytes."""
    x = tensor("random", saved, BATCH, bench.seed)
    for ranks in _both_ranks(bench, saved, BATCH):
        coded = bench.coder.encode(x, saved, _inputs(bench, saved, BATCH, ranks))
        values = symbols(bench.codec, saved, BATCH, ranks)
        told = bench.codec.stored(saved)
        names = [tensor_.name for tensor_ in told]
        _require(set(coded.stored) == set(names), f"{sorted(coded.stored)} are stored, stored() tells {sorted(names)}")
        where = _of("random", x, ranks)
        for tensor_ in told:
            array = coded.stored[tensor_.name]
            expected = shape_of(tensor_.shape, values)
            _require(
                array.dtype == np.dtype(tensor_.dtype) and array.shape == expected,
                f"'{tensor_.name}' is {array.dtype} {list(array.shape)}, stored() tells {tensor_.dtype} "
                f"{list(expected)} {where}",
            )
            _require(
                array.nbytes == tensor_.bytes(values),
                f"'{tensor_.name}' holds {array.nbytes} bytes, stored() tells {tensor_.bytes(values)} {where}",
            )


def repeatable(bench: Bench, saved: Saved) -> None:
    """The same input and run-time inputs give the same result, bit for bit, and are left as they were."""
    x = tensor("random", saved, BATCH, bench.seed)
    for ranks in _both_ranks(bench, saved, BATCH):
        inputs = _inputs(bench, saved, BATCH, ranks)
        results = []
        for coder in (bench.coder, bench.coder, coder_for(bench.codec, bench.place)):
            given, taken = x.copy(), {letter: value.copy() for letter, value in inputs.items()}
            coded = coder.encode(given, saved, taken)
            parts = {**coded.stored, **{f"next {k}": v for k, v in coded.carried.items()}}
            parts["energy"] = np.array(np.nan if coded.energy is None else coded.energy)
            if bench.stores(saved):
                parts["decoded"] = coder.decode(coded.stored, saved, taken)
            changed = [name for name, value in inputs.items() if not np.array_equal(taken[name], value)]
            _require(np.array_equal(given, x) and not changed, f"it changes its input {changed or 'x'}")
            results.append({name: np.array(value).tobytes() for name, value in parts.items()})
        for other in results[1:]:
            differing = [name for name, value in results[0].items() if other[name] != value]
            _require(not differing, f"two runs differ in {differing} {_of('random', x, ranks)}")


def batches(bench: Bench, saved: Saved) -> None:
    """One sample, a full batch and a shorter last one pass through the same nodes, and no sample fares worse for it."""
    if not bench.stores(saved):
        return
    for batch in (BATCH, 1, SHORT, BATCH + 1):
        x = tensor("duplicates", saved, batch, bench.seed)
        full, some = full_ranks(bench.codec, saved, batch), some_ranks(bench.codec, saved, batch, bench.seed)
        for ranks in (full, some):
            inputs = _inputs(bench, saved, batch, ranks)
            coded = bench.coder.encode(x, saved, inputs)
            decoded = bench.coder.decode(coded.stored, saved, inputs)
            where = _of("duplicates", x, ranks)
            _require(
                decoded.shape == x.shape, f"the decoded tensor is {list(decoded.shape)}, not {list(x.shape)} {where}"
            )
            lost = [distance(decoded[i], x[i], x[i]) for i in range(batch)]
            worst = lost.index(max(lost))
            _require(
                lost[worst] <= 2 * min(lost) + 1e-3,
                f"of equal samples number {worst + 1} loses {lost[worst]:.2g} of its norm, another {min(lost):.2g} "
                f"{where}",
            )


def extremes(bench: Bench, saved: Saved) -> None:
    """Zeros stay zeros; of numbers whose squares overflow, the energy is right or not finite; tiny ones do no harm."""
    if not bench.stores(saved):
        return
    within = bench.within(saved)
    with np.errstate(all="ignore"):
        for content in ("zeros", "huge", "tiny"):
            x = tensor(content, saved, BATCH, bench.seed)
            for ranks in _both_ranks(bench, saved, BATCH):
                _extreme(bench, saved, content, x, ranks, within)


def _extreme(bench: Bench, saved: Saved, content: str, x: Array, ranks: Mapping[str, int], within: Tolerance) -> None:
    where, inputs = _of(content, x, ranks), _inputs(bench, saved, len(x), ranks)
    try:
        coded = bench.coder.encode(x, saved, inputs)
    except DataError:
        _require(content == "huge", f"it refuses the tensor {where}")
        return
    decoded = bench.coder.decode(coded.stored, saved, inputs)
    told = 1.0 if coded.energy is None else coded.energy
    if content == "zeros":
        _require(not np.any(decoded), f"zeros are decoded as something else {where}")
        _require(abs(told - 1.0) <= within.energy, f"the energy of zeros is {told}, not 1")
    elif content == "tiny":
        off = distance(decoded, x, x)
        _require(off <= 1 + within.exact, f"the decoded tensor is {off:.2g} of ‖x‖ away, farther than nothing {where}")
        _require(math.isfinite(told) and told <= 1 + within.energy, f"the energy is {told} {where}")
    elif math.isfinite(told):
        real = captured_energy(x, decoded)
        _require(told <= real + within.energy, f"the energy is {told:.7g}, but only {real:.7g} is captured {where}")


def not_finite(bench: Bench, saved: Saved) -> None:
    """NaN and infinity are refused: by the oracle with a DataError, by the emitted nodes with a useless energy."""
    if bench.place != ORACLE and not (bench.codec.lossy and bench.stores(saved)):
        return
    for value in (math.nan, math.inf, -math.inf):
        for ranks in _both_ranks(bench, saved, BATCH):
            x = tensor("random", saved, BATCH, bench.seed)
            x.reshape(-1)[[0, -1][len(saved.shape) % 2]] = value
            inputs = _inputs(bench, saved, BATCH, ranks)
            try:
                with np.errstate(all="ignore"):
                    told = bench.coder.encode(x, saved, inputs).energy
            except DataError:
                continue
            found = "encode takes it; expected a DataError" if bench.place == ORACLE else f"the energy is {told}"
            useless = bench.place != ORACLE and told is not None and not math.isfinite(told)
            _require(useless, f"one element is {value}, and {found} {_of('random', x, ranks)}")


# -- an engine against the oracle -------------------------------------------------------------------------------------


def agreement(bench: Bench, saved: Saved) -> None:
    """What one side stored the other decodes alike; and both find the same where there is one answer to find."""
    if not bench.stores(saved):
        return
    oracle, within = Oracle(bench.codec), bench.within(saved)
    for content, x in [*_contents(bench, saved), ("decaying", tensor("decaying", saved, BATCH, bench.seed))]:
        for ranks in _both_ranks(bench, saved, len(x)):
            where, inputs = _of(content, x, ranks), _inputs(bench, saved, len(x), ranks)
            own, expected = bench.coder.encode(x, saved, inputs), oracle.encode(x, saved, inputs)
            decoded = []
            for whose, stored in (("the nodes", own.stored), ("the oracle", expected.stored)):
                a, b = bench.coder.decode(stored, saved, inputs), oracle.decode(stored, saved, inputs)
                off = distance(a, b, x)
                _require(
                    off <= within.agreement,
                    f"of what {whose} stored, the emitted decoder and the oracle's are {off:.2g} of ‖x‖ apart {where}",
                )
                decoded.append(a)
            if content == "decaying":
                off = distance(*decoded, x)
                _require(off <= within.subspace, f"nodes and oracle are {off:.2g} of ‖x‖ apart {where}")


def carries(bench: Bench, saved: Saved) -> None:
    """The factors for the next step have the shape of those that came in, are finite, and serve the next step."""
    moving = [mode for mode in bench.codec.modes(saved) if mode.source is Source.CARRIED]
    if not moving:
        return
    x = tensor("random", saved, BATCH, bench.seed)
    inputs = _inputs(bench, saved, BATCH, some_ranks(bench.codec, saved, BATCH, bench.seed))
    first = math.nan
    for step in range(3):
        coded = bench.coder.encode(x, saved, inputs)
        captured = captured_energy(x, bench.coder.decode(coded.stored, saved, inputs))
        first = captured if step == 0 else first
        for mode in moving:
            made, given = coded.carried[mode.letter], inputs[mode.letter]
            _require(
                made.shape == given.shape and made.dtype == given.dtype and bool(np.isfinite(made).all()),
                f"the next factor of {mode.letter} is {made.dtype} {list(made.shape)}, after {list(given.shape)}; or "
                "it is not finite",
            )
            inputs[mode.letter] = made
        _require(
            captured >= first - 0.05,
            f"step {step + 1} on the same tensor captures {captured:.4g}, the first {first:.4g}",
        )


PlacedLaw = Callable[[Bench, Saved], None]

CODEC_LAWS: dict[str, Callable[[Codec], None]] = {"config": config}
GEOMETRY_LAWS: dict[str, Callable[[Codec, Saved], None]] = {"declarations": declarations, "emission": emission}
ORACLE_LAWS: dict[str, PlacedLaw] = {"empty": empty, "double": double, "nothing_to_decode": nothing_to_decode}
LAWS: dict[str, PlacedLaw] = {
    "exact": exact,
    "energy": energy,
    "monotone": monotone,
    "held": held,
    "repeatable": repeatable,
    "batches": batches,
    "extremes": extremes,
    "not_finite": not_finite,
}
ENGINE_LAWS: dict[str, PlacedLaw] = {"agreement": agreement, "carries": carries}
