"""File trees of boards, kept as one text each in ``boards/``: what was captured where is said at its head.

``>> PATH`` begins a file, which ends before the next; ``\\0`` stands for a NUL byte, as the device tree has them.
"""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).with_name("boards")
BOARDS = sorted(path.stem for path in FOLDER.glob("*.txt"))


def unpack(board: str, root: Path) -> Path:
    """Write the files of ``board`` below ``root``, and return that."""
    text = (FOLDER / f"{board}.txt").read_text("utf-8")
    for part in text.split("\n>> ")[1:]:
        name, _, content = part.partition("\n")
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.replace("\\0", "\0").encode())
    return root
