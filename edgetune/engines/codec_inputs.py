"""What codecs get at run time: bases from the plan's calibration, sketches, noise, counts, and factors that one step
hands to the next. Knows the plan and a runtime.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from edgetune.bundle import Array, Manifest, ModeSpec
from edgetune.engines.runtime import Handle, Runtime
from edgetune.errors import EngineError
from edgetune.planning.plan import Plan

NEXT = "next/"
"""Prefix of the train graph's outputs that are a run-time input of the next step."""


class CodecInputs:
    """The run-time inputs of one plan. ``manifest`` is settled: it holds the chosen codecs alone."""

    def __init__(
        self, manifest: Manifest, plan: Plan, runtime: Runtime, seed: int, carried: Mapping[str, Array] | None = None
    ) -> None:
        """Put the bases where the runtime wants them; ``carried`` are factors of an earlier step, by input name.

        Raises:
            EngineError: the plan has no basis for a mode, or no rank.
        """
        self._runtime, self._seed = runtime, seed
        self._bases: dict[str, Handle] = {}
        self._drawn: dict[str, tuple[str, ModeSpec, int]] = {}
        for saved in manifest.saved:
            for mode in saved.modes:
                rank = plan.ranks.get(saved.name, {}).get(mode.letter, 0)
                if mode.rank and not rank:
                    raise EngineError(f"the plan has no rank for '{saved.name}', mode {mode.letter}; plan it again")
                if mode.source != "basis":
                    self._drawn[mode.input] = saved.name, mode, rank
                    continue
                spectrum = plan.calibration.spectra[saved.name].get(mode.spectrum) if plan.calibration else None
                if spectrum is None or spectrum.basis is None:
                    raise EngineError(
                        f"the plan has no basis for '{saved.name}', mode {mode.letter}: plan it with calibration data"
                    )
                self._bases[mode.input] = runtime.put(np.ascontiguousarray(spectrum.basis[:, :, :rank]))
        self._carried: dict[str, Array] = {}
        self.carry({name: value for name, value in (carried or {}).items() if name in self._drawn})

    def feeds(self, step: int, samples: int, piece: int = 0) -> dict[str, Handle]:
        """Return all of them for ``samples``, the piece number ``piece`` of a step's batch.

        Every piece draws its own sketches and noise: an unlucky one costs energy in one piece, not in all. They follow
        from the seed, the step and the piece alone, so a resumed session draws the same.
        """
        feeds = dict(self._bases)
        for name, (saved, mode, rank) in self._drawn.items():
            feeds[name] = self._runtime.put(self._drawn_array(name, saved, mode, rank, (step, piece), samples))
        return feeds

    def _drawn_array(
        self, name: str, saved: str, mode: ModeSpec, rank: int, when: tuple[int, int], samples: int
    ) -> Array:
        if mode.source == "count":
            return np.array([rank], np.int64)
        size = samples if mode.size is None else mode.size
        which = b"" if mode.letter == "b" else mode.letter.encode()
        step, piece = when
        later = [256 + piece] if piece else []  # no byte of a name
        rng = np.random.default_rng([self._seed, step, *saved.encode(), *which, *later])
        if mode.source == "noise":
            return rng.random(size, dtype=np.float32)
        shape = size, min(rank, size)
        known = self._carried.get(name)
        # The last batch of a pass may be shorter: its factor has nothing to continue from.
        return known if known is not None and known.shape == shape else rng.standard_normal(shape, dtype=np.float32)

    def carry(self, made: Mapping[str, Array]) -> None:
        """Keep what a step made for the next, by input name."""
        self._carried |= {name: np.array(value) for name, value in made.items()}

    def restore(self, carried: Mapping[str, Array]) -> None:
        """Forget what was carried, but for ``carried``."""
        self._carried = dict(carried)

    def carried(self) -> dict[str, Array]:
        """Return what the next step continues from, by input name."""
        return dict(self._carried)
