"""The tool that says what knobs cost runs, and says it of every knob."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from tools import knobs


def test_every_setting_has_a_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = argparse.Namespace(model="awkward_convs", last=1, batch=2, side=24, rounds=1)
    knobs.report(args, tmp_path)
    rows = [line.strip("|").split("|") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    settings = {(row[0].strip(), row[2].strip()) for row in rows if len(row) == 7}
    assert {("dense", "2"), ("dense", "1"), ("hosvd", "1")} <= settings
    for row in rows:
        if row[0].strip() == "dense":
            assert float(row[6]) < 0.01 and float(row[5]) > 0
