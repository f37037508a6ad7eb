"""The ledger, line by line, and the phases that compete for the peak."""

from __future__ import annotations

import dataclasses
import math

import pytest

from edgetune.bundle import Manifest, SavedSpec
from edgetune.errors import BundleError, UsageError
from edgetune.planning.memory import peak
from edgetune.planning.prediction import Prediction, predict, saved_bytes_by_tensor
from tests.planning.synthetic import manifest, use

SHAPES = [(8, 6, 6), (16, 3, 3)]
RANKS = {"l0": {"b": 2, "c": 3, "h": 4, "w": 5}, "l1": {"b": 1, "c": 2, "h": 3, "w": 1}}
BATCH = 4


def run(described: Manifest, micro_batch: int = 1, batch: int = BATCH) -> Prediction:
    ranks = RANKS if described.codec != "dense" else {}
    return predict(described, batch=batch, micro_batch=micro_batch, ranks=ranks, runtime_bytes=1000)


def only(described: Manifest, *names: str) -> Manifest:
    return dataclasses.replace(described, graphs={name: described.graphs[name] for name in names})


def test_lines_that_are_always_there() -> None:
    described = manifest(SHAPES, slots=2, filler=3)
    ledger = run(described).ledger
    parameter_bytes = 4 * (8 * 8 * 9 + 16 * 16 * 9)
    assert ledger["runtime"] == 1000
    # The fillers' constants are in three graphs under the same names: one file holds them once.
    assert ledger["weights"] == 4 * (64 * 3 * 7 * 7 + 1000 + 3 * 48)
    assert ledger["parameters"] == parameter_bytes
    assert ledger["optimizer"] == 2 * parameter_bytes
    read = 4 * (BATCH * 2 + 8 * 3 + 6 * 4 + 6 * 5) + 4 * (BATCH * 1 + 16 * 2 + 3 * 3 + 3 * 1)
    full = 4 * (8**2 + 6**2 + 6**2) + 4 * (16**2 + 3**2 + 3**2)
    assert ledger["bases"] == read + full


@pytest.mark.parametrize("letters", ["bchw", "chw", ""])
@pytest.mark.parametrize("trunk", [True, False])
def test_the_ledger_sums_to_the_peak(letters: str, trunk: bool) -> None:
    found = run(manifest(SHAPES, letters=letters, trunk=trunk, workspace_elements=50))
    assert sum(found.ledger.values()) == found.peak_bytes
    fixed = sum(found.ledger[line] for line in ("runtime", "weights", "parameters", "optimizer", "bases"))
    assert found.peak_bytes - fixed == max(p.bytes for p in found.peaks.values())
    assert all(sum(t.bytes for t in p.live) == p.bytes for p in found.peaks.values())
    assert set(found.peaks) == {"train", "predict", "update"} | ({"trunk"} if trunk else set())
    graph, node = found.bottleneck.split("/")
    assert (found.peaks[graph].bytes, found.peaks[graph].node_name) == (
        max(p.bytes for p in found.peaks.values()),
        node,
    )


def test_train_phase_by_hand() -> None:
    """Two dense layers; node 2 differentiates the second: both inputs, two gradients of activations, one of weights."""
    described = only(manifest(SHAPES, letters=""), "train")
    x0, x1 = 4 * BATCH * 8 * 36, 4 * BATCH * 16 * 9
    # node 3, the last: the feature is held by the caller, x1 is gone, both weight gradients are there.
    gradients = 4 * (8 * 8 * 9 + 16 * 16 * 9)
    targets = 8 * BATCH
    expected = x0 + gradients + x0 + x1 + targets  # dy of layer 0 and, until it was used, of layer 1
    found = run(described)
    assert found.bottleneck == "train/node3"
    assert found.peaks["train"].bytes == expected
    lines = {line: found.ledger[line] for line in ("features", "saved", "gradients", "transient", "workspace")}
    assert lines == {"features": x0, "saved": 0, "gradients": gradients, "transient": x0 + x1 + targets, "workspace": 0}


def test_workspace_is_a_line_of_its_own() -> None:
    described = only(manifest(SHAPES, letters="", workspace_elements=10**6), "train")
    found = run(described)
    assert found.bottleneck == "train/node2"
    assert found.ledger["workspace"] == 4 * BATCH * 10**6


def test_trunk_phase_holds_its_inputs_and_the_features_of_the_whole_batch() -> None:
    described = only(manifest(SHAPES), "trunk")
    micro = 2
    feature, image, stem = 4 * 8 * 36, 4 * 3 * 1024, 4 * 64 * 1024
    # node 0: input, stem, the scratch of the stem; and, from earlier runs, the features.
    expected = micro * (image + stem + 4 * 9 * 1024) + BATCH * feature
    assert run(described, micro).peaks["trunk"].bytes == expected
    # The caller's input is not freed after its last use; nor does it count twice if the graph lists none.
    late = dataclasses.replace(described.graphs["trunk"], workspaces=())
    held = dataclasses.replace(described, graphs={"trunk": late})
    assert run(held, micro).peaks["trunk"].bytes == micro * (image + stem + feature) + BATCH * feature
    unlisted = dataclasses.replace(late, tensors=late.tensors[1:])
    again = dataclasses.replace(described, graphs={"trunk": unlisted})
    assert run(again, micro).peaks["trunk"].bytes == run(held, micro).peaks["trunk"].bytes


def test_update_phase_holds_gradients_and_no_features() -> None:
    described = only(manifest(SHAPES), "update")
    parameter_bytes = 4 * (8 * 8 * 9 + 16 * 16 * 9)
    found = run(described)
    assert found.ledger["gradients"] == parameter_bytes
    assert found.ledger["transient"] == parameter_bytes  # the new values, beside the old
    assert found.ledger["features"] == 0  # the session lets them go before


def test_calibrate_runs_at_the_whole_batch_and_predict_at_a_few() -> None:
    described = manifest(SHAPES)
    graphs = {"calibrate": described.graphs["predict"], "predict": described.graphs["predict"]}
    found = run(dataclasses.replace(described, graphs=graphs), micro_batch=1).peaks
    assert found["calibrate"].bytes == BATCH * found["predict"].bytes
    assert found["predict"].bytes >= peak(graphs["predict"], {"batch": 1}).bytes


def test_a_correction_is_a_line() -> None:
    described = manifest(SHAPES)
    plain = run(described)
    for correction in (-100, 100):
        found = predict(
            described, batch=BATCH, micro_batch=1, ranks=RANKS, runtime_bytes=1000, correction_bytes=correction
        )
        assert found.peak_bytes == plain.peak_bytes + correction
        assert found.ledger == {**plain.ledger, "correction": correction}


def test_saved_bytes_are_those_of_the_stored_tensors() -> None:
    ranks = RANKS["l0"]
    found = saved_bytes_by_tensor(manifest(SHAPES), batch=BATCH, ranks=RANKS)
    assert found["l0"] == {"l0.core": 4 * math.prod(ranks.values()), "l0.factor_b": 4 * BATCH * ranks["b"]}
    dense = saved_bytes_by_tensor(manifest(SHAPES, letters=""), batch=BATCH, ranks={})
    assert dense == {"l0": {"l0.x": 4 * BATCH * 8 * 36}, "l1": {"l1.x": 4 * BATCH * 16 * 9}}


def _storing(spec: SavedSpec, stored: tuple[str, ...]) -> SavedSpec:
    return dataclasses.replace(spec, options=(dataclasses.replace(spec.options[0], stored=stored),))


def test_a_dense_tensor_that_names_no_storage_stores_itself() -> None:
    described = manifest(SHAPES, letters="")
    saved = tuple(_storing(spec, ()) for spec in described.saved)
    found = saved_bytes_by_tensor(dataclasses.replace(described, saved=saved), batch=BATCH, ranks={})
    assert [sum(t.values()) for t in found.values()] == [4 * BATCH * 8 * 36, 4 * BATCH * 16 * 9]


def test_missing_ranks_and_tensors_are_named() -> None:
    described = manifest(SHAPES)
    with pytest.raises(UsageError, match=r"mode 'b' of 'l1'.*l0\.b, l0\.c"):
        predict(described, batch=1, micro_batch=1, ranks={"l0": RANKS["l0"]}, runtime_bytes=0)
    spec = _storing(described.saved[0], ("nowhere",))
    broken = dataclasses.replace(described, saved=(spec, described.saved[1]))
    with pytest.raises(BundleError, match="'nowhere'"):
        saved_bytes_by_tensor(broken, batch=1, ranks=RANKS)


def test_a_shape_with_a_stranger_is_an_error() -> None:
    described = manifest(SHAPES)
    train = described.graphs["train"]
    odd = dataclasses.replace(train, tensors=(*train.tensors, use("odd", "rank.l9.c", "saved", 0, 1)))
    with pytest.raises(BundleError, match=r"rank\.l9\.c"):
        run(dataclasses.replace(described, graphs={"train": odd}))
