"""What an engine is: something that runs the graphs of a bundle. Knows the bundle and numpy."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from edgetune.bundle import Array, Bundle
from edgetune.errors import EngineError, choices
from edgetune.planning.selection import Chosen, choose, settled_tensors

Handle = Any  # a tensor where the runtime wants it: an OrtValue, a torch tensor


class Runtime(Protocol):
    """Loads and runs the graphs of one bundle. Laws:

    1. ``get(put(x))`` equals ``x``.
    2. nodes are executed in the order of ``GraphSpec.nodes`` (the trunk excepted); :meth:`verify_order` proves it.
    3. an output named in ``into`` is written to that buffer, even if the same buffer is an input.
    4. every tensor that ``run`` makes and does not return is free again when it returns.
    """

    name: str

    def choose(self, selection: Mapping[str, str]) -> None:
        """Take these options where saved tensors have several; what was loaded under other ones is forgotten."""

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

    def settle(self) -> None:
        """Give back to the system what is free; called after every step."""

    def verify_order(self, graph: str, feeds: Mapping[str, Handle]) -> None:
        """Run ``graph`` once and compare the order in which its nodes ran with the emitted one.

        Raises:
            EngineError: they differ; memory would be more than planned.
        """


def chosen_graph(bundle: Bundle, graph: str, selection: Mapping[str, str]) -> Chosen:
    """Return what remains of ``graph`` under ``selection``.

    Raises:
        EngineError: the bundle has no such graph.
        UsageError: the graph has choices that the selection does not make.
    """
    graphs = bundle.manifest.graphs
    if graph not in graphs:
        raise EngineError(f"the bundle has no graph '{graph}'; it has: {choices(graphs)}")
    if not graphs[graph].choices:
        return choose(graphs[graph], (), {})
    return choose(graphs[graph], settled_tensors(bundle.manifest, selection), selection)


def check_feeds(graph: str, inputs: Iterable[str], feeds: Mapping[str, Handle]) -> None:
    """Raise EngineError unless every one of ``inputs`` is fed."""
    for name in inputs:
        if name not in feeds:
            raise EngineError(f"graph '{graph}' reads '{name}', which was not given; given: {choices(feeds)}")
