"""What the runtime takes is one figure for every process that plans: measured once, rounded up, remembered."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from edgetune.agent import baseline
from edgetune.bundle import Bundle
from edgetune.units import MIB
from tests.engines.workshop import bundle_of


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Replace the measurement by one that finds a page more each time; return what it was asked for."""
    asked: list[str] = []

    def measure(bundle: Bundle, engine: str = "auto", *, metrics: bool = False) -> int:
        asked.append(engine + "+metrics" * metrics)
        return 80 * MIB + 4096 * len(asked)

    monkeypatch.setattr(baseline, "measure_runtime_apart", measure)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return asked


def test_one_measurement_serves_all_that_ask_the_same(measured: list[str], tmp_path: Path) -> None:
    found = [baseline.runtime_bytes(bundle_of("hosvd"), "onnxruntime") for _ in range(3)]
    assert found == [81 * MIB] * 3 and measured == ["onnxruntime"]
    # what the choice comes to is the question, not how it was spelled
    assert baseline.runtime_bytes(bundle_of("hosvd"), "auto") == 81 * MIB and len(measured) == 1
    (file,) = (tmp_path / "edgetune" / "runtime").iterdir()
    assert json.loads(file.read_text())["bundle"] == bundle_of("hosvd").digest


def test_another_engine_or_bundle_is_another_figure(measured: list[str]) -> None:
    baseline.runtime_bytes(bundle_of("hosvd"), "onnxruntime")
    baseline.runtime_bytes(bundle_of("hosvd"), "torch")
    baseline.runtime_bytes(bundle_of("dense"), "onnxruntime")
    assert measured == ["onnxruntime", "torch", "onnxruntime"]


def test_an_endpoint_for_monitors_is_another_figure(measured: list[str]) -> None:
    for metrics in (False, True, False, True):
        baseline.runtime_bytes(bundle_of("hosvd"), "onnxruntime", metrics=metrics)
    assert measured == ["onnxruntime", "onnxruntime+metrics"]


def test_the_endpoint_is_in_memory_while_the_runtime_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the measuring process, which prints the figure: here, what is resident where it would measure."""
    program = (
        "import runpy, sys\n"
        "from edgetune.agent import baseline, parts\n"
        "from edgetune.telemetry.process import resident_bytes\n"
        "before = resident_bytes()\n"
        "with baseline.serving_metrics():\n"
        "    print(resident_bytes() - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert 2 * MIB < int(done.stdout) < 16 * MIB
    commands: list[list[str]] = []

    def run(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        return subprocess.CompletedProcess(command, 0, stdout="7\n", stderr="")

    monkeypatch.setattr(subprocess, "run", run)
    assert baseline.measure_runtime_apart(bundle_of("hosvd"), metrics=True) == 7
    assert baseline.measure_runtime_apart(bundle_of("hosvd")) == 7
    assert commands[0] == [*commands[1], "metrics"]


@pytest.mark.parametrize("damage", [b"", b"{", b"[1]", b'{"runtime_bytes": -1}', b'{"runtime_bytes": true}'])
def test_a_damaged_note_is_measured_again(measured: list[str], tmp_path: Path, damage: bytes) -> None:
    baseline.runtime_bytes(bundle_of("hosvd"), "onnxruntime")
    (file,) = (tmp_path / "edgetune" / "runtime").iterdir()
    file.write_bytes(damage)
    assert baseline.runtime_bytes(bundle_of("hosvd"), "onnxruntime") == 81 * MIB and len(measured) == 2


def test_where_nothing_can_be_written_the_figure_is_still_rounded(
    measured: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    found = [baseline.runtime_bytes(bundle_of("hosvd"), "onnxruntime") for _ in range(2)]
    assert found == [81 * MIB] * 2 and len(measured) == 2
    monkeypatch.setenv("XDG_CACHE_HOME", os.path.relpath(tmp_path))  # not absolute: ignored, as the standard says
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    baseline.runtime_bytes(bundle_of("hosvd"), "onnxruntime")
    assert list((tmp_path / "home" / ".cache" / "edgetune" / "runtime").iterdir())
