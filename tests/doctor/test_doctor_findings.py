"""The doctor on four boards, on what may be installed there, and on disks of several kinds."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from edgetune.commands.doctor import doctor
from edgetune.doctor import installed as installed_module
from edgetune.doctor.fatbin import Architectures
from edgetune.doctor.finding import ERROR, OK, WARNING, Finding
from edgetune.doctor.hardware import file_system, hardware
from edgetune.doctor.installed import Installed, Probe
from edgetune.doctor.software import software
from edgetune.telemetry.nvml import NvmlDevice
from tests.telemetry.board_trees import BOARDS, unpack

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
ORIN_KERNELS = Architectures(frozenset({87}), frozenset())
WORKING = Probe("1.23.0", (CUDA, CPU), {CPU: "", CUDA: ""}, (2**30, 2**33))
GOOD = Installed(
    (3, 10, 12), "aarch64", {"onnxruntime-gpu": "1.23.0"}, WORKING, "cuda.so", ORIN_KERNELS, None, None
)  # fmt: skip
PLAIN = dataclasses.replace(
    GOOD, distributions={"onnxruntime": "1.23.0"}, probe=Probe("1.23.0", (CPU,), {CPU: ""}), library=None, kernels=None
)


def levels(findings: Iterable[Finding]) -> dict[str, str]:
    return {finding.topic: finding.level for finding in findings}


def test_each_board_has_its_own_troubles(tmp_path: Path) -> None:
    found = {board: list(hardware(unpack(board, tmp_path / board), tmp_path)) for board in BOARDS}
    troubles = {
        board: {topic for topic, level in levels(lines).items() if level != OK} for board, lines in found.items()
    }
    for topics in troubles.values():
        topics.discard("meter")  # no tree has a clear_refs to write to
        topics.discard("limits")  # of this machine
    assert troubles == {
        "orin-jetpack5": set(),
        "orin-jetpack6": {"swap", "cgroup", "supply"},
        "thor-jetpack7": {"supply"},
        "xavier-jetpack5": {"memory", "throttling"},
    }
    texts = {board: {line.topic: line.text for line in lines} for board, lines in found.items()}
    assert "368.00 MiB may be taken (cgroup /)" in texts["xavier-jetpack5"]["memory"]
    assert "320.00 MiB of the memory" in texts["orin-jetpack6"]["swap"]
    assert "27390 x instantaneous" in texts["orin-jetpack6"]["supply"]
    assert "120W (1), the one that the board starts with; the fastest is MAXN" in texts["thor-jetpack7"]["power"]
    assert "cpu-throttle-alert" in texts["xavier-jetpack5"]["throttling"]
    assert all(line.advice for lines in found.values() for line in lines if line.level != OK)


@pytest.mark.parametrize(
    ("board", "installed", "expected", "words"),
    [
        (
            "orin-jetpack6",
            GOOD,
            {"runtime": OK, "providers": OK, "kernels": OK},
            "ran on CUDA, beside which 1.00 GiB of its memory are free",
        ),
        ("orin-jetpack6", PLAIN, {"providers": WARNING}, "cannot use the GPU"),
        ("xavier-jetpack5", GOOD, {"kernels": ERROR}, "none for this GPU, 7.2"),
        (
            "thor-jetpack7",
            dataclasses.replace(GOOD, kernels=Architectures(frozenset({90}), frozenset({90}))),
            {"kernels": WARNING},
            "none for this GPU, 11.0",
        ),
        ("orin-jetpack6", dataclasses.replace(GOOD, kernels=None), {"kernels": OK}, "cannot be told"),
        (
            "orin-jetpack6",
            dataclasses.replace(GOOD, distributions={"onnxruntime": "1.23.0", "onnxruntime-gpu": "1.23.0"}),
            {"runtime": ERROR},
            "pip uninstall -y onnxruntime onnxruntime-gpu",
        ),
        (
            "orin-jetpack6",
            dataclasses.replace(GOOD, probe=Probe("1.23.0", (CUDA, CPU), {CPU: "", CUDA: "libcudnn.so.9: not found"})),
            {"providers": ERROR},
            "libcudnn.so.9",
        ),
        ("orin-jetpack6", dataclasses.replace(GOOD, probe="ended by signal 11"), {"runtime": ERROR}, "signal 11"),
        (
            "orin-jetpack6",
            dataclasses.replace(GOOD, distributions={}, probe=None),
            {"runtime": ERROR},
            "neither onnxruntime nor torch",
        ),
        (
            "orin-jetpack6",
            dataclasses.replace(GOOD, distributions={}, probe=None, torch="2.8.0", torch_cuda="12.6"),
            {"runtime": OK, "torch": OK},
            "built for CUDA 12.6",
        ),
        ("orin-jetpack6", dataclasses.replace(GOOD, python=(3, 8, 10)), {"python": ERROR}, "needs Python 3.10"),
        (None, PLAIN, {"board": OK, "providers": OK}, "an ordinary computer"),
        (
            None,
            dataclasses.replace(GOOD, nvml=(NvmlDevice("NVIDIA H200", "9.0", 2**37, 2**30, 0.25, 40, 75.0),)),
            {"gpu": OK, "kernels": ERROR},
            "NVIDIA H200, compute capability 9.0, 1.00 GiB of 128.00 GiB used, 25% busy",
        ),
        ("orin-jetpack5", GOOD, {"gpu": OK, "kernels": OK}, "ga10b, 34% busy, at 918 of at most 1300 MHz"),
    ],
)
def test_what_is_installed_on_what(
    board: str | None, installed: Installed, expected: dict[str, str], words: str, tmp_path: Path
) -> None:
    found = list(software(tmp_path if board is None else unpack(board, tmp_path), installed))
    assert expected.items() <= levels(found).items()
    assert words in " ".join(finding.text + " " + finding.advice for finding in found)
    assert sum(finding.level == ERROR for finding in found) == (ERROR in expected.values())


def test_the_cuda_toolkit_is_named(tmp_path: Path) -> None:
    (tmp_path / "usr/local/cuda").mkdir(parents=True)
    (tmp_path / "usr/local/cuda/version.json").write_text('{"cuda": {"name": "CUDA SDK", "version": "12.6.11"}}')
    found = {finding.topic: finding.text for finding in software(unpack("orin-jetpack6", tmp_path), GOOD)}
    assert found["cuda"] == "CUDA toolkit 12.6.11" and found["release"] == "L4T 36.4.4 (JetPack 6.2.1)"


MOUNTS = """overlay / overlay rw,relatime 0 0
/dev/nvme0n1p1 /state ext4 rw 0 0
server:/export /state/share\\040one nfs4 rw 0 0
tmpfs /run tmpfs rw 0 0
"""


@pytest.mark.parametrize(
    ("place", "kind"),
    [
        ("/work", "overlay"),
        ("/state/a", "ext4"),
        ("/state/share one/b", "nfs4"),
        ("/run/x", "tmpfs"),
        ("/states", "overlay"),
    ],
)
def test_which_file_system_a_place_is_on(place: str, kind: str, tmp_path: Path) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/mounts").write_text(MOUNTS)
    assert file_system(tmp_path, Path(place)) == kind


@pytest.mark.parametrize(
    ("kind", "level"), [("ext4", OK), ("overlay", WARNING), ("fuse.sshfs", WARNING), ("tmpfs", WARNING)]
)
def test_a_state_that_would_not_last_is_said(kind: str, level: str, tmp_path: Path) -> None:
    root = unpack("orin-jetpack6", tmp_path / "root")
    (root / "proc/self/mounts").write_text(f"x / {kind} rw 0 0\n")
    assert levels(hardware(root, tmp_path / "not" / "yet" / "there"))["disk"] == level
    assert not (tmp_path / "not").exists()


def test_the_command_and_its_exit_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    app = typer.Typer()
    app.command()(doctor)
    options = ["--root", str(unpack("orin-jetpack6", tmp_path / "root")), "--state", str(tmp_path)]
    monkeypatch.setattr(installed_module, "inspect_installed", lambda: GOOD)
    shown = CliRunner().invoke(app, options)
    assert shown.exit_code == 0 and "0 errors" in shown.stdout and "WARNING  swap" in shown.stdout
    monkeypatch.setattr(installed_module, "inspect_installed", lambda: dataclasses.replace(GOOD, probe="gone"))
    told = CliRunner().invoke(app, [*options, "--json"])
    found = json.loads(told.stdout)
    assert told.exit_code == 1 and found["counts"]["error"] == 1
    assert [line["topic"] for line in found["findings"] if line["level"] == "error"] == ["runtime"]
