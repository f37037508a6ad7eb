"""The table of codecs, on a tiny U-Net: what is measured is what was planned, and the page says it."""

from __future__ import annotations

import dataclasses
import functools
import json
import tempfile
from pathlib import Path

import numpy as np
import pytest

from edgetune.errors import EngineError
from tools import codec_memory, codecs
from tools.codec_memory import Memory
from tools.codec_study import Study
from tools.codec_subjects import Subject, crops
from tools.zoo import plain

MENU = ("recompute", "hosvd", "dct", "int8")
TINY = Subject("unet", lambda: plain.UNet(2, 4, channels=3), 32, 8, last=2, dense_targets=True)
_SHELF = tempfile.TemporaryDirectory(prefix="edgetune-tests-")


@functools.cache
def tiny_study() -> Study:
    return Study(TINY, MENU, Path(_SHELF.name))


@pytest.mark.parametrize("engine", codecs.ENGINES)
@pytest.mark.parametrize("codec", ["dense", "dct"])
def test_the_allocator_holds_after_the_forward_pass_what_was_planned(codec: str, engine: str) -> None:
    study = tiny_study()
    wanted, knob, plan = study.plans(codec, [4.0])[0]
    folders = [study.write(name, made) for name, made in (("dense-baseline", study.dense), (codec, plan))]
    found = codec_memory.measure(study.folder, folders[1], folders[0], engine, 0.0)
    planned = study.rate(codec, wanted, knob, plan).crossing_bytes
    assert planned > 400_000
    assert found.held == pytest.approx(planned, rel=0.02, abs=30_000)
    assert found.peak > 0.8 * found.held and found.resident > 0 and found.seconds > 0 < found.dense_seconds


def test_what_is_kept_is_as_much_as_was_wanted_and_costs_no_more_than_its_codec_should() -> None:
    study = tiny_study()
    found = {codec: [study.rate(codec, *plan) for plan in study.plans(codec, [8.0, 4.0])] for codec in MENU}
    head = 4 * TINY.batch * 6 * 32 * 32
    coded = study.dense.dense_saved_bytes - head
    for codec in ("hosvd", "dct"):
        for rate, most in zip(found[codec], (coded / 8, coded / 4), strict=True):
            assert 0.7 * most < rate.saved_bytes - head <= most
        assert found[codec][1].mean_error < found[codec][0].mean_error < 1.0
    (again,), (int8,) = found["recompute"], found["int8"]
    assert again.mean_error == again.total_error == 0.0 and again.energy is None
    assert 0.0 < int8.mean_error < 0.01 and int8.energy is not None and int8.energy > 0.999
    assert int8.mean_error <= int8.worst_error


def test_the_page_has_a_line_per_codec_and_what_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tools.codec_subjects.SUBJECTS", (TINY,))
    sizes = {"dense-baseline": 1000, "dense": 1000, "int8": 400}

    def run(folder: Path, plan: Path, dense: Path, engine: str, seconds: float) -> Memory:
        if (plan.name, engine) == ("int8", "torch"):
            raise EngineError("out of paper")
        return Memory(sizes[plan.name], 50_000, 2000, 3.0, 2.0)

    figures, page = tmp_path / "figures.json", tmp_path / "page.md"
    command = ["--codec", "int8", "--json", str(figures), "--markdown", str(page)]
    assert codecs.main(command, run) == 1
    text = page.read_text()
    line = next(line for line in text.splitlines() if line.startswith("| `int8`"))
    assert "| -60 % | — |" in line and "| 1.50 | — |" in line
    assert "- int8, torch: out of paper" in text and "--codec int8" in text
    (table,) = json.loads(figures.read_text())["tables"]
    assert [row["rates"][0]["codec"] for row in table["rows"]] == ["dense", "int8"]
    again = tmp_path / "again.md"
    assert codecs.main(["--read", str(figures), "--markdown", str(again)], run) == 1
    assert again.read_text() == text


def test_crops_are_of_real_photographs_and_the_same_for_one_seed() -> None:
    x, places = crops(6, 40, 3)
    again, _ = crops(6, 40, 3)
    assert np.array_equal(x, again) and x.shape == (6, 3, 40, 40) and set(places) <= set(range(6))
    neighbours = np.corrcoef(x[:, :, :, 1:].ravel(), x[:, :, :, :-1].ravel())[0, 1]
    assert neighbours > 0.8
    labels = dataclasses.replace(TINY, side=40).draw(6, 3)[1]
    assert labels.shape == (6, 40, 40) and set(np.unique(labels)) == {0, 1, 2, 3}
