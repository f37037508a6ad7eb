"""What lies around the run of a graph, held to what numpy takes for it."""

from __future__ import annotations

import dataclasses

import pytest

from edgetune.bundle import GraphSpec, TensorUse
from edgetune.planning.memory import peak
from edgetune.planning.workspace import around_calibration

FEATURE = TensorUse("x", ("batch", "8"), "float32", "feature", -1, 1, "x")


def graph(*grams: tuple[int, int], scratch: int = 0) -> GraphSpec:
    """A graph that makes Gram matrices [groups, n, n] of ``x``, with a tensor of ``scratch`` elements meanwhile."""
    outputs = [
        TensorUse(f"gram/{i}", (str(g), str(n), str(n)), "float32", "output", 0, 1, f"gram/{i}")
        for i, (g, n) in enumerate(grams)
    ]
    between = TensorUse("t", (str(scratch),), "float32", "transient", 0, 0, "t")
    names = tuple(use.name for use in outputs)
    return GraphSpec("c", "c", ("x",), names, ("gram",), (FEATURE, *outputs, between))


def around(spec: GraphSpec, batch: int = 4) -> tuple[str, int]:
    symbols = {"batch": batch}
    found = around_calibration(spec, symbols, peak(spec, symbols))
    assert found.bytes == sum(tensor.bytes for tensor in found.live)
    return found.node_name, found.bytes


def test_the_solver_is_the_worst_of_one_large_matrix() -> None:
    # sums in float64, four such matrices beside
    assert around(graph((1, 100))) == ("eigenvectors", 100 * 100 * (8 + 4 * 8))


def test_the_copies_are_the_worst_of_many_small_ones() -> None:
    name, size = around(graph(*[(1, 10)] * 50), batch=1000)
    assert (name, size) == ("copies of the Gram matrices", 4 * 8000 + 50 * 100 * (8 + 4 + 4) + 8 * 100)


def test_the_graph_is_the_worst_where_activations_are_large_and_the_sums_lie_beside_it() -> None:
    assert around(graph((1, 10), scratch=10**6)) == ("gram", 4 * 10**6 + 4 * 32 + 100 * (4 + 8))


def test_groups_are_solved_one_at_a_time() -> None:
    assert around(graph((3, 50)))[1] == 3 * 2500 * (8 + 4) + 2500 * (32 - 4)


def test_counts_have_no_eigenvectors() -> None:
    spec = graph((1, 10))
    counts = dataclasses.replace(spec.tensors[1], shape=("1000",))
    name, size = around(dataclasses.replace(spec, tensors=(FEATURE, counts)), batch=1)
    assert name == "copies of the Gram matrices" and size == 4 * 8 + 1000 * (8 + 4 + 4)


def test_the_solver_takes_what_is_counted() -> None:
    """In a fresh process: the high-water mark of one solution of a matrix of 8 MiB, above the matrix itself."""
    import json
    import subprocess
    import sys

    program = (
        "import json, numpy as np\n"
        "from edgetune.planning.calibration import spectrum_of\n"
        "from edgetune.telemetry.process import PeakMeter, resident_bytes\n"
        "meter, n = PeakMeter(), 1024\n"
        "def gram():\n"
        "    x = np.random.default_rng(0).standard_normal((n, n)); return (x @ x.T)[None]\n"
        "spectrum_of(gram()[:, :64, :64])\n"
        "g = gram(); meter.reset(); before = resident_bytes(); s = spectrum_of(g)\n"
        "print(json.dumps([meter.resettable, meter.peak_bytes() - before]))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    resettable, taken = json.loads(done.stdout)
    if not resettable:
        pytest.skip("this kernel does not reset a process's high-water mark (/proc/self/clear_refs)")
    matrix = 8 * 1024**2
    assert taken == pytest.approx(4 * matrix, rel=0.05)
