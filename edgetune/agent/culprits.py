"""Which samples of a batch broke its step: those with which alone loss or gradient is not finite.

Knows a run's work; nothing of what becomes of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from edgetune.agent.budget import release_memory
from edgetune.agent.ledger import Sample
from edgetune.agent.work import Work
from edgetune.errors import MemoryExhaustedError


def culprits(work: Work, samples: Sequence[Sample]) -> list[Sample]:
    """Return those of ``samples`` that alone, at the weights in force, give a loss or a gradient that is not finite.

    One forward and backward pass for each; the state is the same afterwards. Empty if it could not be found out.
    """
    found = []
    try:
        for sample in samples:
            rows = iter((sample,))
            fed = work.feeder.feed(lambda rows=rows: next(rows, None), 1, work.session, 1, work.computing)  # type: ignore[misc]
            if not fed.samples:
                continue
            with work.computing("the search for what broke the step"):
                loss, gradients = work.session.gradients_from(list(fed.features), fed.labels)
            if not (math.isfinite(loss) and all(np.isfinite(value).all() for value in gradients.values())):
                found.append(sample)
    except MemoryExhaustedError:
        found = []
    release_memory()
    return found
