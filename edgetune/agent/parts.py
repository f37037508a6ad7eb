"""What the agent is put together from, as protocols, and the real parts. Tests put smaller ones in their place.

Knows the shapes of the engines' and telemetry's interfaces; imports them only when a real agent starts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from edgetune.bundle import Array, Bundle
from edgetune.planning.plan import Plan
from edgetune.telemetry.available import UNKNOWN_BYTES, Available


class Report(Protocol):
    """What a session says of its last step."""

    @property
    def loss(self) -> float: ...
    @property
    def correct(self) -> int: ...
    @property
    def samples(self) -> int: ...
    @property
    def energy(self) -> Mapping[str, float]: ...
    @property
    def gradient_norm(self) -> float: ...
    @property
    def seconds(self) -> Mapping[str, float]: ...


class Session(Protocol):
    """The part of ``engines.TrainingSession`` that the agent uses. Batches come first in every shape.

    ``whole`` is False while, and after, a step was broken off in the midst of its update: the state is then neither
    that before it nor that after it, until another one is loaded.
    """

    phase_ended: Callable[[str], None] | None
    hyper: dict[str, float]

    @property
    def report(self) -> Any: ...
    @property
    def whole(self) -> bool: ...
    def features(self, x: Array) -> tuple[Array, ...]: ...
    def add(self, features: Sequence[Array], y: Array) -> None: ...
    def finish(self) -> float: ...
    def discard(self) -> None: ...
    def gradients_from(self, features: Sequence[Array], y: Array) -> tuple[float, dict[str, Array]]: ...
    def predict(self, x: Array) -> Array: ...
    def grams(self, features: tuple[Array, ...]) -> dict[str, dict[str, Array]]: ...
    def set_plan(self, plan: Plan) -> None: ...
    def state(self) -> dict[str, Array]: ...
    def load_state(self, state: Mapping[str, Array]) -> None: ...


class SessionFactory(Protocol):
    """Makes a session; the signature of ``engines.TrainingSession``."""

    def __call__(
        self,
        bundle: Bundle,
        plan: Plan,
        *,
        engine: str,
        hyper: Mapping[str, float] | None,
        seed: int,
    ) -> Session: ...


class Meter(Protocol):
    """The part of ``telemetry.process.PeakMeter`` that the agent uses. ``resettable`` is not True where
    ``peak_bytes`` means the peak since the process began."""

    @property
    def resettable(self) -> bool | None: ...
    def reset(self) -> None: ...
    def peak_bytes(self) -> int: ...


@dataclass(frozen=True)
class Parts:
    """The replaceable parts of an agent.

    ``runtime_bytes(bundle, engine)`` is what the process takes before anything of a plan is allocated;
    ``reserve_bytes(engine)`` is left free of a budget; ``engine(asked)`` tells which engine runs, and why,
    ``packs(asked)`` whether it can keep the tensors of a run in one block;
    ``available()`` is what this process may still take, ``resident_bytes()`` what it has.
    """

    session_factory: SessionFactory
    meter: Meter
    runtime_bytes: Callable[[Bundle, str], int]
    reserve_bytes: Callable[[str], int] = lambda engine: 0
    engine: Callable[[str], str] = str
    packs: Callable[[str], bool] = lambda engine: False
    available: Callable[[], Available] = lambda: Available(UNKNOWN_BYTES, "nothing tells")
    resident_bytes: Callable[[], int] = int


def real_parts(*, metrics: bool = False) -> Parts:
    """Return the parts of a real run. Imports the engines.

    Args:
        metrics: the run has an endpoint for monitors, whose memory counts to the runtime's.

    Raises:
        EngineError: no runtime is installed.
    """
    from edgetune.agent.baseline import runtime_bytes
    from edgetune.engines.choice import choose_engine, describe_engine, packs
    from edgetune.engines.session import TrainingSession
    from edgetune.planning.plan import reserve_bytes_of
    from edgetune.telemetry.available import available_bytes

    meter, taken_bytes = real_meter()

    def reserve_bytes(engine: str) -> int:
        return reserve_bytes_of(choose_engine(engine).name)

    figure = partial(runtime_bytes, metrics=metrics)
    return Parts(
        TrainingSession, meter, figure, reserve_bytes, describe_engine, packs, available_bytes, taken_bytes
    )  # fmt: skip


def real_meter() -> tuple[Meter, Callable[[], int]]:
    """Return what measures the peak of this process, and what tells how much it takes now: with what it holds of the
    GPU's memory, where there is a GPU."""
    from edgetune.engines.choice import has_nvidia_device
    from edgetune.telemetry.device import BoardMeter, DeviceMemory
    from edgetune.telemetry.process import PeakMeter, resident_bytes

    if not has_nvidia_device():
        return PeakMeter(), resident_bytes
    meter = BoardMeter(PeakMeter(), DeviceMemory(), resident_bytes)
    return meter, meter.now_bytes
