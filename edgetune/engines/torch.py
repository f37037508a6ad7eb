"""The engine for computers that have torch: interprets the bundle's graphs node by node, on a CPU or with CUDA.

It runs the readable graphs, in which one model-local function stands for one idea, so that a native kernel can take the
place of a function (torch_ops/native.py); all other functions are inlined. Imported lazily. Knows the bundle, torch and
onnx.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from edgetune.bundle import Array, Bundle, GraphSpec
from edgetune.engines import heap
from edgetune.engines.exhaustion import exhausted, is_exhaustion
from edgetune.engines.runtime import STEP_GRAPHS, Handle, check_feeds, chosen_graph, is_whole
from edgetune.errors import EngineError, choices

try:
    import onnx
    from onnx import inliner
except ImportError as error:
    raise EngineError(
        f"the torch engine reads graphs with the package 'onnx', which cannot be imported ({error}); install onnx, or "
        "run with --engine onnxruntime"
    ) from None

from edgetune.engines.torch_ops.arena import ARENA
from edgetune.engines.torch_ops.fusion import fuse
from edgetune.engines.torch_ops.native import native_kernel
from edgetune.engines.torch_ops.program import Program, Setting
from edgetune.engines.torch_ops.weights import Weights

DEVICES = ("cpu", "cuda")


def cuda_is_available() -> bool:
    """Tell whether torch sees a CUDA device."""
    return torch.cuda.is_available()


class TorchRuntime:
    """Runs the graphs of a bundle with torch. See :class:`edgetune.engines.runtime.Runtime` for its laws."""

    name = "torch"

    def __init__(
        self,
        bundle: Bundle,
        *,
        device: str | None = None,
        threads: int | None = None,
        double: bool = False,
        native: bool = True,
    ) -> None:
        """Load nothing yet.

        Args:
            device: ``cpu`` or ``cuda``; None takes CUDA where there is a device.
            threads: how many threads a CPU kernel may use; None takes all that the process may run on.
            double: compute in float64: what is float32 in the bundle and in what is put becomes float64.
            native: let native kernels stand in for functions.

        Raises:
            EngineError: no such device, or torch sees none.
        """
        name = device or ("cuda" if cuda_is_available() else "cpu")
        if name not in DEVICES:
            raise EngineError(f"the torch engine has no device '{name}'; choose one of: {choices(DEVICES)}")
        if name == "cuda" and not cuda_is_available():
            raise EngineError("torch sees no CUDA device; install a build of torch for CUDA, or use the device cpu")
        self._bundle = bundle
        self._device, self._double = torch.device(name), double
        self._native = native
        self._weights = Weights(bundle.path, bundle.manifest.files, self._device, double=double)
        self._programs: dict[str, tuple[Program, ...]] = {}
        self._selection: dict[str, str] = {}
        self._trained: int | None = None
        torch.set_num_threads(threads or len(os.sched_getaffinity(0)))
        if name == "cpu":
            heap.return_memory_to_the_system()
            heap.keep_blocks()
            ARENA.reserve()  # now: a limit on data that is set later would forbid it

    def choose(self, selection: Mapping[str, str], trained: int | None = None) -> None:
        """Take these options where saved tensors have several, and train these layers."""
        graphs = self._bundle.manifest.graphs
        changed = {name for name in self._programs if graphs[name].choices} if selection != self._selection else set()
        changed |= STEP_GRAPHS if trained != self._trained else set()
        self._selection, self._trained = dict(selection), trained
        self._programs = {name: made for name, made in self._programs.items() if name not in changed}

    def pack(self, packed: bool) -> None:
        """Nothing: this engine has a memory of its own."""

    def limit(self, device_bytes: int | None) -> None:
        """Set what torch's CUDA allocator may take, at once."""
        if self._device.type == "cuda":
            total_bytes = torch.cuda.get_device_properties(self._device).total_memory
            fraction = 1.0 if device_bytes is None else min(1.0, max(0, device_bytes) / total_bytes)
            torch.cuda.set_per_process_memory_fraction(fraction, self._device)

    def load(self, graph: str) -> None:
        """Compile every stage of ``graph``.

        Raises:
            EngineError: the bundle has no such graph, or the engine does not know one of its operators.
        """
        if graph in self._programs:
            return
        chosen = chosen_graph(self._bundle, graph, self._selection, self._trained)
        spec = chosen.spec
        model = onnx.load_model(str(self._bundle.path / spec.file), load_external_data=False)
        if not is_whole(self._bundle.manifest.graphs[graph], chosen):
            _take(model, self._selection, spec.outputs, chosen.absent)
        with torch.inference_mode():
            stages = self._stages(model, spec, native=self._native)
            if stages is None:  # a native kernel stands on both sides of the boundary between two stages
                stages = self._stages(model, spec, native=False)
        if stages is None:
            raise EngineError(
                f"graph '{graph}': the stages that the manifest lists are not those of {spec.file}; export the bundle "
                "again"
            )
        self._programs[graph] = stages

    def _stages(self, model: onnx.ModelProto, spec: GraphSpec, *, native: bool) -> tuple[Program, ...] | None:
        """Compile the stages of ``model``; None if a stage reads what the manifest does not say that it reads."""
        found = {f.name: native_kernel(f) if native else None for f in model.functions}
        functions = {name: kernel for name, kernel in found.items() if kernel is not None}
        inlined = [(f.domain, f.name) for f in model.functions if f.name not in functions]
        flat = inliner.inline_selected_functions(model, inlined) if inlined else model
        opset = max(entry.version for entry in flat.opset_import if entry.domain in ("", "ai.onnx"))
        setting = Setting(opset, self._weights.read, self._device, functions, self._double)
        constants = {tensor.name: self._weights.read(tensor) for tensor in flat.graph.initializer}
        nodes, begin, programs = list(flat.graph.node), 0, []
        numbers = {value.name for value in flat.graph.input if not value.type.tensor_type.shape.dim}
        stages = spec.run_stages()
        for index, stage in enumerate(stages):
            wanted = set(stage.outputs)
            made = [i for i, node in enumerate(nodes) if wanted.intersection(node.output)]
            end = len(nodes) if index + 1 == len(stages) else max(made, default=-1) + 1
            piece = fuse(nodes[begin:end], stage.outputs, numbers) if native else nodes[begin:end]
            program = Program(piece, stage.inputs, stage.outputs, constants, setting)
            if program.captures:
                return None
            programs.append(program)
            begin = end
        return tuple(programs)

    def put(self, array: Array) -> Handle:
        """Return ``array`` as a tensor; on a CPU without a copy."""
        array = np.asarray(array, order="C")
        value = torch.from_numpy(array if array.flags.writeable else array.copy())
        if self._double and value.dtype == torch.float32:
            value = value.double()
        return value.to(self._device)

    def get(self, handle: Handle) -> Array:
        """Return the contents of a tensor; on a CPU a view."""
        array: Array = handle.cpu().numpy()
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
        self.load(graph)
        program = self._programs[graph][stage]
        check_feeds(graph, program.inputs, feeds)
        unknown = [name for name in outputs if name not in program.outputs]
        if unknown:
            raise EngineError(f"graph '{graph}' makes no '{unknown[0]}'; it makes: {choices(program.outputs)}")
        # TF32 keeps ten bits of a product's mantissa, and cudnn would choose it by itself.
        with torch.inference_mode(), torch.backends.cudnn.flags(benchmark=False, deterministic=True, allow_tf32=False):
            try:
                return dict(program.run(feeds, outputs, into))
            except EngineError as error:
                if is_exhaustion(error):
                    raise exhausted(f"graph '{graph}' of torch", error) from error
                raise EngineError(f"graph '{graph}': {error}") from error

    def settle(self) -> None:
        """Give small freed blocks back to the system; what large tensors take at the peak is kept for the next step.

        ``heap.trim`` gives that back too. CUDA's allocator keeps what it has.
        """
        if self._device.type == "cpu":
            heap.trim_blocks()

    def verify_order(self, graph: str, feeds: Mapping[str, Handle]) -> None:
        """Load ``graph``, which checks that every operator is known; the interpreter keeps the order by itself."""
        self.load(graph)


def _take(model: onnx.ModelProto, selection: Mapping[str, str], outputs: Sequence[str], absent: frozenset[str]) -> None:
    """Make of the readable graph what ``selection`` leaves of it (see ``planning.selection``), without ``absent``."""
    taken: dict[str, str] = {}
    for node in model.graph.node:
        if node.op_type == "Choose":
            attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
            labels = [label.decode() for label in attributes["options"]]
            taken[node.output[0]] = node.input[labels.index(selection[attributes["saved"].decode()])]
    for name in taken:
        while taken[name] in taken:
            taken[name] = taken[taken[name]]
    final = {taken[name]: name for name in outputs if name in taken}
    nodes = []
    needed = {taken.get(name, name) for name in outputs}
    for node in reversed(model.graph.node):
        if node.op_type != "Choose" and needed.intersection(node.output):
            node.input[:] = [taken.get(name, name) for name in node.input if name not in absent]
            needed.update(node.input)
            nodes.append(node)
    for node in nodes:
        node.input[:] = [final.get(name, name) for name in node.input]
        node.output[:] = [final.get(name, name) for name in node.output]
    kept = [onnx.NodeProto.FromString(node.SerializeToString()) for node in reversed(nodes)]
    del model.graph.node[:]
    model.graph.node.extend(kept)
