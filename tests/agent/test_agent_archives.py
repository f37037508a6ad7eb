"""Archives: rows of .npz files and members of tar shards, what is refused, and what a broken file still gives."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import random
import tarfile
import tracemalloc
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from edgetune.agent.images import Decoder
from edgetune.agent.intake import Intake, Taken
from edgetune.agent.ledger import Ledger
from edgetune.agent.sources import IntakeConfig, Source, open_source
from edgetune.agent.sources.shards import _Index
from edgetune.agent.sources.tarindex import Member, members
from edgetune.bundle import Array, PreprocessSpec, TensorSpec
from edgetune.errors import DataError
from tests.agent.fakes import CLASSES, make_folder, make_manifest

MIB = 2**20


def never() -> bool:
    return False


def opened(spec: object, **changed: Any) -> Source:
    return open_source(
        str(spec), CLASSES, Decoder(make_manifest()).suffixes, IntakeConfig(**changed), Path(gettempdir())
    )


def looker(source: Source, ledger: Path, *, settle_seconds: float = 0.0) -> Intake:
    return Intake(source, Decoder(make_manifest()), Ledger(ledger), holdout=0, settle_seconds=settle_seconds)


def reasons(taken: Taken) -> dict[str, str]:
    return {row.path: row.reason or "" for row in taken.quarantined}


def pixels(count: int) -> Array:
    return np.random.default_rng(0).integers(0, 256, (count, 8, 8, 3)).astype(np.uint8)


def png(value: Array) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(value).save(stream, format="PNG")
    return stream.getvalue()


def shard(path: Path, entries: Sequence[tuple[str, bytes]], kind: int = tarfile.USTAR_FORMAT) -> Path:
    with tarfile.open(path, "w", format=kind) as archive:
        for name, data in entries:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def samples_of(count: int) -> list[tuple[str, bytes]]:
    """Members of a shard: every sample an image, and its label in one of the two ways."""
    entries = []
    for number, value in enumerate(pixels(count)):
        name = CLASSES[number % 3]
        label = json.dumps({"label": name, "task": f"t{number // 4}"}).encode()
        entries.append((f"{number:04d}.png", png(value)))
        entries.append((f"{number:04d}.json", label) if number % 2 else (f"{number:04d}.cls", str(number % 3).encode()))
    return entries


# ---- arrays that stand for images ----------------------------------------------------------------------------------
def npy(value: Array) -> bytes:
    stream = io.BytesIO()
    np.save(stream, value)
    return stream.getvalue()


def test_an_array_of_pixels_is_the_image_of_the_same_pixels() -> None:
    decoder = Decoder(make_manifest())
    value = np.random.default_rng(0).integers(0, 256, (20, 30, 4)).astype(np.uint8)
    for part in (value, value[..., :3], value[..., 0], np.asfortranarray(value[..., :3])):
        np.testing.assert_array_equal(decoder.decode(npy(part)), decoder.decode(png(part)))
    np.testing.assert_array_equal(decoder.decode(npy(value[..., :1])), decoder.decode(png(value[..., 0])))
    exact = value[:8, :8, :3]
    np.testing.assert_array_equal(decoder.decode(npy(exact.transpose(2, 0, 1))), decoder.decode(png(exact)))


def test_an_array_of_the_exact_shape_is_taken_as_it_is() -> None:
    value = np.random.default_rng(0).normal(size=(3, 8, 8))
    found = Decoder(make_manifest()).decode(npy(value), lambda pixels: pytest.fail("it was changed"))
    np.testing.assert_array_equal(found, value.astype(np.float32))


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (np.zeros((3, 8, 9)), r"shape is \(3, 8, 9\); expected \(3, 8, 8\)"),
        (np.zeros((8, 8, 2), np.uint8), "expected pixels"),
        (np.zeros((0, 8), np.uint8), "expected pixels"),
        (np.zeros((8, 8), np.int32), "expected uint8"),
        (np.full((3, 8, 8), np.nan), "not finite"),
    ],
)
def test_other_arrays_are_refused(value: Array, said: str) -> None:
    with pytest.raises(DataError, match=said):
        Decoder(make_manifest()).decode(npy(value))


def test_a_header_that_promises_more_than_there_is_takes_no_memory() -> None:
    data = npy(np.zeros((8, 8), np.uint8)).replace(b"(8, 8), ", b"(80000, 800000), ")
    header = data.index(b"\n")
    data = data[: header - 8] + data[header:]  # the header's length stays as it was
    tracemalloc.start()
    with pytest.raises(DataError, match="is not what its"):
        Decoder(make_manifest()).decode(data)
    assert tracemalloc.get_traced_memory()[1] < MIB
    tracemalloc.stop()


# ---- .npz ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("names", [("x", "y"), ("images", "labels")])
def test_rows_are_samples(tmp_path: Path, save: Any, names: tuple[str, str]) -> None:
    value, words = pixels(7), np.array([CLASSES[i % 3] for i in range(7)])
    save(tmp_path / "set.npz", **{names[0]: value, names[1]: words, "task": np.array(["a", "b", "a", "b"] + ["c"] * 3)})
    source = opened(tmp_path / "set.npz")
    found = list(source.scan())
    assert [entry.path for entry in found] == [f"set.npz#{row}" for row in range(7)]
    assert [entry.label for entry in found] == [0, 1, 2, 0, 1, 2, 0]
    assert [entry.task for entry in found] == ["a", "b", "a", "b", "c", "c", "c"]
    for row in (6, 0, 3):
        np.testing.assert_array_equal(np.load(io.BytesIO(source.read(f"set.npz#{row}"))), value[row])
    for name in ("set.npz#7", "set.npz#-1", "set.npz#²", "set.npz", "set.npz#" + "9" * 30):
        with pytest.raises(DataError):
            source.read(name)


def test_rows_of_a_plain_archive_are_read_where_they_lie(tmp_path: Path) -> None:
    value = np.random.default_rng(0).integers(0, 256, (600, 64, 64, 3)).astype(np.uint8)  # 7 MiB
    np.savez(tmp_path / "set.npz", x=value, y=np.arange(600) % 3)
    source = opened(tmp_path / "set.npz", spool_bytes=MIB)  # nothing is unpacked
    tracemalloc.start()
    row = np.load(io.BytesIO(source.read("set.npz#599")))
    assert tracemalloc.get_traced_memory()[1] < MIB
    tracemalloc.stop()
    np.testing.assert_array_equal(row, value[599])


def test_a_compressed_archive_is_unpacked_to_the_disk_or_refused(tmp_path: Path) -> None:
    bomb = np.zeros((6000, 32, 32, 3), np.uint8)  # 18 MiB in 18 KiB
    np.savez_compressed(tmp_path / "set.npz", x=bomb, y=np.zeros(6000, int))
    assert (tmp_path / "set.npz").stat().st_size < 40_000
    tracemalloc.start()
    found = list(opened(tmp_path / "set.npz", spool_bytes=8 * MIB).scan())
    assert [entry.path for entry in found] == ["set.npz"] and "refused: its samples unpack to" in str(found[0].problem)
    assert "savez" in str(found[0].problem)
    before = set(os.listdir("/proc/self/fd"))
    source = opened(tmp_path / "set.npz", spool_bytes=32 * MIB)
    assert len(source.read("set.npz#5999")) > 3072
    assert tracemalloc.get_traced_memory()[1] < 6 * MIB
    tracemalloc.stop()
    assert os.listdir(tmp_path) == ["set.npz"]
    source.close()
    assert set(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"a": np.zeros(3)}, "expected one of these pairs: x and y; images and labels"),
        ({"x": np.zeros((3, 3, 8, 8)), "y": np.zeros(4, int)}, "one entry for each of 3 rows"),
        ({"x": np.zeros((3, 3, 8, 8)), "y": np.zeros(3)}, "expected integers or short text"),
        ({"x": np.array([{"an": "object"}]), "y": np.zeros(1, int)}, "has the type object"),
        ({"x": np.zeros(()), "y": np.zeros(1, int)}, "is one number"),
        ({"x": np.asfortranarray(np.zeros((3, 4))), "y": np.zeros(3, int)}, "ascontiguousarray"),
    ],
)
def test_archives_of_other_things_are_refused(tmp_path: Path, arrays: Mapping[str, Any], said: str) -> None:
    np.savez(tmp_path / "set.npz", **arrays)
    taken = looker(opened(tmp_path / "set.npz"), tmp_path / "ledger").look(never)
    assert said in reasons(taken)["set.npz"]


def test_a_header_that_contradicts_the_archive_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "set.npz", x=np.zeros((4, 8), np.uint8), y=np.zeros(4, int))
    data = (tmp_path / "set.npz").read_bytes().replace(b"(4, 8), ", b"(9, 8), ")
    (tmp_path / "set.npz").write_bytes(data)
    (found,) = opened(tmp_path / "set.npz").scan()
    assert "cannot be read" in str(found.problem) or "is not its size" in str(found.problem)


def test_a_row_with_an_unknown_label_is_quarantined_and_the_others_are_not(tmp_path: Path) -> None:
    np.savez(tmp_path / "set.npz", x=pixels(4), y=np.array([0, 1, 3, -1]))
    taken = looker(opened(tmp_path / "set.npz"), tmp_path / "ledger").look(never)
    assert [row.path for row in taken.accepted] == ["set.npz#0", "set.npz#1"]
    assert list(reasons(taken)) == ["set.npz#2", "set.npz#3"] and "valid labels: cat" in reasons(taken)["set.npz#2"]


def test_an_archive_that_is_replaced_is_read_anew(tmp_path: Path) -> None:
    np.savez(tmp_path / "set.npz", x=pixels(2), y=np.zeros(2, int))
    intake = looker(opened(tmp_path / "set.npz"), tmp_path / "ledger")
    assert len(intake.look(never).accepted) == 2
    assert not list(intake.source.scan())  # what is recorded is not looked at again
    np.savez(tmp_path / "other.npz", x=pixels(5), y=np.zeros(5, int))
    os.replace(tmp_path / "other.npz", tmp_path / "set.npz")
    assert [row.path for row in intake.look(never).accepted] == [f"set.npz#{row}" for row in (2, 3, 4)]


def test_signals_of_the_exact_shape(tmp_path: Path) -> None:
    described = dataclasses.replace(
        make_manifest(), inputs=(TensorSpec("signal", (6,)),), preprocess=PreprocessSpec("none", (), ())
    )
    value = np.random.default_rng(0).normal(size=(3, 6))
    np.savez(tmp_path / "set.npz", samples=value, labels=np.arange(3))
    source = opened(tmp_path / "set.npz")
    for row in range(3):
        found = Decoder(described).decode(source.read(f"set.npz#{row}"))
        np.testing.assert_array_equal(found, value[row].astype(np.float32))


# ---- tar: where members are ----------------------------------------------------------------------------------------
NAMES = st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="/"), min_size=1, max_size=120)
PATHS = st.lists(NAMES.filter(lambda name: name not in (".", "..")), min_size=1, max_size=3).map("/".join)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(PATHS, st.binary(max_size=1200), st.sampled_from([b"0", b"5", b"2"])), max_size=6),
    st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
)
def test_members_are_where_the_standard_library_finds_them(
    tmp_path: Path, entries: list[tuple[str, bytes, bytes]], kind: int
) -> None:
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w", format=kind) as archive:
        for name, data, what in entries:
            info = tarfile.TarInfo(name)
            info.type, info.size, info.linkname = what, len(data) if what == b"0" else 0, "elsewhere" * 30
            try:
                archive.addfile(info, io.BytesIO(data))
            except ValueError:  # the ustar format has no room for such a name
                continue
    with tarfile.open(path) as archive:
        wanted = [(m.name, m.offset_data, m.size) for m in archive.getmembers() if m.isfile()]
    with path.open("rb") as stream:
        found = list(members(stream.fileno(), path.stat().st_size))
    assert [(m.name, m.offset, m.size_bytes) for m in found if m.problem is None] == wanted


def test_a_header_of_names_without_end_takes_no_memory(tmp_path: Path) -> None:
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.XHDTYPE, 1 << 33
    block = info.tobuf(tarfile.GNU_FORMAT)
    with (tmp_path / "x.tar").open("wb") as stream:
        stream.write(block)
        stream.truncate(1 << 34)  # without taking any space
    (found,) = opened(tmp_path / "x.tar").scan()
    assert "8589934592 bytes of names" in str(found.problem)


# ---- tar: samples --------------------------------------------------------------------------------------------------
def test_members_with_one_key_are_one_sample(tmp_path: Path) -> None:
    shard(tmp_path / "photos.tar", samples_of(6))
    source = opened(tmp_path / "photos.tar")
    found = list(source.scan())
    assert [entry.path for entry in found] == [f"photos.tar#{number:04d}.png" for number in range(6)]
    assert [entry.label for entry in found] == [0, 1, 2, 0, 1, 2]
    assert [entry.task for entry in found] == [None, "t0", None, "t0", None, "t1"]
    for number in (5, 0, 3):
        assert source.read(f"photos.tar#{number:04d}.png") == png(pixels(6)[number])
    # By name, before anybody looked, and with other files between.
    assert opened(tmp_path / "photos.tar").read("photos.tar#0003.png") == png(pixels(6)[3])
    with pytest.raises(DataError, match="missing"):
        source.read("photos.tar#0003.json.png")


def test_a_shard_of_class_folders_and_arrays(tmp_path: Path) -> None:
    shard(
        tmp_path / "s.tar", [("cat/a.b.png", b""), ("cat/a.png", png(pixels(1)[0])), ("owl/b.npy", npy(pixels(1)[0]))]
    )
    assert [(e.path, e.label) for e in opened(tmp_path / "s.tar").scan()] == [
        ("s.tar#cat/a.png", 0),
        ("s.tar#owl/b.npy", 2),
    ]


def test_many_shards_and_one_more(tmp_path: Path) -> None:
    shard(tmp_path / "a-0.tar", samples_of(2))
    intake = looker(opened(tmp_path / "a-*.tar"), tmp_path / "ledger")
    assert len(intake.look(never).accepted) == 2
    shard(tmp_path / "a-1.tar", [(f"1{name}", data) for name, data in samples_of(4)[4:]])
    shard(tmp_path / "b-2.tar", samples_of(6))
    assert [row.path for row in intake.look(never).accepted] == ["a-1.tar#10002.png", "a-1.tar#10003.png"]
    assert intake.source.read("a-0.tar#0000.png") == png(pixels(1)[0])
    assert opened(tmp_path / "a-*.tar").read("a-1.tar#10003.png") == png(pixels(4)[3])
    for name in ("../a-0.tar#0000.png", "..#0000.png", "#0000.png"):
        with pytest.raises(DataError):
            opened(tmp_path / "a-*.tar").read(name)


def test_what_is_wrong_with_members_is_said_and_the_others_are_taken(tmp_path: Path) -> None:
    image = png(pixels(1)[0])
    path = tmp_path / "s.tar"
    with tarfile.open(path, "w") as archive:

        def put(name: str, data: bytes = image, kind: bytes = b"0", to: str = "") -> None:
            info = tarfile.TarInfo(name)
            info.size, info.type, info.linkname = len(data) if kind == b"0" else 0, kind, to
            archive.addfile(info, io.BytesIO(data))

        put("../cat/out.png")
        put("/cat/abs.png")
        put("cat/link.png", kind=b"2", to="/etc/passwd")
        put("cat/hard.png", kind=b"1", to="../cat/out.png")
        put("none.png")
        for name, label in {
            "cow.cls": b"cow", "torn.json": b"{", "deep.json": b"[" * 100_000, "long.cls": b" " * 2 * MIB,
            "number.cls": b"3", "bad.cls": b"cat",
        }.items():  # fmt: skip
            put(name.partition(".")[0] + ".png", b"no image" if name == "bad.cls" else image)
            put(name, label)
        put("alone.cls", b"cat")
        put("dir", kind=b"5")
        put("fine.png", png(pixels(2)[1]))
        put("fine.cls", b"owl\n")
        put("fine.png")
        put("fine.cls", b"cat")
    taken = looker(opened(path), tmp_path / "ledger").look(never)
    assert [(row.path, row.label) for row in taken.accepted] == [("s.tar#fine.png", 2)]
    why = reasons(taken)
    for name, said in {
        "../cat/out.png": "leaves the archive", "/cat/abs.png": "leaves the archive", "cat/link.png": "a symbolic link",
        "cat/hard.png": "a hard link", "none.png": "expected it in none.cls", "cow.png": "unknown label 'cow'",
        "torn.png": "label cannot be read", "deep.png": "label cannot be read", "long.png": "expected at most 1048576",
        "number.png": "unknown label 3", "bad.png": "not a readable image",
    }.items():  # fmt: skip
        assert said in why.pop(f"s.tar#{name}"), name
    ((again, said),) = why.items()
    assert again.startswith("s.tar@") and said == "a second sample of the name fine.png"


def test_a_compressed_shard_is_refused_with_advice(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "s.tar", "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("x"))
    (found,) = opened(tmp_path / "s.tar").scan()
    assert "unpack it to a plain .tar" in str(found.problem)


def test_a_truncated_shard_gives_what_is_whole_and_the_rest_when_it_has_grown(tmp_path: Path) -> None:
    data = shard(tmp_path / "whole", samples_of(6)).read_bytes()
    path = tmp_path / "s.tar"
    with (tmp_path / "whole").open("rb") as stream:
        ends = [m.offset + -(-m.size_bytes // 512) * 512 for m in members(stream.fileno(), len(data))]
    for end in sorted({random.Random(0).randrange(len(data)) for _ in range(25)} | set(ends)):
        path.write_bytes(data[:end])
        ledger = tmp_path / f"ledger{end}"
        intake = looker(opened(path), ledger, settle_seconds=60)
        first = intake.look(never)
        whole = sum(end >= ends[2 * number + 1] for number in range(6))  # image and label are there
        assert [row.path for row in first.accepted] == [f"s.tar#{number:04d}.png" for number in range(whole)]
        assert first.unsettled == 1 and not first.quarantined  # it may still be growing
        os.utime(path, (1e9, 1e9))
        ((place, why),) = reasons(intake.look(never)).items()
        assert place.startswith("s.tar@") and "is taken up when the file has grown" in why
        assert not intake.look(never).quarantined  # said once
        path.write_bytes(data)
        rest = intake.look(never)
        assert [row.path for row in rest.accepted] == [f"s.tar#{number:04d}.png" for number in range(whole, 6)]
        assert not rest.quarantined and not rest.unsettled


def test_a_shard_with_rubbish_in_it_gives_what_comes_before(tmp_path: Path) -> None:
    data = bytearray(shard(tmp_path / "s.tar", samples_of(4)).read_bytes())
    with (tmp_path / "s.tar").open("rb") as stream:
        third = list(members(stream.fileno(), len(data)))[4].header
    data[third : third + 512] = os.urandom(512)
    (tmp_path / "s.tar").write_bytes(data)
    os.utime(tmp_path / "s.tar", (1e9, 1e9))
    taken = looker(opened(tmp_path / "s.tar"), tmp_path / "ledger").look(never)
    assert [row.path for row in taken.accepted] == ["s.tar#0000.png", "s.tar#0001.png"]
    ((_, why),) = reasons(taken).items()
    assert f"byte {third} is no header" in why


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.randoms(use_true_random=False), st.sampled_from(["s.tar", "s.npz", "c.npz"]))
def test_damage_of_any_kind_is_told_and_nothing_else_happens(tmp_path: Path, dice: random.Random, name: str) -> None:
    """Bytes are changed at random: what is found is a sample or a reason, and never another kind of error."""
    original = tmp_path / f"original-{name}"
    if not original.exists():
        if name == "s.tar":
            shard(original, samples_of(4), tarfile.PAX_FORMAT)
        else:
            save = np.savez if name == "s.npz" else np.savez_compressed
            with original.open("wb") as stream:
                save(stream, x=pixels(4), y=np.arange(4) % 3)
    data = bytearray(original.read_bytes())
    for _ in range(dice.choice([1, 3, 30])):
        data[dice.randrange(len(data))] = dice.randrange(256)
    if dice.random() < 0.3:
        del data[dice.randrange(len(data)) :]
    (tmp_path / name).write_bytes(data)
    source, decoder = opened(tmp_path / name), Decoder(make_manifest())
    for found in source.scan():
        assert (found.label is None) == (found.problem is not None)
        try:
            source.stat(found.path)
            decoder.decode(source.read(found.path))
        except DataError:
            pass
    source.close()


def test_the_place_of_a_sample_takes_little_memory() -> None:
    """64 to 128 bytes each; no name is kept."""
    tracemalloc.start()
    index = _Index()
    for number in range(20_000):
        assert index.add(Member(f"{number}.png", 0, number, 7, 9))
    assert tracemalloc.get_traced_memory()[0] < 20_000 * 140
    tracemalloc.stop()
    assert all(index.find(f"{number}.png") == (number, 7, 9) for number in range(20_000))
    assert index.find("x") is None and not index.add(Member("5.png", 0, 0, 0, 0))


# ---- what is given that is no source ---------------------------------------------------------------------------------
def test_what_is_no_source_is_refused_with_the_kinds_that_there_are(tmp_path: Path) -> None:
    make_folder(tmp_path / "data", 1)
    for spec in (
        tmp_path / "missing",
        tmp_path / "missing.tar",
        tmp_path / "no" / "*.tar",
        tmp_path / "data" / "cat" / "000.png",
    ):
        with pytest.raises(DataError, match=r"--data|give a folder"):
            opened(spec)
    os.mkfifo(tmp_path / "pipe.tar")
    with pytest.raises(DataError, match="not there"):
        opened(tmp_path / "pipe.tar")
