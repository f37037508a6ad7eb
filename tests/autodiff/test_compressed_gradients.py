"""With ranks cut, a weight gradient is the exact rule applied to the decoded tensor, and the energy is the decoded
tensor's. Decoded by the numpy codec, differentiated by torch in float64, from what train.flat.onnx stored."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import helper
from torch.nn.grad import conv2d_weight

import edgetune
from edgetune.bundle import Array, Bundle, SavedSpec
from edgetune.codecs import CODECS, Saved
from edgetune.engines.session import TrainingSession
from tests.autodiff.handmade import CLASSES, CONVS, ConvCase, linear_model
from tests.autodiff.layers import CASES
from tests.autodiff.parity import Bundles, batch_of, relative_error, worst_error

BATCH = 6


def run_with_outputs(bundle: Bundle, feeds: dict[str, Array], more: list[str]) -> dict[str, Array]:
    """Run train.flat.onnx with the tensors ``more`` as further outputs."""
    model = onnx.load(bundle.path / bundle.manifest.graphs["train"].flat_file, load_external_data=False)
    known = {value.name for value in [*model.graph.output, *model.graph.input]}
    for name in dict.fromkeys(more):
        if name not in known:
            model.graph.output.append(helper.make_empty_tensor_value_info(name))
    path = bundle.path.parent / f"{bundle.path.name}.more.onnx"
    # The weights lie beside the graph, where external data are looked for.
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = f"{bundle.path.name}/{entry.value}"
    onnx.save_model(model, path)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    wanted = [o.name for o in session.get_outputs()]
    taken = {i.name: feeds[i.name] for i in session.get_inputs()}
    return dict(zip(wanted, session.run(wanted, taken), strict=True)) | feeds


def bases_of(session: TrainingSession, saved: SavedSpec) -> dict[str, Array]:
    """Return by letter the truncated bases that the plan prescribes, and the session's own sketch for b."""
    plan, found = session.plan, dict[str, Array]()
    feeds = session._run_time_inputs(plan.batch)
    assert plan.calibration is not None
    for mode in saved.modes:
        basis = plan.calibration.spectra[saved.name][mode.letter].basis
        rank = plan.ranks[saved.name][mode.letter]
        if basis is None:
            found[mode.letter] = np.array(session._runtime.get(feeds[mode.input]))
        else:
            found[mode.letter] = np.ascontiguousarray(basis[:, :, :rank])
    return found


def gradient_of_output(bundle: Bundle, weight: str) -> str:
    """Return the name of dY of the layer of ``weight``: the first input of the call that makes its gradient."""
    readable = onnx.load(bundle.path / bundle.manifest.graphs["train"].file, load_external_data=False)
    (call,) = [n for n in readable.graph.node if f"gradient/{weight}" in n.output]
    return str(call.input[0])


def exact_convolution_rule(case: ConvCase, x: Array, dy: Array) -> Array:
    """Return torch's weight gradient in float64; torch pads both sides alike, so the padding is made beforehand."""
    top, left, bottom, right = case.pads
    padded = torch.nn.functional.pad(torch.from_numpy(x).double(), (left, right, top, bottom))
    shape = (case.out, case.shape[0] // case.groups, *case.kernel)
    gradient = conv2d_weight(  # type: ignore[no-untyped-call]
        padded,
        shape,
        torch.from_numpy(dy).double(),
        stride=case.strides,
        dilation=case.dilations,
        groups=case.groups,
    )
    return np.asarray(gradient.numpy())


def check_against_decoded(
    bundle: Bundle, weight: str, rule: Callable[[Array, Array], Array], epsilon: float, seed: int = 0
) -> None:
    manifest = bundle.manifest
    (saved,) = [s for s in manifest.saved if s.lossy]
    shape = manifest.inputs[0].shape
    x, y = batch_of(shape, BATCH, CLASSES, seed)
    plan = edgetune.plan(bundle, batch=BATCH, epsilon=epsilon, calibration=[(x, y)])
    session = TrainingSession(bundle, plan)
    bases = bases_of(session, saved)
    full = {"b": BATCH, **{mode.letter: mode.size for mode in saved.modes if mode.size is not None}}
    ranks = plan.ranks[saved.name]
    assert any(ranks[letter] < full[letter] for letter in ranks), "nothing is cut: the test would prove nothing"

    feeds = {manifest.features[0].name: x, "targets": y, **bundle.initial_parameters()}
    feeds |= {mode.input: bases[mode.letter] for mode in saved.modes}
    dy = gradient_of_output(bundle, weight)
    made = run_with_outputs(bundle, feeds, [*saved.options[0].stored, dy])
    codec = CODECS[saved.options[0].codec]
    stored = dict(
        zip(("factor", "core"), (made[name].astype(np.float64) for name in saved.options[0].stored), strict=True)
    )
    decoded = codec.decode(stored, Saved(saved.name, saved.shape, saved.groups, saved.channels_last), bases)
    assert decoded.shape == x.shape

    assert relative_error(made[f"gradient/{weight}"], rule(decoded, made[dy])) <= 1e-5
    kept = np.sum(np.square(decoded, dtype=np.float64)) / np.sum(np.square(x, dtype=np.float64))
    assert kept < 0.9999
    assert float(made[f"energy/{saved.name}"]) == pytest.approx(kept, rel=1e-5)
    assert float(made[f"energy/{saved.name}"]) <= 1 + 1e-5
    loss, found = session.gradients(x, y)
    assert loss == pytest.approx(float(made["loss"]), rel=1e-6)
    assert worst_error(found, {name: made[f"gradient/{name}"] for name in found}) <= 1e-6


@pytest.mark.parametrize("codec", ["hosvd", "svd"])
@pytest.mark.parametrize("name", CONVS)
def test_convolution(bundles: Bundles, name: str, codec: str) -> None:
    case = CONVS[name]
    bundle = bundles.onnx(f"conv-{name}", case.model, last=1, codec=codec)
    check_against_decoded(bundle, "conv.weight", lambda x, dy: exact_convolution_rule(case, x, dy), epsilon=0.8)


@pytest.mark.parametrize("codec", ["hosvd", "svd"])
@pytest.mark.parametrize(("shape", "op"), [((24,), "Gemm"), ((24,), "MatMul"), ((3, 4, 9), "MatMul")])
def test_linear(bundles: Bundles, shape: tuple[int, ...], op: str, codec: str) -> None:
    name = f"linear-{op}-{shape}"
    bundle = bundles.onnx(name, lambda: linear_model(shape, op=op), last=1, codec=codec)

    def rule(x: Array, dy: Array) -> Array:
        gradient = x.reshape(-1, shape[-1]).T.astype(np.float64) @ dy.reshape(-1, dy.shape[-1]).astype(np.float64)
        return gradient.T if op == "Gemm" else gradient

    check_against_decoded(bundle, "linear.weight", rule, epsilon=0.8)


@pytest.mark.parametrize("codec", ["hosvd", "svd"])
@pytest.mark.parametrize(
    "name",
    [
        "conv1d everything",
        "conv3d everything",
        "conv3d depthwise",
        "conv3d flat",
        "spread1d everything",
        "spread2d everything",
        "spread3d everything",
    ],
)
def test_convolutions_of_any_number_of_axes_and_their_transposes(bundles: Bundles, name: str, codec: str) -> None:
    case = CASES[name]
    bundle = bundles.onnx(name, case.model, last=1, codec=codec)
    check_against_decoded(bundle, "layer.weight", case.weight_gradient, epsilon=0.8)


def torch_gradients(run: Callable[..., Any], parameters: dict[str, Array], x: Array, y: Array) -> dict[str, Array]:
    tensors = {name: torch.from_numpy(value).double().requires_grad_(True) for name, value in parameters.items()}
    loss = torch.nn.functional.cross_entropy(run(torch.from_numpy(x).double(), tensors), torch.from_numpy(y))
    loss.backward()  # type: ignore[no-untyped-call]
    return {name: np.asarray(t.grad.numpy()) for name, t in tensors.items() if t.grad is not None}


@pytest.mark.parametrize("codec", ["dense", "hosvd", "svd"])
@pytest.mark.parametrize("name", ["grouped", "dilation_2_2", "asymmetric_padding", "everything_at_once"])
def test_published_codes_wrong_cases_equal_torch_at_full_rank(bundles: Bundles, name: str, codec: str) -> None:
    case = CONVS[name]
    bundle = bundles.onnx(f"conv-{name}", case.model, last=1, codec=codec)
    x, y = batch_of(case.shape, BATCH, CLASSES, seed=1)
    session = TrainingSession(bundle, edgetune.plan(bundle, batch=BATCH, epsilon=1.0))
    _, found = session.gradients(x, y)
    top, left, bottom, right = case.pads

    def forward(inputs: Any, p: dict[str, Any]) -> Any:
        padded = torch.nn.functional.pad(inputs, (left, right, top, bottom))
        a = torch.nn.functional.conv2d(
            padded, p["conv.weight"], p.get("conv.bias"), case.strides, 0, case.dilations, case.groups
        )
        return torch.relu(a).flatten(1) @ p["head.weight"].T + p["head.bias"]

    expected = torch_gradients(forward, bundle.initial_parameters(), x, y)
    assert set(found) == set(expected)
    assert np.abs(found["conv.weight"]).max() > 0
    bound = 1e-5 if codec == "dense" else 1e-4
    assert max(relative_error(found[key], expected[key]) for key in expected) <= bound


@pytest.mark.parametrize("codec", ["dense", "hosvd", "svd"])
@pytest.mark.parametrize("shape", [(9,), (4, 9), (3, 4, 9)])
def test_linear_inputs_of_2_3_and_4_axes_equal_torch_at_full_rank(
    bundles: Bundles, shape: tuple[int, ...], codec: str
) -> None:
    bundle = bundles.onnx(f"linear-MatMul-{shape}", lambda: linear_model(shape), last=1, codec=codec)
    x, y = batch_of(shape, BATCH, CLASSES, seed=1)
    session = TrainingSession(bundle, edgetune.plan(bundle, batch=BATCH, epsilon=1.0))
    _, found = session.gradients(x, y)

    def forward(inputs: Any, p: dict[str, Any]) -> Any:
        return torch.relu(inputs @ p["linear.weight"]).flatten(1) @ p["head.weight"]

    expected = torch_gradients(forward, bundle.initial_parameters(), x, y)
    bound = 1e-5 if codec == "dense" else 1e-4
    assert max(relative_error(found[key], expected[key]) for key in expected) <= bound
