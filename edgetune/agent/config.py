"""What a run is asked to do: one frozen value, checked as a whole. Knows nothing of how it is done."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from edgetune.agent.drift.config import DriftConfig
from edgetune.agent.gate.config import GateConfig
from edgetune.agent.replay.config import ReplayConfig
from edgetune.agent.service.config import ServiceConfig
from edgetune.agent.sources.config import IntakeConfig
from edgetune.errors import UsageError, choices
from edgetune.planning.plan import ALLOCATIONS, MEMORY

DEFAULT_BATCH = 32
DEFAULT_SEED = 0


@dataclass(frozen=True)
class AgentConfig:
    """The settings of one run.

    Attributes:
        data: the folder with the samples, or another source.
        state: the agent's own directory.
        budget_bytes: what the whole process may take; none = no limit.
        activation_budget_bytes: bytes saved for the backward pass; none = no limit.
        reserve_bytes: what is left to others of the memory that there is; none = 1/16 of it, at most 256 MiB.
        engine: auto, onnxruntime or torch.
        memory: lean = the least; fast = a run's tensors in one block, more memory and less time; auto = where it fits.
        batch: samples per step; none = as the state directory was made with, else 32.
        epsilon: energy kept per mode, in (0, 1]; none = the largest that fits the budget.
        allocation: uniform = one codec and one ε; per-layer = a codec and an ε for each saved tensor.
        codec: label of the one that keeps all in a uniform allocation; none = the first of the bundle's menu.
        micro_batch: samples per run of the trunk; none = the planner chooses.
        tail_micro_batch: samples per run of the train graph; none = the planner chooses.
        trained: how many of the exported layers are trained; none = the planner chooses.
        cache_bytes: memory in which features are kept from pass to pass; none = the planner chooses.
        max_steps: train until this step number of the state directory (resumed steps count); none = no limit.
        epochs: passes over every sample.
        once: take what is there, train and stop; otherwise watch the source.
        holdout: every k-th new sample per class is held out; 0 = none.
        checkpoint_every: steps between two checkpoints.
        seed: of order, augmentation and choice; none = as the state directory was made with, else 0.
        quiet: print nothing but errors.
        calibration_batches: batches whose Gram matrices are summed before training begins.
        settle_seconds: a file that cannot be decoded is retried until it has not changed for this long.
        rescan_seconds: the source is listed again at least this often, whether or not a change was reported.
        pause_seconds: how often a run that waits looks again.
        remember: rows of finished samples that are gone from the source are forgotten beyond so many.
        hyper: hyper-parameters of the optimizer that differ from the bundle's.
        intake: order, augmentation, and streams.
        replay: samples of before in the batches of today.
        gate: which model is promoted.
        drift: what happens when the world changes, or does not.
        service: when training yields to others; metrics.
    """

    data: str | Path
    state: Path
    budget_bytes: int | None = None
    activation_budget_bytes: int | None = None
    reserve_bytes: int | None = None
    engine: str = "auto"
    memory: str = "auto"
    batch: int | None = None
    epsilon: float | None = None
    allocation: str = "uniform"
    codec: str | None = None
    micro_batch: int | None = None
    tail_micro_batch: int | None = None
    trained: int | None = None
    cache_bytes: int | None = None
    max_steps: int | None = None
    epochs: int = 1
    once: bool = False
    holdout: int = 5
    checkpoint_every: int = 20
    seed: int | None = None
    quiet: bool = False
    calibration_batches: int = 2
    settle_seconds: float = 1.0
    rescan_seconds: float = 5.0
    pause_seconds: float = 0.5
    remember: int = 200_000
    hyper: Mapping[str, float] = field(default_factory=dict)
    intake: IntakeConfig = field(default_factory=IntakeConfig)
    replay: ReplayConfig = field(default_factory=ReplayConfig)
    gate: GateConfig = field(default_factory=GateConfig)
    drift: DriftConfig = field(default_factory=DriftConfig)
    service: ServiceConfig = field(default_factory=ServiceConfig)

    def check(self, known_scalars: Mapping[str, float]) -> None:
        """Refuse impossible settings, all of them in one message.

        Args:
            known_scalars: the hyper-parameters that the bundle's optimizer has.

        Raises:
            UsageError: at least one setting is wrong.
        """
        wrong = []
        for name, value, least in (
            ("--batch", self.batch, 1),
            ("--micro-batch", self.micro_batch, 1),
            ("--tail-micro-batch", self.tail_micro_batch, 1),
            ("--trained", self.trained, 0),
            ("--epochs", self.epochs, 1),
            ("--max-steps", self.max_steps, 0),
            ("--holdout", self.holdout, 0),
            ("--checkpoint-every", self.checkpoint_every, 1),
            ("--seed", self.seed, 0),
            ("--budget", self.budget_bytes, 1),
            ("--activation-budget", self.activation_budget_bytes, 1),
            ("--cache", self.cache_bytes, 0),
            ("--reserve", self.reserve_bytes, 0),
            ("calibration_batches", self.calibration_batches, 1),
            ("remember", self.remember, 0),
        ):
            if value is not None and value < least:
                wrong.append(f"{name} is {value}; it must be at least {least}")
        if self.holdout == 1:
            wrong.append("--holdout 1 would hold out every sample; give 0 (none) or at least 2")
        if self.epsilon is not None and not 0 < self.epsilon <= 1:
            wrong.append(f"--epsilon is {self.epsilon}; it must lie in (0, 1]")
        if self.allocation not in ALLOCATIONS:
            wrong.append(f"--allocation is {self.allocation}; choose one of: {choices(ALLOCATIONS)}")
        if self.memory not in MEMORY:
            wrong.append(f"--memory is {self.memory}; choose one of: {choices(MEMORY)}")
        if self.allocation == "per-layer" and (self.epsilon is not None or self.codec is not None):
            wrong.append("--allocation per-layer chooses codecs and ε by itself; leave out --codec and --epsilon")
        for name, given in self.hyper.items():
            if not math.isfinite(given) or given < 0:
                wrong.append(f"--{name.replace('_', '-')} is {given}; it must be a finite number, not negative")
        unknown = set(self.hyper) - set(known_scalars)
        if unknown:
            wrong.append(
                f"this bundle's optimizer has no {choices('--' + name.replace('_', '-') for name in unknown)}; "
                f"it has: {choices('--' + name.replace('_', '-') for name in known_scalars)}"
            )
        for section in (self.intake, self.replay, self.gate, self.drift, self.service):
            wrong += section.check()
        if wrong:
            raise UsageError("; ".join(wrong))
