"""What an engine is: something that runs the graphs of a bundle. Knows the bundle and numpy."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from edgetune.bundle import Array, Bundle, GraphSpec
from edgetune.errors import EngineError, choices
from edgetune.planning.freezing import Narrowed, narrow
from edgetune.planning.selection import Chosen, choose, settled_tensors

Handle = Any  # a tensor where the runtime wants it: an OrtValue, a torch tensor


STEP_GRAPHS = frozenset({"train", "accumulate", "update"})
"""The graphs that depend on which layers are trained."""
CALLED_WITH_PLANS = STEP_GRAPHS | {"calibrate"}
"""The graphs whose inputs have other shapes under another plan."""


class Runtime(Protocol):
    """Loads and runs the graphs of one bundle. Laws:

    1. ``get(put(x))`` equals ``x``.
    2. nodes are executed in the order of ``GraphSpec.nodes`` (the trunk excepted); :meth:`verify_order` proves it.
    3. an output named in ``into`` is written to that buffer, even if the same buffer is an input.
    4. every tensor that ``run`` makes and does not return is free again when it returns.
    """

    name: str

    def choose(self, selection: Mapping[str, str], trained: int | None = None) -> None:
        """Take these options where saved tensors have several, and train the last ``trained`` weight layers (None: all
        that there are); what was loaded under another choice is forgotten."""

    def load(self, graph: str) -> None:
        """Load ``graph`` now rather than at its first run."""

    def put(self, array: Array) -> Handle:
        """Return ``array`` as a handle; the array must not be written to afterwards."""

    def get(self, handle: Handle) -> Array:
        """Return the contents of ``handle``; a view where possible."""

    def run(
        self,
        graph: str,
        feeds: Mapping[str, Handle],
        outputs: Sequence[str],
        into: Mapping[str, Handle] | None = None,
        stage: int = 0,
    ) -> dict[str, Handle]:
        """Run one stage of ``graph`` and return ``outputs``; feeds that it does not read are ignored."""

    def limit(self, device_bytes: int | None) -> None:
        """Let the allocators of a CUDA device take at most so many bytes from now on (None: all that there is): more is
        an allocation that fails. On a CPU the agent's resource limit does this."""

    def pack(self, packed: bool) -> None:
        """Keep the tensors of a run in one block from its second run with the same shapes on, where the engine can
        (``planning.packing`` says what that takes); what was loaded otherwise is forgotten."""

    def settle(self) -> None:
        """Give back to the system what is free; called after every step."""

    def verify_order(self, graph: str, feeds: Mapping[str, Handle]) -> None:
        """Run ``graph`` once and compare the order in which its nodes ran with the emitted one.

        Raises:
            EngineError: they differ; memory would be more than planned.
        """


def chosen_graph(bundle: Bundle, graph: str, selection: Mapping[str, str], trained: int | None = None) -> Chosen:
    """Return what remains of ``graph`` under ``selection`` when the last ``trained`` weight layers are trained.

    Raises:
        EngineError: the bundle has no such graph.
        UsageError: the graph has choices that the selection does not make.
    """
    manifest = bundle.manifest
    if graph not in manifest.graphs:
        raise EngineError(f"the bundle has no graph '{graph}'; it has: {choices(manifest.graphs)}")
    narrowed = Narrowed(manifest) if trained is None else narrow(manifest, trained)
    part, manifest = narrowed.parts.get(graph), narrowed.manifest
    saved = settled_tensors(manifest, selection) if manifest.graphs[graph].choices else ()
    chosen = choose(manifest.graphs[graph], saved, selection)
    if part is None:
        return chosen
    kept = tuple(part.kept[index] for index in chosen.kept)
    return dataclasses.replace(chosen, kept=kept, absent=part.absent)


def is_whole(graph: GraphSpec, chosen: Chosen) -> bool:
    """Return whether ``chosen`` is all of ``graph``, so that its files can be run as they are."""
    return not graph.choices and len(chosen.kept) == len(graph.nodes)


def check_feeds(graph: str, inputs: Iterable[str], feeds: Mapping[str, Handle]) -> None:
    """Raise EngineError unless every one of ``inputs`` is fed."""
    for name in inputs:
        if name not in feeds:
            raise EngineError(f"graph '{graph}' reads '{name}', which was not given; given: {choices(feeds)}")
