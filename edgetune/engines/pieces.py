"""One step over the pieces of a batch: what they make together, of which the gradient stays where the runtime wants it.

Knows the bundle and a runtime; nothing of parameters or plans.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from edgetune.bundle import Array, Manifest
from edgetune.engines.codec_inputs import NEXT
from edgetune.engines.runtime import Handle, Runtime
from edgetune.planning.knobs import ACCUMULATE


@dataclass(frozen=True)
class Made:
    """What one run of the train graph made: its scalars by output name, the gradients' handles by output name, the new
    buffers by name, and by input name what codecs carry to the next run."""

    scalars: dict[str, float] = field(default_factory=dict)
    gradients: dict[str, Handle] = field(default_factory=dict)
    buffers: dict[str, Handle] = field(default_factory=dict)
    carried: dict[str, Handle] = field(default_factory=dict)


class Accumulation:
    """The pieces of one step so far.

    Loss and gradient are what the whole batch would give: the mean over the pieces, each weighed by what counted in it,
    or their sum (``LossSpec.pieces``). Captured energies are the mean over the pieces, weighed by samples: the train
    graph tells fractions, and not the energy that they are of.
    """

    def __init__(self, manifest: Manifest, runtime: Runtime) -> None:
        self._manifest, self._runtime = manifest, runtime
        self.gradients: dict[str, Handle] = {}
        self.buffers: dict[str, Handle] = {}
        self.samples = self.pieces = 0
        self.loss = math.nan
        self.correct = 0.0
        self._mass = 0.0
        self._energy: dict[str, float] = {}
        self._weighed = 0

    def is_finite(self) -> bool:
        """Return whether loss and gradient are finite (and there is one), before an update overwrites what it starts
        from."""
        # A product with itself has no temporary of the tensor's size, and on a CPU the array is a view.
        flat = (self._runtime.get(handle).reshape(-1) for handle in self.gradients.values())
        known = math.isfinite(self.loss) and bool(self.gradients)
        return known and all(math.isfinite(np.vdot(values, values)) for values in flat)

    def arrays(self) -> dict[str, Array]:
        """Return copies of the gradients by the names of the parameters; NaN where no target counted, as in torch."""
        shapes = {spec.name: spec.shape for spec in self._manifest.parameters}
        found = {}
        for output in self._manifest.graphs["train"].outputs:
            if output.startswith("gradient/"):
                name, handle = output.removeprefix("gradient/"), self.gradients.get(output)
                nothing = np.full(shapes[name], np.nan, np.float32)
                found[name] = nothing if handle is None else np.array(self._runtime.get(handle))
        return found

    @property
    def energy(self) -> dict[str, float]:
        """Captured energy by saved tensor."""
        return {name: total / self._weighed for name, total in self._energy.items()}

    def add(self, made: Made, samples: int, mass: float) -> None:
        """Add what a piece of ``samples`` made, of which so much counted: the handles are this object's from now on."""
        scalars, first = made.scalars, not self.gradients
        self.samples += samples
        self.pieces += 1
        self._mass += mass
        keep, share = 1.0, 1.0
        if self._manifest.loss.pieces != "sum" and not first:
            share = mass / self._mass
            keep = 1.0 - share
        if first:
            self.gradients, self.loss = made.gradients, scalars["loss"]
        else:
            self._accumulate(made.gradients, keep, share)
            self.loss = keep * self.loss + share * scalars["loss"]
        self.buffers |= made.buffers
        self.correct += scalars.get("correct", 0.0)
        self._weighed += samples
        for saved in self._manifest.saved:
            if saved.energy is not None:
                self._energy[saved.name] = self._energy.get(saved.name, 0.0) + samples * scalars[saved.energy]

    def skip(self, samples: int) -> None:
        """Count a piece of which nothing counted: its gradient, a mean over nothing, has no part in the whole."""
        self.samples += samples
        self.pieces += 1

    def _accumulate(self, gradients: Mapping[str, Handle], keep: float, share: float) -> None:
        spec = self._manifest.graphs[ACCUMULATE]
        before = {name.replace("gradient/", "accumulated/", 1): handle for name, handle in self.gradients.items()}
        feeds = {**before, **gradients}
        into = {new: feeds[old] for new, old in spec.in_place.items()}
        for name, value in (("keep", keep), ("share", share)):
            feeds[name] = self._runtime.put(np.array(value, np.float32))
        self._runtime.run(ACCUMULATE, feeds, spec.outputs, into)


def run_train(
    manifest: Manifest, runtime: Runtime, features: Sequence[Array], targets: Array, fixed: Mapping[str, Handle]
) -> Made:
    """Run the train graph; ``fixed`` are its inputs besides features and targets. A list of features is emptied.

    Scalars are read at once: a handle may keep all that was bound in the same run.
    """
    feeds = {f.name: runtime.put(v) for f, v in zip(manifest.features, features, strict=True)}
    feeds[manifest.targets.name] = runtime.put(targets)
    feeds |= fixed
    graph, found = manifest.graphs["train"], Made()
    for index, stage in enumerate(graph.run_stages()):
        if index:
            for spec in manifest.features:
                feeds.pop(spec.name, None)
            if isinstance(features, list):
                features.clear()
        made = runtime.run("train", feeds, stage.outputs, stage=index)
        for name in graph.outputs:
            if name in made and name.startswith("gradient/"):
                found.gradients[name] = made[name]
            elif name in made and name.startswith("new/"):
                found.buffers[name.removeprefix("new/")] = made[name]
            elif name in made and name.startswith(NEXT):
                found.carried[name.removeprefix(NEXT)] = made[name]
            elif name in made:
                found.scalars[name] = float(runtime.get(made[name]))
        feeds |= made
    if isinstance(features, list):
        features.clear()
    return found


def slices(samples: int, most: int) -> Iterator[slice]:
    """Yield the places of ``samples`` by at most ``most``."""
    for start in range(0, samples, most):
        yield slice(start, min(start + most, samples))


def mass_of(manifest: Manifest, y: Array) -> float:
    """Return what the mean that is the loss divides by for the targets ``y``, up to a factor that all batches share.

    Of cross-entropy the targets that are not ignored, each by the weight of its class; of other losses the samples.
    """
    loss = manifest.loss
    ignored, weights = loss.config.get("ignore_index"), loss.config.get("class_weights")
    if loss.kind != "cross_entropy" or (ignored is None and not weights):
        return float(len(y))
    counted = y.reshape(-1) if ignored is None else y[y != ignored]
    return float(np.asarray(weights, np.float64)[counted].sum()) if weights else float(counted.size)
