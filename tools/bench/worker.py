"""The process of one contender: does what a line of JSON on standard input says, and answers with one.

    python -m tools.bench.worker CELL CONTENDER

Each contender has a process of its own, because an engine sets the allocator of the whole process to its liking.
Imports torch for a contender that is made of it, and for no other.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from tools.bench.targets import ORT_TRAINING


def contender(cell: Path, name: str) -> Any:
    """Return the contender ``name``, ready for its first step."""
    if name == ORT_TRAINING:
        from tools.bench.ort_training import OrtTraining

        return OrtTraining(cell)
    if "/" in name:
        from tools.bench.ours import Ours

        return Ours(cell, *name.split("/", 1))
    from tools.bench.pytorch import PyTorch

    return PyTorch(cell, name, len(os.sched_getaffinity(0)))


def serve(cell: Path, name: str) -> None:
    """Answer until standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer

    def tell(answer: dict[str, Any]) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    try:
        one = contender(cell, name)
    except Exception as error:
        tell({"error": f"{type(error).__name__}: {error}"})
        return
    tell({})
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            tell(getattr(one, asked["do"])(*asked.get("with", ())))
        except Exception as error:
            tell({"error": f"{type(error).__name__}: {error}"})


if __name__ == "__main__":
    serve(Path(sys.argv[1]), sys.argv[2])
