"""Both kept checkpoints at the start: what is damaged is named and set aside, and nothing is lost by that."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from edgetune.agent import checkpoint
from edgetune.agent.config import AgentConfig
from edgetune.agent.loop import run_agent
from edgetune.agent.view import QuietView
from edgetune.bundle import Array, Bundle
from edgetune.errors import StateError
from edgetune.telemetry import runlog
from tests.agent.fakes import Workshop, make_bundle, make_folder


def run(root: Path, state: Path, **changed: object) -> None:
    fields = {"batch": 4, "once": True, "quiet": True, "epsilon": 0.9, "settle_seconds": 0.1, "checkpoint_every": 3}
    config = AgentConfig(root / "data", state, **{**fields, **changed})  # type: ignore[arg-type]
    run_agent(Bundle.open(root / "bundle"), config, parts=Workshop().parts(), view=QuietView())


def tensors(state: Path) -> dict[str, Array]:
    found = checkpoint.load_newest(state, lambda path: pytest.fail(f"{path} is damaged"))
    assert found is not None
    return dict(found.tensors)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle, data, a run that was stopped at step 6 (checkpoints 3 and 6) and one that went on to the end."""
    root = tmp_path_factory.mktemp("keeper")
    make_bundle(root / "bundle")
    make_folder(root / "data", 12)
    run(root, root / "stopped", max_steps=6)
    run(root, root / "whole")
    return root


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 16
    path.write_bytes(data)


def of_another_version(path: Path) -> None:
    """Put an intact checkpoint of a version to come in the place of ``path``."""
    found = checkpoint.load(path)
    position = {name: value for name, value in found.position.items() if name not in ("schema", "step")}
    tensors = dict(found.tensors)
    path.unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "SCHEMA_VERSION", 99)
        checkpoint.write(path.parent, found.step, tensors, position)


HARMS: dict[str, Callable[[Path], object]] = {
    "torn": lambda path: path.write_bytes(path.read_bytes()[:1000]),
    "truncated": lambda path: path.write_bytes(b""),
    "flipped": flip,
    "of another version": of_another_version,
}


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("harm", HARMS)
def test_one_that_cannot_be_used_is_named_set_aside_and_the_other_used(
    place: Path, tmp_path: Path, harm: str, which: int
) -> None:
    state = tmp_path / "state"
    shutil.copytree(place / "stopped", state)
    step, path = checkpoint.listed(state)[which]
    assert step == (6, 3)[which]
    HARMS[harm](path)
    run(place, state)
    told = [r for r in runlog.read(state / "log.jsonl") if r["event"] in ("damaged", "restored")]
    assert [r["event"] for r in told] == ["damaged", "restored"], "the older one is verified too"
    assert told[0]["file"].startswith(f"checkpoint-{step:08d}") and told[0]["reason"] in told[0]["message"]
    assert ("version 99" in told[0]["reason"]) == (harm == "of another version")
    assert told[1]["step"] == (3, 6)[which]
    assert [p.name for p in state.glob("*.damaged")] == [Path(told[0]["file"]).with_suffix(".damaged").name]
    ends = tensors(state), tensors(place / "whole")
    assert all(ends[0][name].tobytes() == ends[1][name].tobytes() for name in ends[1])


def test_with_none_intact_the_agent_refuses_and_touches_nothing(place: Path, tmp_path: Path) -> None:
    """Set aside, they would be gone for the next start, which would begin anew without a word."""
    state = tmp_path / "state"
    shutil.copytree(place / "stopped", state)
    for _, path in checkpoint.listed(state):
        flip(path)
    before = sorted(p.name for p in state.iterdir())
    for _ in range(2):
        with pytest.raises(StateError, match="none of the 2 checkpoints"):
            run(place, state)
        assert [name for name in before if not (state / name).exists()] == []


def test_lost_checkpoints_are_no_new_beginning(place: Path, tmp_path: Path) -> None:
    state = tmp_path / "state"
    shutil.copytree(place / "whole", state)
    for _, path in checkpoint.listed(state):
        path.unlink()
    for _ in range(2):
        with pytest.raises(StateError, match="no checkpoint, but its ledger says"):
            run(place, state)


def test_a_calibration_whose_content_changed_takes_its_checkpoint_with_it(place: Path, tmp_path: Path) -> None:
    """A flipped bit in the bases would go unseen: safetensors has no checksum."""
    state = tmp_path / "state"
    shutil.copytree(place / "stopped", state)
    (path,) = state.glob("calibration-*.safetensors")
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.raises(StateError, match=path.name):
        run(place, state)


def test_a_checkpoint_of_version_2_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "SCHEMA_VERSION", 2)
    checkpoint.write(tmp_path, 4, {"a": np.arange(3.0)}, {"epoch": 1})
    monkeypatch.undo()
    found = checkpoint.load_newest(tmp_path, lambda path: None)
    assert found is not None and found.step == 4 and dict(found.parts) == {}


def test_arrays_of_the_agent_stay_apart_from_the_session_s(tmp_path: Path) -> None:
    mine, others = {"replay": np.arange(6, dtype=np.uint8)}, {"weight": np.arange(3.0), "step": np.array(4)}
    found = checkpoint.load(checkpoint.write(tmp_path, 4, others, {}, mine))
    assert sorted(found.tensors) == sorted(others) and list(found.parts) == ["replay"]
    np.testing.assert_array_equal(found.parts["replay"], mine["replay"])
    np.testing.assert_array_equal(found.tensors["weight"], others["weight"])


def test_what_a_killed_process_left_unfinished_is_removed(place: Path, tmp_path: Path) -> None:
    state = tmp_path / "state"
    shutil.copytree(place / "stopped", state)
    (state / "checkpoint-00000009.tmp").write_bytes(b"half of it")
    (state / "calibration-00000009.safetensors.tmp").write_bytes(b"half of it")
    run(place, state)
    assert not list(state.glob("*.tmp"))
