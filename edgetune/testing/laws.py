"""The laws of codecs/base.py on data, one function each. Knows the cases and the coders; knows no codec by name.

A law raises AssertionError with a sentence that says what was found and on what. It tries one :class:`Saved` at a time.
Where a law runs: ``ORACLE_LAWS`` are about the numpy code, ``ENGINE_LAWS`` about the emitted nodes, and ``LAWS`` hold
for both alike. The laws that need no place to run are in ``forms``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from edgetune.codecs.base import Array, Codec, Saved, Source, captured_energy
from edgetune.errors import DataError, UsageError
from edgetune.testing.cases import CONTENTS, full_ranks, inputs_for, shape_of, some_ranks, symbols, tensor
from edgetune.testing.coders import ORACLE, Coded, Coder, Oracle, coder_for
from edgetune.testing.forms import require

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
        """Return the tolerance that precision asks for: float16 has eleven bits, a float32 sum of n may lose n·2⁻²⁴."""
        rounding = max(1e-5, math.prod(saved.shape) * 2.0**-24)
        if any(tensor.dtype == "float16" for tensor in codec.stored(saved)):
            return Tolerance(exact=2e-3, energy=2e-3 + rounding, subspace=2e-3)
        if coarse := _rounding(codec):
            return Tolerance(exact=2 * coarse, energy=coarse / 2 + rounding, subspace=2 * coarse)
        return Tolerance(energy=rounding)


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


def _rounding(codec: Codec) -> float:
    """Return by which part a stored number may be off, where that is more than a float16 may."""
    return float(getattr(codec, "rounding", 0.0))


def distance(a: Array, b: Array, scale: Array) -> float:
    """Return ‖a - b‖ / ‖scale‖, or ‖a - b‖ where the scale is zero; computed in float64."""
    norm = float(np.linalg.norm(scale.astype(np.float64)))
    return float(np.linalg.norm(a.astype(np.float64) - b.astype(np.float64))) / (norm or 1.0)


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
        require(off <= within, f"in float64 the decoded tensor is {off:.2g} of ‖x‖ away {_of(content, x, {})}")


def _wide(codec: Codec, saved: Saved) -> bool:
    return not _rounding(codec) and all(t.dtype != "float16" for t in codec.stored(saved))


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
        require(decoded.shape == x.shape, f"the decoded tensor is {list(decoded.shape)}, not {list(x.shape)} {where}")
        if not bench.codec.lossy:
            require(np.array_equal(decoded, x), f"a lossless codec changes the tensor {where}")
        elif bench.exact_at(saved):
            off = distance(decoded, x, x)
            require(off <= within.exact, f"the decoded tensor is {off:.2g} of ‖x‖ away {where}")
            _energy_is(coded, 1.0, within.energy, where)


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
        require(decoded.shape == x.shape, f"the decoded tensor is {list(decoded.shape)}, not {list(x.shape)} {where}")
        real = captured_energy(x, decoded)
        require(-within <= real <= 1 + within, f"the decoded tensor has the captured energy {real} {where}")
        _energy_is(coded, real, within, where, is_bound=bench.is_bound)


def _energy_is(coded: Coded, real: float, within: float, where: str, *, is_bound: bool = False) -> None:
    told = coded.energy
    if told is None:
        raise AssertionError(f"a lossy codec tells no energy {where}")
    require(math.isfinite(told), f"the energy is {told} {where}")
    require(told <= real + within, f"the energy is {told:.7g}, but only {real:.7g} is captured {where}")
    require(
        told >= (min(0.0, real) if is_bound else real) - within,
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
            require(
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
        require(set(coded.stored) == set(names), f"{sorted(coded.stored)} are stored, stored() tells {sorted(names)}")
        where = _of("random", x, ranks)
        for tensor_ in told:
            array = coded.stored[tensor_.name]
            expected = shape_of(tensor_.shape, values)
            require(
                array.dtype == np.dtype(tensor_.dtype) and array.shape == expected,
                f"'{tensor_.name}' is {array.dtype} {list(array.shape)}, stored() tells {tensor_.dtype} "
                f"{list(expected)} {where}",
            )
            require(
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
            require(np.array_equal(given, x) and not changed, f"it changes its input {changed or 'x'}")
            results.append({name: np.array(value).tobytes() for name, value in parts.items()})
        for other in results[1:]:
            differing = [name for name, value in results[0].items() if other[name] != value]
            require(not differing, f"two runs differ in {differing} {_of('random', x, ranks)}")


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
            require(
                decoded.shape == x.shape, f"the decoded tensor is {list(decoded.shape)}, not {list(x.shape)} {where}"
            )
            lost = [distance(decoded[i], x[i], x[i]) for i in range(batch)]
            worst = lost.index(max(lost))
            require(
                lost[worst] <= 2 * min(lost) + max(1e-3, _rounding(bench.codec)),
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
        require(content == "huge", f"it refuses the tensor {where}")
        return
    decoded = bench.coder.decode(coded.stored, saved, inputs)
    told = 1.0 if coded.energy is None else coded.energy
    if content == "zeros":
        require(not np.any(decoded), f"zeros are decoded as something else {where}")
        require(abs(told - 1.0) <= within.energy, f"the energy of zeros is {told}, not 1")
    elif content == "tiny":
        off = distance(decoded, x, x)
        require(off <= 1 + within.exact, f"the decoded tensor is {off:.2g} of ‖x‖ away, farther than nothing {where}")
        require(math.isfinite(told) and told <= 1 + within.energy, f"the energy is {told} {where}")
    elif math.isfinite(told):
        real = captured_energy(x, decoded)
        require(told <= real + within.energy, f"the energy is {told:.7g}, but only {real:.7g} is captured {where}")


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
            require(useless, f"one element is {value}, and {found} {_of('random', x, ranks)}")


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
                require(
                    off <= within.agreement,
                    f"of what {whose} stored, the emitted decoder and the oracle's are {off:.2g} of ‖x‖ apart {where}",
                )
                decoded.append(a)
            if content == "decaying":
                off = distance(decoded[0], decoded[1], x)
                require(off <= within.subspace, f"nodes and oracle are {off:.2g} of ‖x‖ apart {where}")


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
            require(
                made.shape == given.shape and made.dtype == given.dtype and bool(np.isfinite(made).all()),
                f"the next factor of {mode.letter} is {made.dtype} {list(made.shape)}, after {list(given.shape)}; or "
                "it is not finite",
            )
            inputs[mode.letter] = made
        require(
            captured >= first - 0.05,
            f"step {step + 1} on the same tensor captures {captured:.4g}, the first {first:.4g}",
        )


PlacedLaw = Callable[[Bench, Saved], None]

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
