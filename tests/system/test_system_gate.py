"""The promoted file of a real run: what a serving process makes of it, and the commands on it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from typer.testing import CliRunner

import edgetune
from edgetune.agent.gate import manual
from edgetune.agent.images import Decoder
from edgetune.commands import app
from edgetune.engines.serving import ServedModel
from edgetune.errors import UsageError
from tests.autodiff.parity import relative_error
from tests.engines.workshop import bundle_of, plan_of
from tests.system.device import final_state, make_images, run


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with data/ and the state/ of a run that is over."""
    root = tmp_path_factory.mktemp("gate")
    make_images(root / "data", bundle_of("hosvd"), 48)
    gate = {"least_heldout": 4, "tolerance": 1.0, "class_tolerance": 1.0}
    told = run(bundle_of("hosvd"), root / "data", root / "state", checkpoint_every=1, gate=gate)
    assert told["error"] is None and not told["host_libraries"]
    return root


def command(*arguments: str | Path) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_the_model_in_use_is_that_of_the_last_step(finished: Path) -> None:
    model = finished / "state" / "promoted" / "model.onnx"
    onnx.checker.check_model(str(model), full_check=True)
    bundle = bundle_of("hosvd")
    session = edgetune.TrainingSession(bundle, plan_of(bundle))
    session.load_state(final_state(finished / "state"))
    decoder = Decoder(bundle.manifest)
    x = np.stack([decoder.decode(path.read_bytes()) for path in sorted((finished / "data").rglob("*.png"))])
    served = ServedModel(model)
    assert served.shape == bundle.manifest.inputs[0].shape
    assert relative_error(served.predict(x), session.predict(x)) <= 1e-6


def test_eval_scores_each_class(finished: Path) -> None:
    state, data = finished / "state", finished / "data"
    told = json.loads(command("eval", state, "--data", data, "--json"))
    served = ServedModel(state / "promoted" / "model.onnx")
    decoder = Decoder(bundle_of("hosvd").manifest)
    for name, (right, of) in told["classes"].items():
        files = sorted((data / name).iterdir())
        x = np.stack([decoder.decode(path.read_bytes()) for path in files])
        label = bundle_of("hosvd").manifest.classes.index(name)
        assert (right, of) == (int((served.predict(x).argmax(1) == label).sum()), len(files))
    assert told["samples"] == 48 == sum(told["statuses"].values()) and set(told["statuses"]) == {"trained", "heldout"}
    heldout = json.loads(command("eval", state, "--data", data, "--heldout", "--json"))
    assert heldout["statuses"] == {"heldout": heldout["samples"]} and heldout["samples"] == told["statuses"]["heldout"]
    # What the agent found in its own session is what stock onnxruntime finds in the file.
    assert heldout["accuracy"] == manual.listing(state)["versions"][-1]["score"]["accuracy"]
    candidate = json.loads(command("eval", state, "--data", data, "--candidate", "--json"))
    assert candidate["model"] == "the candidate of step 5" and candidate["classes"] == told["classes"]
    # A version that is not on the disk any more.
    refused = CliRunner().invoke(app, ["eval", str(state), "--data", str(data), "--version", "1"])
    assert isinstance(refused.exception, UsageError) and "choose one of: 4, 5, 6" in str(refused.exception)


def test_rollback_promote_and_history(finished: Path) -> None:
    state = finished / "state"
    before = json.loads(command("history", state, "--json"))
    assert "is in use again in the place of version" in command("rollback", state)
    told = json.loads(command("history", state, "--json"))
    assert told["in_use"] < before["in_use"] and told["held"] is not None
    text = command("history", state)
    assert "held: rolled back" in text and "rolled back" in text
    assert "is in use" in command("promote", state)
    assert json.loads(command("history", state, "--json"))["held"] is None
    assert "Nothing was held." in command("promote", state, "--automatic")
