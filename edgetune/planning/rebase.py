"""A plan with bases of newer data: same codecs, ranks and bytes, so that it fits wherever the old one did.

This module may know plans and spectra; it must not know engines, or when bases are old.
"""

from __future__ import annotations

import dataclasses

from edgetune.bundle import Manifest
from edgetune.planning.freezing import narrow
from edgetune.planning.plan import Plan
from edgetune.planning.selection import default_selection, settle
from edgetune.planning.spectra import Calibration, captured_energy_bound, ranks_of


def rebased(manifest: Manifest, plan: Plan, calibration: Calibration) -> Plan:
    """Return ``plan`` with the bases of ``calibration``, and what its ranks capture of that data.

    Raises:
        StateError: the calibration belongs to another bundle.
    """
    settled = settled_for(manifest, plan)
    specs = {spec.name: spec for spec in settled.saved}
    read = {layer.name: specs[layer.saved] for layer in settled.layers}
    rows = []
    for row in plan.rows:
        spec = read[row.layer]
        if any(mode.spectrum in calibration.spectra.get(spec.name, {}) for mode in spec.modes):
            energy = captured_energy_bound(spec, calibration, plan.ranks.get(spec.name, {}), plan.tail_micro_batch)
            row = dataclasses.replace(row, captured_energy=energy)
        rows.append(row)
    return dataclasses.replace(plan, rows=tuple(rows), calibration=calibration)


def suffices(manifest: Manifest, plan: Plan, calibration: Calibration) -> bool:
    """Return whether the ranks of ``plan`` keep its ε of every mode of the newer data, or the ε of each tensor.

    Tensors without an ε have enough.
    """
    specs = {spec.name: spec for spec in settled_for(manifest, plan).saved}
    read = {layer.name: layer.saved for layer in manifest.layers}
    wanted = {read[row.layer]: row.epsilon for row in plan.rows if row.epsilon is not None}
    if plan.epsilon is not None:
        wanted = dict.fromkeys(specs, plan.epsilon)
    needed = {
        name: ranks_of(specs[name], specs[name].modes, calibration, epsilon, plan.tail_micro_batch)
        for name, epsilon in wanted.items()
    }
    planned = {(name, letter): rank for name, modes in plan.ranks.items() for letter, rank in modes.items()}
    return all(rank <= planned.get((name, letter), 0) for name in needed for letter, rank in needed[name].items())


def promises(manifest: Manifest, plan: Plan) -> dict[str, float]:
    """Return the captured energy that ``plan`` promises, by saved tensor; those of which it promises nothing lack."""
    saved = {layer.name: layer.saved for layer in manifest.layers}
    return {saved[row.layer]: row.captured_energy for row in plan.rows if row.captured_energy is not None}


def settled_for(manifest: Manifest, plan: Plan) -> Manifest:
    """Return ``manifest`` with the layers that ``plan`` trains and the options that it chose; where it names none, the
    first of the menu."""
    return settle(narrow(manifest, plan.trained).manifest, default_selection(manifest) | dict(plan.selection))
