"""What is measured: the grid's axes, the contenders, and the presets. Knows no library."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tools.bench.run import Cell

SIDES = {"resnet18": 224, "mobilenet_v2": 224, "mcunet": 160, "vit": 224, "unet": 128, "tiny": 32}
MODELS = tuple(SIDES)
FULL = tuple(model for model in MODELS if model != "tiny")
OURS = tuple(f"{engine}/{codec}" for engine in ("onnxruntime", "torch") for codec in ("hosvd", "dense", "asi"))
RIVALS = (
    "pytorch", "pytorch-checkpoint", "pytorch-bf16", "pytorch-hosvd", "pytorch-asi", "pytorch-filter-r2",
    "pytorch-filter-r4", "ort-training",
)  # fmt: skip
CONTENDERS = (*RIVALS, *OURS)
SWEPT = ("pytorch", "onnxruntime/hosvd", "torch/hosvd", "onnxruntime/dense", "torch/dense")
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
    """Every model at N = 4, batches of 8 and 64, every contender; N and B swept on two models for a few of them."""
    swept = [
        *_cells(("resnet18", "mobilenet_v2"), ("2", "10", "all"), (64,), SWEPT),
        *_cells(("resnet18", "mobilenet_v2"), ("4",), (1, 128), SWEPT),
    ]
    return [*quick(), *_cells(FULL, ("4",), (8, 64), CONTENDERS), *swept]


PRESETS: dict[str, Callable[[], list[Job]]] = {"quick": quick, "main": main}
