"""The promises about speed and memory, and what the figures say of them. Knows the JSON file alone."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

REFERENCE, PUBLISHED, ORT_TRAINING = "pytorch", "pytorch-hosvd", "ort-training"
RESNET, MOBILENET = "resnet18-224-last4-b64-eps0.9", "mobilenet_v2-224-last4-b64-eps0.9"
COMPRESSED = {
    "torch": ("torch/hosvd", "torch/hosvd:storage=log8"),
    "onnxruntime": ("onnxruntime/hosvd",),
    "onnxruntime-fast": ("onnxruntime-fast/hosvd", "onnxruntime-fast/hosvd:storage=log8"),
}
"""By engine, our contenders of which speed and bytes are promised."""
FAST = "-fast"
Entry = Mapping[str, Any]


@dataclass(frozen=True)
class Target:
    """One line: ``what``, the limit as text, what was measured (None: nothing), and whether that meets it."""

    what: str
    wanted: str
    measured: float | None
    met: bool | None

    @property
    def verdict(self) -> str:
        """``met``, ``not met`` or a dash."""
        return "—" if self.met is None else "met" if self.met else "**not met**"


def ratio(cell: Entry, one: str, other: str) -> float | None:
    """Return the seconds of a step of ``one`` over those of ``other``: the median over the rounds that both had."""
    found = [cell.get("contenders", {}).get(name, {}).get("ratios") for name in (one, other)]
    if not all(found):
        return None
    return float(statistics.median(a / b for a, b in zip(*found, strict=False)))


def fewer(cell: Entry, name: str, what: str) -> float | None:
    """Return how many times fewer bytes than ordinary PyTorch ``name`` takes: ``saved`` or ``peak``."""
    contenders = cell.get("contenders", {})
    values = []
    for each in (REFERENCE, name):
        value = contenders.get(each, {}).get(what)
        values.append(value["peak"] if isinstance(value, Mapping) else value)
    return float(values[0] / values[1]) if all(values) else None


def targets(cells: Mapping[str, Entry]) -> list[Target]:
    """Return every line, the best rival first where there are several of a kind."""
    resnet, mobile = cells.get(RESNET, {}), cells.get(MOBILENET, {})
    lines = []
    for name, cell, limits in (("ResNet-18", resnet, (0.8, 1.0, 1.0)), ("MobileNetV2", mobile, (1.0, 1.3, 1.3))):
        for contenders, limit in zip(COMPRESSED.values(), limits, strict=True):
            for ours in contenders:
                found = ratio(cell, ours, REFERENCE)
                lines.append(_at_most(f"{name}: step of {ours} over ordinary PyTorch", limit, found))
    for engine in COMPRESSED:
        ours = f"{engine}/hosvd"
        found = ratio(resnet, PUBLISHED, ours)
        lines.append(_at_least(f"ResNet-18: the published per-batch HOSVD over {ours}", 20, found))
        for asi in (f"{engine.removesuffix(FAST)}/asi", "pytorch-asi"):
            found = ratio(resnet, asi, ours)
            lines.append(_at_least(f"ResNet-18: {asi} at the same captured energy over {ours}", 1.3, found))
    for what, limit in (("saved", 30), ("peak", 3)):
        for name, cell in (("ResNet-18", resnet), ("MobileNetV2", mobile)):
            for ours in chain.from_iterable(COMPRESSED.values()):
                found = fewer(cell, ours, what)
                lines.append(_at_least(f"{name}: {what} bytes of ordinary PyTorch over {ours}", limit, found))
    return lines


def _at_most(what: str, limit: float, found: float | None) -> Target:
    return Target(what, f"≤ {limit:g}", found, None if found is None else found <= limit)


def _at_least(what: str, limit: float, found: float | None) -> Target:
    return Target(what, f"≥ {limit:g}", found, None if found is None else found >= limit)
