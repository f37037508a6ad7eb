"""Weight layers of any number of axes: torch's autograd at full ranks; with ranks cut, the exact rule applied to the
decoded tensor; Gram matrices against unfoldings; the sizes that the planner reads against those of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from edgetune.autodiff.graph import ForwardGraph, Node
from edgetune.autodiff.memory import Slot
from edgetune.bundle import Array
from edgetune.codecs import Codec, Dense, Hosvd, Svd
from edgetune.errors import UnsupportedOperatorError
from edgetune.planning.sizes import evaluate
from tests.autodiff.handmade import CLASSES
from tests.autodiff.layers import BATCH, CASES, Emitted, emit, graph_of, run, spread, train_model
from tests.autodiff.parity import batch_of, relative_error


@pytest.mark.parametrize("codec", ["dense", "hosvd", "svd"])
@pytest.mark.parametrize("name", CASES)
def test_gradients_equal_torchs_at_full_rank(name: str, codec: str) -> None:
    emitted = Emitted.of(CASES[name], codec)
    found, expected = emitted.run(emitted.bases(1.0)), CASES[name].torch_gradients()
    bound = 1e-5 if codec == "dense" else 1e-4
    assert np.abs(expected["weight"]).max() > 0
    for key in expected:
        assert relative_error(found[key], expected[key]) <= (bound if key == "weight" else 1e-5), key


@pytest.mark.parametrize("codec", ["hosvd", "svd"])
@pytest.mark.parametrize("name", CASES)
def test_with_cut_ranks_the_weight_gradient_is_that_of_the_decoded_tensor(name: str, codec: str) -> None:
    case = CASES[name]
    emitted = Emitted.of(case, codec)
    slot, bases = emitted.slot, emitted.bases(0.5)
    assert slot.only.codec.name == codec and slot.only.encoded is not None and slot.only.encoded.energy is not None
    assert any(bases[letter].shape[-1] < size for letter, size in emitted.extents().items())
    (call,) = [node for node in emitted.g.nodes if emitted.made.parameters["weight"] in node.output]
    dy, energy = str(call.input[0]), slot.only.encoded.energy
    made = emitted.run(bases, [*slot.only.encoded.stored, dy, energy])
    # No way leads back to the activation: the call has dY, what is stored, and bases.
    assert set(call.input) == {dy, *slot.only.encoded.stored, *slot.only.encoded.bases.values()}
    stored = dict(
        zip(("factor", "core"), (made[key].astype(np.float64) for key in slot.only.encoded.stored), strict=True)
    )
    decoded = slot.only.codec.decode(stored, slot.saved, bases).reshape(BATCH, *case.shape)
    assert relative_error(made["weight"], case.weight_gradient(decoded, made[dy])) <= 1e-5
    x, _ = case.batch()
    kept = float(np.sum(np.square(decoded)) / np.sum(np.square(x, dtype=np.float64)))
    assert kept < 0.9999
    assert float(made[energy]) == pytest.approx(kept, rel=1e-5)
    # Only dW is touched: the other gradients are exact.
    expected = case.torch_gradients()
    for key in expected.keys() - {"weight"}:
        assert relative_error(made[key], expected[key]) <= 1e-5, key


@pytest.mark.parametrize("codec", ["hosvd", "svd"])
@pytest.mark.parametrize("name", CASES)
def test_the_planner_sees_every_size(name: str, codec: str) -> None:
    emitted = Emitted.of(CASES[name], codec)
    shapes, bases = emitted.symbolic(), emitted.bases(0.5)
    symbols = {"batch": BATCH, **{f"rank.{letter}": basis.shape[-1] for letter, basis in bases.items()}}
    assert emitted.slot.only.encoded is not None
    stored = emitted.slot.only.encoded.stored
    made = emitted.run(bases, stored)
    for tensor in stored:
        assert [evaluate(extent, symbols) for extent in shapes[tensor]] == list(made[tensor].shape)


@pytest.mark.parametrize("name", CASES)
def test_gram_matrices_are_those_of_the_unfoldings(name: str) -> None:
    emitted, (x, _) = Emitted.of(CASES[name], "hosvd"), CASES[name].batch()
    saved, grams = emitted.slot.saved, emitted.grams()
    assert list(grams) == list(emitted.inputs())
    whole = x.astype(np.float64).reshape(BATCH, *saved.shape)
    for letter, gram in grams.items():
        if letter == "c" and not saved.channels_last:
            parts: Sequence[Array] = np.split(whole, saved.groups, axis=1)
            axis = 1
        else:
            parts, axis = [whole], 0 if letter == "b" else 1 + list(saved.extents()).index(letter)
        unfolded = [np.moveaxis(part, axis, 0).reshape(part.shape[axis], -1) for part in parts]
        assert relative_error(gram, np.stack([rows @ rows.T for rows in unfolded])) <= 1e-6


# -- who reads what ---------------------------------------------------------------------------------------------------


def pointwise_and_linear(columns: int = 6, lead: int = 0) -> ForwardGraph:
    """Return a [b, 6, 6, columns] -> Conv and Linear of the same tensor, each of the 3 first outputs summed."""
    rng = np.random.default_rng(0)
    shapes = {
        "x": (lead, 6, 6, columns), "shift": (1, 6, 6, columns), "a": (lead, 6, 6, columns), "k": (columns, 6, 1, 1),
        "w": (columns, columns), "p": (lead, columns, 6, columns), "q": (lead, 6, 6, columns),
        "s": (lead, 6, 6, columns), "flat": (0, 36 * columns * max(-lead, 1)), "z": (0, 4), "head": (0, 0),
    }  # fmt: skip
    head = rng.standard_normal((shapes["flat"][1], 4)).astype(np.float32)
    constants: dict[str, Array] = {"head": head, "rows": np.array([-1, shapes["flat"][1]])}
    shapes |= {"head": head.shape, "rows": (2,)}
    nodes = [
        Node("Add", "shifted", ("x", "shift"), ("a",), {}),
        Node("Conv", "conv", ("a", "k"), ("p",), {"kernel_shape": [1, 1], "pads": [0] * 4}),
        Node("Linear", "linear", ("a", "w"), ("q",), {"transposed": 1, "shape": [-1, 6, 6, columns]}),
        Node("Add", "sum", ("p", "q"), ("s",), {}),
        Node("Reshape", "flattened", ("s", "rows"), ("flat",), {}),
        Node("Gemm", "classified", ("flat", "head"), ("z",), {}),
    ]
    return graph_of(nodes, constants, shapes)


def slots_of(graph: ForwardGraph, codecs: dict[str, Codec], parameters: Sequence[str]) -> dict[str, Slot]:
    made = emit(graph, codecs, parameters)[2]
    return {layer: slot for slot in made.slots for layer in slot.layers}


def test_a_convolution_and_a_linear_layer_may_read_one_tensor() -> None:
    slots = slots_of(pointwise_and_linear(), {"conv": Hosvd(), "linear": Svd()}, ["k", "w", "shift"])
    assert slots["conv"].only.codec.name == "hosvd" and not slots["conv"].saved.channels_last
    assert slots["linear"].only.codec.name == "svd" and slots["linear"].saved.channels_last
    assert slots["conv"].tensor == slots["linear"].tensor == "a"


def test_one_lossless_reader_makes_all_of_them_lossless() -> None:
    slots = slots_of(pointwise_and_linear(), {"conv": Hosvd(), "linear": Dense()}, ["k", "w", "shift"])
    assert {slot.only.codec.name for slot in slots.values()} == {"dense"}


def test_a_trained_weight_that_nobody_listed_is_kept_lossless() -> None:
    slots = slots_of(pointwise_and_linear(), {}, ["w"])
    assert slots["linear"].only.codec.name == "dense" and slots["linear"].saved.name == "linear"


def test_images_per_sample_are_no_mode_of_a_convolution_and_so_kept_whole_for_all() -> None:
    slots = slots_of(pointwise_and_linear(lead=-2), {"conv": Hosvd(), "linear": Hosvd()}, ["k", "w", "shift"])
    assert {slot.only.codec.name for slot in slots.values()} == {"dense"}
    slots = slots_of(pointwise_and_linear(lead=-2), {"linear": Hosvd()}, ["w"])
    assert slots["linear"].only.codec.name == "hosvd" and slots["linear"].saved.shape == (2, 6, 6, 6)


def test_layers_of_a_constant_and_of_what_is_made_of_it_are_trained() -> None:
    """Without a batch axis there is nothing to compress (a table of relative positions behind a small network)."""
    rng = np.random.default_rng(5)
    sizes = {"v": (4, 3), "w": (2, 4), "head": (10, 4), "table": (5, 3)}
    values = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in sizes.items()}
    shapes = {**sizes, "x": (0, 5, 2), "u": (5, 4), "t": (5, 2), "s": (0, 5, 2), "flat": (0, 10), "z": (0, 4)}
    constants: dict[str, Array] = {name: values[name] for name in ("head", "table")}
    nodes = [
        Node("Linear", "first", ("table", "v"), ("u",), {"transposed": 1, "shape": [5, 4]}),
        Node("Linear", "second", ("u", "w"), ("t",), {"transposed": 1, "shape": [5, 2]}),
        Node("Add", "sum", ("x", "t"), ("s",), {}),
        Node("Flatten", "flattened", ("s",), ("flat",), {"axis": 1}),
        Node("Gemm", "classified", ("flat", "head"), ("z",), {}),
    ]
    graph = graph_of(nodes, constants, shapes)
    g, library, made = emit(graph, {"first": Hosvd(), "second": Hosvd()}, ["v", "w"])
    assert [slot.only.codec.name for slot in made.slots] == ["dense", "dense"]
    assert "table" not in made.kept

    x, targets = batch_of((5, 2), BATCH, CLASSES, seed=0)
    feeds = {"x": x, "targets": targets, "v": values["v"], "w": values["w"]}
    found = run(train_model(g, library, graph, feeds, list(made.parameters.values())), feeds)
    p = {name: torch.from_numpy(value).double().requires_grad_(name in "vw") for name, value in values.items()}
    logits = (torch.from_numpy(x).double() + p["table"] @ p["v"].T @ p["w"].T).flatten(1) @ p["head"]
    loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(targets))
    for name, gradient in zip("vw", torch.autograd.grad(loss, [p["v"], p["w"]]), strict=True):
        assert relative_error(found[made.parameters[name]], gradient.numpy()) <= 1e-5


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"auto_pad": "SAME_UPPER"}, r"'layer'.*auto_pad.*output_padding"),
        ({"output_shape": [11, 13]}, r"'layer'.*output_shape.*output_padding"),
        ({"output_padding": [0, 2]}, r"'layer'.*\(0, 2\).*smaller than its strides"),
    ],
)
def test_a_transposed_convolution_must_say_how_it_pads(attributes: dict[str, Any], message: str) -> None:
    graph = spread((4, 5, 6), 3, (2, 2), strides=(2, 2)).graph()
    nodes = [replace(n, attributes={**n.attributes, **attributes}) if n.name == "layer" else n for n in graph.nodes]
    with pytest.raises(UnsupportedOperatorError, match=message):
        slots_of(replace(graph, nodes=nodes), {}, ["weight"])
