"""The tool that kills workers: it kills, counts, and sees what differs."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from edgetune.agent.ledger import Sample
from tests.engines.workshop import bundle_of
from tests.system.device import make_images
from tools.kills import GROUP, WORKER, Job, Result, Tally, campaign, contradictions, differences, table


def test_a_killed_run_ends_as_an_undisturbed_one(tmp_path: Path) -> None:
    bundle = bundle_of("hosvd")
    job = Job(bundle.path.resolve(), make_images(tmp_path / "images", bundle, 48), epochs=4, replay="features")
    found = campaign(job, tmp_path / "runs", kills=1, seed=0)
    assert found[WORKER].kills == 1 and found[WORKER].different == []
    assert found[WORKER].steps % found[WORKER].runs == 0, "each step counted once"
    assert found[GROUP] == Tally()


def test_a_difference_is_told() -> None:
    one = Result("abc", [("a.png", "trained", 3, 1, 0)], [0.5, 0.25])
    assert differences(one, one) == []
    assert differences(one, Result("abd", one.ledger, one.losses)) == ["weights"]
    assert differences(one, Result("abc", [("a.png", "trained", 3, 2, 0)], [0.5])) == ["ledger", "losses"]
    assert differences(Result("abc", one.ledger, one.losses, "x", "y", ["a sample lost"]), one) == [
        "replay buffer", "promoted model", "a sample lost",
    ]  # fmt: skip
    told = table({WORKER: Tally(2, 50, 7, 96, 11, ["weights of run 2"])})
    assert told.splitlines()[-1] == "| worker | 50 | 7 | 2 | 96 | 11 | weights of run 2 |"


def test_contradictions_are_found() -> None:
    samples = [
        Sample(1, "a.png", "h1", 1, 1, 0, "trained", 2, 1, None, 0),
        Sample(2, "b.png", "h2", 1, 1, 0, "replayable", 1, 1, None, 1),
        Sample(3, "c.png", "h3", 1, 1, 0, "heldout", None, 0, None, 0),
    ]
    steps, files = [{"samples": 1, "replayed": 0}, {"samples": 2, "replayed": 1}], ["a.png", "b.png", "c.png"]
    assert contradictions(samples, steps, ["h2"], files) == []
    assert contradictions(samples[1:], steps, ["h2"], files) == ["a sample lost", "a sample trained twice"]
    assert contradictions(samples, steps, [], files) == ["a buffer unknown to the ledger"]
    late = [{"samples": 1, "replayed": 0}, {"samples": 2, "replayed": 0}]
    assert contradictions(samples, late, ["h2"], files) == [
        "a sample trained twice", "a sample replayed unknown to the ledger",
    ]  # fmt: skip
    new = [*samples[:2], dataclasses.replace(samples[2], status="new", passes=0)]
    assert contradictions(new, steps, ["h2"], files) == ["a sample not trained"]
