"""What a state directory says of its run, for ``status`` and ``report``. Reads only; takes no lock, changes nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from edgetune.agent import checkpoint as checkpoints
from edgetune.agent.gate.tasks import Tasks
from edgetune.agent.ledger import Ledger
from edgetune.agent.ledger_schema import STATUSES
from edgetune.agent.service.life import Standings, life_of
from edgetune.agent.state import read_identity
from edgetune.engines.certificate import Certificate
from edgetune.errors import StateError
from edgetune.telemetry import runlog

_ROUTINE = ("step", "evaluated", "checkpoint", "timeline", "state")
_OF_STEPS = (
    "step", "epoch", "samples", "loss", "epsilon", "energy", "predicted_peak_bytes", "measured_peak_bytes",
    "budget_bytes", "effective_budget_bytes", "seconds",
)  # fmt: skip
"""What a report reads of a step: a log may hold tens of thousands, and a device has little memory."""
_CONDITION = ("asked_bytes", "effective_budget_bytes", "available_bytes", "available_source", "least_bytes")


def status(path: Path) -> dict[str, Any]:
    """Return where the run in the state directory ``path`` stands, as JSON data.

    Keys: agent (how it stands: see ``Standings.standing``), state, model, bundle, batch, seed, step (of the newest
    intact checkpoint; None: none yet), logged_step (the last step in the log), accuracy_before, accuracy (held out),
    samples (per ledger status), quarantined (the last ten: path and reason), plan, energy (captured, per saved tensor:
    promised and measured), refreshes (of the bases, up to that step), condition (state: running, degraded or paused;
    reason: of the last change; asked_bytes, effective_budget_bytes, available_bytes and its source; least_bytes: what a
    wait was for; None: nothing logged yet), last_event.

    Raises:
        StateError: not a state directory, or damaged.
    """
    identity = read_identity(path)
    position: dict[str, Any] = {}
    step = None
    for number, file in checkpoints.listed(path):
        if checkpoints.verified(file):
            position, step = checkpoints.read_position(file), number
            break
    certificate = Certificate.from_plain(position["certificate"]) if "certificate" in position else None
    counts, quarantined = _samples(path)
    last_event, logged_step, condition = None, None, dict[str, Any]()
    standings = Standings()
    for record in runlog.read(path / "log.jsonl"):
        standings.take(record)
        if "condition" in record:
            figures = {name: record[name] for name in _CONDITION if name in record}
            condition = {**condition, "state": record["condition"], **figures}
            if record["event"] != "step":
                condition["reason"] = record.get("reason", record.get("message"))
        if record["event"] == "step":
            logged_step = record.get("step")
        if record["event"] not in _ROUTINE:
            last_event = record
    return {
        "agent": standings.standing(life_of(path)),
        "state": str(path),
        "model": identity["model"],
        "bundle": identity["bundle"],
        "batch": identity["batch"],
        "seed": identity["seed"],
        "step": step,
        "logged_step": logged_step,
        "accuracy_before": position.get("accuracy_before"),
        "accuracy": position.get("accuracy"),
        "samples": counts,
        "quarantined": quarantined,
        "plan": json.loads(position["plan"]) if "plan" in position else None,
        "energy": {} if certificate is None else certificate.standing(),
        "refreshes": 0 if certificate is None else certificate.refreshes,
        "condition": condition or None,
        "last_event": last_event,
    }


def standing(path: Path) -> dict[str, Any]:
    """Return how the agent of the state directory ``path`` stands (``Standings.standing``), and nothing else: cheap.

    Raises:
        StateError: not a state directory, or damaged.
    """
    read_identity(path)
    standings = Standings()
    for record in runlog.read(path / "log.jsonl"):
        standings.take(record)
    return standings.standing(life_of(path))


def report(path: Path) -> dict[str, Any]:
    """Return what the whole run was like, as JSON data.

    Keys: state, model, steps, samples, epochs, predicted_peak_bytes and measured_peak_bytes (their maxima over the
    steps), budget_bytes (the last one), over_budget_steps (over the effective one, where the log has it), budget_kept
    (None without a budget), loss_first, loss_last, accuracy_before, accuracy, evaluations, epsilon_least, epsilon_last,
    energy_least (captured), refreshes (of the bases: how many were made, mended the energy, fell short, failed),
    seconds (per phase, summed), allocation, codecs (of the last plan: how many tensors each keeps), events (how many of
    each kind), tasks (``Tasks.report``, as of the newest intact checkpoint; None where no sample names its task).

    Raises:
        StateError: not a state directory, or nothing was logged.
    """
    identity = read_identity(path)
    log = path / "log.jsonl"
    steps = runlog.steps(log, _OF_STEPS)
    events: dict[str, int] = {}
    evaluations, seconds = [], dict[str, float]()
    planned: dict[str, Any] = {}
    for record in runlog.read(log):
        events[record["event"]] = events.get(record["event"], 0) + 1
        if "codecs" in record:
            planned = record
        if record["event"] == "evaluated":
            evaluations.append({"step": record["step"], "accuracy": record["accuracy"]})
        if record["event"] != "step":
            _add(seconds, record.get("seconds"))
    if not events:
        raise StateError(f"'{path}' has no run log yet; run the agent on it first")
    for record in steps:
        _add(seconds, record.get("seconds"))
    limited = [record for record in steps if record.get("budget_bytes") is not None]
    over = sum(1 for record in limited if record["measured_peak_bytes"] > _limit(record))
    epsilons = [record["epsilon"] for record in steps if record.get("epsilon") is not None]
    energies = [value for record in steps for value in record["energy"].values() if value is not None]
    return {
        "state": str(path),
        "model": identity["model"],
        "steps": len(steps),
        "samples": sum(record["samples"] for record in steps),
        "epochs": max((record["epoch"] + 1 for record in steps), default=0),
        "predicted_peak_bytes": max((record["predicted_peak_bytes"] for record in steps), default=None),
        "measured_peak_bytes": max((record["measured_peak_bytes"] for record in steps), default=None),
        "budget_bytes": limited[-1]["budget_bytes"] if limited else None,
        "over_budget_steps": over,
        "budget_kept": over == 0 if limited else None,
        "loss_first": steps[0]["loss"] if steps else None,
        "loss_last": steps[-1]["loss"] if steps else None,
        "accuracy_before": evaluations[0]["accuracy"] if evaluations else None,
        "accuracy": evaluations[-1]["accuracy"] if evaluations else None,
        "evaluations": evaluations,
        "epsilon_least": min(epsilons, default=None),
        "epsilon_last": epsilons[-1] if epsilons else None,
        "energy_least": min(energies, default=None),
        "refreshes": {
            "made": events.get("refresh", 0),
            "mended": events.get("energy_mended", 0),
            "short": events.get("energy_short", 0),
            "failed": events.get("refresh_failed", 0),
        },
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "allocation": planned.get("allocation"),
        "codecs": planned.get("codecs"),
        "events": events,
        "tasks": _tasks(path),
    }


def _tasks(path: Path) -> dict[str, Any] | None:
    for _, file in checkpoints.listed(path):
        if checkpoints.verified(file):
            told = checkpoints.read_position(file).get("gate")
            return None if told is None else Tasks.from_plain(told["tasks"]).report()
    return None


def _samples(path: Path) -> tuple[dict[str, int], list[dict[str, Any]]]:
    file = path / "ledger.sqlite"
    if not file.is_file():
        return dict.fromkeys(STATUSES, 0), []
    ledger = Ledger(file, read_only=True)
    try:
        refused = [{"path": row.path, "reason": row.reason} for row in ledger.samples() if row.status == "quarantined"]
        return ledger.counts(), refused[-10:]
    finally:
        ledger.close()


def _limit(step: dict[str, Any]) -> int:
    """Return what a step could take: the budget, or less where there was less."""
    budget_bytes: int = step["budget_bytes"]
    return min(budget_bytes, step.get("effective_budget_bytes") or budget_bytes)


def _add(total: dict[str, float], more: Any) -> None:
    if isinstance(more, dict):
        for name, value in more.items():
            total[name] = total.get(name, 0.0) + value
