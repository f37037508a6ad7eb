"""What is measured: the grid's axes, the contenders, and the presets. Knows no library."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tools.bench.run import Cell

SIDES = {"resnet18": 224, "mobilenet_v2": 224, "mcunet": 160, "vit": 224, "unet": 128, "tiny": 32}
MODELS = tuple(SIDES)
FULL = tuple(model for model in MODELS if model != "tiny")
OURS = (
    *(f"{engine}/{codec}" for engine in ("onnxruntime", "torch") for codec in ("hosvd", "dense", "asi")),
    "onnxruntime-fast/hosvd", "onnxruntime-fast/hosvd:storage=log8", "onnxruntime-fast/hosvd:cut=c",
    "torch/hosvd:storage=log8", "torch/hosvd:cut=c",
)  # fmt: skip
RIVALS = (
    "pytorch", "pytorch-checkpoint", "pytorch-bf16", "pytorch-hosvd", "pytorch-asi", "pytorch-filter-r2",
    "pytorch-filter-r4", "ort-training",
)  # fmt: skip
CONTENDERS = (*RIVALS, *OURS)
SWEPT = ("pytorch", "onnxruntime-fast/hosvd", "onnxruntime-fast/hosvd:storage=log8", "torch/hosvd")
Job = tuple[Cell, tuple[str, ...]]


def side_of(model: str) -> int:
    """Return the side of the pictures that ``model`` takes, in pixels."""
    return SIDES[model]


def _cells(models: Sequence[str], lasts: Sequence[str], batches: Sequence[int], contenders: Sequence[str]) -> list[Job]:
    return [
        (Cell(model, SIDES[model], last, batch), tuple(contenders))
        for model in models
        for last in lasts
        for batch in batches
    ]


def quick() -> list[Job]:
    """ResNet-18 and MobileNetV2, last 4, batch 64, every contender: what the targets speak of."""
    return _cells(("resnet18", "mobilenet_v2"), ("4",), (64,), CONTENDERS)


def main() -> list[Job]:
    """Every model at N = 4 and a batch of 64, every contender; other N and batches for a few of them.

    All layers with a batch of 8: with 64, ordinary PyTorch takes a quarter of a minute a step.
    """
    return [
        *_cells(FULL, ("4",), (64,), CONTENDERS),
        *_cells(FULL, ("4",), (8,), SWEPT),
        *_cells(FULL, ("2", "10"), (64,), SWEPT),
        *_cells(FULL, ("all",), (8,), SWEPT),
        *_cells(FULL, ("4",), (1, 128), SWEPT),
    ]


GROWTH = ("pytorch", "onnxruntime-fast/hosvd", "torch/hosvd")
GROWTH_MODELS = ("resnet18", "mobilenet_v2")
GROWTH_BATCH = 32


def growth() -> list[Job]:
    """One axis at a time around a batch of 32, N = 4, ε = 0.9: batch, resolution, layers, ε (and with it the ranks)."""
    jobs: dict[str, Job] = {}
    for model in GROWTH_MODELS:
        side = SIDES[model]
        cells = [
            *(Cell(model, side, "4", batch) for batch in (8, 16, 32, 64, 128)),
            *(Cell(model, pixels, "4", GROWTH_BATCH) for pixels in (96, 128, 160, 192, 224)),
            *(Cell(model, side, last, GROWTH_BATCH) for last in ("2", "4", "8", "12", "16")),
            *(Cell(model, side, "4", GROWTH_BATCH, epsilon) for epsilon in (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)),
        ]
        jobs |= {cell.key: (cell, GROWTH) for cell in cells}
    return list(jobs.values())


PRESETS: dict[str, Callable[[], list[Job]]] = {"quick": quick, "main": main, "growth": growth}
