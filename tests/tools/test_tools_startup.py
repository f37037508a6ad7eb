"""What the agent has loaded and holds when it is ready, in a process of its own. Seconds are the tool's business."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.agent.fakes import make_bundle
from tools.startup import MIB, Row, start, table

# What only the host has, and what only some commands show with. pydantic comes with typer where it is installed.
NOT_FOR_THE_AGENT = {"torch", "onnx", "onnx_ir", "onnxscript", "scipy", "sklearn", "pandas", "matplotlib", "rich"}


def test_the_agent_is_ready_with_little_in_memory(tmp_path: Path) -> None:
    found = start("ready", make_bundle(tmp_path / "bundle").path)
    top = {name.partition(".")[0] for name in found.modules}
    assert {"edgetune", "numpy", "onnxruntime"} <= top
    assert not top & NOT_FOR_THE_AGENT
    assert not {name for name in found.modules if name.startswith(("edgetune.export", "edgetune.autodiff"))}
    assert 20 * MIB < found.resident_bytes < 120 * MIB  # 74 MiB with onnxruntime 1.31; the promise is 150
    assert 0 < found.seconds < 60


def test_the_version_needs_neither_numpy_nor_the_agent() -> None:
    found = start("version")
    assert "edgetune.commands" in found.modules
    assert not {"numpy", "onnxruntime", "edgetune.agent.loop", "rich"} & found.modules


def test_a_process_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"did not reach 'ready':\nedgetune: '.*nothing' is not a bundle"):
        start("ready", tmp_path / "nothing")


def test_the_table_has_a_row_per_instant() -> None:
    assert table([Row("ready", 0.614, 0.6, 76 * MIB)]).splitlines()[-1] == "| ready | 0.61 | 0.60 | 76 |"
