"""What training changes, as handles of a runtime: parameters, optimizer state, buffers, and how many steps were made.

Knows the bundle and a runtime.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from edgetune.bundle import Array, Bundle, GraphSpec
from edgetune.engines.runtime import Handle, Runtime
from edgetune.errors import EngineError


class TrainedState:
    """Begins with the exported weights and an optimizer state of zeros."""

    def __init__(self, bundle: Bundle, runtime: Runtime) -> None:
        manifest, self._runtime = bundle.manifest, runtime
        self.step = 0
        # Copies, because the update writes into these buffers.
        self.parameters = {n: runtime.put(v) for n, v in bundle.initial_parameters().items()}
        self.buffers = {n: runtime.put(v) for n, v in bundle.initial_buffers().items()}
        self.slots = {
            # full, not zeros: memory that the budget counts should be there from the start, not page by page
            f"{slot}/{spec.name}": runtime.put(np.full(spec.shape, 0.0, np.float32))
            for spec in manifest.parameters
            for slot in manifest.optimizer.slots
        }

    def feeds(self) -> dict[str, Handle]:
        """Return what a forward pass reads besides the features."""
        return self.parameters | self.buffers

    def update(self, spec: GraphSpec, gradients: Mapping[str, Handle], hyper: Mapping[str, float]) -> float:
        """Run the update graph ``spec`` and return the norm of the gradient.

        Every new value is written over the old one, which nothing reads any more by then.
        """
        self.step += 1
        scalars = dict(hyper)
        if "step" in scalars:
            scalars["step"] = float(self.step)
        feeds = {**gradients, **self.parameters, **self.slots}
        into = {new: feeds[old] for new, old in spec.in_place.items()}
        feeds |= {name: self._runtime.put(np.array(value, np.float32)) for name, value in scalars.items()}
        return float(self._runtime.get(self._runtime.run("update", feeds, spec.outputs, into)["gradient_norm"]))

    def copies(self) -> dict[str, Array]:
        """Return copies of the parameters by name, of ``optimizer/<slot>/<name>``, ``buffer/<name>`` and ``step``."""
        tables = {"": self.parameters, "optimizer/": self.slots, "buffer/": self.buffers}
        found = {
            f"{prefix}{name}": np.array(self._runtime.get(handle))
            for prefix, table in tables.items()
            for name, handle in table.items()
        }
        return found | {"step": np.array(self.step, np.int64)}

    def load(self, state: Mapping[str, Array]) -> None:
        """Take what :meth:`copies` returned.

        Raises:
            EngineError: a tensor is missing, or of another shape.
        """
        places = {name: (self.parameters, name) for name in self.parameters}
        places |= {f"optimizer/{name}": (self.slots, name) for name in self.slots}
        places |= {f"buffer/{name}": (self.buffers, name) for name in self.buffers}
        for name, (table, key) in places.items():
            present = self._runtime.get(table[key]).shape
            if name not in state or state[name].shape != present:
                raise EngineError(f"the state does not fit this bundle: '{name}' should have the shape {present}")
        if "step" not in state:
            raise EngineError("the state does not fit this bundle: it has no 'step'")
        for name, (table, key) in places.items():
            table[key] = self._runtime.put(np.array(state[name], np.float32))
        self.step = int(state["step"])
