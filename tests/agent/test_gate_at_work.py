"""The gate in whole runs with the fake session: what is promoted, refused, rolled back; and crashes in between."""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgetune.agent.config import AgentConfig
from edgetune.agent.gate import manual
from edgetune.agent.gate.config import GateConfig
from edgetune.agent.gate.gatekeeper import Gatekeeper, verdicts_of
from edgetune.agent.gate.history import History
from edgetune.agent.gate.onnxfile import open_model
from edgetune.agent.gate.versions import Versions
from edgetune.agent.images import Decoder
from edgetune.agent.loop import Outcome, run_agent
from edgetune.agent.view import QuietView
from edgetune.bundle import Array, Bundle
from edgetune.errors import GateError, StateError
from edgetune.telemetry import runlog
from tests.agent.fakes import CLASSES, FakeSession, Workshop, make_bundle, make_folder, make_image

GATE = GateConfig(least_heldout=3)


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return make_bundle(tmp_path / "bundle")


def run(tmp_path: Path, bundle: Bundle, shop: Workshop | None = None, state: str = "state", **changed: Any) -> Outcome:
    base: dict[str, Any] = {
        "batch": 4, "once": True, "quiet": True, "epsilon": 0.9, "settle_seconds": 0.1, "checkpoint_every": 2,
        "gate": GATE,
    }  # fmt: skip
    config = AgentConfig(data=tmp_path / "data", state=tmp_path / state, **{**base, **changed})
    return run_agent(bundle, config, parts=(shop or Workshop()).parts(), view=QuietView())


def history(state: Path) -> list[dict[str, Any]]:
    return list(Versions(state).history.read())


def weights_in_use(state: Path) -> Array:
    return open_model(state / "promoted" / "model.onnx").weights["head.weight"].read()


def spoiled(at: int) -> Callable[[FakeSession], None]:
    """From step ``at`` on, the model answers the opposite of what it learned."""

    def on_step(session: FakeSession) -> None:
        if session.step_number == at:
            session.weight = -session.weight

    return on_step


# ---- what a run promotes --------------------------------------------------------------------------------------------
def test_better_candidates_go_into_use(tmp_path: Path, bundle: Bundle) -> None:
    make_folder(tmp_path / "data", 10)
    shop = Workshop()
    outcome = run(tmp_path, bundle, shop)
    state = tmp_path / "state"
    entries = history(state)
    assert [entries[0][name] for name in ("event", "version", "step", "reason", "by")] == [
        "promoted", 1, 0, "the exported model", "agent",
    ]  # fmt: skip
    assert [entry["step"] for entry in entries] == [0, 2, 4, 6]  # every candidate is told, each once
    last = [entry for entry in entries if entry["event"] == "promoted"][-1]
    in_use = Versions(state).version(last["version"])
    assert last["score"] == in_use.score and last["score"]["accuracy"] == outcome.accuracy == 1.0
    assert last["score"]["samples"] == 6 and last["score"]["classes"] == {name: [2, 2] for name in CLASSES}
    assert last["against"]["version"] == in_use.previous
    # The file holds the weights of that step, bit for bit, and says what it is.
    model = open_model(state / "promoted" / "model.onnx")
    said = {key: model.metadata[key] for key in ("version", "step", "score", "bundle", "model")}
    assert said == {
        "version": str(last["version"]), "step": str(last["step"]), "score": "1.000000", "bundle": bundle.digest,
        "model": "fake",
    }  # fmt: skip
    assert json.loads(model.metadata["classes"]) == list(CLASSES)
    assert json.loads(model.metadata["preprocess"]) == {"color": "RGB", "mean": [0.5] * 3, "std": [0.5] * 3}
    if last["step"] == outcome.step:
        assert weights_in_use(state).tobytes() == shop.session.weight.tobytes()
    assert os.path.samefile(state / "promoted" / "model.onnx", state / "promoted" / f"{last['version']}.onnx")


def test_there_is_a_model_before_there_is_a_sample(tmp_path: Path, bundle: Bundle) -> None:
    (tmp_path / "data").mkdir()
    seen: list[Array] = []

    class Watching(QuietView):
        def event(self, message: str) -> None:
            if "is in use" in message:
                seen.append(weights_in_use(tmp_path / "state"))
                make_folder(tmp_path / "data", 2)

    config = AgentConfig(
        data=tmp_path / "data", state=tmp_path / "state", batch=4, quiet=True, max_steps=0, rescan_seconds=0.2,
        settle_seconds=0.1,
    )  # fmt: skip
    run_agent(bundle, config, parts=Workshop().parts(), view=Watching())
    assert seen[0].tobytes() == bundle.initial_parameters()["head.weight"].tobytes()


def test_a_worse_candidate_is_never_in_use(tmp_path: Path, bundle: Bundle) -> None:
    make_folder(tmp_path / "data", 20)
    state = tmp_path / "state"
    run(tmp_path, bundle, max_steps=4)
    before = weights_in_use(state)
    run(tmp_path, bundle, Workshop(on_step=spoiled(6)), max_steps=6)
    last = history(state)[-1]
    assert (last["event"], last["step"]) == ("refused", 6) and "lower by more than gate.tolerance" in last["reason"]
    assert last["score"]["accuracy"] < last["against"]["score"]["accuracy"]
    assert weights_in_use(state).tobytes() == before.tobytes()
    told = [r for r in runlog.read(state / "log.jsonl") if r["event"] == "not_promoted"]
    assert told[-1]["reason"] == last["reason"]


@pytest.mark.parametrize(
    ("changed", "said"),
    [({"least_heldout": 7}, "6 held-out samples are too few"), ({"automatic": False}, "gate.automatic is false")],
)
def test_what_the_settings_do_not_let_through(
    tmp_path: Path, bundle: Bundle, changed: dict[str, Any], said: str
) -> None:
    make_folder(tmp_path / "data", 10)
    run(tmp_path, bundle, gate=GateConfig(**{"least_heldout": 3, **changed}))
    entries = history(tmp_path / "state")
    assert [entry["event"] for entry in entries] == ["promoted", "refused", "refused", "refused"]
    assert all(said in entry["reason"] for entry in entries[1:])


def test_without_held_out_samples_the_exported_model_stays(tmp_path: Path, bundle: Bundle) -> None:
    make_folder(tmp_path / "data", 4)
    run(tmp_path, bundle, holdout=0)
    assert [entry["event"] for entry in history(tmp_path / "state")] == ["promoted"]
    assert weights_in_use(tmp_path / "state").tobytes() == bundle.initial_parameters()["head.weight"].tobytes()


def test_evaluations_may_be_rarer_than_checkpoints(tmp_path: Path, bundle: Bundle) -> None:
    make_folder(tmp_path / "data", 20)
    run(tmp_path, bundle, gate=GateConfig(least_heldout=3, every=5))
    # 12 steps, a checkpoint every 2: the first at or after 5 steps.
    assert [entry["step"] for entry in history(tmp_path / "state")] == [0, 6, 12]


def test_the_gate_changes_nothing_in_what_is_trained(tmp_path: Path, bundle: Bundle) -> None:
    """Its weights are in the session for a while where a held-out sample came after the promotion."""
    make_folder(tmp_path / "data", 10)
    shops = {}
    for state, gate in (("state", GATE), ("none", GateConfig(every=1000, automatic=False))):
        run(tmp_path, bundle, state=state, gate=gate, max_steps=3, hyper={"learning_rate": 0.001})
    for label, name in enumerate(CLASSES):
        for seed in range(100, 110):
            make_image(tmp_path / "data" / name / f"{seed}.png", label, seed)
    for state, gate in (("state", GATE), ("none", GateConfig(every=1000, automatic=False))):
        shops[state] = Workshop()
        run(tmp_path, bundle, shops[state], state=state, gate=gate, hyper={"learning_rate": 0.001})
    a, b = shops["state"].session.state(), shops["none"].session.state()
    assert all(a[name].tobytes() == b[name].tobytes() for name in a)
    # The verdicts that were missing are those that the promoted weights give.
    found = Versions(tmp_path / "state")
    number = found.in_use()
    assert number is not None
    version = found.version(number)
    candidate = found.candidate()
    assert set(version.verdicts) == set(candidate.labels) and len(candidate.labels) == 12
    session = FakeSession(bundle, shops["state"].session.plans[-1])
    session.weight = open_model(found.file(number)).weights["head.weight"].read()
    again = _verdicts(tmp_path, bundle, session)
    assert {content: again[content] for content in version.verdicts} == dict(version.verdicts)


def _verdicts(tmp_path: Path, bundle: Bundle, session: FakeSession) -> dict[str, int]:
    decoder, found = Decoder(bundle.manifest), {}
    for path in (tmp_path / "data").rglob("*.png"):
        data = path.read_bytes()
        logits = session.predict(decoder.decode(data)[None])
        found[hashlib.sha256(data).hexdigest()[:16]] = int(logits.argmax())
    return found


def test_verdicts_of_outputs_that_are_not_finite() -> None:
    outputs = np.array([[0.0, 1, 0], [np.nan, 5, 0], [np.inf, 0, 0], [2, 1, 0]])
    assert verdicts_of(outputs) == [1, -1, -1, 0]


# ---- versions -------------------------------------------------------------------------------------------------------
def promoted_thrice(tmp_path: Path, bundle: Bundle) -> Path:
    """Return a state directory with at least three versions."""
    make_folder(tmp_path / "data", 20)
    run(tmp_path, bundle, gate=GateConfig(least_heldout=3, tolerance=1.0, class_tolerance=1.0), max_steps=8)
    return tmp_path / "state"


def test_so_many_versions_are_kept(tmp_path: Path, bundle: Bundle) -> None:
    state = promoted_thrice(tmp_path, bundle)
    assert Versions(state).numbers() == [3, 4, 5]  # steps 0, 2, 4, 6, 8
    assert sorted(path.name for path in (state / "promoted").glob("*.json")) == [
        "3.json", "4.json", "5.json", "candidate.json",
    ]  # fmt: skip


def test_a_rollback_goes_back_and_holds(tmp_path: Path, bundle: Bundle) -> None:
    state = promoted_thrice(tmp_path, bundle)
    fourth = open_model(state / "promoted" / "4.onnx").weights["head.weight"].read()
    left, taken = manual.rollback(state)
    assert (left.number, taken.number) == (5, 4) and weights_in_use(state).tobytes() == fourth.tobytes()
    assert history(state)[-1]["event"] == "rolled_back" and history(state)[-1]["of"] == 5
    assert manual.listing(state)["held"] == "rolled back from version 5 to 4"
    # The agent learns on, and promotes nothing.
    run(tmp_path, bundle, gate=GateConfig(least_heldout=3, tolerance=1.0, class_tolerance=1.0), max_steps=10)
    assert weights_in_use(state).tobytes() == fourth.tobytes()
    assert "held since a rollback" in history(state)[-1]["reason"] and history(state)[-1]["step"] == 10
    # Somebody promotes: the candidate of step 10 takes the place of version 4, and to it a rollback goes back.
    version = manual.promote(state)
    assert (version.number, version.previous, version.step, version.by) == (6, 4, 10, "user")
    assert manual.listing(state)["held"] is None
    assert Versions(state).numbers() == [3, 4, 6]  # what was rolled back goes, not what was used
    assert manual.rollback(state)[1].number == 4
    assert manual.rollback(state)[1].number == 3
    with pytest.raises(StateError, match="there is no version 2"):
        manual.rollback(state)


def test_the_first_version_has_none_before_it(tmp_path: Path, bundle: Bundle) -> None:
    make_folder(tmp_path / "data", 4)
    run(tmp_path, bundle, holdout=0)
    with pytest.raises(StateError, match="version 1 is the first"):
        manual.rollback(tmp_path / "state")
    with pytest.raises(StateError, match="there is no candidate"):
        manual.promote(tmp_path / "state")


def test_promote_refuses_what_the_gate_refuses(tmp_path: Path, bundle: Bundle) -> None:
    make_folder(tmp_path / "data", 20)
    state = tmp_path / "state"
    shop = Workshop(on_step=spoiled(6))
    run(tmp_path, bundle, shop, max_steps=6)
    before = weights_in_use(state)
    with pytest.raises(GateError, match=r"step 6 is not promoted: .*lower by more than gate.tolerance.*--force"):
        manual.promote(state)
    assert weights_in_use(state).tobytes() == before.tobytes()
    version = manual.promote(state, force=True)
    assert version.forced and version.step == 6
    assert weights_in_use(state).tobytes() == shop.session.weight.tobytes() != before.tobytes()
    assert history(state)[-1]["forced"] is True
    assert manual.promote(state).number == version.number  # it is in use already
    assert open_model(state / "promoted" / "model.onnx").metadata["classes"] == json.dumps(CLASSES)


def test_promote_waits_for_who_is_at_it(tmp_path: Path, bundle: Bundle) -> None:
    state = promoted_thrice(tmp_path, bundle)
    descriptor = os.open(state / "promoted" / "lock", os.O_RDWR)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    done = threading.Thread(target=manual.rollback, args=(state,))
    done.start()
    done.join(0.2)
    assert done.is_alive() and Versions(state).in_use() == 5
    os.close(descriptor)
    done.join(10)
    assert not done.is_alive() and Versions(state).in_use() == 4


def test_a_disk_without_hard_links_will_do(tmp_path: Path, bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*names: object) -> None:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    state = promoted_thrice(tmp_path, bundle)
    manual.rollback(state)
    manual.promote(state, force=True)
    promoted = state / "promoted"
    assert (promoted / "model.onnx").read_bytes() == (promoted / f"{Versions(state).in_use()}.onnx").read_bytes()
    assert not list(promoted.glob("*.tmp")) and not list(promoted.glob(".*"))


def test_a_copied_state_still_knows_what_is_in_use(tmp_path: Path, bundle: Bundle) -> None:
    state = promoted_thrice(tmp_path, bundle)
    shutil.copytree(state, tmp_path / "copy")  # hard links become files of their own
    assert Versions(tmp_path / "copy").in_use() == 5
    assert manual.rollback(tmp_path / "copy")[1].number == 4


@pytest.mark.parametrize("damage", ["flip", "cut", "gone", "record"])
def test_a_damaged_model_is_replaced_by_the_one_before(tmp_path: Path, bundle: Bundle, damage: str) -> None:
    state = promoted_thrice(tmp_path, bundle)
    model = state / "promoted" / "5.onnx"
    content = bytearray(model.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
        model.write_bytes(content)
    elif damage == "cut":
        model.write_bytes(content[:-20])
    elif damage == "gone":
        model.unlink()
    else:
        (state / "promoted" / "5.json").write_text("{")
    run(tmp_path, bundle, gate=GateConfig(automatic=False), max_steps=8)
    assert Versions(state).in_use() == 4
    assert any(record["event"] == "promoted_damaged" for record in runlog.read(state / "log.jsonl"))


def test_a_model_of_another_bundle_is_compared_by_what_is_known_of_it(tmp_path: Path, bundle: Bundle) -> None:
    state = promoted_thrice(tmp_path, bundle)
    found = Versions(state)
    found.note(dataclasses.replace(found.version(5), bundle="another", verdicts={}))
    run(tmp_path, bundle, gate=GateConfig(least_heldout=3), max_steps=10)
    assert "no held-out sample on which both" in history(state)[-1]["reason"]
    assert found.in_use() == 5


# ---- crashes --------------------------------------------------------------------------------------------------------
class Crash(BaseException):
    """Ends the process at this point, as kill -9 would."""


POINTS = [
    (Versions, "set_candidate"), (Versions, "note"), (Versions, "add"), (Versions, "use"), (History, "append"),
    (Versions, "tidy"), (Gatekeeper, "consider"),
]  # fmt: skip


def facts(state: Path) -> tuple[Any, ...]:
    """Return all that a crash must not change."""
    promoted = state / "promoted"
    told = [{key: value for key, value in entry.items() if key != "time"} for entry in history(state)]
    files = {path.name: path.read_bytes() for path in promoted.glob("*.onnx")}
    records = {path.name: path.read_text() for path in promoted.glob("*.json")}
    return told, files, records, {path.name for path in promoted.iterdir()}


# A crash behind the others is one in front of the next.
@pytest.mark.parametrize(
    ("owner", "name", "after"),
    [
        *(pytest.param(*point, False, id=f"before {point[1]}") for point in POINTS),
        *(
            pytest.param(*point, True, id=f"after {point[1]}")
            for point in POINTS
            if point[1] in ("add", "use", "append")
        ),
    ],
)
def test_a_crash_at_any_point_changes_nothing(
    tmp_path: Path, bundle: Bundle, monkeypatch: pytest.MonkeyPatch, owner: type, name: str, after: bool
) -> None:
    make_folder(tmp_path / "data", 5)
    learning: dict[str, Any] = {"hyper": {"learning_rate": 0.01}, "checkpoint_every": 1}
    run(tmp_path, bundle, state="undisturbed", **learning)
    expected = facts(tmp_path / "undisturbed")
    real = getattr(owner, name)
    for call in range(1, 40):
        state = f"state{call}"
        calls = 0

        def crashing(*arguments: Any, call: int = call, **named: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == call and not after:
                raise Crash
            result = real(*arguments, **named)
            if calls == call:
                raise Crash
            return result

        monkeypatch.setattr(owner, name, crashing)
        try:
            run(tmp_path, bundle, state=state, **learning)
        except Crash:
            monkeypatch.setattr(owner, name, real)
            run(tmp_path, bundle, state=state, **learning)
        else:
            assert call > 1
            break
        assert facts(tmp_path / state) == expected, call
    else:
        pytest.fail("it never ended")
