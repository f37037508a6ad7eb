"""``run``, ``status`` and ``report`` as commands: options, tables, JSON."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from edgetune.agent import loop, summary, worker
from edgetune.agent.config import AgentConfig
from edgetune.agent.loop import run_agent
from edgetune.agent.view import QuietView
from edgetune.bundle import Bundle
from edgetune.commands.report import report
from edgetune.commands.run import run
from edgetune.commands.status import status
from edgetune.errors import StateError, UsageError
from tests.agent.fakes import RUNTIME_BYTES, Workshop, make_bundle, make_folder


@pytest.fixture(scope="module")
def app() -> typer.Typer:
    made = typer.Typer()
    for command in (run, status, report):
        made.command()(command)
    return made


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("commands")
    make_folder(root / "data", 10)
    (root / "data" / "cat" / "bad.png").write_bytes(b"x")
    os.utime(root / "data" / "cat" / "bad.png", (1e9, 1e9))
    settings = AgentConfig(
        data=root / "data", state=root / "state", batch=4, once=True, epochs=2, budget_bytes=RUNTIME_BYTES + 50_000
    )
    run_agent(make_bundle(root / "bundle"), settings, parts=Workshop().parts(), view=QuietView())
    return root / "state"


def test_status(app: typer.Typer, state: Path) -> None:
    found = json.loads(CliRunner().invoke(app, ["status", str(state), "--json"]).stdout)
    assert found["step"] == found["logged_step"] == 12 and found["accuracy"] == 1.0
    assert found["samples"] == {"new": 0, "heldout": 6, "trained": 24, "replayable": 0, "quarantined": 1}
    assert [entry["path"] for entry in found["quarantined"]] == ["cat/bad.png"]
    assert found["plan"]["budget_bytes"] == RUNTIME_BYTES + 50_000 and found["last_event"]["event"] == "stopped"
    table = CliRunner().invoke(app, ["status", str(state)]).stdout
    assert "12 stored" in table and "24 trained" in table and "cat/bad.png" in table


def test_report(app: typer.Typer, state: Path) -> None:
    found = json.loads(CliRunner().invoke(app, ["report", str(state), "--json"]).stdout)
    assert found["steps"] == 12 and found["samples"] == 48 and found["epochs"] == 2
    assert found["measured_peak_bytes"] == RUNTIME_BYTES + 20_000 and found["budget_kept"] is True
    assert found["loss_last"] < found["loss_first"] and found["accuracy"] == 1.0 > found["accuracy_before"]
    assert {"decode", "trunk", "train", "update", "checkpoint", "evaluate"} <= set(found["seconds"])
    assert found["events"]["step"] == 12
    table = CliRunner().invoke(app, ["report", str(state)]).stdout
    assert "kept at every step" in table and "seconds: train" in table


def test_a_step_over_what_there_was_counts_though_it_kept_the_budget(state: Path, tmp_path: Path) -> None:
    shutil.copytree(state, tmp_path / "state")
    log = tmp_path / "state" / "log.jsonl"
    steps = [json.loads(line) for line in log.read_text().splitlines() if '"event":"step"' in line]
    tight = steps[-1] | {"effective_budget_bytes": steps[-1]["measured_peak_bytes"] - 1}
    log.write_text(log.read_text() + json.dumps(tight) + "\n")
    found = summary.report(tmp_path / "state")
    assert tight["measured_peak_bytes"] < tight["budget_bytes"] and found["over_budget_steps"] == 1


def test_a_directory_that_is_no_state_is_named(app: typer.Typer, tmp_path: Path) -> None:
    for command in ("status", "report"):
        result = CliRunner().invoke(app, [command, str(tmp_path)])
        assert isinstance(result.exception, StateError) and "state.json" in str(result.exception)


def test_the_options_of_run_reach_the_agent(app: typer.Typer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Bundle, AgentConfig]] = []

    def remember(bundle: Bundle, config: AgentConfig, **options: Any) -> None:
        seen.append((bundle, config))

    monkeypatch.setattr(loop, "run_agent", remember)
    bundle = make_bundle(tmp_path / "b")
    words = [
        "run", str(bundle.path), "--data", "d", "--state", "s", "--budget", "64MiB", "--activation-budget", "1 MB",
        "--engine", "onnxruntime", "--batch", "8", "--epsilon", "0.75",
        "--reserve", "8MiB", "--micro-batch", "2", "--tail-micro-batch", "4", "--trained", "1", "--cache", "0",
        "--max-steps", "9", "--epochs", "3", "--once", "--holdout", "4", "--checkpoint-every", "7",
        "--learning-rate", "0.5", "--momentum", "0", "--seed", "3",
        "--quiet", "--no-supervise",
    ]  # fmt: skip
    assert CliRunner().invoke(app, words).exit_code == 0
    opened, config = seen[0]
    assert opened.digest == bundle.digest
    assert config == AgentConfig(
        data="d", state=Path("s"), budget_bytes=64 * 2**20, activation_budget_bytes=10**6, engine="onnxruntime",
        reserve_bytes=8 * 2**20, micro_batch=2, tail_micro_batch=4, trained=1, cache_bytes=0,
        batch=8, epsilon=0.75, max_steps=9, epochs=3, once=True, holdout=4, checkpoint_every=7,
        hyper={"learning_rate": 0.5, "momentum": 0.0}, seed=3, quiet=True,
    )  # fmt: skip
    plain = ["run", str(bundle.path), "--data", "d", "--state", "s"]
    assert CliRunner().invoke(app, [*plain, "--no-supervise"]).exit_code == 0
    assert seen[1][1] == AgentConfig(data="d", state=Path("s"))  # the defaults are those of the config


def test_run_becomes_the_supervisor_of_a_worker_with_the_same_options(
    app: typer.Typer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    became: list[list[str]] = []
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    monkeypatch.setattr(os, "execv", lambda _program, line: became.append(line))
    monkeypatch.setattr(loop, "run_agent", lambda *_: None)
    bundle = make_bundle(tmp_path / "b")
    words = ["run", str(bundle.path), "--data", "d", "--state", "s", "--learning-rate", "0.5", "--epsilon", "0.9"]
    assert CliRunner().invoke(app, words).exit_code == 0
    (line,) = became
    split = line.index("--")
    assert line[1] == "-I" and Path(line[2]).name == "supervisor.py" and line[3:split] == ["s"]
    given = AgentConfig(data="d", state=Path("s"), epsilon=0.9, hyper={"learning_rate": 0.5})
    assert worker.settings(line[-1]) == (bundle.path, given)
    assert os.environ["PYTHONPATH"].endswith(":elsewhere")
    # what no worker could do is said at once, by the command itself
    wrong = CliRunner().invoke(app, [*words, "--epochs", "0"])
    assert isinstance(wrong.exception, UsageError) and len(became) == 1


def test_importing_a_command_is_cheap_and_the_agent_never_sees_the_host(state: Path) -> None:
    code = (
        "import sys; import edgetune.commands.run, edgetune.commands.status, edgetune.commands.report\n"
        "assert not {'numpy', 'PIL', 'rich.live', 'watchfiles', 'sqlite3'} & set(sys.modules), 'heavy import'\n"
        "import edgetune.agent.loop\n"
        "assert not {'torch', 'onnx', 'onnxruntime'} & set(sys.modules), 'forbidden import'\n"
    )
    root = Path(__file__).resolve().parents[2]
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
