"""When training yields: the rules as numbers, the readers on trees of boards and on real processes, and the loop."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from edgetune.agent import checkpoint, loop
from edgetune.agent.config import AgentConfig
from edgetune.agent.service import service
from edgetune.agent.service.config import ServiceConfig
from edgetune.agent.service.hours import Hours
from edgetune.agent.service.readings import Reader, Readings
from edgetune.agent.service.yielding import Verdict, Yielding, blind
from edgetune.agent.view import QuietView
from edgetune.bundle import Bundle
from edgetune.errors import UsageError
from edgetune.telemetry import runlog
from edgetune.telemetry.battery import Battery, read_battery
from edgetune.telemetry.processes import running
from edgetune.telemetry.thermal import hottest_celsius, read_zones
from tests.agent.fakes import FakeSession, Workshop, make_bundle, make_folder
from tests.telemetry.board_trees import BOARDS, unpack


# ---- the rules ------------------------------------------------------------------------------------------------------
def judged(config: ServiceConfig, values: list[Readings], every_s: float = 1.0) -> list[Verdict]:
    yielding = Yielding(config)
    return [yielding.look(value, every_s * number) for number, value in enumerate(values)]


def test_nothing_is_asked_for_so_nothing_yields() -> None:
    burning = Readings(celsius=140.0, battery=Battery(1.0, False), mode=(0, "15W"))
    assert judged(ServiceConfig(), [burning]) == [Verdict()]


def test_heat_pauses_and_slows_with_a_margin_on_the_way_back() -> None:
    heat = [60.0, 70.0, 70.1, None, 67.1, 67.0, 80.0, 80.5, 75.5, 75.0, 68.0, 66.9]
    found = judged(ServiceConfig(slow_above_c=70.0, pause_above_c=80.0), [Readings(celsius=value) for value in heat])
    slow = [bool(verdict.slow) for verdict in found]
    pause = [bool(verdict.pause) for verdict in found]
    assert slow == [False, False, True, True, True, False, True, True, True, True, True, False]
    assert pause == [False] * 7 + [True, True, False, False, False]
    assert found[7].pause == found[8].pause == "the board is hotter than 80 °C"


def test_a_weak_battery_pauses_until_it_is_fuller_or_charged() -> None:
    levels = [Battery(20, False), Battery(19, False), Battery(24, False), Battery(25, False), Battery(19.9, False),
              Battery(10, True), Battery(10, False), None]  # fmt: skip
    found = judged(ServiceConfig(battery_file="/b"), [Readings(battery=level) for level in levels])
    assert [bool(verdict.pause) for verdict in found] == [False, True, True, False, True, False, True, True]
    assert found[1].pause == "the battery holds less than 20 %" and "tells no charge" in found[-1].pause


def test_a_process_that_comes_and_goes_counts_as_there() -> None:
    seen = ["serve", None, None, None, None, None, None, "serve"]
    found = judged(ServiceConfig(yield_to=("serve",)), [Readings(process=name) for name in seen])
    assert [bool(verdict.pause) for verdict in found] == [True] * 5 + [False, False, True]


def test_power_modes_by_name_or_number_and_all_reasons_together() -> None:
    config = ServiceConfig(power_modes=("15W", "2"), hours="08:00-09:00")
    modes = [(0, "MAXN"), (1, "15W"), (2, None), (3, None), None]
    found = judged(config, [Readings(mode=mode, hour=8) for mode in modes])
    assert [verdict.pause for verdict in found] == [
        "the power mode is MAXN, not 15W or 2", "", "", "the power mode is 3, not 15W or 2", "",
    ]  # fmt: skip
    (both,) = judged(config, [Readings(mode=(0, "MAXN"), hour=9)])
    assert both.pause == "outside of the hours 08:00-09:00; the power mode is MAXN, not 15W or 2"
    assert blind(config, Readings()) == ["this machine has no nvpmodel: service.power_modes has no effect"]
    assert len(blind(ServiceConfig(slow_above_c=60.0), Readings())) == 1
    assert blind(config, Readings(mode=(0, None))) == blind(ServiceConfig(), Readings()) == []


@pytest.mark.parametrize(
    "text", ["22:00-06:00", " 9:05 - 17:30 ", "00:00-24:00x", "06:00-06:00", "25:00-01:00", "1:60-2:00", ""]
)
def test_hours_as_a_set_of_minutes(text: str) -> None:
    known = {"22:00-06:00": set(range(1320, 1440)) | set(range(360)), " 9:05 - 17:30 ": set(range(545, 1050))}
    if text not in known:
        with pytest.raises(UsageError, match="22:00-06:00"):
            Hours.parse(text)
        return
    window = Hours.parse(text)
    assert {minute for minute in range(1440) if window.contains(*divmod(minute, 60))} == known[text]
    assert Hours.parse("20:00-24:00").contains(23, 59) and not Hours.parse("20:00-24:00").contains(0, 0)


# ---- the readers ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("board", BOARDS)
def test_a_board_tells_heat_power_and_mode(board: str, tmp_path: Path) -> None:
    root = unpack(board, tmp_path)
    now = Reader(ServiceConfig(power_modes=("x",)), root).read()
    celsius = [zone.celsius for zone in read_zones(root) if zone.celsius is not None]
    assert now.celsius == max(celsius) == hottest_celsius(root)
    if board == "orin-jetpack6":
        assert now.watts == pytest.approx(5.016 * 1.55, rel=1e-3) and now.mode == (2, "MAXN_SUPER")


def test_readings_are_a_second_old_at_most(tmp_path: Path) -> None:
    zone = tmp_path / "sys/class/thermal/thermal_zone0"
    zone.mkdir(parents=True)
    (zone / "type").write_text("tj\n")
    (zone / "temp").write_text("41000\n")
    now = [0.0]
    reader = Reader(ServiceConfig(), tmp_path, lambda: now[0], lambda: time.gmtime(3600 * 5 + 60 * 7))
    assert reader.read() == Readings(celsius=41.0, hour=5, minute=7)
    (zone / "temp").write_text("50500\n")
    now[0] = 0.9
    assert reader.read().celsius == 41.0
    now[0] = 1.0
    assert reader.read().celsius == 50.5


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"capacity": "57\n"}, Battery(57.0, False)),
        ({"capacity": "57", "status": "Charging\n"}, Battery(57.0, True)),
        ({"capacity": "57", "status": "Discharging"}, Battery(57.0, False)),
        ({"capacity": "99.5 %"}, Battery(99.5, False)),
        ({"capacity": "101"}, None),
        ({"capacity": "full"}, None),
        ({"capacity": "-3"}, None),
        ({}, None),
    ],
)
def test_a_battery_file_or_folder(tmp_path: Path, files: dict[str, str], expected: Battery | None) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    assert read_battery(tmp_path) == expected == read_battery(tmp_path / "capacity")


def test_processes_are_found_by_what_they_are_called(tmp_path: Path) -> None:
    program = tmp_path / "a-model-server-with-a-name"  # longer than the kernel's 15 characters
    shutil.copy("/bin/sleep", program)
    script = tmp_path / "serve.py"
    script.write_text("import time\ntime.sleep(60)\n")
    started = [subprocess.Popen([str(program), "60"]), subprocess.Popen([sys.executable, str(script)])]
    try:
        for name in (program.name, program.name[:15], "serve.py"):
            deadline = time.monotonic() + 10
            while running([name]) is None and time.monotonic() < deadline:
                time.sleep(0.02)
            assert running(["no-such-program-runs", name]) == name
        assert running([]) is None and running(["no-such-program-runs"]) is None
        assert running(["a-model-server-with-another-name"]) == "a-model-server-with-another-name"  # comm cannot tell
        os.kill(started[0].pid, signal.SIGKILL)
        time.sleep(0.1)
        assert running([program.name]) is None  # a zombie until somebody waits for it
    finally:
        for process in started:
            process.kill()
            process.wait()
    assert running(["serve.py"], tmp_path) is None


# ---- the loop -------------------------------------------------------------------------------------------------------
class Weather(Reader):
    """A reader that says what the test puts into ``now``, and remembers nothing."""

    now = Readings()

    def read(self) -> Readings:
        return Weather.now


@pytest.fixture
def weather(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Weather]]:
    monkeypatch.setattr(service, "Reader", Weather)
    Weather.now = Readings()
    yield Weather
    Weather.now = Readings()


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return make_bundle(tmp_path / "bundle")


def config(tmp_path: Path, **changed: Any) -> AgentConfig:
    base: dict[str, Any] = {
        "data": tmp_path / "data", "state": tmp_path / "state", "batch": 4, "once": True, "quiet": True, "holdout": 0,
        "epsilon": 0.9, "settle_seconds": 0.1, "rescan_seconds": 0.3, "checkpoint_every": 5, "pause_seconds": 0.01,
        "cache_bytes": 20_000, "epochs": 2,
    }  # fmt: skip
    return AgentConfig(**{**base, **changed})


def events(state: Path, *kinds: str) -> list[dict[str, Any]]:
    return [record for record in runlog.read(state / "log.jsonl") if record["event"] in kinds]


def tensors(state: Path) -> dict[str, bytes]:
    found = checkpoint.load_newest(state, lambda path: None)
    assert found is not None
    return {name: value.tobytes() for name, value in found.tensors.items()}


def test_a_pause_stores_gives_back_and_changes_nothing(tmp_path: Path, bundle: Bundle, weather: type[Weather]) -> None:
    make_folder(tmp_path / "data", 10)
    settings = config(tmp_path, service=ServiceConfig(pause_above_c=80.0))
    stored: list[int] = []

    class Cooling(FakeSession):
        """The board gets hot in step 3 and in step 9, and cools down while nothing is loaded."""

        def step_features(self, features: Any, y: Any) -> float:
            found = super().step_features(features, y)
            weather.now = Readings(celsius=90.0 if self.step_number in (3, 9) and not rehearsing() else 50.0)
            return found

        def __del__(self) -> None:
            newest = checkpoint.load_newest(tmp_path / "state", lambda path: None)
            stored.append(-1 if newest is None else newest.step)
            weather.now = Readings(celsius=50.0)

    def rehearsing() -> bool:
        return not events(tmp_path / "state", "rehearsed")

    parts = replace(Workshop().parts(), session_factory=Cooling)
    outcome = loop.run_agent(bundle, settings, parts=parts, view=QuietView())
    assert outcome.step == 16 and stored[:2] == [3, 9]
    paused = events(tmp_path / "state", "yielded")
    assert [record["celsius"] for record in paused] == [90.0, 90.0]
    assert len(events(tmp_path / "state", "yield_ended")) == 2
    said = [(record["state"], record["reason"]) for record in events(tmp_path / "state", "state")]
    assert said.count(("paused", "the board is hotter than 80 °C")) == 2
    steps = events(tmp_path / "state", "step")
    assert [record["step"] for record in steps] == list(range(1, 17)) and steps[0]["celsius"] == 50.0
    undisturbed = tmp_path / "undisturbed"
    weather.now = Readings()
    loop.run_agent(bundle, replace(settings, state=undisturbed), parts=Workshop().parts(), view=QuietView())
    assert tensors(undisturbed) == tensors(tmp_path / "state")


def test_what_the_disk_refused_stays_in_memory_during_a_pause(
    tmp_path: Path, bundle: Bundle, weather: type[Weather], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_folder(tmp_path / "data", 10)
    real = checkpoint.write
    refused: list[int] = []

    def refuse(directory: Path, step: int, *args: Any) -> Path:
        if step == 3 and not refused:
            refused.append(step)
            weather.now = Readings(celsius=50.0)
            raise OSError(28, "No space left on device")
        return real(directory, step, *args)

    from edgetune.errors import StorageError

    def write(*args: Any) -> Path:
        try:
            return refuse(*args)
        except OSError as error:
            raise StorageError(str(error)) from error

    monkeypatch.setattr(checkpoint, "write", write)

    def on_step(session: FakeSession) -> None:
        if session.step_number == 3 and events(tmp_path / "state", "rehearsed"):
            weather.now = Readings(celsius=90.0)

    shop = Workshop(on_step=on_step)
    settings = config(tmp_path, service=ServiceConfig(pause_above_c=80.0))
    outcome = loop.run_agent(bundle, settings, parts=shop.parts(), view=QuietView())
    assert refused == [3] and outcome.step == 16 and len(shop.sessions) == 1


def test_heat_slows_and_says_so(tmp_path: Path, bundle: Bundle, weather: type[Weather]) -> None:
    make_folder(tmp_path / "data", 10)
    weather.now = Readings(celsius=75.0, watts=10.0)

    def on_step(session: FakeSession) -> None:
        time.sleep(0.05)

    settings = config(tmp_path, epochs=1, service=ServiceConfig(slow_above_c=70.0))
    loop.run_agent(bundle, settings, parts=Workshop(on_step=on_step).parts(), view=QuietView())
    steps = events(tmp_path / "state", "step")
    gaps = [later["time"] - earlier["time"] for earlier, later in pairwise(steps[1:])]
    assert min(gaps) >= 0.1
    said = [record for record in events(tmp_path / "state", "state") if record["state"] == "degraded"]
    assert said[0]["reason"] == "resting after every step: the board is hotter than 70 °C"
    for record in steps:
        assert (record["celsius"], record["watts"]) == (75.0, 10.0)
        assert record["joules"] == pytest.approx(10.0 * sum(record["seconds"].values()), abs=1e-5)
    assert all("celsius" in record for record in events(tmp_path / "state", "calibrated", "rehearsed"))


def test_nothing_begins_while_something_has_precedence(tmp_path: Path, bundle: Bundle, weather: type[Weather]) -> None:
    make_folder(tmp_path / "data", 4)
    weather.now = Readings(process="serve")
    asked: list[float] = []

    def measured(*args: Any) -> int:
        asked.append(time.monotonic())
        return 1_000_000

    parts = replace(Workshop().parts(), runtime_bytes=measured)
    agent = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(0.6)"])  # a clock of its own
    began = time.monotonic()

    class Until(Weather):
        def read(self) -> Readings:
            return Readings(process="serve" if agent.poll() is None else None)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(service, "Reader", Until)
        patch.setattr("edgetune.agent.service.yielding.LINGER_SECONDS", 0.05)
        settings = config(tmp_path, epochs=1, service=ServiceConfig(yield_to=("serve",)))
        loop.run_agent(bundle, settings, parts=parts, view=QuietView())
    assert asked[0] - began > 0.5
    said = [(record["state"], record["reason"]) for record in events(tmp_path / "state", "state")]
    assert said[:3] == [("calibrating", "starting"), ("paused", "'serve' runs"), ("calibrating", "starting")]


def test_a_stop_during_a_pause_is_heeded_at_once(tmp_path: Path, bundle: Bundle) -> None:
    make_folder(tmp_path / "data", 10)
    (tmp_path / "battery").write_text("50")
    told = {"bundle": str(bundle.path), "step_seconds": 0.05, "config": {
        "data": str(tmp_path / "data"), "state": str(tmp_path / "state"), "batch": 4, "quiet": True, "holdout": 0,
        "epochs": 50, "service": {"battery_file": str(tmp_path / "battery")},
    }}  # fmt: skip
    process = subprocess.Popen([sys.executable, str(Path(__file__).with_name("run_fake.py")), json.dumps(told)])
    try:
        _wait(lambda: len(events(tmp_path / "state", "step")) > 3)
        (tmp_path / "battery").write_text("5")
        _wait(lambda: bool(events(tmp_path / "state", "yielded")))
        process.terminate()
        assert process.wait(10) == 0
    finally:
        process.kill()
        process.wait()
    last = events(tmp_path / "state", "step")[-1]["step"]
    found = checkpoint.load_newest(tmp_path / "state", lambda path: None)
    assert found is not None and found.step == last
    assert events(tmp_path / "state", "yielded")[0]["battery_percent"] == 5.0


def _wait(done: Any, seconds: float = 20.0) -> None:
    until = time.monotonic() + seconds
    while not done() and time.monotonic() < until:
        time.sleep(0.02)
    assert done()
