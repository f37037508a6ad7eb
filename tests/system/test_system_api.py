"""The public functions, used as the design writes them."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import edgetune
from edgetune.agent import baseline
from edgetune.errors import BudgetError, UsageError
from edgetune.planning.plan import Plan
from edgetune.units import MIB
from tests.engines.workshop import CODECS, LARGE, ROOT, bundle_of, samples

BATCH = 32
RUNTIME_BYTES = 50 * MIB


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A convolution, a mean and a linear head as an ONNX file, so that exporting it needs no torch."""
    rng = np.random.default_rng(0)
    weights = {"conv.weight": (4, 1, 3, 3), "fc.weight": (4, 3)}
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["x", "conv.weight"], ["c"], pads=[1, 1, 1, 1], kernel_shape=[3, 3]),
            helper.make_node("Relu", ["c"], ["r"]),
            helper.make_node("GlobalAveragePool", ["r"], ["m"]),
            helper.make_node("Flatten", ["m"], ["f"]),
            helper.make_node("MatMul", ["f", "fc.weight"], ["y"]),
        ],
        "small",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 1, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 3])],
        [
            numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name)
            for name, shape in weights.items()
        ],
    )
    path = tmp_path_factory.mktemp("model") / "small.onnx"
    onnx.save_model(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


@pytest.mark.parametrize("first", ["import edgetune.export.bundling", "from edgetune import export", "pass"])
def test_export_is_a_function_whatever_was_imported_before(model_file: Path, tmp_path: Path, first: str) -> None:
    program = f"""
import sys
{first}
import edgetune
edgetune.export(sys.argv[1], None, sys.argv[2] + "/one", last=0)
import edgetune.export.bundling
from edgetune import export
assert "edgetune.export" in sys.modules and callable(edgetune.export.bundling.export_bundle)
assert edgetune.export(sys.argv[1], None, sys.argv[2] + "/two", last=0).digest == export(
    sys.argv[1], None, sys.argv[2] + "/three", last=0).digest
assert "torch" not in sys.modules
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(model_file), str(tmp_path)], cwd=ROOT, capture_output=True, text=True,
        timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert edgetune.open_bundle(tmp_path / "one").digest == edgetune.open_bundle(tmp_path / "two").digest


def test_importing_the_package_imports_no_runtime_and_no_host_library() -> None:
    program = (
        "import sys, edgetune; "
        "sys.exit(','.join(m for m in ('torch', 'onnx', 'onnxruntime', 'numpy', 'PIL') if m in sys.modules) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.fixture
def fixed_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a process takes differs from one to the next; what is planned here must not."""
    for name in ("measure_runtime", "remembered_bytes", "runtime_bytes"):
        monkeypatch.setattr(baseline, name, lambda bundle, engine="auto": RUNTIME_BYTES)


def test_the_runtime_is_measured_in_a_process_without_the_host() -> None:
    bundle = bundle_of("hosvd")
    apart_bytes = baseline.measure_runtime_apart(bundle)
    # This process holds torch; a device's does not.
    assert "torch" in sys.modules
    assert 30 * MIB < apart_bytes < baseline.measure_runtime(bundle) - 50 * MIB


def test_a_budget_without_calibration_is_refused_where_ranks_depend_on_data() -> None:
    with pytest.raises(UsageError, match="calibrat"):
        edgetune.plan(bundle_of("hosvd"), batch=8, budget="1GiB")


@pytest.mark.usefixtures("fixed_runtime")
def test_the_budget_picks_the_largest_epsilon_that_fits() -> None:
    bundle = bundle_of("hosvd", "large", last=5)
    batches = [samples(BATCH, LARGE)]
    whole: dict[str, Any] = {"tail_micro_batch": BATCH, "trained": 5}  # the knobs that would be turned before
    free = edgetune.plan(bundle, batch=BATCH, epsilon=1.0, calibration=batches)
    with pytest.raises(BudgetError) as caught:
        edgetune.plan(bundle, batch=BATCH, budget="60MiB", calibration=batches, **whole)
    least_bytes = caught.value.least_bytes
    assert least_bytes < free.predicted_peak_bytes
    plans: list[tuple[Plan, float]] = []
    for share in (0.0, 0.3, 0.6, 0.9):
        budget_bytes = least_bytes + int(share * (free.predicted_peak_bytes - least_bytes))
        plan = edgetune.plan(bundle, batch=BATCH, budget=budget_bytes, calibration=batches, **whole)
        assert plan.predicted_peak_bytes <= budget_bytes == plan.budget_bytes
        assert sum(plan.ledger.values()) == plan.predicted_peak_bytes
        assert plan.epsilon is not None
        plans.append((plan, plan.epsilon))
    chosen = [epsilon for _, epsilon in plans]
    assert chosen == sorted(chosen) and chosen[0] < chosen[-1] < 1
    # no larger epsilon would have fitted
    middle, epsilon = plans[1]
    with pytest.raises(BudgetError):
        edgetune.plan(
            bundle, batch=BATCH, budget=middle.budget_bytes, epsilon=min(1.0, epsilon + 0.02),
            calibration=batches, **whole,
        )  # fmt: skip


@pytest.mark.usefixtures("fixed_runtime")
def test_the_least_budget_is_lower_where_more_knobs_may_be_turned() -> None:
    bundle = bundle_of("hosvd", "large", last=5)
    least_bytes, every = [], list[dict[str, Any]]([{"tail_micro_batch": BATCH, "trained": 5}, {"trained": 5}, {}])
    for pins in every:
        with pytest.raises(BudgetError) as caught:
            edgetune.plan(bundle, batch=BATCH, budget="1MiB", epsilon=1.0, **pins)
        least_bytes.append(caught.value.least_bytes)
    assert least_bytes[0] > least_bytes[1] > least_bytes[2]


@pytest.mark.usefixtures("fixed_runtime")
@pytest.mark.parametrize("codec", CODECS)
def test_a_plan_reads_back_equal_and_trains(codec: str) -> None:
    bundle = bundle_of(codec)
    x, y = samples(8)
    plan = edgetune.plan(bundle, budget="2GiB", batch=8, calibration=[(x, y)])
    assert plan.epsilon == (None if codec == "dense" else 1.0)
    again = Plan.from_json(plan.to_json())
    assert again == plan and again.to_json() == plan.to_json() and again.calibration is None
    session = edgetune.TrainingSession(bundle, dataclasses.replace(again, calibration=plan.calibration))
    session.step(x, y)
    assert session.report.samples == 8


@pytest.mark.usefixtures("fixed_runtime")
def test_an_activation_budget_is_kept_too() -> None:
    bundle = bundle_of("hosvd")
    batches = [samples(8)]
    plan = edgetune.plan(bundle, activation_budget="4KiB", batch=8, calibration=batches)
    assert 0 < plan.saved_bytes <= 4096 < plan.dense_saved_bytes


def test_the_words_of_the_design() -> None:
    """Plan and train as the design's example does, with the public names alone."""
    bundle = bundle_of("hosvd")
    x, y = samples(16)
    plan = edgetune.plan(bundle, budget="4GiB", batch=16, calibration=[(x, y)])
    session = edgetune.TrainingSession(bundle, plan, engine="onnxruntime")
    loss, gradients = session.gradients(x, y)
    assert loss == session.step(x, y) and set(gradients) == {spec.name for spec in bundle.manifest.parameters}
    assert session.step_features(session.features(x), y) < loss
    assert session.predict(x).shape == (16, 4)
