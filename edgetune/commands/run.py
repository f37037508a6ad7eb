"""``edgetune run``: check the options, then become the supervisor of the agent (or the agent itself)."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from edgetune.commands._knobs import Cache, Memory, MicroBatch, TailMicroBatch, Trained

if TYPE_CHECKING:
    from edgetune.agent.config import AgentConfig


def run(
    bundle: Annotated[
        Path | None, typer.Argument(help="The bundle that 'edgetune export' wrote (or 'bundle' in the configuration).")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option("--data", help="The samples: a folder, .npz, .tar, module:function, camera:0 (docs/sources.md)."),
    ] = None,
    state: Annotated[Path | None, typer.Option("--state", help="The agent's own directory; made, or resumed.")] = None,
    config: Annotated[
        Path | None, typer.Option("--config", help="A TOML file with settings; 'edgetune config' prints one.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Any setting of that file, such as replay.ratio=0.3."),
    ] = None,
    budget: Annotated[
        str | None, typer.Option("--budget", help="What the whole process may take, such as 512MiB. Chooses ε.")
    ] = None,
    activation_budget: Annotated[
        str | None, typer.Option("--activation-budget", help="What may be saved for the backward pass, such as 8MiB.")
    ] = None,
    reserve: Annotated[
        str | None,
        typer.Option(
            "--reserve", help="What to leave to others of the memory there is (default: 1/16, at most 256MiB)."
        ),
    ] = None,
    engine: Annotated[str | None, typer.Option("--engine", help="auto (default), onnxruntime or torch.")] = None,
    memory: Memory = None,
    batch: Annotated[
        int | None, typer.Option("--batch", help="Samples per step (default: as the state was made with, else 32).")
    ] = None,
    epsilon: Annotated[
        float | None, typer.Option("--epsilon", help="Energy kept per mode, in (0, 1] (default: chosen by the budget).")
    ] = None,
    allocation: Annotated[
        str | None,
        typer.Option(
            "--allocation", help="uniform (default): one codec, one ε. per-layer: those with the least error."
        ),
    ] = None,
    codec: Annotated[
        str | None, typer.Option("--codec", help="The codec of the bundle's menu that keeps all (default: its first).")
    ] = None,
    micro_batch: MicroBatch = None,
    tail_micro_batch: TailMicroBatch = None,
    trained: Trained = None,
    cache: Cache = None,
    max_steps: Annotated[
        int | None, typer.Option("--max-steps", help="Stop at this step number; steps before a restart count.")
    ] = None,
    epochs: Annotated[int | None, typer.Option("--epochs", help="Passes over every sample (default: 1).")] = None,
    once: Annotated[
        bool | None, typer.Option("--once/--watch", help="Train on what is there and stop, instead of watching.")
    ] = None,
    holdout: Annotated[
        int | None,
        typer.Option("--holdout", help="Hold out every k-th new sample of a class for evaluation (5); 0 = none."),
    ] = None,
    checkpoint_every: Annotated[
        int | None, typer.Option("--checkpoint-every", help="Steps between two checkpoints (20).")
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option("--learning-rate", help="Of the optimizer (default: the bundle's).")
    ] = None,
    weight_decay: Annotated[
        float | None, typer.Option("--weight-decay", help="Of the optimizer (default: the bundle's).")
    ] = None,
    momentum: Annotated[
        float | None, typer.Option("--momentum", help="Of the optimizer (default: the bundle's).")
    ] = None,
    clip_norm: Annotated[
        float | None, typer.Option("--clip-norm", help="Of the whole gradient; 0 = no clipping (default).")
    ] = None,
    seed: Annotated[
        int | None, typer.Option("--seed", help="Order of the samples (default: as the state was made with, else 0).")
    ] = None,
    replace_bundle: Annotated[
        bool,
        typer.Option("--replace-bundle", help="Go on in a state made with another bundle: with this one's weights."),
    ] = False,
    quiet: Annotated[bool | None, typer.Option("--quiet/--no-quiet", help="Print nothing but errors.")] = None,
    supervise: Annotated[
        bool, typer.Option("--supervise/--no-supervise", help="Start the agent again when it is killed (default).")
    ] = True,
) -> None:
    """Train on the samples of a source inside a memory budget, and lose nothing when the power goes.

    Of a setting that is given more than once, an option wins over --set, and that over the configuration file.
    """
    from edgetune.agent import state as state_directory
    from edgetune.agent.loop import run_agent
    from edgetune.agent.settings import assignment, configured, merged, read
    from edgetune.bundle import Bundle
    from edgetune.errors import UsageError
    from edgetune.units import parse_bytes

    hyper = {"learning_rate": learning_rate, "weight_decay": weight_decay, "momentum": momentum, "clip_norm": clip_norm}
    options = {
        "bundle": bundle,
        "data": data,
        "state": state,
        "budget_bytes": None if budget is None else parse_bytes(budget),
        "activation_budget_bytes": None if activation_budget is None else parse_bytes(activation_budget),
        "reserve_bytes": None if reserve is None else parse_bytes(reserve, zero=True),
        "engine": engine,
        "memory": memory,
        "batch": batch,
        "epsilon": epsilon,
        "allocation": allocation,
        "codec": codec,
        "micro_batch": micro_batch,
        "tail_micro_batch": tail_micro_batch,
        "trained": trained,
        "cache_bytes": None if cache is None else parse_bytes(cache, zero=True),
        "max_steps": max_steps,
        "epochs": epochs,
        "once": once,
        "holdout": holdout,
        "checkpoint_every": checkpoint_every,
        "seed": seed,
        "quiet": quiet,
        "hyper": {name: value for name, value in hyper.items() if value is not None},
    }
    given = merged(
        {} if config is None else read(config),
        *map(assignment, settings or ()),
        {name: value for name, value in options.items() if value is not None},
    )
    path = given.pop("bundle", None)
    missing = [text for name, text in (("data", "--data"), ("state", "--state")) if name not in given]
    missing = ["the bundle"] * (path is None) + missing
    if missing:
        raise UsageError(
            f"{' and '.join(missing)} must be given: edgetune run BUNDLE --data SOURCE --state DIR, or in --config FILE"
        )
    asked = configured(given)
    if replace_bundle:
        state_directory.replace_bundle(asked.state, Bundle.open(path))
    if supervise:
        asked.check(Bundle.open(path, verify=False).manifest.optimizer.scalars)
        _become_the_supervisor(Path(path), asked)
    run_agent(Bundle.open(path), asked)


def _become_the_supervisor(bundle: Path, config: AgentConfig) -> NoReturn:
    """Replace this process, and the memory that it has taken by now, by a small one that starts the agent as another.

    The worker finds this package where this process found it.
    """
    from edgetune.agent import supervisor, worker

    package = str(Path(__file__).resolve().parents[2])
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
    own = [sys.executable, "-I", str(Path(supervisor.__file__).resolve()), str(config.state)]
    sys.stdout.flush()
    os.execv(sys.executable, [*own, "--", *worker.command(bundle, config)])
