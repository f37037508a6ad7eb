"""A manifest whose saved tensors have several options, made of numbers alone, with graphs that can be cut to a choice.

A chain of layers: the forward pass makes x1, x2, ... and encodes each by every codec; the backward pass decodes them.
Options: ``hosvd`` (a rank for c), ``dct`` (a count), ``int8`` (nothing to choose), ``dense``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from edgetune.bundle import (
    Array,
    ChoiceSpec,
    GraphSpec,
    LayerSpec,
    Manifest,
    ModeSpec,
    OptionSpec,
    ParameterSpec,
    SavedSpec,
    TensorUse,
    WireSpec,
)
from edgetune.codecs import count_grid
from edgetune.planning.rates import LEVELS
from edgetune.planning.spectra import Calibration, Spectrum
from tests.planning.synthetic import graph, manifest, use

MENU = ("hosvd", "dct", "int8", "dense")


def menu_manifest(shapes: Sequence[tuple[int, ...]], menu: Sequence[str] = MENU, *, pieces: bool = False) -> Manifest:
    """Layers whose inputs have the given (channels, *positions); without a trunk or calibrate graph. With ``pieces`` a
    batch may be trained in pieces."""
    plain = manifest(shapes, trunk=False)
    saved = tuple(_saved(i, shape, menu) for i, shape in enumerate(shapes))
    weights = [f"l{i}.weight" for i in range(len(shapes))]
    graphs = {"train": _train(shapes, saved), "predict": plain.graphs["predict"], "update": plain.graphs["update"]}
    if pieces:
        sizes = [f"{shape[0]} {shape[0]} 3 3" for shape in shapes]
        names = [f"{kind}/{weight}" for kind in ("accumulated", "gradient") for weight in weights]
        held = [use(name, size, "gradient", -1, 1) for name, size in zip(names, 2 * sizes, strict=True)]
        graphs["accumulate"] = graph("accumulate", 1, held)
    layers = tuple(
        LayerSpec(f"l{i}", "Conv", "tail", shape, weights[i], None, f"l{i}") for i, shape in enumerate(shapes)
    )
    parameters = tuple(
        ParameterSpec(weights[i], (shape[0], shape[0], 3, 3), f"l{i}", "tail") for i, shape in enumerate(shapes)
    )
    return dataclasses.replace(
        plain, codec="+".join(menu), saved=saved, layers=layers, parameters=parameters, graphs=graphs
    )


def menu_calibration(described: Manifest, batch: int, seed: int = 0) -> Calibration:
    """Spectra and energies that decay at random speeds, and errors that fall with ε at a random level per tensor."""
    rng = np.random.default_rng(seed)
    spectra: dict[str, dict[str, Spectrum]] = {}
    counts: dict[str, dict[str, Array]] = {}
    errors: dict[str, dict[str, Array]] = {}
    for spec in described.saved:
        channels, size = spec.shape[0], math.prod(spec.shape)
        values = np.sort(np.exp(-rng.uniform(0.1, 1) * np.arange(channels)))[::-1]
        basis = np.eye(channels, dtype=np.float32)[None]
        spectra[spec.name] = {"c": Spectrum(values[None], basis)}
        grid = np.array(count_grid(size))
        counts[spec.name] = {"dct.k": np.append(1 - np.exp(-rng.uniform(2, 20) * grid / size), 1.0)}
        level = rng.uniform(0.2, 2.0)
        lost = np.sqrt(1 - np.array(LEVELS))
        errors[spec.name] = {
            "hosvd": np.column_stack([LEVELS, level * lost]),
            "dct": np.column_stack([LEVELS[:-1], 0.7 * level * lost[:-1]]),
            "int8": np.array([[1.0, rng.uniform(0.001, 0.05)]]),
        }
    return Calibration(spectra, 2 * batch, batch, counts, errors)


def _saved(i: int, shape: tuple[int, ...], menu: Sequence[str]) -> SavedSpec:
    name, size = f"l{i}", math.prod(shape)
    rank = ModeSpec("c", shape[0], 1, f"rank.{name}.c", f"{name}.basis", "basis", "c")
    count = ModeSpec("k", size, 1, f"rank.{name}.k", f"{name}.count", "count", "dct.k")
    options = {
        "hosvd": OptionSpec("hosvd", "hosvd", {}, True, (rank,), (f"{name}.core",)),
        "dct": OptionSpec("dct", "dct", {}, True, (count,), (f"{name}.values", f"{name}.places")),
        "int8": OptionSpec("int8", "int8", {}, True, (), (f"{name}.bytes",)),
        "dense": OptionSpec("dense", "dense", {}, False, (), (f"x{i}",)),
    }
    return SavedSpec(name, (name,), tuple(options[label] for label in menu), shape, 1, f"{name}.energy")


def _train(shapes: Sequence[tuple[int, ...]], saved: Sequence[SavedSpec]) -> GraphSpec:
    n = len(shapes)
    wires: list[WireSpec] = []
    tensors: list[TensorUse] = [use("y", "batch", "target", -1, 0, dtype="int64")]
    choices: list[ChoiceSpec] = []

    def node(op: str, inputs: str, outputs: str) -> None:
        wires.append(WireSpec(op, tuple(inputs.split()), tuple(outputs.split())))

    def tensor(name: str, shape: str, kind: str = "transient", dtype: str = "float32") -> None:
        first = -1 if kind in ("feature", "parameter", "basis", "scalar") else 0
        tensors.append(use(name, shape, kind, first, 0, dtype=dtype))

    dense = ["batch " + " ".join(map(str, shape)) for shape in (*shapes, shapes[-1])]
    tensor("x0", dense[0], "feature")
    tensor(f"x{n}", dense[n])
    tensor(f"dy{n}", dense[n])
    for i, (spec, shape) in enumerate(zip(saved, shapes, strict=True)):
        rest, size = " ".join(map(str, shape[1:])), math.prod(shape)
        if i:
            tensor(f"x{i}", dense[i])
            tensor(f"dy{i}", dense[i])
        tensor(f"l{i}.weight", f"{shape[0]} {shape[0]} 3 3", "parameter")
        tensor(f"gradient/l{i}.weight", f"{shape[0]} {shape[0]} 3 3", "gradient")
        tensor(f"{spec.name}.in", dense[i])
        node("Conv", f"x{i} l{i}.weight", f"x{i + 1}")
        for option in spec.options:
            if option.label == "hosvd":
                tensor(f"{spec.name}.basis", f"1 {shape[0]} rank.{spec.name}.c", "basis")
                tensor(f"{spec.name}.core", f"batch rank.{spec.name}.c {rest}")
                node("MatMul", f"x{i} {spec.name}.basis", f"{spec.name}.core")
            elif option.label == "dct":
                tensor(f"{spec.name}.count", "1", "scalar", "int64")
                tensor(f"{spec.name}.scratch", dense[i])
                tensor(f"{spec.name}.values", f"batch rank.{spec.name}.k")
                tensor(f"{spec.name}.places", f"batch 2 rank.{spec.name}.k", dtype="uint8")
                node("MatMul", f"x{i}", f"{spec.name}.scratch")
                node("TopK", f"{spec.name}.scratch {spec.name}.count", f"{spec.name}.values {spec.name}.places")
            elif option.label == "int8":
                tensor(f"{spec.name}.bytes", f"batch {size}", dtype="uint8")
                node("Cast", f"x{i}", f"{spec.name}.bytes")
    node("Loss", f"x{n} y", f"dy{n} loss")
    tensor("loss", "", "output")
    for i in reversed(range(n)):
        spec, taken = saved[i], {}
        for option in spec.options:
            label = option.label
            taken[label] = f"x{i}" if label == "dense" else f"{spec.name}.{label}"
            if label == "dense":
                continue
            tensor(taken[label], dense[i])
            node(
                "Decode",
                " ".join((*option.stored, *(m.input for m in option.modes if m.source == "basis"))),
                taken[label],
            )
        choices.append(ChoiceSpec(spec.name, f"{spec.name}.in", taken))
        node("WeightGradient", f"dy{i + 1} {spec.name}.in", f"gradient/l{i}.weight")
        if i:
            node("InputGradient", f"dy{i + 1} l{i}.weight", f"dy{i}")
    inputs = tuple(t.name for t in tensors if t.first < 0)
    outputs = ("loss", *(f"gradient/l{i}.weight" for i in range(n)))
    nodes = tuple(f"node{i}" for i in range(len(wires)))
    return GraphSpec(
        "train.onnx", "train.flat.onnx", inputs, outputs, nodes, tuple(tensors), wires=tuple(wires),
        choices=tuple(choices), ends=(f"dy{n}",),
    )  # fmt: skip
