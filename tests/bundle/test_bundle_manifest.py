"""The manifest: JSON that reads back equal, and refuses what it does not know."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgetune.bundle import FORMAT_VERSION, Manifest, TensorUse
from edgetune.errors import BundleError
from edgetune.plain import from_plain
from tests.engines.workshop import CODECS, bundle_of, plain


@pytest.mark.parametrize("codec", CODECS)
def test_a_manifest_reads_back_equal(codec: str) -> None:
    manifest = bundle_of(codec).manifest
    again = Manifest.from_json(manifest.to_json())
    assert again == manifest
    assert again.to_json() == manifest.to_json()


@dataclass(frozen=True)
class Leaf:
    text: str
    number: int
    ratio: float
    flag: bool
    maybe: str | None
    extent: int | None = None


@dataclass(frozen=True)
class Tree:
    leaves: tuple[Leaf, ...]
    table: Mapping[str, Leaf]
    nested: Mapping[str, Mapping[str, int]]
    anything: Any
    names: tuple[str, ...] = ()
    more: Mapping[str, float] = field(default_factory=dict)


FINITE = st.floats(allow_nan=False, allow_infinity=False)
INTEGERS = st.integers(-(2**53), 2**53)
LEAVES = st.builds(
    Leaf, st.text(), INTEGERS, FINITE, st.booleans(), st.none() | st.text(), st.none() | INTEGERS
)  # fmt: skip
PLAIN = st.recursive(
    st.none() | st.booleans() | INTEGERS | FINITE | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
TREES = st.builds(
    Tree,
    st.lists(LEAVES, max_size=3).map(tuple),
    st.dictionaries(st.text(), LEAVES, max_size=3),
    st.dictionaries(st.text(), st.dictionaries(st.text(), INTEGERS, max_size=2), max_size=2),
    PLAIN,
    st.lists(st.text(), max_size=3).map(tuple),
    st.dictionaries(st.text(), FINITE, max_size=3),
)


@given(TREES)
def test_from_plain_is_the_inverse_of_asdict_through_json(tree: Tree) -> None:
    assert from_plain(Tree, json.loads(json.dumps(dataclasses.asdict(tree))), "tree") == tree


USES = st.builds(
    TensorUse,
    st.text(),
    st.lists(st.text(), max_size=4).map(tuple),
    st.text(),
    st.text(),
    INTEGERS,
    INTEGERS,
    st.text(),
)


@given(USES)
def test_a_tensor_use_reads_back_equal(use: TensorUse) -> None:
    assert from_plain(TensorUse, json.loads(json.dumps(dataclasses.asdict(use))), "use") == use


@given(TREES, st.sampled_from(["leaves", "table", "nested", "anything"]))
def test_a_field_without_a_default_may_not_be_missing(tree: Tree, name: str) -> None:
    data = dataclasses.asdict(tree)
    del data[name]
    with pytest.raises(BundleError, match=rf"tree: .*missing fields \['{name}'\]"):
        from_plain(Tree, data, "tree")


@given(TREES)
def test_fields_with_defaults_may_be_missing(tree: Tree) -> None:
    data = dataclasses.asdict(tree)
    del data["names"], data["more"]
    assert from_plain(Tree, data, "tree") == dataclasses.replace(tree, names=(), more={})


@given(LEAVES, st.text().filter(lambda name: name not in {f.name for f in dataclasses.fields(Leaf)}))
def test_an_unknown_field_is_named(leaf: Leaf, name: str) -> None:
    with pytest.raises(BundleError, match="unknown fields") as caught:
        from_plain(Leaf, {**dataclasses.asdict(leaf), name: 1}, "leaf")
    assert repr(name) in str(caught.value)


WRONG_FOR: dict[str, list[Any]] = {
    "text": [1, None, [], {}],
    "number": [True, 1.5, "1", None],
    "ratio": [True, "1.0", None],
    "flag": [0, 1, "true", None],
    "maybe": [1, ["a"]],
    "extent": [1.5, True, "3"],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG_FOR.items() for value in values])
def test_a_value_of_the_wrong_type_is_refused_with_its_place(name: str, value: Any) -> None:
    good = dataclasses.asdict(Leaf("a", 1, 0.5, True, None))
    with pytest.raises(BundleError, match=rf"tree\.leaves\[1\]\.{name}: expected"):
        from_plain(Tree, {"leaves": [good, {**good, name: value}], "table": {}, "nested": {}, "anything": 0}, "tree")


def test_an_integer_is_a_float_where_one_is_expected() -> None:
    leaf = from_plain(Leaf, {"text": "", "number": 1, "ratio": 2, "flag": False, "maybe": None}, "leaf")
    assert isinstance(leaf.ratio, float) and math.isclose(leaf.ratio, 2)


# ---- the whole manifest -------------------------------------------------------------------------------------------


def _rename(data: dict[str, Any]) -> None:
    data["graphs"]["train"]["tensors"][0]["size"] = 1


def _lack(data: dict[str, Any]) -> None:
    del data["layers"][0]["role"]


def _mistype(data: dict[str, Any]) -> None:
    data["saved"][0]["shape"][0] = "eight"


def _list_for_object(data: dict[str, Any]) -> None:
    data["graphs"] = []


def _object_for_list(data: dict[str, Any]) -> None:
    data["layers"] = {}


def _nothing(data: dict[str, Any]) -> None:
    data["loss"] = None


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_rename, r"manifest\.graphs\.train\.tensors\[0\]: unknown fields \['size'\]"),
        (_lack, r"manifest\.layers\[0\]: .*missing fields \['role'\]"),
        (_mistype, r"manifest\.saved\[0\]\.shape\[0\]: expected int, found str"),
        (_list_for_object, r"manifest\.graphs: expected an object, found list"),
        (_object_for_list, r"manifest\.layers: expected a list, found dict"),
        (_nothing, r"manifest\.loss: expected an object, found NoneType"),
    ],
)
def test_a_damaged_manifest_is_refused_with_the_place(damage: Callable[[dict[str, Any]], None], message: str) -> None:
    data = copy.deepcopy(plain(bundle_of("hosvd").manifest))
    damage(data)
    with pytest.raises(BundleError, match=message):
        Manifest.from_json(json.dumps(data))


@pytest.mark.parametrize("version", [FORMAT_VERSION + 1, 0, str(FORMAT_VERSION), None])
def test_another_version_is_refused_before_anything_else_is_read(version: Any) -> None:
    with pytest.raises(BundleError, match=f"format version is {version!r}; .* reads version {FORMAT_VERSION}"):
        Manifest.from_json(json.dumps({"format_version": version, "from the future": True}))


@pytest.mark.parametrize("text", ["", "{", "manifest", '{"format_version": 1'])
def test_what_is_no_json_is_refused(text: str) -> None:
    with pytest.raises(BundleError, match=r"manifest\.json is not JSON"):
        Manifest.from_json(text)


@pytest.mark.parametrize("text", ["[]", "3", '"text"', "null"])
def test_json_that_is_no_object_is_refused(text: str) -> None:
    with pytest.raises(BundleError, match="format version is None"):
        Manifest.from_json(text)
