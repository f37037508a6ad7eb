"""GELU and Swish, however they are written: recognised, kept once, right; and near-misses are left as they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper
from torch import Tensor, nn
from torch.nn import functional

import edgetune
from edgetune.autodiff.graph import ForwardGraph
from edgetune.autodiff.lowering import OWN
from edgetune.bundle import Bundle
from edgetune.export.canonical import canonicalise, fold_frozen
from edgetune.export.capture import Captured, capture
from edgetune.export.source import Signature
from edgetune.planning.memory import timeline
from tests.export.small_models import BATCH, assert_equal_gradients, drawn, seeded, session_of, torch_gradients
from tests.export.test_export_odd_models import CONV, CONV_WEIGHT, Calls, file_of

TOKENS, WIDTH, HIDDEN = 5, 6, 96
SLOPE = float(np.sqrt(2.0 / np.pi))


def gelu_new(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.tanh(SLOPE * (x + 0.044715 * torch.pow(x, 3.0))))


def gelu_fast(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.tanh(x * SLOPE * (1.0 + 0.044715 * x * x)))


SPELLINGS: dict[str, tuple[Callable[[Tensor], Tensor], str, dict[str, Any]]] = {
    "gelu": (functional.gelu, "Gelu", {"approximate": "none"}),
    "half first": (lambda x: x * 0.5 * (1.0 + torch.erf(x / 2.0**0.5)), "Gelu", {"approximate": "none"}),
    "halved behind": (lambda x: (torch.erf(x * 0.5**0.5) + 1.0) * x / 2.0, "Gelu", {"approximate": "none"}),
    "a difference": (lambda x: 0.5 * (x - x * -torch.erf(x / 2.0**0.5)), "Gelu", {"approximate": "none"}),
    "gelu by tanh": (lambda x: functional.gelu(x, approximate="tanh"), "Gelu", {"approximate": "tanh"}),
    "gelu_new": (gelu_new, "Gelu", {"approximate": "tanh"}),
    "gelu_fast": (gelu_fast, "Gelu", {"approximate": "tanh"}),
    "silu": (functional.silu, "Swish", {"alpha": 1.0}),
    "quick gelu": (lambda x: x * torch.sigmoid(1.702 * x), "Swish", {"alpha": pytest.approx(1.702)}),
}


def network(function: Callable[[Tensor], Tensor]) -> nn.Module:
    """fc1 -> ``function`` -> fc2 over tokens."""
    return side_by_side([plain(function)])


def plain(function: Callable[[Tensor], Tensor]) -> Callable[[Any, Tensor], Tensor]:
    """Return ``function`` as one that gets the module too."""
    return lambda m, x: function(x)


def side_by_side(functions: Sequence[Callable[[Any, Tensor], Tensor]], **more: nn.Module | nn.Parameter) -> nn.Module:
    """The sum of fc1 -> function -> fc2 over tokens, layers of its own for each; functions get the module too."""

    def forward(m: Any, x: Tensor) -> Tensor:
        branches = [m.fc2[i](function(m, m.fc1[i](x))) for i, function in enumerate(functions)]
        result: Tensor = sum(branches[1:], branches[0]).mean(1)
        return result

    def make() -> nn.Module:
        fc1 = nn.ModuleList(nn.Linear(WIDTH, HIDDEN) for _ in functions)
        return Calls(forward, fc1=fc1, fc2=nn.ModuleList(nn.Linear(HIDDEN, 3) for _ in functions), **more)

    return seeded(make)


def graph_of(model: nn.Module, shape: tuple[int, ...] = (TOKENS, WIDTH)) -> ForwardGraph:
    return canonicalise(capture(model, [Signature(shape)]))


def own(graph: ForwardGraph) -> list[str]:
    return [node.op for node in graph.nodes if node.op in ("Gelu", "Swish")]


def saved(bundle: Bundle) -> dict[str, tuple[str, ...]]:
    return {use.buffer: use.shape for use in bundle.manifest.graphs["train"].tensors if use.kind == "saved"}


def checked(
    model: nn.Module, tmp_path: Path, *, shape: tuple[int, ...] = (TOKENS, WIDTH), scale: float = 1.0
) -> Bundle:
    """Hold predictions and gradients to torch in float64; no graph has an operator of our own."""
    x, y = drawn((BATCH, *shape)) * np.float32(scale), np.array([0, 2, 1])
    bundle = edgetune.export(model, torch.from_numpy(x[:2]), tmp_path / "b", last="all", codec="dense")
    session, wide = session_of(bundle), torch.from_numpy(x).double()
    with torch.no_grad():
        expected = model(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(session.predict(x), expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max())
    _, found = session.gradients(x, y)
    gradients = torch_gradients(model, lambda m: functional.cross_entropy(m(wide), torch.from_numpy(y)))
    assert set(found) == {name.removesuffix(".inner") for name in gradients}
    assert_equal_gradients(found, gradients)
    for spec in bundle.manifest.graphs.values():
        proto = onnx.load(bundle.path / spec.flat_file, load_external_data=False)
        assert not {node.op_type for node in proto.graph.node} & set(OWN)
    return bundle


def test_every_spelling_is_one_node_that_keeps_its_input(tmp_path: Path) -> None:
    model = side_by_side([plain(function) for function, _, _ in SPELLINGS.values()])
    found = [(n.op, dict(n.attributes)) for n in graph_of(model).nodes if n.op in ("Gelu", "Swish")]
    assert found == [(op, attributes) for _, op, attributes in SPELLINGS.values()]
    bundle = checked(model, tmp_path, scale=2.0)
    large = ("batch", str(TOKENS), str(HIDDEN))
    assert sum(shape == large for shape in saved(bundle).values()) == 2 * len(SPELLINGS)  # its input, and fc2's


def branched(m: Any, x: Tensor) -> Tensor:
    gate = torch.sigmoid(x)
    return x * gate + gate


def read_twice(m: Any, x: Tensor) -> Tensor:
    share = 1.0 + torch.erf(x / 2.0**0.5)
    return 0.5 * x * share + share.mean(-1, keepdim=True)


NEAR: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "gate read twice": branched,
    "sum read twice": read_twice,
    "another cube": lambda m, x: 0.5 * x * (1.0 + torch.tanh(SLOPE * (x + 0.0447 * x**3))),
    "another root": lambda m, x: 0.5 * x * (1.0 + torch.erf(x / 1.41421)),
    "another half": lambda m, x: 0.51 * x * (1.0 + torch.erf(x / 2.0**0.5)),
    "another power": lambda m, x: 0.5 * x * (1.0 + torch.tanh(SLOPE * (x + 0.044715 * x**2))),
    "another factor": lambda m, x: (x + 0.1) * torch.sigmoid(x),
    "gate of something else": lambda m, x: x * torch.sigmoid(m.gate(x)),
    "one trained": lambda m, x: 0.5 * x * (m.one + torch.erf(x / 2.0**0.5)),
    "slope trained": lambda m, x: x * torch.sigmoid(m.one * x),
}


def test_what_only_looks_like_it_is_left_as_it_is(tmp_path: Path) -> None:
    model = side_by_side(list(NEAR.values()), gate=nn.Linear(HIDDEN, HIDDEN), one=nn.Parameter(torch.ones(())))
    graph = graph_of(model)
    assert own(graph) == []
    assert sum(node.op in ("Erf", "Tanh", "Sigmoid") for node in graph.nodes) == len(NEAR)
    checked(model, tmp_path)


def test_an_intermediate_that_is_an_output_stays() -> None:
    def forward(m: Any, x: Tensor) -> Any:
        hidden = m.fc1(x)
        gate = torch.sigmoid(hidden)
        return m.fc2(hidden * gate), gate

    model = seeded(lambda: Calls(forward, fc1=nn.Linear(WIDTH, HIDDEN), fc2=nn.Linear(HIDDEN, 3)))
    captured = capture(model, [Signature((WIDTH,))], outputs=["output", "output.1"])
    assert own(canonicalise(captured)) == []
    assert own(canonicalise(capture(model, [Signature((WIDTH,))], outputs=["output"]))) == ["Swish"]


def test_a_constant_with_an_axis_of_its_own_is_no_number() -> None:
    # [batch, 6] times a constant [1, 1, 1] has three axes: no activation of its input
    nodes = [
        helper.make_node("Mul", ["x", "root"], ["scaled"]),
        helper.make_node("Erf", ["scaled"], ["erf"]),
        helper.make_node("Add", ["erf", "one"], ["sum"]),
        helper.make_node("Mul", ["sum", "x"], ["twice"]),
        helper.make_node("Mul", ["twice", "half"], ["y"]),
    ]
    weights = {"root": np.full((1, 1), 0.5**0.5, np.float32), "one": np.ones(1, np.float32)}
    for half, expected in ((np.full((1, 1), 0.5), ["Gelu"]), (np.full((1, 1, 1), 0.5), [])):
        model = file_of(nodes, ["batch", 6], {**weights, "half": half.astype(np.float32)}, 18)
        graph = canonicalise(Captured(model, frozenset()))
        assert own(graph) == expected
        between = {"scaled", "erf", "sum", "twice"}
        for known in (graph.shapes, graph.dtypes):  # nothing of what is no longer there
            assert between & known.keys() == (set() if expected else between)


def test_activations_one_behind_the_other_are_told_apart() -> None:
    model = network(lambda x: functional.silu(functional.gelu(functional.gelu(x, approximate="tanh")) * 1.5))
    assert own(graph_of(model)) == ["Gelu", "Gelu", "Swish"]


def test_what_follows_from_parameters_alone_is_folded_or_trained(tmp_path: Path) -> None:
    """A table behind a small network with a GELU, as tables of relative positions are."""

    def forward(m: Any, x: Tensor) -> Tensor:
        result: Tensor = m.head(x + functional.gelu(m.fc(m.table))).mean(1)
        return result

    parts = {"fc": nn.Linear(4, WIDTH), "head": nn.Linear(WIDTH, 3)}
    model = seeded(lambda: Calls(forward, table=nn.Parameter(torch.randn(1, TOKENS, 4)), **parts))
    graph = graph_of(model)
    assert own(graph) == ["Gelu"]
    fold_frozen(graph, {"head.weight"})
    assert own(graph) == []
    made = functional.gelu(model.fc(model.table)).detach().numpy()  # type: ignore[operator]
    assert any(value.shape == made.shape and np.allclose(value, made, atol=1e-6) for value in graph.constants.values())
    checked(model, tmp_path)


@pytest.mark.parametrize(
    ("op", "attributes", "opset", "found"),
    [("Gelu", {}, 20, "Gelu"), ("Gelu", {"approximate": "tanh"}, 20, "Gelu"), ("Swish", {}, 24, "Swish"),
     ("Swish", {"alpha": 0.7}, 24, "Swish")],
)  # fmt: skip
def test_an_operator_of_a_newer_opset_is_whole_again(
    op: str, attributes: dict[str, Any], opset: int, found: str
) -> None:
    nodes = [CONV, helper.make_node(op, ["c"], ["y"], **attributes)]
    graph = canonicalise(capture(file_of(nodes, ["batch", 2, 5, 5], CONV_WEIGHT, opset), []))
    assert [node.op for node in graph.nodes] == ["Conv", found]
    for key, value in attributes.items():
        assert graph.nodes[1].attributes[key] == (pytest.approx(value) if isinstance(value, float) else value)


@pytest.mark.parametrize("name", ["gelu", "gelu_new", "silu"])
def test_the_backward_pass_needs_four_tensors_of_its_size_at_most(name: str, tmp_path: Path) -> None:
    """The gradient that comes in and three more, the input among them as long as it is read."""
    model = network(SPELLINGS[name][0])
    bundle = edgetune.export(model, torch.zeros(2, TOKENS, WIDTH), tmp_path / "b", last="all", codec="dense")
    train = bundle.manifest.graphs["train"]
    large = BATCH * TOKENS * HIDDEN * 4
    proto = onnx.load(bundle.path / train.flat_file, load_external_data=False)
    names = [node.name.split(":", 1)[-1] for node in proto.graph.node]
    others = ("grad/linear", "grad/output")
    own_nodes = [i for i, called in enumerate(names) if called.startswith("grad/") and not called.startswith(others)]
    assert own_nodes
    alive = timeline(train, {"batch": BATCH})
    assert max(alive[i] for i in own_nodes) < 5 * large


def test_a_model_and_the_activations_of_transformers() -> None:
    activations = pytest.importorskip("transformers.activations").ACT2FN
    from tools.zoo import zoo_model

    vit = zoo_model("vit")
    graph = graph_of(vit.factory(), vit.inputs["pixel_values"])
    assert own(graph) == ["Gelu"] * 3 and not {node.op for node in graph.nodes} & {"Erf", "Tanh"}
    names = {"gelu": "Gelu", "gelu_new": "Gelu", "gelu_fast": "Gelu", "gelu_python": "Gelu", "silu": "Swish"}
    model = side_by_side([plain(activations[name]) for name in names])
    assert own(graph_of(model)) == list(names.values())
