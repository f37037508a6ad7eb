"""What the memory plan assumes of onnxruntime and predicts of a step, held to the process's own high-water mark.

Every measurement is made in a process of its own: memory that other tests left behind would hide what is measured.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import edgetune
from edgetune.autodiff.builder import IR_VERSION, OPSET
from edgetune.bundle import Array
from edgetune.planning.lifetimes import IN_PLACE, VIEWS
from edgetune.planning.spectra import Calibration
from edgetune.units import MIB
from tests.engines.run_operators import SHAPE
from tests.engines.workshop import CODECS, bundle_of, in_fresh_process, plan_of, samples

HERE = Path(__file__).parent
BINARY, UNARY = ("Add", "Sub", "Mul", "Div"), ("Neg", "Exp", "Sqrt")
MARGIN_UNITS = 0.15  # of 64 MiB; what is looked for are whole tensors
BATCH = 64


# ---- operators ----------------------------------------------------------------------------------------------------

EXTRA_INPUTS: dict[str, list[str]] = {
    "Reshape": ["as_columns"],
    "Squeeze": ["no_axis"],
    "Unsqueeze": ["first_axis"],
    "Clip": ["zero", "one"],
    **{name: ["one"] for name in BINARY},
}
CONSTANTS: dict[str, Array] = {
    "zero": np.array(0.0, np.float32),
    "one": np.array(1.0, np.float32),
    "as_columns": np.array([2 * SHAPE[0], -1], np.int64),
    "no_axis": np.array([], np.int64),
    "first_axis": np.array([0], np.int64),
    "as_image": np.array([1, 1, *SHAPE], np.int64),
    "kernel": np.full((1, 1, 3, 3), 0.1, np.float32),
}


def write_operator(root: Path, name: str, nodes: Sequence[onnx.NodeProto], *, flag: bool = False) -> None:
    """Write a graph of ``nodes`` whose input is ``x`` and whose output ``s`` is the sum of ``out``."""
    used = {key for node in nodes for key in node.input}
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, SHAPE)]
    inputs += [helper.make_tensor_value_info("flag", TensorProto.BOOL, SHAPE)] if flag else []
    graph = helper.make_graph(
        [*nodes, helper.make_node("ReduceMax", ["out"], ["s"], keepdims=0)],
        name,
        inputs,
        [helper.make_tensor_value_info("s", TensorProto.FLOAT, [])],
        [onnx.numpy_helper.from_array(value, key) for key, value in CONSTANTS.items() if key in used],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    onnx.checker.check_model(model)
    onnx.save_model(model, root / f"{name}.onnx")


def node(operator: str, *inputs: str, out: str = "out") -> onnx.NodeProto:
    return helper.make_node(operator, [*inputs, *EXTRA_INPUTS.get(operator, ())], [out])


@pytest.fixture(scope="module")
def units(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """Memory that small graphs take above their input ``x``, in tensors. ``<operator>.<case>`` by case:

    transient: its input is a tensor that the graph made and nobody reads later.
    input: its input is the graph's own.
    kept: its input is made by the graph and read once more later.
    """
    root = tmp_path_factory.mktemp("operators")
    made = helper.make_node("Add", ["x", "one"], ["made"])
    for operator in sorted(IN_PLACE | VIEWS | {*BINARY, *UNARY}):
        write_operator(root, f"{operator}.transient", [made, node(operator, "made")])
        write_operator(root, f"{operator}.input", [node(operator, "x")])
    for operator in sorted(IN_PLACE):
        # a larger of two, not a sum: only one tensor of scratch more, and none before the operator has run
        later = [node(operator, "made", out="mapped"), helper.make_node("ReduceMax", ["mapped"], ["a"], keepdims=0)]
        later += [
            helper.make_node("ReduceMax", ["made"], ["b"], keepdims=0),
            helper.make_node("Max", ["a", "b"], ["out"]),
        ]
        write_operator(root, f"{operator}.kept", [made, *later])
    for operator in BINARY:
        pair = helper.make_node(operator, ["made", "x"], ["out"])
        write_operator(root, f"{operator}.pair", [made, pair])
    plane = helper.make_node("Reshape", ["x", "as_image"], ["image"])
    few = helper.make_node("Conv", ["image", "kernel"], ["out"], pads=[1, 1, 1, 1])
    write_operator(root, "Conv.few", [plane, few])
    for axis in (0, 1):
        write_operator(root, f"Softmax.axis{axis}", [helper.make_node("Softmax", ["x"], ["out"], axis=axis)])
    write_operator(root, "Where.input", [helper.make_node("Where", ["flag", "x", "x"], ["out"])], flag=True)
    files = [str(path) for path in sorted(root.glob("*.onnx"))]
    found = in_fresh_process(HERE / "run_operators.py", str(bundle_of("dense").path), *files)
    if not found["resettable"]:
        pytest.skip("this kernel does not reset a process's high-water mark (/proc/self/clear_refs)")
    measured: dict[str, float] = found["units"]
    return measured


@pytest.mark.parametrize("operator", sorted(IN_PLACE))
def test_an_operator_in_the_table_takes_its_dead_inputs_memory(units: dict[str, float], operator: str) -> None:
    assert units[f"{operator}.transient"] == pytest.approx(1, abs=MARGIN_UNITS)


@pytest.mark.parametrize("operator", sorted(IN_PLACE))
def test_it_leaves_alone_what_is_still_needed(units: dict[str, float], operator: str) -> None:
    assert units[f"{operator}.input"] == pytest.approx(1, abs=MARGIN_UNITS)
    assert units[f"{operator}.kept"] == pytest.approx(2, abs=MARGIN_UNITS)


@pytest.mark.parametrize("operator", [*BINARY, *UNARY])
def test_arithmetic_always_makes_a_new_tensor(units: dict[str, float], operator: str) -> None:
    assert units[f"{operator}.transient"] == pytest.approx(2, abs=MARGIN_UNITS)
    if operator in BINARY:
        assert units[f"{operator}.pair"] == pytest.approx(2, abs=MARGIN_UNITS)


@pytest.mark.parametrize("operator", sorted(VIEWS))
def test_a_view_copies_nothing(units: dict[str, float], operator: str) -> None:
    assert units[f"{operator}.transient"] == pytest.approx(1, abs=MARGIN_UNITS)
    assert units[f"{operator}.input"] == pytest.approx(0, abs=MARGIN_UNITS)


def test_a_convolution_of_few_filters_never_has_all_its_columns(units: dict[str, float]) -> None:
    assert units["Conv.few"] == pytest.approx(1, abs=MARGIN_UNITS)  # its nine planes of columns are never there


def test_softmax_transposes_twice_unless_its_axis_is_the_last(units: dict[str, float]) -> None:
    assert units["Softmax.axis1"] == pytest.approx(1, abs=MARGIN_UNITS)
    assert units["Softmax.axis0"] == pytest.approx(3, abs=MARGIN_UNITS)


def test_a_selection_takes_two_temporaries_beside_its_output(units: dict[str, float]) -> None:
    assert units["Where.input"] == pytest.approx(3, abs=MARGIN_UNITS)


# ---- steps --------------------------------------------------------------------------------------------------------


def measured_step(
    root: Path, codec: str, size: str, optimizer: str, batch: int, last: int, piece: int | None = None,
    memory: str = "lean",
) -> dict[str, Any]:  # fmt: skip
    bundle = bundle_of(codec, size, optimizer, last)
    shape = bundle.manifest.inputs[0].shape
    plan = dataclasses.replace(plan_of(bundle, batch), tail_micro_batch=piece or batch, memory=memory)
    x, y = samples(batch, shape)
    features = edgetune.TrainingSession(bundle, plan, verify=False).features(x)
    shutil.copytree(bundle.path, root / "bundle")
    (root / "plan.json").write_text(plan.to_json())
    (plan.calibration or Calibration({}, 0, batch)).save(root / "calibration.safetensors")
    np.savez(root / "features.npz", y, *features)
    found: dict[str, Any] = in_fresh_process(HERE / "run_step.py", str(root))
    if not found["resettable"]:
        pytest.skip("this kernel does not reset a process's high-water mark (/proc/self/clear_refs)")
    return found


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """One measured step of the large network per codec."""
    return {c: measured_step(tmp_path_factory.mktemp(c), c, "large", "sgd", BATCH, 5) for c in CODECS}


@pytest.mark.parametrize("codec", CODECS)
def test_a_train_step_peaks_where_it_was_predicted_to(steps: dict[str, dict[str, Any]], codec: str) -> None:
    found = steps[codec]
    assert found["train_bytes"] > 60 * MIB  # else there would be little to measure
    assert found["measured"]["train"] == pytest.approx(found["train_bytes"], rel=0.1)


def test_a_step_in_pieces_peaks_where_it_was_predicted_to(steps: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    found = measured_step(tmp_path, "dense", "large", "sgd", BATCH, 5, piece=16)
    assert found["measured"]["train"] == pytest.approx(found["train_bytes"], rel=0.1)
    assert found["measured"]["train"] < 0.35 * steps["dense"]["measured"]["train"]


@pytest.mark.parametrize("codec", ["dense", "svd"])
def test_one_block_for_a_run_is_as_large_as_it_was_predicted_to_be(
    steps: dict[str, dict[str, Any]], tmp_path: Path, codec: str
) -> None:
    found = measured_step(tmp_path, codec, "large", "sgd", BATCH, 5, memory="fast")
    assert found["train_bytes"] > 1.02 * steps[codec]["train_bytes"]  # else there would be nothing to tell apart
    assert found["measured"]["train"] == pytest.approx(found["train_bytes"], rel=0.08)
    assert found["measured"]["train"] > 1.02 * steps[codec]["measured"]["train"]


@pytest.mark.parametrize("codec", CODECS)
def test_a_step_gives_all_its_memory_back(steps: dict[str, dict[str, Any]], codec: str) -> None:
    assert steps[codec]["after_bytes"] < 2 * MIB


def test_compression_lowers_the_true_peak(steps: dict[str, dict[str, Any]]) -> None:
    peak = {codec: found["measured"]["train"] for codec, found in steps.items()}
    assert peak["hosvd"] < peak["svd"] < peak["dense"]
    assert peak["hosvd"] < 0.6 * peak["dense"]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_the_update_of_a_model_with_large_weights_peaks_where_it_was_predicted_to(
    tmp_path: Path, optimizer: str
) -> None:
    found = measured_step(tmp_path, "dense", "wide", optimizer, 2, 1)
    assert found["update_bytes"] > 15 * MIB  # the gradients: everything else is written over what is there
    for graph in ("train", "update"):
        assert found["measured"][graph] == pytest.approx(found[f"{graph}_bytes"], rel=0.1)
