"""What is installed: several distributions of one module, architectures in a library, a runtime that is tried."""

from __future__ import annotations

import importlib.metadata
import struct
from pathlib import Path

import pytest

from edgetune.doctor import probe
from edgetune.doctor.fatbin import CUBIN, MAGIC, PTX, Architectures, architectures
from edgetune.doctor.installed import Probe, inspect_installed, providing


def elf(path: Path, section: str, content: bytes) -> Path:
    """Write a 64-bit ELF file of three sections: none, names, ``section``."""
    names = b"\0.shstrtab\0" + section.encode() + b"\0"
    data = b"\0" * 64 + names + content
    table = len(data)
    for name, offset, size in ((0, 0, 0), (1, 64, len(names)), (11, 64 + len(names), len(content))):
        data += struct.pack("<IIQQQQ", name, 1, 0, 0, offset, size) + b"\0" * 24
    head = b"\x7fELF\x02\x01" + b"\0" * 34 + struct.pack("<Q", table) + b"\0" * 10 + struct.pack("<HHH", 64, 3, 1)
    path.write_bytes(head + data[len(head) :])
    return path


def container(*entries: tuple[int, int]) -> bytes:
    """Return one container of device code with an entry per (kind, architecture)."""
    body = b"".join(
        struct.pack("<HHIQIIHHI", kind, 257, 64, 8, 0, 0, 0, 1, number) + b"\0" * 32 + b"CODECODE"
        for kind, number in entries
    )
    return MAGIC + struct.pack("<HHQ", 1, 16, len(body)) + body


def test_architectures_are_read_from_the_file(tmp_path: Path) -> None:
    code = container((CUBIN, 72), (CUBIN, 87)) + b"\0" * 5 + MAGIC + b"looks alike" + container((CUBIN, 87), (PTX, 90))
    assert architectures(elf(tmp_path / "a.so", ".nv_fatbin", code)) == Architectures(
        frozenset({72, 87}), frozenset({90})
    )
    assert architectures(elf(tmp_path / "b.so", ".nv_other", code)) is None
    assert architectures(elf(tmp_path / "c.so", ".nv_fatbin", container((7, 87)))) is None  # not known: not guessed
    (tmp_path / "d.so").write_text("no library")
    assert architectures(tmp_path / "d.so") is None and architectures(tmp_path / "none.so") is None


def test_which_boards_kernels_suit() -> None:
    ordinary = Architectures(frozenset({80, 86, 90}), frozenset({90}))
    assert not ordinary.suits("8.7", tegra=True) and not ordinary.translates("8.7")
    assert ordinary.suits("8.9", tegra=False) and not ordinary.suits("12.0", tegra=False)
    assert ordinary.translates("11.0") and not ordinary.suits("11.0", tegra=True)
    assert Architectures(frozenset({87}), frozenset()).suits("8.7", tegra=True)
    assert Architectures(frozenset({101}), frozenset()).suits("11.0", tegra=True)  # Thor's number before CUDA 13


def distribution(root: Path, name: str, *files: str, top: str | None = None) -> importlib.metadata.Distribution:
    folder = root / f"{name}-1.2.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n")
    (folder / "RECORD").write_text("".join(f"{file},,\n" for file in files))
    if top is not None:
        (folder / "top_level.txt").write_text(top)
    return importlib.metadata.Distribution.at(folder)


def test_every_distribution_of_the_module_is_found(tmp_path: Path) -> None:
    found = [
        distribution(tmp_path, "onnxruntime-gpu", top="onnxruntime\n"),
        distribution(tmp_path, "onnxruntime", "onnxruntime/__init__.py"),
        distribution(tmp_path, "onnxruntime-extensions", "onnxruntime_extensions/__init__.py"),
        distribution(tmp_path, "a-boards-own-build", top="onnxruntime\n"),
        distribution(tmp_path, "numpy", "numpy/__init__.py"),
    ]
    assert providing("onnxruntime", found) == {
        "a-boards-own-build": "1.2",
        "onnxruntime": "1.2",
        "onnxruntime-gpu": "1.2",
    }


def test_this_runtime_is_loaded_and_runs_a_graph() -> None:
    found = inspect_installed()
    assert isinstance(found.probe, Probe) and found.distributions
    assert "CPUExecutionProvider" in found.probe.providers and found.probe.failed["CPUExecutionProvider"] == ""


def test_a_provider_that_fails_says_why() -> None:
    runtime = pytest.importorskip("onnxruntime")
    assert "fell back to CPUExecutionProvider" in probe.tried(runtime, "CUDAExecutionProvider")
