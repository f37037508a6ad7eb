"""Keeps the agent's worker alive: starts it, passes signals on, starts it again when it was killed, and says why.

Run as a script by ``edgetune run`` (``python -I supervisor.py STATE -- COMMAND...``), with the standard library alone:
not even this package is imported, so that next to nothing is lost when the kernel needs memory and looks for a victim.

- A worker that *exits* has said what it had to say: its code is passed on. One exception: :data:`OUT_OF_MEMORY`.
- A worker that *dies by a signal* is started again, at once if a newer checkpoint exists than when it was started, else
  after a pause that doubles. What happened is appended to the run log (``worker_died``, ``worker_restarted``).
- If it ran out of memory (it said so by that code; or the kernel killed it, and its control group's count of such kills
  rose, or the system's where no group counts), or it died :data:`LOWER_AFTER` times in a row without newer checkpoint,
  ``deaths.json`` asks the next worker for a lower plan (``agent/deaths.py`` reads it). Any other death changes nothing:
  the same plan again, so that the finished run equals an undisturbed one bit for bit.
- After :data:`GIVE_UP_AFTER` deaths in a row without a newer checkpoint it gives up with exit code :data:`GAVE_UP`.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time

TYPE_CHECKING = False  # importing typing for its own constant would cost memory
if TYPE_CHECKING:
    from typing import Any

LOWER_AFTER = 3
GIVE_UP_AFTER = 8
OUT_OF_MEMORY = 11
"""The exit code of ``errors.MemoryExhaustedError``: there was not even memory to answer the lack of it."""
GAVE_UP = 12
CALM_STEPS = 200
"""Steps that a lower plan must train before one lowering is taken back (written into deaths.json)."""
TAIL_BYTES = 1 << 18
FIRST_PAUSE_SECONDS = 0.5
LONGEST_PAUSE_SECONDS = 60.0
WATCHED = (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_FROM_KERNEL = 0x80  # siginfo's si_code SI_KERNEL: a terminal sent it, to every process in the foreground


class Supervisor:
    """Supervises ``command`` for the state directory ``state``. ``root``: of /proc and /sys, for tests."""

    def __init__(self, state: str, command: list[str], root: str = "/") -> None:
        self.state, self.command, self.root = state, command, root
        self.pid = 0
        self.stopping = False
        self.fruitless = 0
        self._step = -1
        self._kills: int | None = None
        self._started = 0.0

    def run(self) -> int:
        """Supervise until the worker exits by itself, a stop is asked for, or nothing helps; return the exit code."""
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # ignored, it would take the children's wait statuses with it
        signal.pthread_sigmask(signal.SIG_BLOCK, WATCHED)
        self._start()
        while True:
            status = self._watch()
            number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
            if number == 0 and (self.stopping or os.WEXITSTATUS(status) != OUT_OF_MEMORY):
                return os.WEXITSTATUS(status)
            if self.stopping:  # one that had not got to its handlers yet dies of the signal itself: it has stopped
                return 0 if number in (signal.SIGTERM, signal.SIGINT) else 128 + number
            pause_seconds = self._died(number)
            if pause_seconds is None:
                return GAVE_UP
            if not self._sleep(pause_seconds):
                return 0  # asked to stop while no worker runs: all that was trained is stored
            self._start()
            self._log("worker_restarted", f"the worker was started again after {pause_seconds:g} s", pid=self.pid)

    # ---- the worker -----------------------------------------------------------------------------------------------
    def _start(self) -> None:
        self._step, self._kills, self._started = newest_step(self.state), oom_kills(self.root), time.monotonic()
        os.environ["EDGETUNE_SUPERVISOR"] = str(os.getpid())
        # The mask of blocked signals would be inherited.
        self.pid = os.posix_spawn(self.command[0], self.command, os.environ, setsigmask=())

    def _watch(self) -> int:
        """Pass signals on until the worker is gone; return its wait status."""
        while True:
            told = signal.sigwaitinfo(WATCHED)
            if told.si_signo != signal.SIGCHLD:
                self._pass_on(told)
                continue
            while True:  # as process 1 of a container, others' orphans are ours as well
                try:
                    pid, status = os.waitpid(-1, os.WNOHANG)
                except ChildProcessError:
                    break
                if pid == 0:
                    break
                if pid == self.pid and (os.WIFEXITED(status) or os.WIFSIGNALED(status)):
                    self.pid = 0
                    return status

    def _pass_on(self, told: Any) -> None:
        self.stopping = True
        if told.si_code == _FROM_KERNEL:
            return  # the worker has it too; a second SIGINT would interrupt what the first asked to finish
        os.kill(self.pid, signal.SIGTERM if told.si_signo == signal.SIGHUP else told.si_signo)

    def _sleep(self, seconds: float) -> bool:
        """Return whether nobody asked to stop meanwhile."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            told = signal.sigtimedwait(WATCHED, left)
            if told is not None and told.si_signo != signal.SIGCHLD:
                return False
        return True

    # ---- its death ------------------------------------------------------------------------------------------------
    def _died(self, number: int) -> float | None:
        """Record a death by signal ``number`` (0: :data:`OUT_OF_MEMORY`); return the pause before the next start.

        None: give up.
        """
        seconds = time.monotonic() - self._started
        step, kills = newest_step(self.state), oom_kills(self.root)
        self.fruitless = 0 if step > self._step else self.fruitless + 1
        killed_for_memory = number == signal.SIGKILL and None not in (kills, self._kills) and kills != self._kills
        out_of_memory = number == 0 or killed_for_memory
        stuck = self.fruitless > 0 and self.fruitless % LOWER_AFTER == 0
        name = signal.Signals(number).name if number in signal.valid_signals() else f"signal {number}"
        how = f"was killed by {name}" if number else "ran out of memory"
        message = f"the worker {how} after {seconds:.1f} s, with step {max(step, 0)} stored"
        if number == 0:
            message += ": the next worker plans with less"
        elif out_of_memory:
            message += "; the kernel was out of memory: the next worker plans with less"
        elif stuck:
            message += f"; {self.fruitless} deaths without a newer checkpoint: the next worker plans with less"
        if os.isatty(1):
            os.write(1, b"\x1b[?25h\n")  # a killed worker could not give the cursor back
        lowerings = None
        if out_of_memory or stuck:
            lowerings = self._lower(max(step, 0), "out_of_memory" if out_of_memory else "no_progress")
        self._log(
            "worker_died", message, signal=name if number else None, step=max(step, 0), seconds=round(seconds, 3),
            lowerings=lowerings, out_of_memory=out_of_memory, deaths_without_checkpoint=self.fruitless,
        )  # fmt: skip
        if self.fruitless >= GIVE_UP_AFTER:
            message = (
                f"the worker died {self.fruitless} times in a row without a newer checkpoint, and last {how};"
                " giving up. What is stored is intact. 'edgetune doctor' says what this machine lacks; a smaller"
                " --budget or --checkpoint-every may help; --no-supervise shows the worker's own words"
            )
            self._log("gave_up", message)
            return None
        if self.fruitless == 0:
            return 0.0
        return min(LONGEST_PAUSE_SECONDS, FIRST_PAUSE_SECONDS * (1 << self.fruitless - 1))

    def _lower(self, step: int, why: str) -> int:
        """Ask the next worker for a lower plan; return how many lowerings are in force from now on."""
        path = os.path.join(self.state, "deaths.json")
        known: dict[str, Any] = {}
        try:
            with open(path, encoding="utf-8") as stream:
                known = json.load(stream)
        except FileNotFoundError:
            pass
        except (OSError, ValueError) as error:
            say(f"{path} cannot be read ({error}); it is written anew")
        lowerings = in_force(known, step) + 1
        found = {
            "schema": 1,
            "lowerings": lowerings,
            "at_step": step,
            "calm_steps": CALM_STEPS,
            "planned_bytes": planned_bytes(self.state),
            "why": why,
            "time": round(time.time(), 3),
        }
        try:
            write_atomic(path, json.dumps(found, indent=1).encode())
        except OSError as error:
            say(f"{path} cannot be written ({error}); the next worker plans as before")
        return lowerings

    def _log(self, event: str, message: str, **fields: Any) -> None:
        say(message)
        record = {"event": event, "time": round(time.time(), 3), "message": message, **fields}
        try:
            append(os.path.join(self.state, "log.jsonl"), json.dumps(record, separators=(",", ":")).encode())
        except OSError as error:
            say(f"the run log cannot be written ({error})")


def in_force(known: dict[str, Any], step: int) -> int:
    """Return how many lowerings of a deaths.json still hold at ``step``: one less per ``calm_steps`` trained since."""
    try:
        calm = max(0, step - int(known["at_step"])) // max(1, int(known["calm_steps"]))
        return max(0, int(known["lowerings"]) - calm)
    except (KeyError, TypeError, ValueError):
        return 0


def newest_step(state: str) -> int:
    """Return the step of the newest checkpoint in the state directory, -1 without any."""
    try:
        names = os.listdir(state)
    except OSError:
        return -1
    parts = [name.split(".") for name in names if name.startswith("checkpoint-")]
    steps = [part[0].removeprefix("checkpoint-") for part in parts if len(part) == 3 and part[2] == "safetensors"]
    return max((int(step) for step in steps if step.isdigit()), default=-1)


def planned_bytes(state: str) -> int | None:
    """Return the predicted peak of the last plan in the run log, the one of the worker that died; None: no plan yet."""
    for name in ("log.jsonl", *full_logs(state)[::-1]):
        for line in reversed(tail(os.path.join(state, name))):
            if b'"predicted_peak_bytes":' not in line:
                continue
            try:
                return int(json.loads(line)["predicted_peak_bytes"])
            except (ValueError, KeyError, TypeError):  # torn, or cut by where we began to read
                continue
    return None


def full_logs(state: str) -> list[str]:
    """Return the names of the run log's full files, the oldest first; see ``telemetry/runlog.py``."""
    try:
        ends = [name.removeprefix("log.jsonl.") for name in os.listdir(state) if name.startswith("log.jsonl.")]
    except OSError:
        return []
    return [f"log.jsonl.{number}" for number in sorted(int(end) for end in ends if end.isdigit())]


def tail(path: str) -> list[bytes]:
    """Return the last lines of a file."""
    try:
        with open(path, "rb") as stream:
            stream.seek(max(0, os.fstat(stream.fileno()).st_size - TAIL_BYTES))
            return stream.read().splitlines()
    except OSError:
        return []


def oom_kills(root: str) -> int | None:
    """Return how many processes the kernel has killed for want of memory: in this process's control group (of version
    2, or 1), or in the whole system where no group counts them. None: this kernel does not tell."""
    places = []
    for line in _lines(os.path.join(root, "proc/self/cgroup")):
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        inside = path.lstrip("/")
        if number == "0" and not controllers:
            places += [os.path.join("sys/fs/cgroup", inside, "memory.events"), "sys/fs/cgroup/memory.events"]
        elif "memory" in controllers.split(","):
            mount = "sys/fs/cgroup/memory"
            places += [os.path.join(mount, inside, "memory.oom_control"), os.path.join(mount, "memory.oom_control")]
    # A group's own count first: in a container the path may lie outside of what is mounted, whose root is then ours.
    for place in [*places, "proc/vmstat"]:
        for line in _lines(os.path.join(root, place)):
            name, _, count = line.partition(" ")
            if name == "oom_kill" and count.strip().isdigit():
                return int(count)
    return None


def _lines(path: str) -> list[str]:
    try:
        with open(path, encoding="ascii", errors="replace") as stream:
            return stream.read().splitlines()
    except OSError:
        return []


def append(path: str, line: bytes) -> None:
    """Append a line to the run log, synced, after a line that a power loss tore; see ``telemetry/runlog.py``."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
    try:
        size_bytes = os.fstat(descriptor).st_size
        torn = size_bytes > 0 and os.pread(descriptor, 1, size_bytes - 1) != b"\n"
        os.write(descriptor, (b"\n" if torn else b"") + line + b"\n")
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: str, data: bytes) -> None:
    """Replace ``path`` by ``data``: a reader, or a power loss, sees the old content or the new."""
    temporary = path + ".tmp"
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
    try:
        os.write(descriptor, data)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    os.replace(temporary, path)
    folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def say(message: str) -> None:
    """Tell whoever reads the standard error output, if anybody still does."""
    try:
        os.write(2, f"edgetune: {message}\n".encode())
    except OSError:
        pass


def main(arguments: list[str]) -> int:
    """``[--root ROOT] STATE -- COMMAND...``: supervise the command; return the exit code."""
    split = arguments.index("--")
    own, command = arguments[:split], arguments[split + 1 :]
    root = own[1] if own[0] == "--root" else "/"
    return Supervisor(own[-1], command, root).run()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
