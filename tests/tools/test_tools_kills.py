"""The tool that kills workers: it kills, counts, and sees what differs."""

from __future__ import annotations

from pathlib import Path

from tests.engines.workshop import bundle_of
from tests.system.device import make_images
from tools.kills import GROUP, WORKER, Job, Result, Tally, campaign, differences, table


def test_a_killed_run_ends_as_an_undisturbed_one(tmp_path: Path) -> None:
    bundle = bundle_of("hosvd")
    job = Job(bundle.path.resolve(), make_images(tmp_path / "images", bundle, 48), epochs=8)
    found = campaign(job, tmp_path / "runs", kills=1, seed=0)
    assert found[WORKER].kills == 1 and found[WORKER].different == []
    assert found[WORKER].steps == 16 * found[WORKER].runs, "two batches a pass, each step counted once"
    assert found[GROUP] == Tally()


def test_a_difference_is_told() -> None:
    one = Result("abc", [("a.png", "trained", 3, 1)], [0.5, 0.25])
    assert differences(one, one) == []
    assert differences(one, Result("abd", one.ledger, one.losses)) == ["weights"]
    assert differences(one, Result("abc", [("a.png", "trained", 3, 2)], [0.5])) == ["ledger", "losses"]
    told = table({WORKER: Tally(2, 50, 7, 96, 11, ["weights of run 2"])})
    assert told.splitlines()[-1] == "| worker | 50 | 7 | 2 | 96 | 11 | weights of run 2 |"
