"""One real training step with its resident bytes over time, in a process that does nothing else.

    python -m edgetune.agent.sampling BUNDLE PLAN.json CALIBRATION DATA ENGINE

prints one JSON line. ``CALIBRATION`` may be an empty text. Knows sessions, the feeder and the process's meter.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import mmap
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from edgetune.agent.baseline import load_agent
from edgetune.agent.budget import release_memory
from edgetune.agent.feeder import Feeder
from edgetune.agent.images import Decoder
from edgetune.agent.ledger import Sample
from edgetune.agent.samples import entries
from edgetune.agent.sources import Found, Source, open_source
from edgetune.agent.timeline import PhasePeaks
from edgetune.bundle import Bundle
from edgetune.engines.session import TrainingSession
from edgetune.errors import DataError, EngineError
from edgetune.planning.plan import Plan
from edgetune.planning.spectra import Calibration
from edgetune.telemetry.process import PROC, PeakMeter

PERIOD_SECONDS = 0.001


@dataclass(frozen=True)
class SampledStep:
    """One step. ``seconds`` and ``resident_bytes`` are the samples; ``ends`` maps a phase to when it ended (in the same
    seconds, from the beginning of the step), ``peak_bytes`` to its high-water mark, which no sample can miss."""

    seconds: tuple[float, ...]
    resident_bytes: tuple[int, ...]
    ends: dict[str, float]
    peak_bytes: dict[str, int]

    def stretch(self, phase: str) -> list[tuple[float, int]]:
        """Return the samples of ``phase``: how far it had come (0 to 1), and the resident bytes."""
        order = list(self.ends)
        begin = self.ends[order[order.index(phase) - 1]] if order.index(phase) else 0.0
        length = max(self.ends[phase] - begin, 1e-9)
        pairs = zip(self.seconds, self.resident_bytes, strict=True)
        return [((at - begin) / length, size) for at, size in pairs if begin <= at <= self.ends[phase]]


class Sampler:
    """Reads what is resident every millisecond, in a thread of its own, between entering and leaving the block."""

    def __init__(self, root: Path = PROC) -> None:
        self._file = root / "self" / "statm"
        self._stop = threading.Event()
        self.samples: list[tuple[float, int]] = []

    def __enter__(self) -> Sampler:
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _read(self) -> None:
        descriptor = os.open(self._file, os.O_RDONLY)
        try:
            while not self._stop.is_set():
                pages = int(os.pread(descriptor, 128, 0).split()[1])  # proc(5): total, then resident, in pages
                self.samples.append((time.perf_counter(), pages * mmap.PAGESIZE))
                self._stop.wait(PERIOD_SECONDS)
        finally:
            os.close(descriptor)


def sample_step(bundle: Bundle, plan: Plan, data: str | Path, engine: str = "auto") -> SampledStep:
    """Return the second of two steps on samples of ``data``, measured in a process of its own.

    Raises:
        DataError: there are fewer readable samples than a batch.
        EngineError: the process failed; its own words are in the message.
    """
    with tempfile.TemporaryDirectory(prefix="edgetune-") as scratch:
        told, known = Path(scratch) / "plan.json", ""
        told.write_text(plan.to_json(), "utf-8")
        if plan.calibration is not None:
            known = str(Path(scratch) / "calibration.safetensors")
            plan.calibration.save(known)
        here = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH"))))
        command = [sys.executable, "-m", "edgetune.agent.sampling", str(bundle.path.resolve()), str(told), known]
        command += [str(data), engine]
        environment = {**os.environ, "PYTHONPATH": path}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode != 0:
        words = (done.stderr.strip().splitlines() or ["no word"])[-1]
        kind = DataError if "DataError" in words else EngineError
        raise kind(f"the step could not be measured: {words}")
    found = json.loads(done.stdout.splitlines()[-1])
    return SampledStep(tuple(found["seconds"]), tuple(found["resident_bytes"]), found["ends"], found["peak_bytes"])


def _step(bundle: Bundle, plan: Plan, data: str | Path, engine: str) -> SampledStep:
    """Do what :func:`sample_step` says, here."""
    manifest = bundle.manifest
    load_agent(manifest)
    decoder = Decoder(manifest)
    with closing(open_source(data, manifest.classes, decoder.suffixes)) as source:
        feeder, found = Feeder(source, decoder), entries(source, plan.batch)
        session = TrainingSession(bundle, plan, engine=engine)
        meter, ends = PeakMeter(), dict[str, float]()
        peaks = PhasePeaks(meter)

        def ended(phase: str) -> None:
            peaks.ended(phase)
            ends[phase] = time.perf_counter()

        session.phase_ended = ended
        for last in (False, True):
            rows = _rows(source, found)
            release_memory()
            peaks.begin()
            with Sampler() as sampler:
                begin = time.perf_counter()
                fed = feeder.feed(lambda rows=rows: next(rows, None), plan.batch, session, plan.micro_batch)  # type: ignore[misc]
                if len(fed.samples) < plan.batch:
                    raise DataError(f"'{data}' holds {len(fed.samples)} readable samples; a batch has {plan.batch}")
                ended("trunk")
                features, fed.features = list(fed.features), ()
                session.step_features(features, fed.labels)
            if last:
                break
        return SampledStep(
            tuple(at - begin for at, _ in sampler.samples),
            tuple(size for _, size in sampler.samples),
            {phase: at - begin for phase, at in sorted(ends.items(), key=lambda one: one[1])},
            dict(peaks.measured_bytes),
        )


def _rows(source: Source, found: Iterable[Found]) -> Iterator[Sample]:
    """Yield the samples of ``source`` as a ledger would hold them."""
    for entry in found:
        try:
            digest = hashlib.sha256(source.read(entry.path)).hexdigest()
        except DataError:
            continue  # the agent says what is wrong with a file; here another one serves as well
        yield Sample(0, entry.path, digest, 0, 0, entry.label, "new", None, 0, None)


if __name__ == "__main__":
    bundle_path, plan_path, known_path, data_path, which = sys.argv[1:]
    asked = Plan.from_json(Path(plan_path).read_text("utf-8"))
    if known_path:
        asked = dataclasses.replace(asked, calibration=Calibration.load(known_path))
    step = _step(Bundle.open(bundle_path, verify=False), asked, data_path, which)
    sys.stdout.write(json.dumps(dataclasses.asdict(step)) + "\n")
