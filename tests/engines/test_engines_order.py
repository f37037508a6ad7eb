"""The emitted order of nodes is the executed one, and a runtime that changes it is refused."""

from __future__ import annotations

import dataclasses
import gc
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st

import edgetune
from edgetune.bundle import Bundle
from edgetune.engines.onnxruntime import OnnxRuntime, check_order
from edgetune.errors import EngineError
from tests.engines.workshop import CODECS, bundle_of, plan_of, remade


def events(names: Sequence[str]) -> list[dict[str, Any]]:
    """Return a profile as onnxruntime writes it, with what is no kernel of the graph in between."""
    found: list[dict[str, Any]] = [{"cat": "Session", "name": "model_run"}]
    for name in names:
        found += [{"cat": "Node", "name": f"{name}_fence_before"}, {"cat": "Node", "name": f"{name}_kernel_time"}]
        found.append({"cat": "Node", "name": "inside of a Scan_kernel_time"})
    return found


NAMES = st.lists(st.text(min_size=1, max_size=5), min_size=2, max_size=12, unique=True)


@given(NAMES)
def test_the_emitted_order_is_accepted(names: list[str]) -> None:
    check_order(
        "train", [f"{i}:{name}" for i, name in enumerate(names)], events([f"{i}:{n}" for i, n in enumerate(names)])
    )


@given(NAMES, st.data())
def test_two_swapped_nodes_are_found(names: list[str], data: st.DataObject) -> None:
    emitted = [f"{i}:{name}" for i, name in enumerate(names)]
    i = data.draw(st.integers(0, len(emitted) - 2))
    j = data.draw(st.integers(i + 1, len(emitted) - 1))
    executed = list(emitted)
    executed[i], executed[j] = executed[j], executed[i]
    with pytest.raises(EngineError) as caught:
        check_order("train", emitted, events(executed))
    # the first of the two places is the one that is named
    assert f"'{emitted[j]}' where '{emitted[i]}'" in str(caught.value) and f"place {i} of" in str(caught.value)


@given(NAMES, st.data())
def test_a_missing_node_is_found(names: list[str], data: st.DataObject) -> None:
    emitted = [f"{i}:{name}" for i, name in enumerate(names)]
    i = data.draw(st.integers(0, len(emitted) - 1))
    with pytest.raises(EngineError, match=f"place {i} of {len(emitted)}"):
        check_order("train", emitted, events(emitted[:i] + emitted[i + 1 :]))


def test_a_profile_without_kernels_proves_nothing() -> None:
    with pytest.raises(EngineError, match="executes 'nothing'"):
        check_order("train", ["0:a"], [])


@pytest.mark.parametrize("codec", CODECS)
def test_the_real_runtime_keeps_the_order(codec: str) -> None:
    bundle = bundle_of(codec)
    edgetune.TrainingSession(bundle, plan_of(bundle), verify=True)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("level", ["ORT_ENABLE_EXTENDED", "ORT_ENABLE_ALL"])
def test_a_runtime_that_optimises_is_refused(codec: str, level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    emitted = OnnxRuntime._options

    def optimising(self: OnnxRuntime, graph: str) -> Any:
        options = emitted(self, graph)
        options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
        return options

    bundle = bundle_of(codec)
    plan = plan_of(bundle)
    monkeypatch.setattr(OnnxRuntime, "_options", optimising)
    with pytest.raises(EngineError, match="graph 'train': the runtime executes"):
        edgetune.TrainingSession(bundle, plan)


def test_a_runtime_with_an_order_of_its_own_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    emitted = OnnxRuntime._options

    def unordered(self: OnnxRuntime, graph: str) -> Any:
        options = emitted(self, graph)
        options.execution_order = onnxruntime.ExecutionOrder.DEFAULT
        return options

    bundle = bundle_of("hosvd")
    plan = plan_of(bundle)
    monkeypatch.setattr(OnnxRuntime, "_options", unordered)
    with pytest.raises(EngineError, match="the memory plan does not hold"):
        edgetune.TrainingSession(bundle, plan)
    edgetune.TrainingSession(bundle, plan, verify=False)


def swapped(bundle: Bundle, target: Path, place: int) -> Bundle:
    """Return a copy of ``bundle`` whose manifest names two neighbours of the train graph the other way round."""
    train = bundle.manifest.graphs["train"]
    nodes = list(train.nodes)
    nodes[place], nodes[place + 1] = nodes[place + 1], nodes[place]
    graphs = {**bundle.manifest.graphs, "train": dataclasses.replace(train, nodes=tuple(nodes))}
    return remade(bundle, target, graphs=graphs)


@pytest.mark.parametrize("part", ["first", "second stage", "last"])
def test_a_manifest_with_another_order_is_refused(tmp_path: Path, part: str) -> None:
    bundle = bundle_of("hosvd")
    train = bundle.manifest.graphs["train"]
    place = {"first": 0, "second stage": train.run_stages()[0].end, "last": len(train.nodes) - 2}[part]
    other = swapped(bundle, tmp_path / "bundle", place)
    with pytest.raises(EngineError, match=f"place {place} of {len(train.nodes)}"):
        edgetune.TrainingSession(other, plan_of(bundle))


def test_the_order_is_proven_for_every_graph_but_the_trunk() -> None:
    bundle = bundle_of("svd")
    manifest, runtime = bundle.manifest, OnnxRuntime(bundle)
    feeds = {spec.name: np.zeros((2, *spec.shape), np.float32) for spec in manifest.features}
    feeds |= bundle.initial_parameters()
    for graph in ("predict", "calibrate"):
        runtime.verify_order(graph, {name: runtime.put(value) for name, value in feeds.items()})


def test_no_profiled_session_is_left_to_train_with(monkeypatch: pytest.MonkeyPatch) -> None:
    # onnxruntime 1.31: after end_profiling, 12,000 runs of twenty loops add 2 MB to what such a session holds
    profiled = list[weakref.ref[onnxruntime.InferenceSession]]()

    class Watched(onnxruntime.InferenceSession):  # type: ignore[misc]
        def __init__(self, model: object, options: onnxruntime.SessionOptions, **others: object) -> None:
            super().__init__(model, options, **others)
            if options.enable_profiling:
                profiled.append(weakref.ref(self))

    monkeypatch.setattr(onnxruntime, "InferenceSession", Watched)
    bundle = bundle_of("hosvd")
    session = edgetune.TrainingSession(bundle, plan_of(bundle))
    assert len(profiled) == len(bundle.manifest.graphs["train"].run_stages())
    gc.collect()
    assert [one() for one in profiled] == [None] * len(profiled)
    del session
