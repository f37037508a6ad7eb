"""The power goes at a few points of a recorded run: what was not synced is lost, torn or kept, and nothing comes of it.

``tools/powerloss.py`` does the same with the real engine at many more points (docs/supervision.md).
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import pytest

from edgetune.agent import checkpoint
from tests.agent.fakes import make_bundle, make_folder
from tests.agent.test_agent_replay import SCRIPT, assert_same_end, config, start
from tools.powerloss_disk import MODES, after_power_loss
from tools.powerloss_trace import record, usable


@pytest.mark.skipif(not usable(), reason="needs strace, and leave to trace")
def test_after_a_power_loss_the_run_ends_as_if_undisturbed(tmp_path: Path) -> None:
    make_bundle(tmp_path / "bundle")
    make_folder(tmp_path / "data", 12)
    settings = config(tmp_path, "whole", "features")
    message = json.dumps(
        {"bundle": tmp_path / "bundle", "config": {**settings, "replay": vars(settings["replay"])}}, default=str
    )
    (tmp_path / "whole").mkdir()
    code, said, changes = record([sys.executable, str(SCRIPT), message], tmp_path / "whole", tmp_path / "trace")
    assert code == 0, said
    dice, resumed = random.Random(5), 0
    for number in range(3):
        at, name = dice.randint(len(changes) // 8, len(changes)), f"lost{number}"
        after_power_loss(changes[:at], MODES[number % len(MODES)], dice).write(tmp_path / name)
        resumed += bool(checkpoint.listed(tmp_path / name))
        code, output = start(tmp_path, name, "features")
        assert code == 0, output
        assert_same_end(tmp_path / "whole", tmp_path / name)
    assert resumed >= 2
