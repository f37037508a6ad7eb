"""Manifests made of numbers alone: a chain of trained layers, as the exporter would describe it, without any graph."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edgetune.bundle import (
    FORMAT_VERSION,
    GraphSpec,
    InferenceSpec,
    LayerSpec,
    LossSpec,
    Manifest,
    ModeSpec,
    OptimizerSpec,
    OptionSpec,
    ParameterSpec,
    PreprocessSpec,
    SavedSpec,
    TensorSpec,
    TensorUse,
    Workspace,
)
from edgetune.codecs import Saved
from edgetune.planning.sizes import rank_symbol
from edgetune.planning.spectra import Calibration, Spectrum

CLASSES = 10


def use(
    name: str, shape: str, kind: str, first: int, last: int, *, buffer: str | None = None, dtype: str = "float32"
) -> TensorUse:
    """A tensor whose ``shape`` is written with spaces between axes."""
    return TensorUse(name, tuple(shape.split()), dtype, kind, first, last, buffer or name)


def graph(
    name: str, count: int, tensors: list[TensorUse], workspaces: tuple[Workspace, ...] = (), prefix: str = "node"
) -> GraphSpec:
    """A graph of ``count`` nodes."""
    nodes = tuple(f"{prefix}{i}" for i in range(count))
    return GraphSpec(f"{name}.onnx", f"{name}.flat.onnx", (), (), nodes, tuple(tensors), workspaces)


def saved_spec(name: str, shape: tuple[int, ...], letters: str, groups: int, *, last: bool = False) -> SavedSpec:
    """A saved convolution input, or (``last``) a linear layer's; ``letters`` names the truncated modes ("" for the
    dense codec)."""
    size: dict[str, int | None] = {"b": None, **Saved(name, shape, groups, last).extents()}
    modes = tuple(
        ModeSpec(
            x,
            size[x],
            groups if x == "c" else 1,
            rank_symbol(name, x),
            f"basis.{name}.{x}",
            "sketch" if x == "b" else "basis",
            x,
        )
        for x in letters
    )
    stored = (f"{name}.core",) + ((f"{name}.factor_b",) if "b" in letters else ())
    if not modes:
        return SavedSpec(name, (name,), (OptionSpec("dense", "dense", {}, False, (), (f"{name}.x",)),), shape)
    option = OptionSpec("hosvd", "hosvd", {}, True, modes, stored)
    return SavedSpec(name, (name,), (option,), shape, groups, f"{name}.energy", last)


def manifest(
    shapes: Sequence[tuple[int, ...]],
    *,
    letters: str = "bchw",
    groups: int = 1,
    trunk: bool = True,
    slots: int = 1,
    filler: int = 0,
    workspace_elements: int = 0,
) -> Manifest:
    """A chain of layers whose inputs have the given (channels, *positions).

    Forward node i makes the input of layer i + 1 and encodes its own; backward node n + j handles layer n - 1 - j.
    ``filler`` adds that many small constants and short-lived tensors to the trunk, the train and the predict graph.
    """
    n = len(shapes)
    saved = [saved_spec(f"l{i}", shape, letters, groups) for i, shape in enumerate(shapes)]
    dense = ["batch " + " ".join(map(str, shape)) for shape in shapes] + [f"batch {CLASSES}"]
    total = 2 * n + filler
    train, update, parameters, layers = [use("y", "batch", "target", -1, n, dtype="int64")], [], [], []
    for i, spec in enumerate(saved):
        back = 2 * n - 1 - i
        producer = i - 1
        if spec.modes:
            last = i  # the encoder reads it; after that the core stands for it
            rank = {m.letter: m.rank for m in spec.modes}
            order = ["b", *Saved(spec.name, spec.shape, groups).extents()]
            core = " ".join(rank.get(x, w) for x, w in zip(order, dense[i].split(), strict=True))
            if "c" in rank and groups > 1:
                core = core.replace(rank["c"], f"{groups}*{rank['c']}")
            train.append(use(f"{spec.name}.core", core, "saved", i, back))
            for mode in spec.modes:
                rows = "batch" if mode.letter == "b" else f"{mode.groups} {mode.size}"
                train.append(use(mode.input, f"{rows} {mode.rank}", "basis", -1, total))
            if "b" in rank:
                train.append(use(f"{spec.name}.factor_b", f"batch {rank['b']}", "saved", i, back))
        else:
            last = back
        kind = "feature" if i == 0 else ("transient" if spec.modes else "saved")
        train.append(use(f"{spec.name}.x", dense[i], kind, producer, last))
        # The activation is computed in place: the same memory under another name, one node longer.
        if i:
            train.append(use(f"{spec.name}.relu", dense[i], "transient", producer, i, buffer=f"{spec.name}.x"))
        channels = shapes[i][0]
        weight = f"{spec.name}.weight"
        train.append(use(weight, f"{channels} {channels // groups} 3 3", "parameter", -1, total))
        train.append(use(f"{weight}.grad", f"{channels} {channels // groups} 3 3", "gradient", back, total))
        train.append(use(f"{spec.name}.dy", dense[i], "transient", back, back + 1))
        for suffix, kind_, first, end in (
            ("", "parameter", -1, n),
            (".grad", "gradient", -1, i),
            (".new", "output", i, n),
        ):
            update.append(use(weight + suffix, f"{channels} {channels // groups} 3 3", kind_, first, end))
        update.append(use(f"{weight}.momentum", f"{channels} {channels // groups} 3 3", "state", -1, n))
        parameters.append(ParameterSpec(weight, (channels, channels // groups, 3, 3), spec.name, "tail"))
        layers.append(LayerSpec(spec.name, "Conv", "tail", shapes[i], weight, None, spec.name))
    scratch = (Workspace(n, f"{workspace_elements}*batch"),) if workspace_elements else ()
    padding = [use(f"k{i}", "16 3", "constant", -1, total) for i in range(filler)]
    padding += [use(f"t{i}", "batch 16", "transient", 2 * n + i, 2 * n + i + 1) for i in range(filler)]
    chain = [use(f"l{i}.x", dense[i], "feature" if i == 0 else "transient", i - 1, i) for i in range(n + 1)]
    chain.append(use("head.constant", "1000", "constant", -1, n))
    graphs = {
        "train": graph("train", total, train + padding, scratch),
        "predict": graph("predict", n + filler, chain + padding),
        "update": graph("update", n, update),
    }
    if trunk:
        inside = [
            use("x", "batch 3 32 32", "feature", -1, 0),
            use("stem", "batch 64 32 32", "transient", 0, 1),
            use("l0.x", dense[0], "feature", 1, 2 + filler),
            use("stem.weight", "64 3 7 7", "constant", -1, 2 + filler),
        ]
        graphs["trunk"] = graph("trunk", 2 + filler, inside + padding, (Workspace(0, "9*batch*1024"),), "trunk")
    features = (TensorSpec("l0.x", shapes[0]),)
    return Manifest(
        format_version=FORMAT_VERSION,
        model="synthetic",
        made_by="test",
        opset=17,
        inputs=(TensorSpec("x", (3, 32, 32)),) if trunk else features,
        features=features,
        outputs=(TensorSpec("logits", (CLASSES,)),),
        targets=TensorSpec("targets", (), "int64"),
        classes=tuple(str(i) for i in range(CLASSES)),
        preprocess=PreprocessSpec("RGB", (0.5,) * 3, (0.25,) * 3),
        loss=LossSpec(),
        optimizer=OptimizerSpec("sgd", ("momentum",) * slots, {"learning_rate": 0.01}),
        codec="hosvd" if letters else "dense",
        layers=tuple(layers),
        saved=tuple(saved),
        parameters=tuple(parameters),
        graphs=graphs,
        inference=InferenceSpec("infer.onnx", ("logits",), ()),
    )


def decaying_calibration(described: Manifest, batch: int, seed: int, *, samples: int = 64) -> Calibration:
    """Spectra that decay at random speeds, without bases (planning never reads them)."""
    rng = np.random.default_rng(seed)
    spectra: dict[str, dict[str, Spectrum]] = {}
    for spec in described.saved:
        for mode in spec.modes:
            size = batch if mode.size is None else mode.size
            values = np.exp(-rng.uniform(0, 1) * np.arange(size)) * rng.uniform(0.5, 1.0, (mode.groups, size))
            spectra.setdefault(spec.name, {})[mode.letter] = Spectrum(np.sort(values, axis=1)[:, ::-1], None)
    return Calibration(spectra, samples, batch)
