"""The default engine: stock onnxruntime, CPU or CUDA, no training build (DESIGN.md section 5).

Imported lazily. Knows the bundle and onnxruntime.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgetune.bundle import Array, Bundle, GraphSpec
from edgetune.engines import heap
from edgetune.engines.assembly import Port, assemble
from edgetune.engines.exhaustion import exhausted, is_exhaustion
from edgetune.engines.runtime import CALLED_WITH_PLANS, STEP_GRAPHS, Handle, check_feeds, chosen_graph, is_whole
from edgetune.errors import EngineError
from edgetune.planning.selection import Chosen

# Where constants lie that a model given as bytes points to (onnxruntime_session_options_config_keys.h).
_WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"


def import_onnxruntime() -> Any:
    """Return the module.

    Raises:
        EngineError: none is installed; several distributions provide it, so the message says which to choose.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise EngineError(
            f"onnxruntime cannot be imported ({error}). Install one: 'onnxruntime' for a CPU, 'onnxruntime-gpu' for a "
            "CUDA workstation; on a Jetson the wheel that matches its JetPack (NVIDIA's Jetson package index)"
        ) from None
    return onnxruntime


def providers(available: Sequence[str], gpu_limit_bytes: int | None = None) -> list[Any]:
    """Return the execution providers to use, best first, with the settings that keep their memory visible."""
    chosen: list[Any] = []
    if "CUDAExecutionProvider" in available:
        options: dict[str, str] = {
            "arena_extend_strategy": "kSameAsRequested",
            "cudnn_conv_use_max_workspace": "0",
        }
        if gpu_limit_bytes is not None:
            options["gpu_mem_limit"] = str(gpu_limit_bytes)
        chosen.append(("CUDAExecutionProvider", options))
    return [*chosen, "CPUExecutionProvider"]


class OnnxRuntime:
    """Runs the graphs of a bundle in onnxruntime. See :class:`edgetune.engines.runtime.Runtime` for its laws."""

    name = "onnxruntime"

    def __init__(
        self,
        bundle: Bundle,
        *,
        gpu_limit_bytes: int | None = None,
        threads: int | None = None,
    ) -> None:
        """Load nothing yet.

        Args:
            gpu_limit_bytes: what CUDA's allocator may take.
            threads: how many threads a kernel may use; None takes all that the process may run on.
        """
        self._ort = import_onnxruntime()
        self._bundle = bundle
        self._providers = providers(self._ort.get_available_providers(), gpu_limit_bytes)
        self._device = "cuda" if len(self._providers) > 1 else "cpu"
        self._threads = threads or len(os.sched_getaffinity(0))
        self._packed = False
        self._sessions: dict[tuple[str, int], Any] = {}
        self._selection: dict[str, str] = {}
        self._trained: int | None = None
        self._chosen: dict[str, Chosen] = {}
        if self._device == "cpu":
            heap.return_memory_to_the_system()

    def choose(self, selection: Mapping[str, str], trained: int | None = None) -> None:
        """Take these options where saved tensors have several, and train these layers."""
        graphs = self._bundle.manifest.graphs
        changed = {name for name in self._chosen if graphs[name].choices} if selection != self._selection else set()
        changed |= STEP_GRAPHS & self._chosen.keys() if trained != self._trained else set()
        self._selection, self._trained = dict(selection), trained
        for graph in changed:
            del self._chosen[graph]
            self._sessions = {key: session for key, session in self._sessions.items() if key[0] != graph}

    def limit(self, device_bytes: int | None) -> None:
        """Set ``gpu_mem_limit`` of the graphs that are loaded from now on; each has an allocator of its own."""
        self._providers = providers(self._ort.get_available_providers(), device_bytes)

    def pack(self, packed: bool) -> None:
        """Keep the tensors of a run in one block. Measured with the train steps of ResNet-18 and MobileNetV2 (last 4,
        B = 64): a fifth of the page faults."""
        if packed != self._packed:
            self._packed = packed
            self._sessions.clear()
        elif packed:
            # The layout of the first shapes stays: the runtime tells shapes apart by the exclusive or of all extents,
            # in which two inputs of one batch cancel out. New shapes would get the old block, and not fit into it.
            self._sessions = {key: one for key, one in self._sessions.items() if key[0] not in CALLED_WITH_PLANS}

    def load(self, graph: str) -> None:
        """Load every stage of ``graph``."""
        for stage in range(len(self._spec(graph).run_stages())):
            self._session(graph, stage)

    def put(self, array: Array) -> Handle:
        """Return ``array`` as an OrtValue; on a CPU without a copy."""
        # not ascontiguousarray, which gives a scalar an axis
        return self._ort.OrtValue.ortvalue_from_numpy(np.asarray(array, order="C"), self._device, 0)

    def get(self, handle: Handle) -> Array:
        """Return the contents of an OrtValue."""
        array: Array = handle.numpy()
        return array

    def run(
        self,
        graph: str,
        feeds: Mapping[str, Handle],
        outputs: Sequence[str],
        into: Mapping[str, Handle] | None = None,
        stage: int = 0,
    ) -> dict[str, Handle]:
        """Run one stage of ``graph``."""
        return self._run(self._session(graph, stage), graph, stage, feeds, outputs, into or {})

    def _run(
        self,
        session: Any,
        graph: str,
        stage: int,
        feeds: Mapping[str, Handle],
        outputs: Sequence[str],
        into: Mapping[str, Handle],
    ) -> dict[str, Handle]:
        binding = session.io_binding()
        inputs = self._spec(graph).run_stages()[stage].inputs
        check_feeds(graph, inputs, feeds)
        for name in inputs:
            binding.bind_ortvalue_input(name, feeds[name])
        for name in outputs:
            if name in into:
                binding.bind_ortvalue_output(name, into[name])
            else:
                binding.bind_output(name, self._device)
        try:
            session.run_with_iobinding(binding)
        except Exception as error:  # onnxruntime raises its own kinds, none of them public
            if is_exhaustion(error):
                raise exhausted(f"graph '{graph}' of onnxruntime", error) from error
            raise EngineError(f"onnxruntime failed in graph '{graph}': {error}") from error
        # An output keeps its binding alive, and with it everything else that is bound: let go of the inputs at least.
        binding.clear_binding_inputs()
        return dict(zip(outputs, binding.get_outputs(), strict=True))

    def settle(self) -> None:
        """Give small freed blocks back to the system."""
        if self._device == "cpu":
            heap.trim()

    def verify_order(self, graph: str, feeds: Mapping[str, Handle]) -> None:
        """Profile one run of every stage of ``graph`` and compare the executed order with the emitted one."""
        events: list[Mapping[str, Any]] = []
        known = dict(feeds)
        for stage, spec in enumerate(self._spec(graph).run_stages()):
            with tempfile.TemporaryDirectory(prefix="edgetune-") as scratch:
                # Of its own, and then dropped: after end_profiling it goes on to record each parallel loop (8 bytes),
                # for as long as it lives.
                self._sessions.pop((graph, stage), None)
                session = self._loaded(graph, stage, profile=Path(scratch) / "order")
                known |= self._run(session, graph, stage, known, spec.outputs, {})
                events += json.loads(Path(session.end_profiling()).read_text("utf-8"))
                del session
        check_order(graph, self._spec(graph).nodes, events)

    def _spec(self, graph: str) -> GraphSpec:
        if graph not in self._chosen:
            self._chosen[graph] = chosen_graph(self._bundle, graph, self._selection, self._trained)
        return self._chosen[graph].spec

    def _model(self, graph: str, stage: int) -> str | bytes:
        """Return the file that holds one stage of ``graph``; where a plan chose from it, what remains of it."""
        spec = self._spec(graph)
        chosen = self._chosen[graph]
        stages = spec.run_stages()
        # A stage that was cut after the export has no file of its own.
        if stages[stage].file and is_whole(self._bundle.manifest.graphs[graph], chosen):
            return str(self._bundle.path / stages[stage].file)
        begin = stages[stage - 1].end if stage else 0
        wires = spec.wires[begin : stages[stage].end]
        uses = {use.name: use for use in spec.tensors}
        read = {name for wire in wires for name in wire.inputs}
        ports = [
            [Port(name, uses[name].dtype, uses[name].shape) for name in names]
            for names in (stages[stage].inputs, stages[stage].outputs)
        ]
        constants = {name for name in read if uses[name].kind == "constant"}
        whole = (self._bundle.path / spec.flat_file).read_bytes()
        nodes = chosen.kept[begin : stages[stage].end]
        return assemble(whole, nodes, chosen.renamed, ports[0], ports[1], constants, chosen.absent)

    def _session(self, graph: str, stage: int) -> Any:
        if (graph, stage) not in self._sessions:
            self._sessions[graph, stage] = self._loaded(graph, stage)
        return self._sessions[graph, stage]

    def _loaded(self, graph: str, stage: int, profile: Path | None = None) -> Any:
        options = self._options(graph)
        if profile is not None:
            options.enable_profiling = True
            options.profile_file_prefix = str(profile)
        model = self._model(graph, stage)
        if isinstance(model, bytes):
            options.add_session_config_entry(_WEIGHTS_FOLDER, str(self._bundle.path.resolve()))
        try:
            return self._ort.InferenceSession(model, options, providers=self._providers)
        except Exception as error:
            name = f"graph '{graph}' of {self._bundle.path}"
            if is_exhaustion(error):
                raise exhausted(f"loading {name}", error) from error
            raise EngineError(f"onnxruntime {self._ort.__version__} cannot load {name}: {error}") from error

    def _options(self, graph: str) -> Any:
        ort = self._ort
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = self._threads
        options.inter_op_num_threads = 1
        options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
        # An arena keeps what it got and would hide every byte that a codec frees.
        options.enable_cpu_mem_arena = False
        # Buffers planned ahead lie in one block, which leaves gaps, but costs a fifth of the page faults.
        options.enable_mem_pattern = self._packed
        # Reuse of a dead buffer by a later tensor keeps it allocated in between.
        options.enable_mem_reuse = False
        if graph == "trunk":
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        else:
            # Fused nodes are appended and lose their place; the emitted order is what the memory plan rests on.
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
            options.execution_order = ort.ExecutionOrder.PRIORITY_BASED
        return options


def check_order(graph: str, emitted: Sequence[str], events: Sequence[Mapping[str, Any]]) -> None:
    """Compare the kernel events of a profile, which come in the order of execution, with the emitted node names.

    Raises:
        EngineError: a node is missing, or ran at another place; the message names the first one.
    """
    known = set(emitted)
    suffix = "_kernel_time"
    kernels = (e["name"] for e in events if e.get("cat") == "Node" and e["name"].endswith(suffix))
    names = [name.removesuffix(suffix) for name in kernels]
    executed = [name for name in names if name in known]
    for place, expected in enumerate(emitted):
        found = executed[place] if place < len(executed) else "nothing"
        if found != expected:
            raise EngineError(
                f"graph '{graph}': the runtime executes '{found}' where '{expected}' was emitted (place {place} of "
                f"{len(emitted)}), so the memory plan does not hold; onnxruntime 1.23 and 1.31 keep the order"
            )
