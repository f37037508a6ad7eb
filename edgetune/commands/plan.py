"""``edgetune plan``: what training would take, and what a budget picks, before anything is trained."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgetune.commands._knobs import Cache, Memory, MicroBatch, TailMicroBatch, Trained, lines

if TYPE_CHECKING:
    from edgetune.bundle import Bundle
    from edgetune.planning.curve import Explanation
    from edgetune.planning.plan import Plan
    from edgetune.planning.spectra import Calibration


def plan(
    bundle: Annotated[Path, typer.Argument(help="The bundle that 'edgetune export' wrote.")],
    budget: Annotated[
        str | None, typer.Option("--budget", help="What the whole process may take, such as 512MiB. Chooses ε.")
    ] = None,
    activation_budget: Annotated[
        str | None, typer.Option("--activation-budget", help="What may be saved for the backward pass, such as 8MiB.")
    ] = None,
    epsilon: Annotated[float | None, typer.Option("--epsilon", help="Fix ε instead, in (0, 1].")] = None,
    rate: Annotated[
        float | None, typer.Option("--rate", help="Fix how much dct, haar, db3, threshold keep: one element of RATE.")
    ] = None,
    codec: Annotated[
        str | None, typer.Option("--codec", help="The codec of the bundle's menu that keeps all (default: its first).")
    ] = None,
    allocation: Annotated[
        str, typer.Option("--allocation", help="uniform: one codec, one ε. per-layer: those with the least error.")
    ] = "uniform",
    front: Annotated[
        bool, typer.Option("--front", help="Show the least gradient error for every peak instead of one plan.")
    ] = False,
    plot: Annotated[Path | None, typer.Option("--plot", help="Write that picture to this SVG file.")] = None,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Samples per step.")] = 32,
    micro_batch: MicroBatch = None,
    tail_micro_batch: TailMicroBatch = None,
    trained: Trained = None,
    cache: Cache = None,
    memory: Memory = None,
    data: Annotated[
        str | None,
        typer.Option("--data", help="Samples to measure the spectra on (any source, as for run)."),
    ] = None,
    batches: Annotated[int, typer.Option("--batches", min=1, help="Batches of it to measure on.")] = 2,
    calibration: Annotated[
        Path | None,
        typer.Option("--calibration", help="Keep what is measured in this file; if it is there, measure nothing."),
    ] = None,
    engine: Annotated[str, typer.Option("--engine", help="auto, onnxruntime or torch.")] = "auto",
    explain: Annotated[bool, typer.Option("--explain", help="Show which tensors are alive at the peak.")] = False,
    phase: Annotated[
        str | None, typer.Option("--phase", help="Explain the peak of this phase (default: that of the process).")
    ] = None,
    timeline: Annotated[
        Path | None, typer.Option("--timeline", help="Write live bytes over one step to this SVG file.")
    ] = None,
    state: Annotated[
        Path | None, typer.Option("--state", help="Draw what this agent's run log has measured over it.")
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Do one step on --data in a process of its own, and draw it over it.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Show per layer what is kept, the predicted peak, and the codecs and ε that the budget picks."""
    from edgetune.api import front_of, plan_bundle
    from edgetune.bundle import Bundle
    from edgetune.errors import UsageError
    from edgetune.units import parse_bytes

    if plot is not None and not front:
        raise UsageError("--plot draws the front: give --front as well")
    _check_options(front, explain, phase, timeline, state, measure, data)
    budget_bytes = None if budget is None else parse_bytes(budget)
    activation_budget_bytes = None if activation_budget is None else parse_bytes(activation_budget)
    opened = Bundle.open(bundle)
    known = _calibration(opened, calibration, data, batch, batches, engine, errors=front or allocation != "uniform")
    if front:
        found = front_of(opened, batch=batch, calibration=known, engine=engine)
        if plot is not None:
            from edgetune.commands._front import svg

            plot.write_text(svg(found, f"{bundle.name}, batch {batch}"), "utf-8")
        if as_json:
            print(json.dumps(dataclasses.asdict(found), indent=1))
        else:
            from edgetune.commands._front import show_front

            show_front(found)
        return
    if explain or timeline is not None:
        from edgetune.agent.baseline import runtime_bytes

        runtime_bytes(opened, engine)  # remembered: what is shown is a process on the device, not this one
    made = plan_bundle(
        opened,
        batch=batch,
        budget_bytes=budget_bytes,
        activation_budget_bytes=activation_budget_bytes,
        epsilon=epsilon,
        calibration=known,
        engine=engine,
        codec=codec,
        allocation=allocation,
        rate=rate,
        micro_batch=micro_batch,
        tail_micro_batch=tail_micro_batch,
        trained=trained,
        cache_bytes=None if cache is None else parse_bytes(cache, zero=True),
        memory=memory or "auto",
    )
    if timeline is not None:
        timeline.write_text(_drawn(opened, made, bundle.name, state, data if measure else None, engine), "utf-8")
    explained = _explained(opened, made, phase) if explain else None
    if as_json:
        told = json.loads(made.to_json())
        if explained is not None:
            told["explain"] = dataclasses.asdict(explained)
        print(json.dumps(told, indent=1))
        return
    from edgetune.engines.choice import describe_engine
    from edgetune.planning.knobs import layers_before_head

    _show(made)
    for line in lines(made, layers_before_head(opened.manifest)):
        print(line)
    if explained is not None:
        from edgetune.commands._timeline import show_explanation

        show_explanation(explained)
    print(describe_engine(engine))


def _check_options(
    front: bool, explain: bool, phase: str | None, timeline: Path | None, state: Path | None, measure: bool,
    data: str | None,
) -> None:  # fmt: skip
    """Raise UsageError where an option is given without the one that it is for."""
    from edgetune.errors import UsageError

    if front and (explain or timeline is not None):
        raise UsageError("--front shows many plans; --explain and --timeline tell of one: leave one of them out")
    if phase is not None and not explain:
        raise UsageError("--phase says which peak is explained: give --explain as well")
    if (state is not None or measure) and timeline is None:
        raise UsageError("--state and --measure draw what was measured: give --timeline FILE.svg as well")
    if measure and data is None:
        raise UsageError("--measure does a step on real samples: give --data FOLDER as well")


def _explained(bundle: Bundle, made: Plan, phase: str | None) -> Explanation:
    from edgetune.planning.curve import explain

    return explain(bundle.manifest, made, phase)


def _drawn(bundle: Bundle, made: Plan, name: str, state: Path | None, data: str | None, engine: str) -> str:
    """Return the picture of one step of ``made``; what was measured is from the run log in ``state`` and from one step
    on ``data``, whichever is given."""
    from edgetune.commands._timeline import measured_in, svg
    from edgetune.errors import UsageError
    from edgetune.planning.curve import curve_of

    peaks, step = dict[str, int](), None
    if state is not None:
        from edgetune.telemetry.runlog import read

        peaks = measured_in(read(state / "log.jsonl"))
        if not peaks:
            raise UsageError(
                f"no plan was measured in the run log of '{state}' yet; leave out --state, or run the agent for a step"
            )
    if data is not None:
        from edgetune.agent.sampling import sample_step

        step = sample_step(bundle, made, data, engine)
        peaks = step.peak_bytes
    return svg(curve_of(bundle.manifest, made), f"{name}, batch {made.batch}, {_how(made)}", peaks, step)


def _calibration(
    bundle: Bundle, file: Path | None, data: str | None, batch: int, batches: int, engine: str, *, errors: bool
) -> Calibration | None:
    """Return what ``file`` holds; where there is no such file, what is measured on ``data``, and write it there."""
    from edgetune.agent.samples import labelled_batches
    from edgetune.api import calibrate_bundle
    from edgetune.planning.spectra import Calibration

    if file is not None and file.is_file():
        return Calibration.load(file)
    if data is None:
        return None
    found = calibrate_bundle(
        bundle, batch, labelled_batches(bundle.manifest, data, batch, batches), engine, errors=errors
    )
    if file is not None and found is not None:
        found.save(file)
    return found


def _show(found: Plan) -> None:
    from rich.console import Console
    from rich.table import Table

    from edgetune.units import format_bytes

    console = Console(markup=False, emoji=False)
    mixed = found.allocation != "uniform"
    table = Table(
        title=f"codec {found.codec}, batch {found.batch}, {_how(found)}",
        caption="energy: lower bound of what the ranks keep, from the spectra",
    )
    measured = found.error is not None and any(row.error for row in found.rows)
    columns = ["layer", "input", "dense", *(["codec"] if mixed else []), "ranks", "stored", "ratio", "energy ≥"]
    for column in [*columns, *(["error"] if measured else [])]:
        table.add_column(column, justify="left" if column in ("layer", "input", "codec", "ranks") else "right")
    for row in found.rows:
        ranks = " ".join(f"{letter}{rank}" for letter, rank in row.ranks.items()) or "-"
        energy = "-" if row.captured_energy is None else f"{row.captured_energy:.4f}"
        shape = "×".join(map(str, (found.batch, *row.input_shape)))
        cells = [row.layer, shape, format_bytes(row.dense_bytes), *([row.codec] if mixed else [])]
        cells += [ranks, format_bytes(row.stored_bytes), f"{row.ratio:.1f}", energy]
        table.add_row(*cells, *([f"{row.error:.4f}"] if measured and row.error is not None else []))
    console.print(table)
    ledger = Table(title="predicted peak of the process", caption=f"at {found.bottleneck}")
    ledger.add_column("line")
    ledger.add_column("bytes", justify="right")
    for line, size_bytes in found.ledger.items():
        ledger.add_row(line, format_bytes(size_bytes))
    ledger.add_section()
    ledger.add_row("peak", format_bytes(found.predicted_peak_bytes))
    if found.budget_bytes is not None:
        ledger.add_row("budget", format_bytes(found.budget_bytes))
    console.print(ledger)
    saved = f"saved for the backward pass: {format_bytes(found.saved_bytes)}"
    console.print(f"{saved} instead of {format_bytes(found.dense_saved_bytes)}")
    if found.error is not None and found.error_bound is not None:
        console.print(f"total gradient error {found.error:.4f}, proven to be at least {found.error_bound:.4f}")
    elif measured:
        console.print(f"total gradient error {found.error:.4f}")


def _how(found: Plan) -> str:
    if found.allocation != "uniform":
        return "chosen per layer"
    if found.epsilon is not None:
        return f"ε = {found.epsilon:.4f}"
    return "ranks by rate" if found.ranks else "nothing is truncated"
