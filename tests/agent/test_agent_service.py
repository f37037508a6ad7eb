"""What service managers, monitors and people are told of an agent: over real sockets, by real processes."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer
from prometheus_client.parser import text_string_to_metric_families
from typer.testing import CliRunner

from edgetune.agent import loop
from edgetune.agent.config import AgentConfig
from edgetune.agent.service import exporter, service
from edgetune.agent.service.config import ServiceConfig
from edgetune.agent.service.life import Life, Standings, life_of, require_alive
from edgetune.agent.service.notify import Notifier
from edgetune.agent.service.numbers import Numbers
from edgetune.agent.view import QuietView
from edgetune.bundle import Bundle
from edgetune.commands.status import status
from edgetune.errors import BudgetError, NotAliveError
from edgetune.telemetry import runlog
from edgetune.version import __version__
from tests.agent.fakes import RUNTIME_BYTES, FakeSession, Workshop, make_bundle, make_folder


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return make_bundle(tmp_path / "bundle")


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[socket.socket]:
    """The socket on which a service manager listens."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(str(tmp_path / "notify"))
        listening.setblocking(False)
        yield listening


def heard(listening: socket.socket) -> list[str]:
    found = []
    while True:
        try:
            found.append(listening.recv(4096).decode())
        except BlockingIOError:
            return found


def config(tmp_path: Path, **changed: Any) -> AgentConfig:
    base: dict[str, Any] = {
        "data": tmp_path / "data", "state": tmp_path / "state", "batch": 4, "once": True, "quiet": True,
        "epsilon": 0.9, "settle_seconds": 0.1, "rescan_seconds": 0.3, "checkpoint_every": 5,
    }  # fmt: skip
    return AgentConfig(**{**base, **changed})


def states(tmp_path: Path) -> list[tuple[str, str]]:
    log = runlog.read(tmp_path / "state" / "log.jsonl")
    return [(record["state"], record["reason"]) for record in log if record["event"] == "state"]


# ---- the service manager --------------------------------------------------------------------------------------------
class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_notifier_pings_when_it_is_due_and_says_a_status_once(tmp_path: Path, manager: socket.socket) -> None:
    clock = Clock()
    told = Notifier({"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "40000000"}, clock)
    told.alive()
    told.alive()
    assert heard(manager) == ["WATCHDOG=1\nEXTEND_TIMEOUT_USEC=120000000"]
    told.ready()
    clock.now += 9.9
    told.alive()
    assert heard(manager) == ["READY=1"]
    clock.now += 0.2  # a quarter of the 40 s
    told.alive()
    told.status("one\nline", now=True)
    told.status("one\nline", now=True)
    told.status("too soon")
    clock.now += 5
    told.status("later")
    assert heard(manager) == ["WATCHDOG=1", "STATUS=one line", "STATUS=later"]
    told.stopping()
    clock.now += 10
    told.alive()
    assert heard(manager) == ["STOPPING=1", "WATCHDOG=1\nEXTEND_TIMEOUT_USEC=120000000"]
    told.close()
    told.status("closed", now=True)
    assert heard(manager) == []


def test_an_abstract_address_a_full_queue_and_nobody_there() -> None:
    address = f"edgetune-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind("\0" + address)
        told = Notifier({"NOTIFY_SOCKET": "@" + address})
        for number in range(1000):  # more than a queue holds: this must not wait
            told.status(str(number), now=True)
        assert listening.recv(100) == b"STATUS=0"
    told.ready()  # nobody listens any more
    Notifier({}).ready()


@pytest.mark.parametrize(
    ("environment", "seconds"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "x"}, None),
        ({"WATCHDOG_USEC": "2000000"}, 2.0),
        ({"WATCHDOG_USEC": "2000000", "WATCHDOG_PID": str(os.getpid())}, 2.0),
        ({"WATCHDOG_USEC": "2000000", "WATCHDOG_PID": "4711"}, None),
        ({"WATCHDOG_USEC": "2000000", "WATCHDOG_PID": "4711", "EDGETUNE_SUPERVISOR": "4711"}, 2.0),
    ],
)
def test_who_is_watched(environment: dict[str, str], seconds: float | None) -> None:
    assert Notifier(environment).watchdog_s == seconds


def test_an_agent_gives_signs_of_life_in_every_state(
    tmp_path: Path, bundle: Bundle, manager: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a watchdog of 4 µs every sign that the agent may give is due."""
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    monkeypatch.setenv("WATCHDOG_USEC", "4")
    monkeypatch.setattr(service, "LOOK_SECONDS", 0.0)
    everything: list[str] = []
    pings: dict[str, list[int]] = {}

    def listen(phase: str) -> None:
        found = heard(manager)
        everything.extend(found)
        pings.setdefault(phase, []).append(sum("WATCHDOG=1" in text for text in found))

    class Told(FakeSession):
        def grams(self, features: Any) -> Any:
            listen("calibrating")
            return super().grams(features)

        def predict(self, x: Any) -> Any:
            listen("evaluating")
            return super().predict(x)

        def step_features(self, features: Any, y: Any) -> Any:
            listen("training")
            return super().step_features(features, y)

    shop = Workshop()
    parts = shop.parts()
    (tmp_path / "data").mkdir()
    done: list[loop.Outcome] = []

    def work() -> None:
        asked = config(tmp_path, once=False, max_steps=6, holdout=3, rescan_seconds=0.2)
        done.append(loop.run_agent(bundle, asked, parts=made, view=QuietView()))

    made = replace(parts, session_factory=Told)
    thread = threading.Thread(target=work)
    thread.start()
    deadline = time.monotonic() + 20
    while ("waiting", "for samples") not in states(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.02)
    listen("beginning")
    time.sleep(0.5)
    listen("waiting")
    make_folder(tmp_path / "data", 12)
    thread.join(25)
    listen("end")
    assert done and done[0].step == 6
    for phase in ("waiting", "calibrating", "evaluating", "training"):
        assert min(pings[phase]) > 0, f"{phase}: a sign before every piece of work, whatever happened in between"
    assert len(pings["evaluating"]) > 6
    others = [text for text in everything if not text.startswith("WATCHDOG")]
    assert others.index("READY=1") < others.index("STATUS=waiting: for samples") < others.index("STOPPING=1")
    assert any(text.startswith("STATUS=training (") and "step" in text for text in others)
    assert all("EXTEND" in text for text in everything[: everything.index("READY=1")] if "WATCHDOG" in text)
    assert states(tmp_path)[:4] == [
        ("calibrating", "starting"), ("waiting", "for samples"), ("calibrating", "on the first batches"),
        ("training", ""),
    ]  # fmt: skip


# ---- monitors -------------------------------------------------------------------------------------------------------
def scrape(port: int) -> dict[str, float]:
    """Return every sample that the endpoint shows, by its name and the value of its label."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    found = {}
    for family in text_string_to_metric_families(text):
        assert family.documentation or family.name == "edgetune", family.name
        for sample in family.samples:
            found["/".join([sample.name, *sample.labels.values()])] = sample.value
    return found


def test_the_endpoint_answers_with_what_the_log_says(tmp_path: Path, bundle: Bundle) -> None:
    make_folder(tmp_path / "data", 10)
    shown: list[dict[str, float]] = []

    def on_step(session: FakeSession) -> None:
        if session.step_number == 8 and not shown:
            shown.append(scrape(endpoints[0].port))

    endpoints = []
    real = exporter.Exporter

    class Kept(real):  # type: ignore[misc, valid-type]
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            endpoints.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(service, "Exporter", Kept)
        settings = config(tmp_path, epochs=2, service=ServiceConfig(metrics_port=0))
        loop.run_agent(bundle, settings, parts=Workshop(on_step=on_step).parts(), view=QuietView())
    (found,) = shown
    steps = [r for r in runlog.read(tmp_path / "state" / "log.jsonl") if r["event"] == "step"]
    seventh = steps[6]
    assert found["edgetune_step"] == 7 == found["edgetune_steps_total"] and found["edgetune_loss"] == seventh["loss"]
    assert found["edgetune_peak_bytes"] == seventh["measured_peak_bytes"]
    assert found["edgetune_state/training"] == 1 and found["edgetune_state/paused"] == 0
    assert found["edgetune_samples_trained_total"] == sum(record["samples"] for record in steps[:7])
    assert found["edgetune_samples/heldout"] == 6 and found["edgetune_checkpoint_step"] == 5
    assert found["edgetune_events_total/step"] == 7 and found["edgetune_samples_arrived_total"] == 30
    assert found["edgetune_heldout_accuracy"] <= 1 and found["edgetune_captured_energy"] == seventh["energy"]["head"]
    train = sum(record["seconds"]["train"] for record in steps[:7])
    assert found["edgetune_phase_seconds_total/train"] == pytest.approx(train)
    assert found[f"edgetune_info/{bundle.digest}/fake/{__version__}"] == 1
    with pytest.raises(OSError, match="refused"):  # it ended with the agent
        scrape(endpoints[0].port)


def test_numbers_that_are_not_known_any_more_are_not_shown() -> None:
    numbers = Numbers()
    numbers.take({"event": "step", "loss": 0.5, "celsius": 41.5, "seconds": {"train": 1.0}, "energy": {}})
    numbers.take({"event": "step", "loss": None, "celsius": 42.0, "seconds": {"train": 2.0}, "energy": {"a": None}})
    found = {family.name: family.values for family in numbers.families()}
    assert "loss" not in found and found["temperature_celsius"] == {"": 42.0} and found["steps"] == {"": 2.0}
    assert found["phase_seconds"] == {"train": 3.0}


def test_a_port_that_is_taken_is_said_once_and_tried_again(
    tmp_path: Path, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_folder(tmp_path / "data", 10)
    monkeypatch.setattr(service, "LOOK_SECONDS", 0.0)
    monkeypatch.setattr(service, "RETRY_SECONDS", 0.0)
    found: list[dict[str, float]] = []
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]

        def on_step(session: FakeSession) -> None:
            if session.step_number == 2 and taken.fileno() >= 0:
                taken.close()
            if session.step_number == 4:
                found.append(scrape(port))

        settings = config(tmp_path, service=ServiceConfig(metrics_port=port))
        outcome = loop.run_agent(bundle, settings, parts=Workshop(on_step=on_step).parts(), view=QuietView())
    assert outcome.step == 6 and found and found[-1]["edgetune_step"] == 3
    (refused,) = [r for r in runlog.read(tmp_path / "state" / "log.jsonl") if r["event"] == "metrics_refused"]
    assert str(port) in refused["reason"]


# ---- people ---------------------------------------------------------------------------------------------------------
def command(*words: object) -> Any:
    app = typer.Typer()
    app.command()(status)
    return CliRunner().invoke(app, [str(word) for word in words])


def test_status_tells_who_is_alive(tmp_path: Path, bundle: Bundle) -> None:
    make_folder(tmp_path / "data", 4)
    told = {"bundle": str(bundle.path), "config": {
        "data": str(tmp_path / "data"), "state": str(tmp_path / "state"), "batch": 4, "quiet": True, "holdout": 0,
    }}  # fmt: skip
    script = Path(__file__).with_name("run_fake.py")
    process = subprocess.Popen([sys.executable, str(script), json.dumps(told)])
    try:
        deadline = time.monotonic() + 30
        while ("waiting", "for samples") not in states(tmp_path) and time.monotonic() < deadline:
            time.sleep(0.05)
        done = command(tmp_path / "state", "--check")
        assert done.exit_code == 0 and done.stdout.startswith("waiting: for samples, since 20")
        found = json.loads(command(tmp_path / "state", "--json").stdout)["agent"]
        assert found["alive"] and found["state"] == "waiting" and 0 <= found["silent_s"] < 30
        assert "waiting: for samples" in command(tmp_path / "state").stdout
        os.utime(tmp_path / "state" / "lock", (1e9, 1e9))
        done = command(tmp_path / "state", "--check")
        assert isinstance(done.exception, NotAliveError) and "no sign of life" in str(done.exception)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    done = command(tmp_path / "state", "--check")
    assert isinstance(done.exception, NotAliveError) and "killed" in str(done.exception)
    assert NotAliveError.exit_code == 13
    loop.run_agent(bundle, config(tmp_path, holdout=0), parts=Workshop().parts(), view=QuietView())
    found = json.loads(command(tmp_path / "state", "--json").stdout)["agent"]
    assert (found["alive"], found["state"], found["reason"]) == (False, "stopped", "every sample is trained")


def test_an_agent_that_failed_says_why(tmp_path: Path, bundle: Bundle) -> None:
    make_folder(tmp_path / "data", 4)
    settings = config(tmp_path, epsilon=None, budget_bytes=RUNTIME_BYTES)
    with pytest.raises(BudgetError):
        loop.run_agent(bundle, settings, parts=Workshop().parts(), view=QuietView())
    assert states(tmp_path)[-1][0] == "failed" and "too small" in states(tmp_path)[-1][1]
    done = command(tmp_path / "state", "--check")
    assert isinstance(done.exception, NotAliveError) and "failed" in str(done.exception)


def test_what_the_supervisor_wrote_last_is_told() -> None:
    def standing(*records: dict[str, Any], alive: bool = False) -> dict[str, Any]:
        standings = Standings()
        for number, record in enumerate(records):
            standings.take({"time": float(number), **record})
        return standings.standing(Life(alive, 1.0))

    training = {"event": "state", "state": "training", "reason": ""}
    died = {"event": "worker_died", "message": "the worker was killed by SIGKILL after 3 s"}
    assert standing()["state"] is None
    assert standing(training, alive=True) == {
        "alive": True, "silent_s": 1.0, "state": "training", "reason": "", "since": 0.0,
    }  # fmt: skip
    assert standing(training, died)["reason"].startswith("the worker was killed by SIGKILL")
    gave_up = standing(training, died, {"event": "gave_up", "message": "giving up"})
    assert (gave_up["state"], gave_up["reason"], gave_up["since"]) == ("failed", "giving up", 2.0)
    # A failed run that was started again is not failed any more.
    again = standing({"event": "state", "state": "failed", "reason": "x"}, {"event": "start"})
    assert again["state"] == "stopped"
    with pytest.raises(NotAliveError, match="giving up"):
        require_alive(Path("s"), gave_up)
    with pytest.raises(NotAliveError, match="has failed"):
        require_alive(Path("s"), {**gave_up, "alive": True})


def test_who_looks_does_not_keep_an_agent_out(tmp_path: Path, bundle: Bundle) -> None:
    make_folder(tmp_path / "data", 4)
    (tmp_path / "state").mkdir()
    assert life_of(tmp_path / "state") == Life(False, None)
    stop = threading.Event()

    def look() -> None:
        while not stop.is_set():
            life_of(tmp_path / "state")

    thread = threading.Thread(target=look)
    thread.start()
    try:
        for number in range(3):
            run = config(tmp_path, holdout=0, max_steps=number + 1)
            assert loop.run_agent(bundle, run, parts=Workshop().parts(), view=QuietView()).step == number + 1
    finally:
        stop.set()
        thread.join()


def test_the_settings_are_checked_together() -> None:
    assert ServiceConfig().check() == []
    good = ServiceConfig(60.0, 70.0, ("15W", "2"), "/x", 30.0, ("serve",), "22:00-06:00", 9464)
    assert good.check() == []
    wrong = ServiceConfig(70.0, 60.0, (), None, 120.0, ("/usr/bin/serve",), "22-6", 70000, "").check()
    words = (
        "slow_above_c is 70.0; it must be below",
        "least_battery",
        "/usr/bin/serve",
        "'22-6'",
        "70000",
        "metrics_host",
    )
    assert len(wrong) == len(words) and all(any(word in text for text in wrong) for word in words)
    assert "between 0 and 150" in ServiceConfig(slow_above_c=float("nan")).check()[0]
