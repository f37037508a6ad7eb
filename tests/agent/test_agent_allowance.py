"""The effective budget: its two terms, the file that changes one of them, and the command that writes it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from edgetune.agent.allowance import AllowanceReader, default_reserve_bytes, write_budget
from edgetune.agent.storage import write_atomic
from edgetune.commands import app
from edgetune.errors import UsageError
from edgetune.telemetry.available import Available
from edgetune.units import MIB


def reader(tmp_path: Path, asked: int | None = 300 * MIB, reserve: int | None = 50 * MIB) -> AllowanceReader:
    complaints: list[str] = []
    made = AllowanceReader(
        tmp_path, asked, reserve, available=lambda: Available(200 * MIB, "MemAvailable"),
        resident_bytes=lambda: 100 * MIB, refused=complaints.append,
    )  # fmt: skip
    made.complaints = complaints  # type: ignore[attr-defined]
    return made


def test_it_is_the_least_of_what_is_asked_and_what_there_is(tmp_path: Path) -> None:
    found = reader(tmp_path).read()
    assert (found.room, found.limit) == (250 * MIB, 250 * MIB)
    assert reader(tmp_path, 120 * MIB).read().limit == 120 * MIB
    assert reader(tmp_path, None).read().limit == 250 * MIB
    assert reader(tmp_path, None, 400 * MIB).read().limit == 0
    for word in ("300.00 MiB", "200.00 MiB (MemAvailable)", "effective 250.00 MiB"):
        assert word in str(found)


def test_a_sixteenth_is_left_to_others(tmp_path: Path) -> None:
    assert reader(tmp_path, reserve=None).read().reserve == 300 * MIB // 16 == default_reserve_bytes(300 * MIB)
    assert default_reserve_bytes(1 << 36) == 256 * MIB


def test_the_file_replaces_what_was_given_until_it_is_gone(tmp_path: Path) -> None:
    watched = reader(tmp_path)
    assert write_budget(tmp_path, "120 MiB") == 120 * MIB and watched.read().asked == 120 * MIB
    assert write_budget(tmp_path, "none") is None and watched.read().asked is None
    write_atomic(tmp_path / "budget", b"plenty")
    assert watched.read().asked is None and watched.read().asked is None
    (complaint,) = watched.complaints  # type: ignore[attr-defined]
    assert "'plenty' is not a size" in complaint and "none" in complaint
    (tmp_path / "budget").unlink()
    assert watched.read().asked == 300 * MIB


def test_the_command_writes_it_for_a_state_directory_alone(tmp_path: Path) -> None:
    runner = CliRunner()
    assert runner.invoke(app, ["budget", str(tmp_path), "120MiB"]).exception is not None
    assert not (tmp_path / "budget").exists()
    (tmp_path / "state.json").write_text(json.dumps({"schema": 1}))
    done = runner.invoke(app, ["budget", str(tmp_path), "120MiB", "--json"])
    assert json.loads(done.output) == {"state": str(tmp_path), "budget_bytes": 120 * MIB}
    assert (tmp_path / "budget").read_text() == "120MiB\n" and list(tmp_path.glob("*.tmp")) == []
    refused = runner.invoke(app, ["budget", str(tmp_path), "-3"])
    assert refused.exit_code != 0
    with pytest.raises(UsageError, match="for no limit"):
        write_budget(tmp_path, "much")
    assert (tmp_path / "budget").read_text() == "120MiB\n"
