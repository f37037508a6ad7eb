"""The check of a CUDA device, run on the CPU: the same code, the smallest of everything."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgetune.errors import EngineError
from tools import gpu_check, gpu_check_worker
from tools.gpu_check import MIB, NO_DEVICE, Case

CASE = Case("digits_resnet", (1, 16, 16), 4, 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the workers of a case read."""
    made = tmp_path_factory.mktemp("gpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_check, "CODECS", ("dense",))
        gpu_check.prepare(CASE, made)
    return made


def batch_in(folder: Path) -> tuple[Any, Any]:
    with np.load(folder / "batch.npz") as stored:
        return stored["x"], stored["y"]


def test_contenders_train_the_same_and_are_measured(folder: Path) -> None:
    x, y = batch_in(folder)
    threads = torch.get_num_threads()
    try:
        found = gpu_check_worker.ours(folder, "torch/dense", "cpu", x, y, 0.0)
    finally:
        torch.set_num_threads(threads)
    base = gpu_check_worker.pytorch(folder, "cpu", x, y, 0.0)
    assert len(found["seconds"]) == len(base["seconds"]) == 3
    assert set(found["phases"]) == {"trunk", "train", "update"}
    assert found["predicted_bytes"] > found["saved_bytes"] > 0
    assert math.isfinite(found["gradient_norm"]) and found["gradient_norm"] > 0
    assert found["reserved_bytes"] is found["device_bytes"] is base["reserved_bytes"] is None  # no CUDA allocator
    assert json.loads(json.dumps(found)) == found


def test_a_model_that_lacks_a_trained_tensor_is_no_rival(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "dense").symlink_to(folder / "dense")
    (tmp_path / "subject.json").write_text(json.dumps({"model": "awkward_convs"}))
    with pytest.raises(EngineError, match=r"the bundle trains \d+ tensors, of which the model has \d"):
        gpu_check_worker.pytorch(tmp_path, "cpu", *batch_in(folder), 0.0)


def test_a_worker_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "WORKER", tmp_path / "worker.py")
    gpu_check.WORKER.write_text("import sys\nprint('{\"seconds\": [1.0]}' if sys.argv[2] == 'pytorch' else 1 / 0)\n")
    assert gpu_check.run_worker(tmp_path, "pytorch", "cpu", 0.0, 60.0) == {"seconds": [1.0]}
    found = gpu_check.run_worker(tmp_path, "torch/dense", "cpu", 0.0, 60.0)
    assert found == {"failure": "ZeroDivisionError: division by zero"}
    gpu_check.WORKER.write_text("import time\ntime.sleep(60)\n")
    assert gpu_check.run_worker(tmp_path, "torch/dense", "cpu", 0.0, 0.1) == {"failure": "not done within 0 s"}


def test_gradients_are_compared_and_what_is_late_or_unknown_does_not_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "CODECS", ("dense",))
    held, unknown = gpu_check.check_parity(["two_by_two", "nobody's"], ["onnxruntime"], time.monotonic() + 600)
    assert held["holds"] and set(held["cells"]) == {"onnxruntime/dense"}
    assert not unknown["holds"]
    (late,) = gpu_check.check_parity(["two_by_two"], ["onnxruntime"], time.monotonic() - 1)
    assert not late["holds"]


def test_the_report_has_ratios_and_every_failure() -> None:
    base = gpu_check.combined([{"seconds": [1.0, 2.0, 9.0]}, {"seconds": [4.0]}])
    ours = gpu_check.combined([{"seconds": [1.0]}, {"seconds": [3.0], "step_bytes": 3 * MIB, "saved_bytes": MIB}])
    broken = gpu_check.combined([{"seconds": [1.0]}, {"failure": "no memory"}])
    wild = {"seconds": [1.0, 1.0], "gradient_norm": float("nan"), "ratio": 0.5}
    assert (base["seconds"], gpu_check.ratio(ours, base)) == ([2.0, 4.0], 0.625)
    assert gpu_check.ratio(broken, base) is None
    for entry in (base, ours, broken):
        entry["ratio"] = gpu_check.ratio(entry, base)
    contenders = {"pytorch": base, "torch/hosvd": ours, "torch/dense": broken, "onnxruntime/dense": wild}
    report = {
        "device": "cuda", "environment": {"torch": "2.0"}, "seconds": 3.0,
        "left_out": {"onnxruntime": "it has no CUDA"},
        "cases": [{"model": "m", "shape": [3, 8, 8], "batch": 2, "last": 4, "contenders": contenders}],
        "parity": [{"model": "p", "holds": False, "cells": {"torch/dense": 0.5}}],
    }  # fmt: skip
    assert gpu_check.failures(report) == [
        "m, torch/dense: no memory",
        "m, onnxruntime/dense: its gradient is not finite",
        "gradients of p: {'torch/dense': 0.5}",
    ]
    page = gpu_check.markdown(report)
    assert "| torch/hosvd | 1.0000, 3.0000 | 0.62 | — | 3.00 | — | — | 1.00 |" in page
    assert "| p | torch/dense 5.0e-01 | **no** |" in page
    assert "Engine onnxruntime left out: it has no CUDA." in page
    assert "- m, torch/dense: no memory" in page


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_the_check_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_check.main([]) == NO_DEVICE
    assert "sees no CUDA device" in capsys.readouterr().err
