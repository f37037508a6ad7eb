"""Another bundle in the place of the one that a state directory was made with."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from edgetune.agent import checkpoint
from edgetune.agent.state import StateDirectory, replace_bundle
from edgetune.bundle import Bundle, write_manifest
from edgetune.errors import StateError
from edgetune.telemetry import runlog
from tests.agent.fakes import CLASSES, make_bundle, make_image, make_manifest
from tests.agent.test_agent_replay import assert_same_end, buffer, newest, rows, run, start


def another_bundle(path: Path, **changed: object) -> Bundle:
    """Return a bundle like the fake one with other weights."""
    shutil.rmtree(path, ignore_errors=True)
    make_bundle(path)
    weight = np.random.default_rng(7).normal(0, 0.01, (3, 48)).astype(np.float32)
    save_file({"head.weight": weight}, path / "weights.safetensors")
    return write_manifest(path, dataclasses.replace(make_manifest("newer"), **changed))  # type: ignore[arg-type]


def arrive(root: Path, first: int, count: int) -> None:
    for label, name in enumerate(CLASSES):
        for seed in range(first, first + count):
            make_image(root / "data" / name / f"{seed:03d}.png", label, seed)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A state that a first bundle has left, with samples that came since, and a second bundle in the first one's
    place."""
    root = tmp_path_factory.mktemp("replace")
    make_bundle(root / "bundle")
    arrive(root, 0, 8)
    run(root, "before", "raw", epochs=1)
    arrive(root, 8, 8)
    another_bundle(root / "bundle")
    return root


def replaced(place: Path, name: str) -> Path:
    shutil.copytree(place / "before", place / name)
    assert replace_bundle(place / name, Bundle.open(place / "bundle"))
    return place / name


def test_ledger_and_raw_replay_go_on_with_the_new_weights(place: Path) -> None:
    old = newest(place / "before")
    state = replaced(place, "first")
    assert not replace_bundle(state, Bundle.open(place / "bundle")), "once"
    kept = buffer(place / "before")
    run(place, "first", "raw", epochs=1, max_steps=old.step)
    begun = newest(state)
    assert begun.step == old.step and begun.position["bundle"] == Bundle.open(place / "bundle").digest
    weight = Bundle.open(place / "bundle").initial_parameters()["head.weight"]
    np.testing.assert_array_equal(begun.tensors["head.weight"], weight)
    assert buffer(state) == kept
    # A clock that was set back must not bring the old weights back.
    path = next(path for step, path in checkpoint.listed(state) if step == old.step)
    os.utime(path, (1, 1))
    run(place, "first", "raw", epochs=1)
    steps = runlog.steps(state / "log.jsonl")
    assert [step["step"] for step in steps] == list(range(1, len(steps) + 1)) and steps[old.step]["replayed"] == 2
    assert all(row.passes == 1 for row in rows(state) if row.status in ("trained", "replayable"))
    assert sum(event["event"] == "bundle_replaced" for event in runlog.read(state / "log.jsonl")) == 1


def test_killed_while_it_is_replaced_it_ends_as_if_undisturbed(place: Path) -> None:
    replaced(place, "whole")
    assert start(place, "whole", "raw")[0] == 0
    number, deaths, dice = 3, 0, random.Random(1)
    replaced(place, "killed")
    while True:
        code, output = start(place, "killed", "raw", kill_at_sync=number)
        if code == 0:
            break
        assert code == -signal.SIGKILL, output
        deaths += 1
        number += dice.randint(20, 50)
    assert deaths >= 3
    assert_same_end(place / "whole", place / "killed")


def test_other_samples_are_refused_and_so_is_a_directory_in_use(place: Path, tmp_path: Path) -> None:
    state = tmp_path / "state"
    shutil.copytree(place / "before", state)
    other = another_bundle(tmp_path / "other", classes=("cat", "dog", "cow"))
    with pytest.raises(StateError, match=r"classes: .*owl.*, here .*cow"):
        replace_bundle(state, other)
    bundle = Bundle.open(place / "bundle")
    known = json.loads((state / "state.json").read_text())
    with (
        StateDirectory(state, digest=known["bundle"], model="fake", batch=None, seed=None),
        pytest.raises(StateError, match="in use"),
    ):
        replace_bundle(state, bundle)
    (state / "state.json").write_text(json.dumps({**known, "samples": None}))
    with pytest.raises(StateError, match="did not note its classes"):
        replace_bundle(state, bundle)
    with StateDirectory(state, digest=known["bundle"], model="fake", batch=None, seed=None, samples=known["samples"]):
        pass
    assert replace_bundle(state, bundle), "noted by now"
    assert not replace_bundle(tmp_path / "nothing", bundle)
    run_with_the_old = {"digest": known["bundle"], "model": "fake", "batch": None, "seed": None}
    with pytest.raises(StateError, match="--replace-bundle"):
        StateDirectory(state, **run_with_the_old)


def test_the_command_replaces_before_it_runs(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from edgetune.commands import app

    state = tmp_path / "state"
    shutil.copytree(place / "before", state)
    seen = []
    monkeypatch.setattr("edgetune.agent.loop.run_agent", lambda bundle, config: seen.append(bundle.digest))
    words = ["run", str(place / "bundle"), "--data", str(place / "data"), "--state", str(state), "--no-supervise"]
    assert CliRunner().invoke(app, [*words, "--replace-bundle"]).exit_code == 0
    assert seen == [json.loads((state / "state.json").read_text())["bundle"]] == [Bundle.open(place / "bundle").digest]
