"""Settings as a file, as words on the command line, and as what the worker is told."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from edgetune.agent import loop
from edgetune.agent.config import AgentConfig
from edgetune.agent.settings import annotated, assignment, configured, merged, plain, read
from edgetune.bundle import Bundle
from edgetune.commands.config import config as config_command
from edgetune.commands.run import run
from edgetune.errors import UsageError
from tests.agent.fakes import make_bundle


@pytest.fixture(scope="module")
def app() -> typer.Typer:
    made = typer.Typer()
    for command in (run, config_command):
        made.command()(command)
    return made


def test_the_printed_file_holds_every_setting_with_its_meaning_and_its_default(tmp_path: Path) -> None:
    text = annotated()
    (tmp_path / "as_is.toml").write_text(text)
    default = AgentConfig(data="/var/lib/edgetune/samples", state=Path("/var/lib/edgetune/state"))
    assert configured(read(tmp_path / "as_is.toml")) == default
    # What is commented out is what holds without it: written out, it changes nothing.
    (tmp_path / "all.toml").write_text(re.sub(r"^#(\w+ = (?!\"model).+)$", r"\1", text, flags=re.M))
    every = read(tmp_path / "all.toml")
    assert configured({**every, "hyper": {}}) == default and every["hyper"] == {"learning_rate": 0.001}
    assert len(every["replay"]) == len(dataclasses.fields(default.replay)) and every["epochs"] == 1
    lines = text.splitlines()
    known: Any
    for known in (default, default.intake, default.replay, default.gate, default.drift, default.service):
        for field in dataclasses.fields(known):
            if dataclasses.is_dataclass(getattr(known, field.name)) or field.name == "hyper":
                continue
            (place,) = [i for i, line in enumerate(lines) if re.match(rf"#?{field.name} =", line)]
            assert lines[place - 1].startswith("# ") and lines[place - 1] != f"# {field.name}"


def test_a_file_words_and_units(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text(
        'data = "photos"\nstate = "s"\nbudget_bytes = "512MiB"\nreserve_bytes = 0\nepochs = 2\n'
        '[hyper]\nlearning_rate = 1\n[replay]\nkind = "raw"\nlimit_bytes = "1 GB"\n[drift]\nactions = ["boost"]\n'
    )
    words = ["replay.ratio=0.25", "drift.actions=notice, boost", "budget_bytes=none", "quiet=true", "intake.window=8"]
    found = configured(merged(read(tmp_path / "c.toml"), *map(assignment, words), {"epochs": 3}))
    assert found.data == "photos" and found.state == Path("s") and found.epochs == 3 and found.quiet is True
    assert found.budget_bytes is None and found.reserve_bytes == 0 and found.hyper == {"learning_rate": 1.0}
    assert found.replay.kind == "raw" and found.replay.limit_bytes == 10**9 and found.replay.ratio == 0.25
    assert found.drift.actions == ("notice", "boost") and found.intake.window == 8
    assert configured(plain(found)) == found  # what the supervisor tells the worker


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"replay": {"rati": 1}}, "there is no setting 'replay.rati'; did you mean 'replay.ratio'?"),
        ({"colour": 1}, "there is no setting 'colour'; known are:"),
        ({"epochs": "two"}, "epochs: expected int, found 'two'"),
        ({"once": 1}, "once: expected bool, found 1"),
        ({"replay": 3}, "replay: expected a table, found 3"),
        ({"drift": {"actions": "boost"}}, "drift.actions: expected a list, found 'boost'"),
        ({"budget_bytes": "many"}, "'many' is not a size"),
        ({"state": None}, "state: expected"),
    ],
)
def test_a_wrong_setting_is_named(given: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=re.escape(words)):
        configured({"data": "d", "state": "s", **given})


def test_all_wrong_settings_are_named_at_once_and_judged_by_their_sections() -> None:
    with pytest.raises(UsageError, match=r"'epoch'; did you mean 'epochs'.*'data' is missing"):
        configured({"state": "s", "epoch": 1})
    wrong = {
        "replay": {"kind": "video", "ratio": 1.0}, "gate": {"keep": 1}, "drift": {"delta": 0.0},
        "service": {"hours": "late"}, "intake": {"augment": ["blur"]}, "budget_bytes": 0,
    }  # fmt: skip
    with pytest.raises(UsageError) as caught:
        configured({"data": "d", "state": "s", **wrong}).check({})
    for name in (
        "replay.kind",
        "replay.ratio",
        "gate.keep",
        "drift.delta",
        "service.hours",
        "intake.augment",
        "--budget",
    ):
        assert name in str(caught.value)


def test_bad_files_and_bad_words(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        read(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("data = \n")
    with pytest.raises(UsageError, match="is not TOML"):
        read(tmp_path / "bad.toml")
    for word in ("replay.ratio", "=3", "a.b.c=1", ".x=1"):
        with pytest.raises(UsageError, match="is not a setting"):
            assignment(word)


def test_run_takes_all_from_a_file_and_options_win(
    app: typer.Typer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[Bundle, AgentConfig]] = []
    monkeypatch.setattr(loop, "run_agent", lambda bundle, config: seen.append((bundle, config)))
    bundle = make_bundle(tmp_path / "b")
    file = tmp_path / "c.toml"
    file.write_text(f'bundle = "{bundle.path}"\ndata = "d"\nstate = "s"\nbatch = 4\nepochs = 2\nonce = true\n')
    words = ["run", "--config", str(file), "--set", "batch=8", "--set", "epochs=5", "--epochs", "7", "--watch"]
    done = CliRunner().invoke(app, [*words, "--no-supervise"], catch_exceptions=False)
    assert done.exit_code == 0 and seen[0][0].digest == bundle.digest
    assert seen[0][1] == AgentConfig(data="d", state=Path("s"), batch=8, epochs=7)
    missing = CliRunner().invoke(app, ["run", "--data", "d"])
    assert isinstance(missing.exception, UsageError) and "the bundle and --state must be given" in str(
        missing.exception
    )
    checked = CliRunner().invoke(app, ["config", "--check", str(file)], catch_exceptions=False)
    assert checked.exit_code == 0 and "in order, and so is what it asks of" in checked.stdout
    file.write_text(file.read_text() + "[hyper]\nmomentun = 0.9\n")
    wrong = CliRunner().invoke(app, ["config", "--check", str(file)])
    assert isinstance(wrong.exception, UsageError) and "--momentun" in str(wrong.exception)


def test_the_command_prints_a_file_that_it_accepts(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-m", "edgetune", "config"], capture_output=True, text=True, check=True)
    (tmp_path / "edgetune.toml").write_text(done.stdout)
    assert configured(read(tmp_path / "edgetune.toml")).replay.kind == "none"
