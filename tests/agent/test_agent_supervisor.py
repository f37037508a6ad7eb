"""The supervisor, with a worker that does as it is told: exits, dies, takes a checkpoint, dies of a kernel's doing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from edgetune.agent import supervisor
from edgetune.agent.deaths import Deaths, read_deaths
from edgetune.telemetry import runlog
from edgetune.units import MIB

# What the n-th worker does is the n-th word of its argument, the last one for ever.
WORKER = """
import os, pathlib, signal, sys, time
state, root, words = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), sys.argv[3].split(",")
with (state / "starts").open("a") as stream:
    stream.write(f"{os.getpid()}\\n")
turn = len((state / "starts").read_text().splitlines())
for word in words[min(turn, len(words)) - 1].split("+"):
    if word == "checkpoint":
        (state / f"checkpoint-{20 * turn:08d}.{'0' * 64}.safetensors").touch()
    elif word.startswith("plan"):
        with (state / "log.jsonl").open("a") as stream:
            stream.write('{"event":"step","predicted_peak_bytes":%s}\\n{"event":"evaluated"}\\n' % word[4:])
    elif word == "oom":
        (root / "proc/vmstat").write_text(f"nr_free_pages 1\\noom_kill {turn}\\n")
    elif word == "stop":
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(5))
        signal.signal(signal.SIGINT, lambda *_: sys.exit(6))
        (state / "ready").touch()
        time.sleep(60)
    elif word == "start":
        (state / "ready").touch()
        time.sleep(60)
    elif word in ("KILL", "SEGV"):
        os.kill(os.getpid(), getattr(signal, "SIG" + word))
    else:
        sys.exit(int(word))
"""


@pytest.fixture
def state(tmp_path: Path) -> Path:
    (tmp_path / "state").mkdir()
    (tmp_path / "root" / "proc").mkdir(parents=True)
    (tmp_path / "root" / "proc" / "vmstat").write_text("nr_free_pages 1\noom_kill 0\n")
    return tmp_path / "state"


def line(state: Path, words: str, command: list[str] | None = None) -> list[str]:
    """Return the command line of a supervisor that does not wait between two starts."""
    root = state.parent / "root"
    code = f"import runpy, sys; found = runpy.run_path({supervisor.__file__!r}); "
    code += "found['Supervisor'].run.__globals__['FIRST_PAUSE_SECONDS'] = 0.001; sys.exit(found['main'](sys.argv[1:]))"
    worker = [sys.executable, "-I", "-S", "-c", WORKER, str(state), str(root), words] if command is None else command
    return [sys.executable, "-I", "-c", code, "--root", str(root), str(state), "--", *worker]


def supervise(state: Path, words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(line(state, words), capture_output=True, text=True, timeout=60)


def starts(state: Path) -> int:
    return len((state / "starts").read_text().splitlines())


def events(state: Path) -> list[dict[str, Any]]:
    return list(runlog.read(state / "log.jsonl"))


def until(path: Path) -> None:
    limit = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < limit, f"{path} did not appear"
        time.sleep(0.01)


def test_an_exit_code_is_passed_on_and_nothing_is_written(state: Path) -> None:
    done = supervise(state, "7")
    assert done.returncode == 7 and starts(state) == 1 and done.stderr == ""
    assert not (state / "log.jsonl").exists() and not (state / "deaths.json").exists()


def test_a_killed_worker_is_started_again_with_the_same_plan(state: Path) -> None:
    (state / "log.jsonl").write_bytes(b'{"event":"step","step":1}\n{"event":"st')  # a power loss tore the last line
    done = supervise(state, "checkpoint+KILL,SEGV,0")
    assert done.returncode == 0 and starts(state) == 3
    found = [record for record in events(state) if record["event"].startswith("worker")]
    assert [record["event"] for record in found] == ["worker_died", "worker_restarted"] * 2
    assert [record.get("signal") for record in found[::2]] == ["SIGKILL", "SIGSEGV"]
    assert [record["step"] for record in found[::2]] == [20, 20]
    assert [record["deaths_without_checkpoint"] for record in found[::2]] == [0, 1]
    assert not any(record["out_of_memory"] for record in found[::2])
    assert "killed by SIGKILL" in done.stderr and "started again" in done.stderr
    assert not (state / "deaths.json").exists()


def test_a_kernel_without_memory_asks_for_a_lower_plan(state: Path) -> None:
    assert supervise(state, "checkpoint+oom+KILL,checkpoint+KILL,plan600+oom+KILL,0").returncode == 0
    died = [record for record in events(state) if record["event"] == "worker_died"]
    assert [record["out_of_memory"] for record in died] == [True, False, True]
    assert [record["lowerings"] for record in died] == [1, None, 2]
    assert read_deaths(state) == Deaths(2, 40, supervisor.CALM_STEPS, planned_bytes=600)


def test_a_worker_that_says_that_memory_ran_out_is_started_again_with_less(state: Path) -> None:
    done = supervise(state, "11,0")
    assert done.returncode == 0 and starts(state) == 2 and "ran out of memory after" in done.stderr
    (record,) = [record for record in events(state) if record["event"] == "worker_died"]
    assert (record["signal"], record["out_of_memory"], record["lowerings"]) == (None, True, 1)


@pytest.mark.parametrize(("count", "lowered"), [("oom_kill 5", None), ("oom_kill 6", 1)])
def test_the_control_groups_own_count_is_believed_first(state: Path, count: str, lowered: int | None) -> None:
    """Somebody else on the system may be the kernel's victim: only the group's own count says that it was us."""
    group = state.parent / "root/sys/fs/cgroup/system.slice/edgetune.service"
    group.mkdir(parents=True)
    (group / "memory.events").write_text("low 0\nhigh 0\nmax 9\noom 5\noom_kill 5\n")
    (state.parent / "root/proc/self").mkdir()
    (state.parent / "root/proc/self/cgroup").write_text("0::/system.slice/edgetune.service\n")
    one = supervisor.Supervisor(str(state), [], str(state.parent / "root"))
    one._kills = supervisor.oom_kills(one.root)
    (group / "memory.events").write_text(f"low 0\nhigh 0\nmax 9\noom 6\n{count}\n")
    (state.parent / "root/proc/vmstat").write_text("oom_kill 1\n")
    one._died(signal.SIGKILL)
    assert events(state)[-1]["lowerings"] == lowered and (state / "deaths.json").exists() == (lowered is not None)


def test_deaths_without_a_newer_checkpoint_lower_and_then_end(state: Path) -> None:
    done = supervise(state, "checkpoint+KILL,KILL")
    assert done.returncode == supervisor.GAVE_UP and starts(state) == 1 + supervisor.GIVE_UP_AFTER
    died = [record for record in events(state) if record["event"] == "worker_died"]
    assert [record["lowerings"] for record in died] == [None, None, None, 1, None, None, 2, None, None]
    assert events(state)[-1]["event"] == "gave_up" and "What is stored is intact" in done.stderr


@pytest.mark.parametrize(
    ("words", "sent", "code"),
    [
        ("stop", signal.SIGTERM, 5),
        ("stop", signal.SIGHUP, 5),
        ("stop", signal.SIGINT, 6),
        ("start", signal.SIGTERM, 0),  # it has no handler yet
    ],
)
def test_signals_reach_the_worker_and_its_answer_comes_back(
    state: Path, words: str, sent: signal.Signals, code: int
) -> None:
    with subprocess.Popen(line(state, words)) as process:
        until(state / "ready")
        process.send_signal(sent)
        assert process.wait(30) == code
    assert starts(state) == 1


def test_it_stays_small(state: Path) -> None:
    root = state.parent / "root"
    worker = [sys.executable, "-I", "-S", "-c", WORKER, str(state), str(root), "KILL,stop"]
    own = [sys.executable, "-I", supervisor.__file__, str(state), "--", *worker]
    with subprocess.Popen(own, stderr=subprocess.DEVNULL) as process:
        until(state / "ready")
        text = Path(f"/proc/{process.pid}/status").read_text()
        process.send_signal(signal.SIGTERM)
    peak_bytes = int(text.split("VmHWM:")[1].split()[0]) * 1024
    assert peak_bytes < 14 * MIB, f"{peak_bytes / MIB:.1f} MiB"


def test_a_worker_does_not_outlive_its_supervisor(state: Path) -> None:
    code = "import time; from edgetune.agent.worker import stop_with_the_supervisor as stop; stop(); "
    code += f"open({str(state / 'ready')!r}, 'w').close(); time.sleep(60)"
    environment = {**os.environ, "PYTHONPATH": str(Path(supervisor.__file__).parents[2])}
    with subprocess.Popen(line(state, "", [sys.executable, "-c", code]), env=environment) as process:
        until(state / "ready")
        (worker,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        process.kill()
    limit = time.monotonic() + 30
    while Path(f"/proc/{worker}/status").exists() and "zombie" not in Path(f"/proc/{worker}/status").read_text():
        assert time.monotonic() < limit, "the worker lives on"
        time.sleep(0.01)


def test_lowerings_are_given_back_with_the_steps_trained_since(state: Path) -> None:
    deaths = Deaths(lowerings=2, at_step=100, calm_steps=200, planned_bytes=600)
    steps = (0, 100, 299, 300, 499, 500, 9999)
    assert [deaths.in_force(step) for step in steps] == [2, 2, 2, 1, 1, 0, 0]
    # the plan that died had been lowered once already: 720, 600, 500
    assert [deaths.ceiling_bytes(step, 9999) for step in steps] == [500, 500, 500, 600, 600, None, None]
    unknown = Deaths(lowerings=2, at_step=0, calm_steps=200)
    assert [unknown.ceiling_bytes(step, 720) for step in (0, 200, 400)] == [500, 600, None]
    assert Deaths().ceiling_bytes(0, 720) is None
    known = {"lowerings": 2, "at_step": 100, "calm_steps": 200}
    assert all(supervisor.in_force(known, step) == deaths.in_force(step) for step in range(0, 900, 7))
    (state / "deaths.json").write_text("{")
    assert read_deaths(state) == Deaths() and supervisor.in_force({}, 3) == 0
