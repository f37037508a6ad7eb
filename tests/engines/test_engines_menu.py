"""Bundles from whose codecs a plan chooses for every saved tensor: on both engines, with the memory foretold."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

import edgetune
from edgetune.api import calibrate_bundle
from edgetune.bundle import Array, Bundle, Manifest
from edgetune.engines.session import TrainingSession
from edgetune.errors import BudgetError, UsageError
from edgetune.export.bundling import ExportOptions, export_bundle
from edgetune.export.source import signatures_of
from edgetune.planning.memory import peak
from edgetune.planning.plan import Plan, make_plan
from edgetune.planning.selection import check_codec, choose, default_selection, settle
from edgetune.planning.sizes import nbytes
from edgetune.planning.spectra import identity_calibration, ranks_at
from tests.autodiff.parity import relative_error
from tests.engines.workshop import _SHELF, Residual, samples

MENU = "hosvd+dense+svd+recompute"
BATCH = 6


@functools.cache
def menu_bundle() -> Bundle:
    torch.manual_seed(3)
    model = Residual(3, (16, 24), 2, 5).eval()
    return edgetune.export(model, torch.zeros(1, 3, 16, 16), Path(_SHELF.name) / "menu", last=4, codec=MENU)


def plan_for(bundle: Bundle, selection: dict[str, str], epsilon: float = 1.0) -> Plan:
    """Return a plan of full ranks (or of unit bases cut at ``epsilon``) with this selection."""
    settled = settle(bundle.manifest, selection)
    calibration = identity_calibration(settled, BATCH)
    plan = make_plan(bundle.manifest, batch=BATCH, calibration=None, epsilon=1.0, runtime_bytes=0)
    ranks = ranks_at(settled, calibration, epsilon, BATCH)
    return dataclasses.replace(plan, selection=selection, ranks=ranks, calibration=calibration)


def mixed(bundle: Bundle, start: int) -> dict[str, str]:
    """Return a selection that takes the options of one saved tensor after the other in turn."""
    labels = {spec.name: [option.label for option in spec.options] for spec in bundle.manifest.saved}
    return {name: known[(start + i) % len(known)] for i, (name, known) in enumerate(labels.items())}


def gradients(bundle: Bundle, plan: Plan, engine: str) -> dict[str, Array]:
    x, y = samples(BATCH, bundle.manifest.inputs[0].shape)
    return TrainingSession(bundle, plan, engine=engine).gradients(x, y)[1]


@functools.cache
def exact() -> dict[str, Array]:
    bundle = menu_bundle()
    return gradients(bundle, plan_for(bundle, default_selection(bundle.manifest, "dense")), "onnxruntime")


@pytest.mark.parametrize("engine", ["onnxruntime", "torch"])
@pytest.mark.parametrize("start", range(4))
def test_every_mix_of_codecs_has_the_same_gradients_where_nothing_is_cut(start: int, engine: str) -> None:
    bundle = menu_bundle()
    found = gradients(bundle, plan_for(bundle, mixed(bundle, start)), engine)
    assert found.keys() == exact().keys()
    errors = {name: relative_error(found[name], value) for name, value in exact().items()}
    assert max(errors.values()) <= 1e-5, errors


def test_where_ranks_are_cut_only_the_layers_of_that_codec_are_touched() -> None:
    bundle = menu_bundle()
    selection = default_selection(bundle.manifest, "dense")
    cut = next(spec for spec in bundle.manifest.saved if spec.lossy)
    found = gradients(bundle, plan_for(bundle, {**selection, cut.name: "hosvd"}, 0.3), "onnxruntime")
    changed = {name for name, value in exact().items() if relative_error(found[name], value) > 1e-4}
    assert changed == {layer.weight for layer in bundle.manifest.layers if layer.saved == cut.name}


@pytest.mark.parametrize("engine", ["onnxruntime", "torch"])
def test_a_session_changes_codecs_between_two_steps(engine: str) -> None:
    bundle = menu_bundle()
    x, y = samples(BATCH, bundle.manifest.inputs[0].shape)
    one = TrainingSession(bundle, plan_for(bundle, mixed(bundle, 0)), engine=engine)
    other = TrainingSession(bundle, plan_for(bundle, default_selection(bundle.manifest, "dense")), engine=engine)
    for start in range(3):
        one.set_plan(plan_for(bundle, mixed(bundle, start)))
        assert one.step(x, y) == pytest.approx(other.step(x, y), rel=1e-5)
    for name, value in other.parameters().items():
        assert relative_error(one.parameters()[name], value) <= 1e-5, name


def test_a_chosen_graph_has_no_trace_of_the_other_codecs(tmp_path: Path) -> None:
    """What is loaded is checked by onnx, and equals what the manifest says of nodes, inputs and outputs."""
    from edgetune.engines.onnxruntime import OnnxRuntime

    bundle = menu_bundle()
    for start in range(4):
        selection = mixed(bundle, start)
        runtime = OnnxRuntime(bundle)
        runtime.choose(selection)
        spec = settle(bundle.manifest, selection).graphs["train"]
        names: list[str] = []
        for index, stage in enumerate(spec.run_stages()):
            content = runtime._model("train", index)
            assert isinstance(content, bytes)
            model = onnx.ModelProto.FromString(content)
            names += [node.name for node in model.graph.node]
            assert [v.name for v in model.graph.input] == list(stage.inputs)
            assert [v.name for v in model.graph.output] == list(stage.outputs)
            assert all(node.op_type != "Choose" for node in model.graph.node)
            read = {name for node in model.graph.node for name in node.input}
            assert {t.name for t in model.graph.initializer} <= read
        assert tuple(names) == spec.nodes
        shifts = sum("EyeLike" in wire.op for wire in spec.wires)
        subspaces = sum(label in ("hosvd", "svd") for label in selection.values())
        assert shifts == subspaces, "one shifted Gram matrix for each Tucker codec, none for the others"


def test_choosing_recomputation_stores_nothing_and_reads_the_features() -> None:
    bundle = menu_bundle()
    dense = settle(bundle.manifest, default_selection(bundle.manifest, "dense")).graphs["train"]
    again = settle(bundle.manifest, default_selection(bundle.manifest, "recompute")).graphs["train"]
    symbols = {"batch": BATCH}
    kept = {
        name: sum(nbytes(u, symbols) for u in g.tensors if u.kind == "saved")
        for name, g in (("dense", dense), ("again", again))
    }
    assert kept["again"] < 0.5 * kept["dense"]
    assert not again.stages, "the features live on: the backward pass starts from them a second time"
    assert len(again.nodes) > len(dense.nodes)


def test_a_frozen_layers_input_that_is_read_again_is_planned_for(tmp_path: Path) -> None:
    """Recomputation starts from it, but nothing is left of what log8 would have stored."""
    torch.manual_seed(3)
    model, menu = Residual(3, (16, 24), 2, 5).eval(), "hosvd:storage=log8+recompute+dense"
    bundle = edgetune.export(model, torch.zeros(1, 3, 16, 16), tmp_path / "bundle", last=4, codec=menu)
    x, y = samples(BATCH, bundle.manifest.inputs[0].shape)
    calibration = calibrate_bundle(bundle, BATCH, [(x, y)], errors=True)

    def plan(budget: int, **how: Any) -> Plan:
        made_for: dict[str, Any] = {"calibration": calibration, "runtime_bytes": 0, "allocation": "per-layer", **how}
        return make_plan(bundle.manifest, batch=BATCH, budget_bytes=budget, **made_for)

    for trained in range(4):
        with pytest.raises(BudgetError, match="the least is") as refused:
            plan(1, trained=trained)
        least = plan(refused.value.least_bytes, trained=trained)
        assert least.trained == trained
        assert np.isfinite(TrainingSession(bundle, least).step(x, y))


def test_a_selection_must_name_every_tensor_and_an_option_of_it() -> None:
    manifest = menu_bundle().manifest
    selection = default_selection(manifest)
    first = manifest.saved[0].name
    with pytest.raises(UsageError, match=f"'{first}' cannot be kept as 'zip'.*dense, hosvd, recompute, svd"):
        settle(manifest, {**selection, first: "zip"})
    with pytest.raises(UsageError, match=f"lacks '{first}'"):
        settle(manifest, {name: label for name, label in selection.items() if name != first})
    with pytest.raises(UsageError, match="no codec 'zip'"):
        check_codec(manifest, "zip")


def test_lifetimes_are_those_of_a_bundle_that_has_this_codec_alone(tmp_path: Path) -> None:
    """The same codec, chosen from a menu or exported alone: no more bytes at any time than a sign mask explains."""
    torch.manual_seed(3)
    model = Residual(3, (16, 24), 2, 5).eval()
    menu = menu_bundle()
    for label in ("hosvd", "svd"):
        alone = edgetune.export(model, torch.zeros(1, 3, 16, 16), tmp_path / label, last=4, codec=label)
        plan = make_plan(alone.manifest, batch=BATCH, calibration=None, epsilon=1.0, runtime_bytes=0)
        chosen = settle(menu.manifest, default_selection(menu.manifest, label)).graphs["train"]
        assert peak(chosen, plan.symbols()).bytes == peak(alone.manifest.graphs["train"], plan.symbols()).bytes
        assert chosen.outputs == alone.manifest.graphs["train"].outputs
        assert [w.op for w in chosen.wires] == _operators(alone)


def _operators(bundle: Bundle) -> list[str]:
    flat = onnx.load(bundle.path / bundle.manifest.graphs["train"].flat_file, load_external_data=False)
    return [node.op_type for node in flat.graph.node]


def test_without_choices_a_graph_is_left_as_it_is() -> None:
    spec = menu_bundle().manifest.graphs["predict"]
    chosen = choose(spec, (), {})
    assert chosen.spec is spec and chosen.kept == tuple(range(len(spec.nodes))) and not chosen.renamed


# ---- what one step hands to the next ------------------------------------------------------------------------------

CARRYING = "asi+dense+asi:storage=float16+recompute"


@functools.cache
def carrying_bundle() -> Bundle:
    torch.manual_seed(3)
    model = Residual(3, (16, 24), 2, 5).eval()
    return edgetune.export(model, torch.zeros(1, 3, 16, 16), Path(_SHELF.name) / "carrying", last=2, codec=CARRYING)


def carrying(manifest: Manifest, label: str) -> set[str]:
    """Return the names of all inputs that this codec brings from one step to the next."""
    options = (option for spec in manifest.saved for option in spec.options if option.label == label)
    return {mode.input for option in options for mode in option.modes if mode.source == "carried"}


@pytest.mark.parametrize("label", CARRYING.split("+"))
def test_only_the_chosen_codec_hands_something_to_the_next_step(label: str) -> None:
    manifest = carrying_bundle().manifest
    assert carrying(manifest, "asi") == carrying(manifest, "asi:storage=float16") != set()
    chosen = settle(manifest, default_selection(manifest, label)).graphs["train"]
    made = {name.removeprefix("next/") for name in chosen.outputs if name.startswith("next/")}
    assert made == carrying(manifest, label)
    assert made == {name for name in chosen.inputs if ".carried." in name}


@pytest.mark.parametrize("engine", ["onnxruntime", "torch"])
def test_a_factor_goes_from_step_to_step_and_is_forgotten_by_codecs_without_one(engine: str) -> None:
    bundle = carrying_bundle()
    x, y = samples(BATCH, bundle.manifest.inputs[0].shape)
    session = TrainingSession(bundle, plan_for(bundle, default_selection(bundle.manifest, "dense")), engine=engine)
    for label in ("dense", "asi", "asi:storage=float16", "dense"):
        session.set_plan(plan_for(bundle, default_selection(bundle.manifest, label), 0.6))
        session.step(x, y)
        carried = {name.removeprefix("carried/") for name in session.state() if name.startswith("carried/")}
        assert carried == carrying(bundle.manifest, label)


# ---- values -------------------------------------------------------------------------------------------------------


class _Smooth(nn.Module):
    """Attention over tokens and a gated layer: what a rule wants of them are values, not signs."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 16, 4, stride=4)
        self.norm = nn.LayerNorm(16)
        self.qkv = nn.Linear(16, 48)
        self.up = nn.Linear(16, 32)
        self.down = nn.Linear(32, 16)
        self.head = nn.Linear(16, 5)

    def forward(self, image: Tensor) -> Tensor:
        x = self.patch(image).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(self.norm(x)).reshape(-1, 25, 3, 2, 8).permute(2, 0, 3, 1, 4)
        attention = torch.softmax(q @ k.transpose(-1, -2) / 8**0.5, -1)
        x = x + (attention @ v).transpose(1, 2).reshape(-1, 25, 16)
        x = x + self.down(torch.tanh(self.up(x)))
        out: Tensor = self.head(x.mean(1))
        return out


@functools.cache
def smooth_bundle(compress: str) -> Bundle:
    torch.manual_seed(1)
    options = ExportOptions(last="all", codec="hosvd+dense", compress=compress)
    image = signatures_of(torch.zeros(1, 3, 20, 20))
    return export_bundle(_Smooth().eval(), Path(_SHELF.name) / f"smooth-{compress}", options, image)


def test_values_are_kept_through_a_codec_only_where_all_is_compressed() -> None:
    layers, everything = smooth_bundle("layers").manifest, smooth_bundle("all").manifest
    assert all(spec.layers for spec in layers.saved)
    values = [spec for spec in everything.saved if not spec.layers]
    shapes = {spec.shape for spec in values}
    assert (2, 25, 25) in shapes, "the softmax of the attention"
    assert (25, 32) in shapes or any(s.shape == (25, 32) and s.layers for s in everything.saved), "the tanh"
    selection = default_selection(everything, "hosvd")
    assert {selection[spec.name] for spec in values} == {"hosvd"}
    kept = {}
    for name, manifest in (("layers", layers), ("all", everything)):
        graph = settle(manifest, default_selection(manifest, "hosvd")).graphs["train"]
        stored = {n for spec in manifest.saved for option in spec.options for n in option.stored}
        whole = [u.name for u in graph.tensors if u.kind == "saved" and "batch" in u.shape]
        kept[name] = [tensor for tensor in whole if tensor not in stored]
    assert len(kept["all"]) < len(kept["layers"]), "less is kept as it is"


@pytest.mark.parametrize("engine", ["onnxruntime", "torch"])
def test_at_full_ranks_compressed_values_change_no_gradient(engine: str) -> None:
    bundle = smooth_bundle("all")
    whole = gradients(bundle, plan_for(bundle, default_selection(bundle.manifest, "dense")), engine)
    found = gradients(bundle, plan_for(bundle, default_selection(bundle.manifest, "hosvd")), engine)
    scale = max(float(np.abs(value).max()) for value in whole.values())
    for name, value in whole.items():
        assert float(np.abs(found[name] - value).max()) <= 1e-5 * scale, name


def test_the_error_of_a_compressed_value_travels_to_earlier_layers() -> None:
    bundle = smooth_bundle("all")
    selection = default_selection(bundle.manifest, "dense")
    (softmax,) = (spec.name for spec in bundle.manifest.saved if spec.shape == (2, 25, 25))
    whole = gradients(bundle, plan_for(bundle, selection), "onnxruntime")
    found = gradients(bundle, plan_for(bundle, {**selection, softmax: "hosvd"}, 0.5), "onnxruntime")
    changed = {name for name, value in whole.items() if relative_error(found[name], value) > 1e-3}
    assert "qkv.weight" in changed and "patch.weight" in changed
    assert not changed & {"down.weight", "up.weight", "head.weight"}


@pytest.mark.parametrize("compress", ["none", "layer"])
def test_what_is_compressed_is_one_of_two(compress: str) -> None:
    with pytest.raises(UsageError, match=f"'{compress}'.*all, layers"):
        ExportOptions(compress=compress).check()
