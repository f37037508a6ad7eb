"""What a train step costs by count, on small models, against what it cost when it was last written down.

    python tools/counts.py              the table, and what has changed
    python tools/counts.py --write      write tests/tools/counts.json anew

A change that makes a step dearer by more than one percent fails the tests; so does one that makes it cheaper, until the
file is written anew: what was won stays won. Ranks are a quarter of each mode, so no spectrum plays a part.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from edgetune.bundle import Bundle, Manifest  # noqa: E402 - the path comes first
from tools.counting import Count, count_graph  # noqa: E402

GOLDEN = ROOT / "tests" / "tools" / "counts.json"
COMMAND = "python tools/counts.py --write"
TOLERANCE = 0.01
BATCH = 16
_SHARE = 4


@dataclass(frozen=True)
class Subject:
    """A model of tools/models.py or tools/zoo/plain.py, samples of ``shape``, and the codecs to count it with."""

    model: str
    shape: tuple[int, ...]
    last: int
    codecs: tuple[str, ...]


# Capturing a model takes most of the time, another codec next to none.
SUBJECTS = (
    Subject("digits_resnet", (1, 16, 16), 6, ("dense", "hosvd", "svd", "int8", "dct", "recompute")),
    Subject("MCUNet", (3, 32, 32), 4, ("dense", "hosvd", "svd", "patch")),
)


def symbols_of(manifest: Manifest, batch: int = BATCH) -> dict[str, int]:
    """Return a value for every symbol of the train graph: the batch, and of each rank or count a quarter of what it
    is at most."""
    sizes = {mode.rank: mode.size or batch for saved in manifest.saved for mode in saved.modes if mode.rank}
    return {"batch": batch} | {rank: max(1, size // _SHARE) for rank, size in sizes.items()}


def count_step(bundle: Bundle) -> dict[str, Count]:
    """Return what the train graph and the update graph of ``bundle``, which offers one codec, cost."""
    import onnx

    graphs, symbols = bundle.manifest.graphs, symbols_of(bundle.manifest)
    return {
        name: count_graph(
            onnx.load(bundle.path / graphs[name].flat_file, load_external_data=False), graphs[name], symbols
        )
        for name in ("train", "update")
    }


def count_all(folder: Path) -> Iterator[tuple[str, Count]]:
    """Export every subject into ``folder``; yield ``model codec graph`` and what it costs."""
    import onnx
    import torch

    import edgetune
    from edgetune.export.capture import capture
    from edgetune.export.source import Signature
    from tools import models
    from tools.zoo import plain

    for subject in SUBJECTS:
        torch.manual_seed(0)
        factory = getattr(models, subject.model, None) or getattr(plain, subject.model)
        captured = capture(factory().eval(), [Signature(subject.shape)]).model
        for codec in subject.codecs:
            model = onnx.ModelProto()
            model.CopyFrom(captured)
            place = folder / f"{subject.model}-{codec}"
            bundle = edgetune.export(model, None, place, last=subject.last, codec=codec)
            for graph, count in count_step(bundle).items():
                if graph == "train" or codec == subject.codecs[0]:  # no codec plays a part in an update
                    yield f"{subject.model} {codec} {graph}", count


def plain_form(counts: Mapping[str, Count]) -> dict[str, Any]:
    """Return the counts as they stand in the file."""
    return {name: asdict(count) | {"flops": count.flops} for name, count in counts.items()}


def differences(found: Mapping[str, Any], golden: Mapping[str, Any], tolerance: float = TOLERANCE) -> list[str]:
    """Return one sentence per entry that is new or gone, or whose ``flops`` or ``bytes`` differ by more than
    ``tolerance``; nothing where all is as it was."""
    problems = [f"'{name}' is not counted any more" for name in golden if name not in found]
    for name, count in found.items():
        if name not in golden:
            problems.append(f"'{name}' has not been written down yet")
            continue
        for unit in ("flops", "bytes"):
            before, now = golden[name][unit], count[unit]
            if abs(now - before) > tolerance * before:
                word = "more" if now > before else "fewer"
                problems.append(f"{name}: {abs(now / before - 1):.1%} {word} {unit} ({before:,} before, {now:,} now)")
    return problems


def table(found: Mapping[str, Any]) -> str:
    """Return the counts as Markdown."""
    lines = ["| step | MFLOP | MB moved | nodes |", "|---|---|---|---|"]
    lines += [f"| {n} | {c['flops'] / 1e6:.2f} | {c['bytes'] / 1e6:.2f} | {c['nodes']} |" for n, c in found.items()]
    return "\n".join(lines)


def main() -> None:
    """Print the table and what has changed; with ``--write``, write it down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write what is found to the file that the tests read")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="edgetune-counts-") as scratch:
        found = plain_form(dict(count_all(Path(scratch))))
    print(table(found))
    before = json.loads(GOLDEN.read_text("utf-8")) if GOLDEN.is_file() else {}
    problems = differences(found, before)
    print("\n".join(problems))
    if args.write:
        GOLDEN.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    elif problems:
        sys.exit(f"if this is meant: {COMMAND}")


if __name__ == "__main__":
    main()
