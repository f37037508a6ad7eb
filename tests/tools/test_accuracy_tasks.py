"""The tasks are the same every time, and nothing that is judged by was trained on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edgetune.errors import UsageError
from tools import accuracy_tasks
from tools.accuracy_tasks import CHARACTERS, PILLOWS_OWN, Font, Task

OWN = Font(PILLOWS_OWN, None)
COUNTS = (40, 60, 40)


def small(seed: int) -> Task:
    return accuracy_tasks.glyphs(seed, ([OWN], [OWN, OWN, OWN]), COUNTS, side=24)


def test_glyphs_are_deterministic_and_split_by_outline() -> None:
    one, again, other = small(0), small(0), small(1)
    parts = zip((*one.stream, *one.test, *one.pretrain), (*again.stream, *again.test, *again.pretrain), strict=True)
    for mine, same in parts:
        np.testing.assert_array_equal(mine, same)
    assert not np.array_equal(one.stream[0], other.stream[0])
    assert [len(part[1]) for part in (one.pretrain, one.stream, one.test)] == list(COUNTS)
    for task in (one, other):
        assert not set(task.origins[0]) & set(task.origins[1])
        for origins, (_, labels) in zip(task.origins, (task.stream, task.test), strict=True):
            np.testing.assert_array_equal(origins % len(CHARACTERS), labels)
        assert set(task.test[1]) == set(range(len(CHARACTERS))), "every class is judged"


def test_glyphs_show_what_their_labels_say() -> None:
    images, labels = small(0).pretrain
    strokes = {int(label): image for image, label in zip(images, labels, strict=True)}
    assert all(image.max() > 200 and image.min() == 0 for image in strokes.values())
    same = [image for image, label in zip(images, labels, strict=True) if label == labels[0]]
    assert not np.array_equal(same[0], same[1]), "each is drawn anew"


def test_digits_are_split_without_leakage() -> None:
    pytest.importorskip("sklearn")
    task = accuracy_tasks.digits(0)
    assert not set(task.origins[0]) & set(task.origins[1])
    assert (len(task.pretrain[1]), len(task.stream[1]), len(task.test[1])) == (800, 600, 794)
    images = [image.tobytes() for image in task.test[0]]
    assert len(set(images)) == len(images), "the same digit drifts differently each time"


def test_missing_fonts_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(accuracy_tasks, "_SYSTEM_FONTS", tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="pip install matplotlib"):
        accuracy_tasks.found()
    (tmp_path / "DejaVuSans.ttf").write_bytes(b"")
    pretrain, drifted = accuracy_tasks.found()
    assert [font.name for font in pretrain] == ["DejaVuSans"] and [font.name for font in drifted] == [PILLOWS_OWN]
