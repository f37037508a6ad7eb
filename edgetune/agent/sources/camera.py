"""A camera, or a film, through OpenCV: one picture every so many seconds, and a function that says what is on it.

OpenCV (cv2) is an optional extra and is imported only for a camera. Of its interface only VideoCapture and imencode are
used, which are the same in versions 4 and 5.
"""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from edgetune.agent.sources.entry import load_entry
from edgetune.errors import DataError

PREFIX = "camera:"


def pictures(device: str, labeller: str | None, interval_s: float) -> Callable[[int], tuple[Iterable[Any], int]]:
    """Return what opens the camera ``device`` (its number, an address, or a film's file) as a stream of (PNG, label).

    Args:
        labeller: names a function that is given the picture, uint8 RGB of [height, width, 3], and returns the name or
            index of its class, (label, task), or None to leave it out.
        interval_s: between two pictures; in a film, of its own time.

    Raises:
        DataError: there is no labeller, or no OpenCV.
    """
    if labeller is None:
        raise DataError(
            "a camera gives no labels: set intake.labeller to module:function or file.py:function, which is given a "
            "picture and returns its class, or None to leave it out"
        )
    label_of = load_entry(labeller)
    if not callable(label_of):
        raise DataError(f"intake.labeller '{labeller}' is a {type(label_of).__name__}; expected a function")
    try:
        cv2 = importlib.import_module("cv2")
    except ImportError as error:
        raise DataError(
            f"a camera needs OpenCV, which cannot be imported ({error}): install edgetune[camera], or on a board with "
            "an OpenCV of its own use that"
        ) from None

    def begin(start: int) -> tuple[Iterable[Any], int]:
        return _labelled(cv2, device, label_of, interval_s), 0

    return begin


def _labelled(cv2: Any, device: str, label_of: Callable[[Any], Any], interval_s: float) -> Iterator[tuple[Any, ...]]:
    is_film = os.path.isfile(device)
    capture = cv2.VideoCapture(int(device) if device.isdigit() else device)
    try:
        if not capture.isOpened():
            raise DataError(f"the camera '{device}' cannot be opened; is it there, and not in use by another program?")
        for picture in (_of_film if is_film else _of_camera)(cv2, capture, device, interval_s):
            answer = label_of(np.ascontiguousarray(picture[..., ::-1]))  # OpenCV has blue first
            if answer is None:
                continue
            good, encoded = cv2.imencode(".png", picture)
            if not good:
                raise DataError(f"a picture of the camera '{device}' cannot be encoded")
            yield (encoded.tobytes(), *(answer if isinstance(answer, tuple) else (answer,)))
    finally:
        capture.release()


def _of_camera(cv2: Any, capture: Any, device: str, interval_s: float) -> Iterator[Any]:
    due = time.monotonic()
    while True:
        # All pictures are taken and most let go of: a driver's buffer would otherwise hand out old ones.
        if not capture.grab():
            raise DataError(f"the camera '{device}' gives no picture any more")
        if time.monotonic() < due:
            continue
        good, picture = capture.retrieve()
        if not good:
            raise DataError(f"the camera '{device}' gave a picture that cannot be read")
        yield picture
        due = max(due + interval_s, time.monotonic())


def _of_film(cv2: Any, capture: Any, device: str, interval_s: float) -> Iterator[Any]:
    rate = capture.get(cv2.CAP_PROP_FPS)
    every = max(1, round(interval_s * rate)) if rate > 0 else 1
    number = 0
    while capture.grab():
        if number % every == 0:
            good, picture = capture.retrieve()
            if good:
                yield picture
        number += 1
