"""The agent with its real engine, on real bundles and PNG files: what it loads, and what it survives."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from edgetune.telemetry import runlog
from tests.engines.workshop import CODECS, ROOT, bundle_of, same_bits
from tests.system.device import final_state, last_step, make_images, run, start, trained

EPOCHS = 12


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("images"), bundle_of("hosvd"), 40)


@pytest.mark.parametrize("codec", CODECS)
def test_the_device_side_trains_without_the_hosts_libraries(codec: str, images: Path, tmp_path: Path) -> None:
    result = run(bundle_of(codec), images, tmp_path / "state", epsilon=0.9, epochs=2)
    assert result["error"] is None and result["reason"] == "every sample is trained"
    assert result["host_libraries"] == []
    steps = runlog.steps(tmp_path / "state" / "log.jsonl")
    assert [record["step"] for record in steps] == list(range(1, result["step"] + 1))
    # 40 samples in 4 classes, every fifth of a class held out
    taken = [row for row in trained(tmp_path / "state") if row[1] == "trained"]
    assert 28 <= len(taken) <= 36 and all(row[3] == 2 for row in taken)
    assert sum(record["samples"] for record in steps) == 2 * len(taken)


# ---- kill -9 ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def undisturbed(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The state of a run that nobody disturbed."""
    state = tmp_path_factory.mktemp("undisturbed") / "state"
    assert run(bundle_of("hosvd"), images, state, epsilon=0.9, epochs=EPOCHS, checkpoint_every=5)["error"] is None
    return state


def test_a_killed_run_continues_from_its_checkpoint_to_the_same_bits(
    undisturbed: Path, images: Path, tmp_path: Path
) -> None:
    bundle, state, whole = bundle_of("hosvd"), tmp_path / "state", last_step(undisturbed)
    options: dict[str, Any] = {"epsilon": 0.9, "epochs": EPOCHS, "checkpoint_every": 5}
    for step in (7, 23):
        agent = start(bundle, images, state, **options)
        try:
            until = time.monotonic() + 60
            while last_step(state) < step and agent.poll() is None and time.monotonic() < until:
                time.sleep(0.005)
        finally:
            agent.kill()
        assert agent.wait() == -9, "the agent ended before it could be killed"
        assert step <= last_step(state) < whole
    killed_at = last_step(state)
    assert run(bundle, images, state, **options)["step"] == whole
    records = list(runlog.read(state / "log.jsonl"))
    starts = [index for index, record in enumerate(records) if record["event"] == "start"]
    resumed = next(record["step"] for record in records[starts[-1] :] if record["event"] == "step")
    assert len(starts) == 3
    assert resumed % 5 == 1 and killed_at - 5 <= resumed <= killed_at + 1, "it went on from the last checkpoint"
    assert same_bits(final_state(state), final_state(undisturbed))
    assert trained(state) == trained(undisturbed)
    losses = [[record["loss"] for record in runlog.steps(which / "log.jsonl")] for which in (state, undisturbed)]
    assert losses[0] == losses[1]


# ---- the oldest Python --------------------------------------------------------------------------------------------


def python_3_10() -> str | None:
    """Return an interpreter of that version that really runs."""
    found = [str(path) for path in Path.home().glob(".pyenv/versions/3.10*/bin/python")]
    for candidate in (shutil.which("python3.10"), *sorted(found)):
        if candidate is None:
            continue
        check = "import sys, venv, ensurepip, sqlite3; sys.exit(sys.version_info[:2] != (3, 10))"
        try:
            if subprocess.run([candidate, "-c", check], capture_output=True, timeout=20).returncode == 0:
                return candidate
        except (OSError, subprocess.TimeoutExpired):
            continue
    return None


@pytest.fixture
def board_python(tmp_path: Path) -> str:
    """A Python 3.10 with what pyproject.toml wants on a device, and onnxruntime."""
    if sys.version_info[:2] == (3, 10):
        pytest.skip("these tests run on Python 3.10 themselves")
    tomllib = pytest.importorskip("tomllib")
    interpreter = python_3_10()
    if interpreter is None:
        pytest.skip("there is no working Python 3.10 here")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["cpu"]]
    python = str(tmp_path / "venv" / "bin" / "python")
    try:
        subprocess.run([interpreter, "-m", "venv", str(tmp_path / "venv")], check=True, capture_output=True, timeout=40)
        install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--only-binary=:all:"]
        subprocess.run([*install, "--retries=1", *wanted], check=True, capture_output=True, timeout=90)
    except subprocess.TimeoutExpired as error:
        pytest.skip(f"an environment for Python 3.10 could not be made in {error.timeout} s")
    except subprocess.CalledProcessError as error:
        reason = error.stderr.decode(errors="replace").strip().splitlines()
        pytest.skip(f"an environment for Python 3.10 cannot be made: {reason[-1] if reason else error}")
    return python


def test_the_device_side_runs_on_the_oldest_python(board_python: str, images: Path, tmp_path: Path) -> None:
    bundle = bundle_of("hosvd")
    result = run(bundle, images, tmp_path / "state", python=board_python, epsilon=0.9, epochs=2, checkpoint_every=3)
    assert result["python"] == [3, 10]
    assert result["error"] is None and result["step"] == last_step(tmp_path / "state") > 3
    assert result["host_libraries"] == []
    # and an older runtime resumes what it stored
    again = run(bundle, images, tmp_path / "state", python=board_python, epsilon=0.9, epochs=3)
    assert again["error"] is None and again["step"] > result["step"]
