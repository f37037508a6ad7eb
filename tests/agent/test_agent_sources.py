"""The folder, the decoder and the intake: labels, conventions, refusals, files that are still being written."""

from __future__ import annotations

import dataclasses
import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import watchfiles
from PIL import Image

from edgetune.agent.images import IMAGE_SUFFIXES, Decoder
from edgetune.agent.intake import Intake
from edgetune.agent.ledger import Ledger
from edgetune.agent.sources import FolderSource, Watcher
from edgetune.bundle import PreprocessSpec, TensorSpec
from edgetune.errors import BundleError, DataError
from tests.agent.fakes import CLASSES, make_folder, make_image, make_manifest


def source(root: Path) -> FolderSource:
    return FolderSource(root, CLASSES, IMAGE_SUFFIXES)


def intake(root: Path, *, holdout: int = 0, settle: float = 0.0, ledger: Ledger | None = None) -> Intake:
    ledger = Ledger(root.parent / "ledger.sqlite") if ledger is None else ledger
    return Intake(source(root), Decoder(make_manifest()), ledger, holdout=holdout, settle_seconds=settle)


def reasons(taken: object) -> dict[str, str]:
    return {row.path: row.reason for row in taken.quarantined}  # type: ignore[attr-defined]


def never() -> bool:
    return False


def old(path: Path) -> Path:
    """Make a file look as if it had been written long ago."""
    os.utime(path, (1e9, 1e9))
    return path


# ---- decoding ------------------------------------------------------------------------------------------------------
def test_decoding_follows_the_manifest(tmp_path: Path) -> None:
    described = dataclasses.replace(
        make_manifest(),
        inputs=(TensorSpec("image", (3, 5, 7)),),
        preprocess=PreprocessSpec("RGB", (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)),
    )
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 4)).astype(np.uint8)
    Image.fromarray(pixels, "RGBA").save(tmp_path / "x.png")
    found = Decoder(described).decode((tmp_path / "x.png").read_bytes())
    small = np.asarray(Image.fromarray(pixels, "RGBA").convert("RGB").resize((7, 5), Image.Resampling.BILINEAR))
    for channel, (mean, std) in enumerate(((0.1, 0.5), (0.2, 0.6), (0.3, 0.7))):
        np.testing.assert_allclose(found[channel], (small[..., channel] / 255 - mean) / std, atol=1e-6)
    assert found.shape == (3, 5, 7) and found.dtype == np.float32 and found.flags.c_contiguous


def test_grey_images_get_one_channel(tmp_path: Path) -> None:
    described = dataclasses.replace(
        make_manifest(), inputs=(TensorSpec("image", (1, 4, 4)),), preprocess=PreprocessSpec("L", (0.0,), (1.0,))
    )
    Image.new("RGB", (9, 9), (255, 255, 255)).save(tmp_path / "x.png")
    np.testing.assert_allclose(Decoder(described).decode((tmp_path / "x.png").read_bytes()), np.ones((1, 4, 4)))


def test_arrays_for_inputs_that_are_no_images(tmp_path: Path) -> None:
    described = dataclasses.replace(
        make_manifest(), inputs=(TensorSpec("signal", (6,)),), preprocess=PreprocessSpec("none", (), ())
    )
    np.save(tmp_path / "a.npy", np.arange(6.0))
    np.save(tmp_path / "b.npy", np.arange(5.0))
    np.save(tmp_path / "c.npy", np.array([{"an": "object"}]), allow_pickle=True)
    decoder = Decoder(described)
    np.testing.assert_array_equal(decoder.decode((tmp_path / "a.npy").read_bytes()), np.arange(6, dtype=np.float32))
    for name in ("b.npy", "c.npy"):
        with pytest.raises(DataError):
            decoder.decode((tmp_path / name).read_bytes())


def test_a_colour_that_does_not_fit_the_input_is_refused() -> None:
    with pytest.raises(BundleError, match="expected"):
        Decoder(dataclasses.replace(make_manifest(), inputs=(TensorSpec("image", (1, 8, 8)),)))


@pytest.mark.parametrize("factor", [1.5, 3.0])  # Pillow itself warns up to twice its limit and raises above
def test_decompression_bombs_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    Image.new("RGB", (100, int(10 * factor))).save(tmp_path / "x.png")
    with pytest.raises(DataError, match="pixels"):
        Decoder(make_manifest()).decode((tmp_path / "x.png").read_bytes())


# ---- listing -------------------------------------------------------------------------------------------------------
def test_class_folders(tmp_path: Path) -> None:
    make_image(tmp_path / "cat" / "1.png", 0, 1)
    make_image(tmp_path / "dog" / "deep" / "2.png", 1, 1)
    make_image(tmp_path / "cow" / "3.png", 1, 2)
    make_image(tmp_path / "4.png", 1, 3)
    for ignored in (".hidden.png", "readme.txt", "x.png.part", ".folder/a.png"):
        (tmp_path / "cat" / ignored).parent.mkdir(exist_ok=True)
        (tmp_path / "cat" / ignored).write_bytes(b"")
    found = {entry.path: entry for entry in source(tmp_path).scan()}
    assert {path: entry.label for path, entry in found.items()} == {
        "cat/1.png": 0, "dog/deep/2.png": 1, "cow/3.png": None, "4.png": None,
    }  # fmt: skip
    problem = found["cow/3.png"].problem
    assert problem is not None and "'cow'" in problem and "cat, dog, owl" in problem
    assert "cat, dog, owl" in str(found["4.png"].problem)


def test_metadata_lines(tmp_path: Path) -> None:
    lines: list[object] = [
        {"file_name": "a.png", "label": "dog"},
        {"file_name": "sub/b.png", "label": 2},
        {"file_name": "c.png", "label": 3},
        {"file_name": "d.png", "label": True},
        {"file_name": "../outside.png", "label": "cat"},
        {"file_name": "/etc/passwd.png", "label": "cat"},
        {"label": "cat"},
        ["no object"],
    ]
    text = "\n".join(json.dumps(line) for line in lines) + '\nnot json\n\n{"file_name": "torn'
    (tmp_path / "metadata.jsonl").write_text(text)
    found = list(source(tmp_path).scan())
    assert [(entry.path, entry.label) for entry in found[:2]] == [("a.png", 1), ("sub/b.png", 2)]
    assert all(entry.label is None and entry.problem for entry in found[2:])
    assert "valid labels: cat, dog, owl" in str(found[2].problem)
    assert "leaves the data folder" in str(found[4].problem) and "leaves the data folder" in str(found[5].problem)
    assert [entry.path for entry in found[6:]] == ["metadata.jsonl:7", "metadata.jsonl:8", "metadata.jsonl:9"]


def test_nothing_outside_the_folder_is_read(tmp_path: Path) -> None:
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    make_image(outside / "secret.png", 0, 0)
    make_image(inside / "cat" / "real.png", 0, 1)
    (inside / "cat" / "link.png").symlink_to(outside / "secret.png")
    (inside / "dog").symlink_to(outside)
    (inside / "cat" / "near.png").symlink_to(inside / "cat" / "real.png")
    taken = intake(inside).look(never)
    assert [row.path for row in taken.accepted] == ["cat/near.png"]  # a link within the folder is fine
    assert reasons(taken) == {
        "cat/link.png": "refused: a link leads out of the data folder",
        "cat/real.png": "duplicate of cat/near.png",
    }
    for name in ("../outside/secret.png", str(outside / "secret.png"), "dog/secret.png"):
        with pytest.raises(DataError, match="refused"):
            source(inside).read(name)


def test_a_pipe_does_not_stop_the_agent(tmp_path: Path) -> None:
    (tmp_path / "d" / "cat").mkdir(parents=True)
    os.mkfifo(tmp_path / "d" / "cat" / "pipe.png")
    assert reasons(intake(tmp_path / "d").look(never)) == {"cat/pipe.png": "not a regular file"}


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        source(tmp_path / "missing")


# ---- taking in -----------------------------------------------------------------------------------------------------
def test_corrupt_unknown_and_duplicate_files_are_quarantined_with_reasons(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "d", 2)
    old(root / "cat" / "000.png").rename(root / "cat" / "keep.png")
    (root / "cat" / "text.jpg").write_text("not an image")
    whole = make_image(root / "cat" / "cut.png", 0, 77).read_bytes()
    (root / "cat" / "cut.png").write_bytes(whole[: len(whole) // 2])
    (root / "dog" / "same.png").write_bytes((root / "cat" / "keep.png").read_bytes())
    make_image(root / "cow" / "x.png", 0, 5)
    found = intake(root)
    first = found.look(never)
    assert len(first.accepted) == 6
    why = reasons(first)
    assert "not a readable image" in why["cat/text.jpg"] and "not a readable image" in why["cat/cut.png"]
    assert why["dog/same.png"] == "duplicate of cat/keep.png, which is labelled cat"
    assert "valid labels: cat, dog, owl" in why["cow/x.png"]
    second = found.look(never)
    assert not second.accepted and not second.quarantined  # what is known is not reported again


def test_a_file_that_grows_is_retried_and_a_damaged_one_given_up(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "d", 1)
    whole = make_image(root / "cat" / "slow.png", 0, 9).read_bytes()
    (root / "cat" / "slow.png").write_bytes(whole[:40])
    (root / "cat" / "bad.png").write_bytes(whole[:41])
    found = intake(root, settle=0.3)
    first = found.look(never)
    assert first.unsettled == 2 and not first.quarantined
    (root / "cat" / "slow.png").write_bytes(whole)
    rest = found.look_until_settled(never)
    assert [row.path for row in rest.accepted] == ["cat/slow.png"] and list(reasons(rest)) == ["cat/bad.png"]
    (root / "cat" / "bad.png").write_bytes(make_image(tmp_path / "new.png", 0, 10).read_bytes())
    assert [row.path for row in found.look(never).accepted] == ["cat/bad.png"]  # mended: a sample after all


def test_an_old_damaged_file_is_given_up_at_once(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "d", 1)
    (root / "cat" / "bad.png").write_bytes(b"x")
    old(root / "cat" / "bad.png")
    assert list(reasons(intake(root, settle=60).look(never))) == ["cat/bad.png"]


def test_a_name_that_is_used_again_gives_a_new_sample(tmp_path: Path) -> None:
    root = tmp_path / "d"
    make_image(root / "cat" / "latest.png", 0, 1)
    found = intake(root)
    assert len(found.look(never).accepted) == 1
    make_image(root / "cat" / "latest.png", 0, 2)
    assert len(found.look(never).accepted) == 1
    assert found.ledger.counts()["new"] == 2
    os.utime(root / "cat" / "latest.png", (1e9, 1e9))  # touched, same content
    taken = found.look(never)
    assert found.ledger.counts()["new"] == 2 and not taken.quarantined


def test_a_missing_listed_file_is_waited_for(tmp_path: Path) -> None:
    root = tmp_path / "d"
    root.mkdir()
    (root / "metadata.jsonl").write_text(json.dumps({"file_name": "late.png", "label": "owl"}) + "\n")
    found = intake(root, settle=0.2)
    assert found.look(never).unsettled == 1
    make_image(root / "late.png", 2, 0)
    assert [row.label for row in found.look(never).accepted] == [2]
    (root / "metadata.jsonl").write_text(json.dumps({"file_name": "gone.png", "label": "owl"}) + "\n")
    assert reasons(found.look_until_settled(never)) == {"gone.png": "missing"}


def test_a_corrected_label_frees_a_quarantined_file(tmp_path: Path) -> None:
    root = tmp_path / "d"
    make_image(root / "a.png", 0, 0)
    (root / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "label": "cow"}) + "\n")
    found = intake(root)
    assert list(reasons(found.look(never))) == ["a.png"]
    (root / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "label": "cat"}) + "\n")
    assert [row.label for row in found.look(never).accepted] == [0]
    assert not found.look(never).quarantined


def test_held_out_samples_are_stratified_and_stable(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "d", 11)
    found = intake(root, holdout=5)
    held = {row.path for row in found.look(never).accepted if row.status == "heldout"}
    assert held == {f"{name}/{number:03d}.png" for name in CLASSES for number in (4, 9)}
    for label, name in enumerate(CLASSES):
        for seed in range(20, 25):
            make_image(root / name / f"{seed:03d}.png", label, seed)
    more = {row.path for row in found.look(never).accepted if row.status == "heldout"}
    assert more == {f"{name}/023.png" for name in CLASSES}
    assert {row.path for row in found.ledger.samples() if row.status == "heldout"} == held | more


def test_the_watcher_sees_a_new_file_and_times_out_without(tmp_path: Path) -> None:
    closed = threading.Event()
    watcher = Watcher(tmp_path, rescan_seconds=0.4, closed=closed)
    started = time.monotonic()
    watcher.wait(5, never)
    assert 0.3 < time.monotonic() - started < 3
    patient = Watcher(tmp_path, rescan_seconds=10, closed=closed)
    (tmp_path / "x.png").write_bytes(b"x")
    started = time.monotonic()
    patient.wait(10, never)
    assert time.monotonic() - started < 5
    closed.set()


def test_reports_of_changes_do_not_pile_up_while_nobody_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held: set[int] = set()
    taken = threading.Event()

    def watch(root: Path, *, stop_event: threading.Event, **_: object) -> Iterator[set[int]]:
        yield set()
        for number in range(1000):
            held.add(number)
            yield set(held)  # as watchfiles does: all that came since it was last asked
            held.clear()
        taken.set()
        stop_event.wait()

    monkeypatch.setattr(watchfiles, "watch", watch)
    closed = threading.Event()
    watcher = Watcher(tmp_path, rescan_seconds=10, closed=closed)
    assert taken.wait(5), "nobody takes the reports"
    assert not held
    started = time.monotonic()
    watcher.wait(10, never)  # all of them are one change
    assert time.monotonic() - started < 1
    watcher.rescan_seconds = 0.2
    watcher.wait(10, never)
    assert 0.15 < time.monotonic() - started < 5
    closed.set()


def test_the_watch_ends_with_the_source(tmp_path: Path) -> None:
    others = set(threading.enumerate())
    source = FolderSource(tmp_path, CLASSES, IMAGE_SUFFIXES)
    source.waiter(1.0)
    (watch,) = (thread for thread in threading.enumerate() if thread not in others)
    source.close()
    watch.join(5)
    assert not watch.is_alive()
