"""``edgetune plan``: what training would take, and the ε that a budget picks, before anything is trained."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from edgetune.planning.plan import Plan


def plan(
    bundle: Annotated[Path, typer.Argument(help="The bundle that 'edgetune export' wrote.")],
    budget: Annotated[
        str | None, typer.Option("--budget", help="What the whole process may take, such as 512MiB. Chooses ε.")
    ] = None,
    activation_budget: Annotated[
        str | None, typer.Option("--activation-budget", help="What may be saved for the backward pass, such as 8MiB.")
    ] = None,
    epsilon: Annotated[float | None, typer.Option("--epsilon", help="Fix ε instead, in (0, 1].")] = None,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Samples per step.")] = 32,
    data: Annotated[
        Path | None, typer.Option("--data", help="Folder of samples to measure the spectra on (as for run).")
    ] = None,
    batches: Annotated[int, typer.Option("--batches", min=1, help="Batches of it to measure on.")] = 2,
    engine: Annotated[str, typer.Option("--engine", help="auto, onnxruntime or torch.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Show per layer what is kept, the predicted peak, and the ε that the budget picks."""
    from edgetune.agent.samples import labelled_batches
    from edgetune.api import plan_bundle
    from edgetune.bundle import Bundle
    from edgetune.units import parse_bytes

    budget_bytes = None if budget is None else parse_bytes(budget)
    activation_budget_bytes = None if activation_budget is None else parse_bytes(activation_budget)
    opened = Bundle.open(bundle)
    found = plan_bundle(
        opened,
        batch=batch,
        budget_bytes=budget_bytes,
        activation_budget_bytes=activation_budget_bytes,
        epsilon=epsilon,
        calibration=None if data is None else labelled_batches(opened.manifest, data, batch, batches),
        engine=engine,
    )
    if as_json:
        print(found.to_json())
    else:
        from edgetune.engines.choice import describe_engine

        _show(found)
        print(describe_engine(engine))


def _show(found: Plan) -> None:
    from rich.console import Console
    from rich.table import Table

    from edgetune.units import format_bytes

    console = Console(markup=False, emoji=False)
    how = "nothing is truncated" if found.epsilon is None else f"ε = {found.epsilon:.4f}"
    table = Table(
        title=f"codec {found.codec}, batch {found.batch}, {how}",
        caption="energy: lower bound of what the ranks keep, from the spectra",
    )
    for column in ("layer", "input", "dense", "ranks", "stored", "ratio", "energy ≥"):
        table.add_column(column, justify="left" if column in ("layer", "input", "ranks") else "right")
    for row in found.rows:
        ranks = " ".join(f"{letter}{rank}" for letter, rank in row.ranks.items()) or "-"
        energy = "-" if row.captured_energy is None else f"{row.captured_energy:.4f}"
        shape = "×".join(map(str, (found.batch, *row.input_shape)))
        sizes = format_bytes(row.dense_bytes), ranks, format_bytes(row.stored_bytes)
        table.add_row(row.layer, shape, *sizes, f"{row.ratio:.1f}", energy)
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
    console.print(f"{saved} instead of {format_bytes(found.dense_saved_bytes)}; micro-batch {found.micro_batch}")
