"""``edgetune plan --explain`` and ``--timeline``: a plan told in full, in words, as JSON, as a picture."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from edgetune.agent.sampling import SampledStep
from edgetune.agent.timeline import timeline_fields
from edgetune.commands import app
from edgetune.commands._timeline import measured_in
from edgetune.errors import DataError, UsageError
from edgetune.planning.plan import make_plan
from edgetune.telemetry.runlog import RunLog
from edgetune.units import MIB
from tests.engines.workshop import bundle_of
from tests.system.device import make_images

BATCH = 8


def plan(*options: object, batch: int = BATCH) -> str:
    line = ["plan", bundle_of("hosvd").path, "--batch", batch, "--epsilon", "1", *options]
    done = CliRunner().invoke(app, list(map(str, line)))
    if done.exception is not None:
        raise done.exception
    return done.stdout


def areas(picture: Path) -> Iterator[tuple[str, list[tuple[float, float]]]]:
    for element in ElementTree.parse(picture).getroot():
        if element.tag.endswith(("polygon", "polyline")):
            points = [tuple(map(float, pair.split(","))) for pair in element.attrib["points"].split()]
            yield element.tag.rsplit("}", 1)[1], [(x, y) for x, y in points]


def test_explain_lists_what_is_alive_and_sums_to_the_peak() -> None:
    told = json.loads(plan("--explain", "--json"))
    found = told["explain"]
    assert (
        found["peak_bytes"] == told["predicted_peak_bytes"]
        and f"{found['phase']}/{found['node']}" == told["bottleneck"]
    )
    assert sum(found["fixed"].values()) + sum(row["bytes"] for row in found["alive"]) == found["peak_bytes"]
    update = json.loads(plan("--explain", "--phase", "update", "--json"))["explain"]
    assert update["phase"] == "update" and {"gradient"} <= {row["kind"] for row in update["alive"]}
    text = plan("--explain", "--phase", "update")
    assert "alive at the peak of update" in text and "(given)" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--phase", "train"], "give --explain as well"),
        (["--explain", "--phase", "nothing"], r"no phase 'nothing'; choose one of: .*train"),
        (["--measure"], "give --timeline FILE.svg as well"),
        (["--timeline", "t.svg", "--measure"], "give --data FOLDER as well"),
        (["--front", "--explain"], "leave one of them out"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        plan(*options)


def test_a_run_log_is_drawn_over_the_prediction(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no plan was measured in the run log"):
        plan("--timeline", tmp_path / "t.svg", "--state", tmp_path)
    manifest = bundle_of("hosvd").manifest
    made = make_plan(manifest, batch=BATCH, calibration=None, epsilon=1.0, runtime_bytes=80 * MIB)
    log = RunLog(tmp_path / "log.jsonl")
    for size in (100, 120):
        log.append("timeline", **timeline_fields(manifest, made, 80 * MIB, {"train": size * MIB, "update": 90 * MIB}))
    log.close()
    plan("--timeline", tmp_path / "t.svg", "--state", tmp_path)
    dashed = [element for element in ElementTree.parse(tmp_path / "t.svg").getroot() if element.get("stroke-dasharray")]
    heights = [float(element.attrib["points"].split()[0].split(",")[1]) for element in dashed]
    assert len(dashed) == 2 and heights[0] < heights[1], "the last event counts; more bytes lie higher"
    events = [{"event": "timeline", "phases": {"train": {"measured_bytes": 5}, "trunk": {"measured_bytes": None}}}]
    assert measured_in([*events, {"event": "step"}]) == {"train": 5}


def test_a_real_step_is_measured_and_drawn(tmp_path: Path) -> None:
    data = make_images(tmp_path / "images", bundle_of("hosvd"), 3 * BATCH)
    plan("--timeline", tmp_path / "t.svg", "--measure", "--data", data)
    kinds = [kind for kind, _ in areas(tmp_path / "t.svg")]
    assert kinds.count("polygon") >= 4 and kinds.count("polyline") >= 6  # three phases: border, peak, samples each
    text = (tmp_path / "t.svg").read_text("utf-8")
    assert "measured: every ms" in text and re.search(r"train.*nodes", text, re.DOTALL)
    with pytest.raises(DataError, match="24 readable samples; a batch has 32"):
        plan("--timeline", tmp_path / "u.svg", "--measure", "--data", data, batch=32)


def test_samples_are_spread_over_the_phase_in_which_they_fell() -> None:
    step = SampledStep((0.0, 1.0, 2.0, 3.0, 4.0), (1, 2, 3, 4, 5), {"trunk": 2.0, "train": 4.0}, {})
    assert step.stretch("trunk") == [(0.0, 1), (0.5, 2), (1.0, 3)]
    assert step.stretch("train") == [(0.0, 3), (0.5, 4), (1.0, 5)]
