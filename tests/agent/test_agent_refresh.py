"""What the agent does when the captured energy falls: one refresh, in the log, in the checkpoint, and after kill -9."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from edgetune.agent import checkpoint
from edgetune.agent.budget import Budgeter, PlanRequest
from edgetune.agent.config import AgentConfig
from edgetune.agent.drift.config import DriftConfig
from edgetune.agent.journal import Journal
from edgetune.agent.loop import Outcome, run_agent
from edgetune.agent.refresher import LEAST_SAMPLES, Refresher
from edgetune.agent.summary import report, status
from edgetune.agent.view import QuietView
from edgetune.bundle import Array, Bundle, OptionSpec
from edgetune.planning.rebase import promises
from edgetune.planning.spectra import Calibration, Spectrum
from edgetune.telemetry import runlog
from tests.agent.fakes import CLASSES, RUNTIME_BYTES, FakeSession, Workshop, make_bundle, make_manifest
from tests.agent.test_agent_faults import finish, start

FLAT = np.ones((8, 8, 1))
STRIPES = np.tile(np.array([[1], [1], [-1], [-1]] * 2).reshape(8, 1, 1), (1, 8, 1))
"""Orthogonal to FLAT: no basis of the one captures anything of the other."""
FIRST, SECOND = 120, 132
"""Images before and after the change."""


def settings(root: Path, state: str = "state", **changed: Any) -> dict[str, Any]:
    return {
        "data": root / "data", "state": root / state, "batch": 4, "epsilon": 0.8, "epochs": 1, "once": True,
        "quiet": True, "holdout": 0, "checkpoint_every": 5, "settle_seconds": 0.05, **changed,
    }  # fmt: skip


def run(root: Path, bundle: Bundle, shop: Workshop | None = None, state: str = "state", **changed: Any) -> Outcome:
    config = AgentConfig(**settings(root, state, **changed))
    return run_agent(bundle, config, parts=(shop or Workshop()).parts(), view=QuietView())


def events(root: Path, *kinds: str, state: str = "state") -> list[dict[str, Any]]:
    return [record for record in runlog.read(root / state / "log.jsonl") if record["event"] in kinds]


def write(root: Path, pattern: Array | None, first: int, count: int) -> None:
    """Write images of ``pattern`` with a little noise; None: of noise alone."""
    rng = np.random.default_rng(first)
    for number in range(first, first + count):
        change = rng.integers(-90, 91, (8, 8, 3)) if pattern is None else 90 * pattern * np.ones(3)
        pixels = 128 + change + rng.integers(-3, 4, (8, 8, 3))
        path = root / "data" / CLASSES[number % 3] / f"{number:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path)


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle, and a run that has trained everything there was before the change."""
    root = tmp_path_factory.mktemp("before")
    bundle = make_bundle(root / "bundle")
    write(root, FLAT, 0, FIRST)
    run(root, bundle)
    assert not events(root, "energy_fallen", "refresh")
    return root


@pytest.fixture
def changing(before: Path, tmp_path: Path) -> tuple[Path, Bundle]:
    """A copy of that, to which a test adds other data."""
    shutil.copytree(before, tmp_path, dirs_exist_ok=True)
    return tmp_path, Bundle.open(tmp_path / "bundle")


def test_an_abrupt_change_is_seen_in_two_steps_and_mended_by_one_refresh(changing: tuple[Path, Bundle]) -> None:
    root, bundle = changing
    write(root, STRIPES, 1000, SECOND)
    run(root, bundle)
    (fallen,), (refresh,), (mended,) = (events(root, kind) for kind in ("energy_fallen", "refresh", "energy_mended"))
    last_before = FIRST // 4
    assert fallen["step"] == refresh["step"] == last_before + 2
    energies = {record["step"]: record["energy"]["head"] for record in events(root, "step")}
    assert energies[last_before] > 0.9 > 0.1 > energies[last_before + 1]
    assert min(value for step, value in energies.items() if step > refresh["step"]) > 0.9
    assert refresh["tensors"]["head"]["promised"] > 0.9 > refresh["tensors"]["head"]["measured"]
    assert "head fell to" in refresh["reason"] and refresh["samples"] == LEAST_SAMPLES
    assert refresh["seconds"]["refresh"] > 0 and refresh["measured_peak_bytes"] > 0
    assert "is back" in mended["message"]
    assert report(root / "state")["refreshes"] == {"made": 1, "mended": 1, "short": 0, "failed": 0}
    found = status(root / "state")
    assert found["refreshes"] == 1 and found["energy"]["head"]["measured"] > 0.9


def test_the_new_bases_are_in_the_checkpoint(changing: tuple[Path, Bundle]) -> None:
    root, bundle = changing
    write(root, STRIPES, 1000, SECOND)
    run(root, bundle)
    (refresh,) = events(root, "refresh")
    (name,) = (path.name for path in (root / "state").glob("calibration-*"))
    assert name.startswith(f"calibration-{refresh['step']:08d}.")
    # A later run has them from its first step.
    write(root, STRIPES, 2000, 40)
    run(root, bundle)
    steps = events(root, "step")
    assert len(events(root, "refresh")) == 1 and min(step["energy"]["head"] for step in steps[-10:]) > 0.9


@pytest.mark.parametrize("part", range(2))
def test_a_run_killed_around_its_refresh_ends_as_if_undisturbed(before: Path, tmp_path: Path, part: int) -> None:
    shutil.copytree(before, tmp_path, dirs_exist_ok=True)
    shutil.copytree(tmp_path / "state", tmp_path / "killed")
    bundle = Bundle.open(tmp_path / "bundle")
    write(tmp_path, STRIPES, 1000, SECOND)
    run(tmp_path, bundle)
    # A graceful stop first: where the fall has begun, or where the refresh is due and not made.
    run(tmp_path, bundle, state="killed", max_steps=FIRST // 4 + 1 + part)
    dice, number, deaths = random.Random(part), 1 + part, 0
    changed = settings(tmp_path, "killed")
    while True:
        code, output = finish(start(tmp_path, "killed", changed=changed, kill_at_sync=number))
        if code == 0:
            break
        assert code == -signal.SIGKILL, output
        deaths += 1
        number += dice.randint(2, 6)
    assert deaths >= 3
    ends = [checkpoint.load_newest(tmp_path / state, lambda path: None) for state in ("state", "killed")]
    one, other = ends
    assert one is not None and other is not None
    assert all(one.tensors[name].tobytes() == other.tensors[name].tobytes() for name in one.tensors)
    assert one.position == other.position, "the certificate, the plan and the name of its calibration"
    kept = [load_file(tmp_path / state / str(one.position["calibration"])) for state in ("state", "killed")]
    assert kept[0].keys() == kept[1].keys() and all(kept[0][k].tobytes() == kept[1][k].tobytes() for k in kept[0])
    energies = [
        {record["step"]: (record["energy"], record["loss"]) for record in events(tmp_path, "step", state=state)}
        for state in ("state", "killed")
    ]
    assert energies[0] == energies[1]
    assert {record["step"] for record in events(tmp_path, "refresh", state="killed")} == {FIRST // 4 + 2}


def test_ranks_too_small_for_the_new_data_are_said_once(changing: tuple[Path, Bundle]) -> None:
    """Noise is of full rank: no basis of few columns holds most of it, however new."""
    root, bundle = changing
    budget_bytes = 4 * 4 * 2 * 2 * 2  # a core of [4, 2, 2, 2] and not more
    write(root, None, 1000, 400)
    run(root, bundle, epsilon=None, activation_budget_bytes=budget_bytes)
    assert len(events(root, "refresh")) == 1
    (short,) = events(root, "energy_short")
    assert short["tensors"]["head"]["measured"] < short["tensors"]["head"]["promised"] - 0.2
    assert "too small for this data" in short["message"]
    assert len(events(root, "step")) == (FIRST + 400) // 4


def test_ranks_follow_an_epsilon_that_was_given(changing: tuple[Path, Bundle]) -> None:
    root, bundle = changing
    write(root, None, 1000, SECOND)
    run(root, bundle, epsilon=0.8)
    (refresh,) = events(root, "refresh")
    first, last = events(root, "step")[0], events(root, "step")[-1]
    assert refresh["epsilon"] == first["epsilon"] == last["epsilon"] == 0.8
    assert sum(last["ranks"]["head"].values()) > sum(first["ranks"]["head"].values())
    assert "other ranks" in refresh["reason"]


def test_bases_that_cannot_be_measured_do_not_stop_the_run(
    changing: tuple[Path, Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    root, bundle = changing
    write(root, STRIPES, 1000, SECOND)
    grams = FakeSession.grams

    def overflowing(session: FakeSession, features: tuple[Array, ...]) -> dict[str, dict[str, Array]]:
        made = grams(session, features)
        made["head"]["c"][...] = np.inf
        return made

    monkeypatch.setattr(FakeSession, "grams", overflowing)
    run(root, bundle, drift=DriftConfig(actions=("notice",)))  # else drift asks for new bases as well
    assert not events(root, "refresh")
    failed = events(root, "refresh_failed")
    assert [record["step"] - FIRST // 4 for record in failed] == [2, 22], "not at every step"
    assert "not finite" in failed[0]["message"] and len(events(root, "step")) == (FIRST + SECOND) // 4


# ---- the parts ------------------------------------------------------------------------------------------------------


def calibration(decay: float, samples: int = 64) -> Calibration:
    """Spectra of the fake's modes that fall by the factor ``decay`` from one eigenvalue to the next."""
    spectra = {
        letter: Spectrum((decay ** np.arange(size, dtype=np.float64))[None], np.eye(size, dtype=np.float32)[None])
        for letter, size in (("c", 3), ("h", 4), ("w", 4))
    }
    return Calibration({"head": spectra}, samples, 4)


def test_ranks_that_still_do_are_kept_with_the_new_bases() -> None:
    budgeter = Budgeter(make_manifest(), PlanRequest(4, None, None, 0.9), RUNTIME_BYTES)
    old = budgeter.replan(calibration(0.3))
    newer = calibration(0.2)
    plan = budgeter.refresh(newer)
    assert plan.calibration is newer
    assert (plan.ranks, plan.ledger, plan.predicted_peak_bytes) == (old.ranks, old.ledger, old.predicted_peak_bytes)
    promised = [promises(make_manifest(), which)["head"] for which in (old, plan)]
    assert promised[1] > promised[0], "the same ranks hold more of a steeper spectrum"


def test_an_epsilon_that_no_longer_fits_yields_to_the_budget() -> None:
    manifest = make_manifest()
    free = Budgeter(manifest, PlanRequest(4, None, None, 0.9), RUNTIME_BYTES).replan(calibration(0.2))
    budgeter = Budgeter(manifest, PlanRequest(4, None, free.saved_bytes, 0.9), RUNTIME_BYTES)
    assert budgeter.replan(calibration(0.2)).ranks == free.ranks
    plan = budgeter.refresh(calibration(0.9))
    assert plan.saved_bytes <= free.saved_bytes and plan.epsilon is not None and plan.epsilon < 0.9


def test_a_codec_that_takes_nothing_from_the_data_is_only_logged(tmp_path: Path) -> None:
    manifest = make_manifest()
    (saved,) = manifest.saved
    patch = OptionSpec("patch", "patch", {"size": 2}, True, (), ("core",))
    plan = Budgeter(manifest, PlanRequest(4, None, None, None), RUNTIME_BYTES).plan
    plan = dataclasses.replace(plan, codec="patch", selection={"head": "patch"})
    manifest = dataclasses.replace(manifest, saved=(dataclasses.replace(saved, options=(patch,)),), codec="patch")
    log = runlog.RunLog(tmp_path / "log.jsonl")
    refresher = Refresher(manifest, Journal(log, QuietView()))
    for step in range(200):
        refresher.observe(step, {"head": 0.9 if step < 100 else 0.4}, plan)
        assert not refresher.due
    log.close()
    kinds = [json.loads(line)["event"] for line in (tmp_path / "log.jsonl").read_text("utf-8").splitlines()]
    assert kinds == ["energy_fallen", "energy_accepted"]
