"""What is deployed, checked as far as it can be without a board: by systemd's and docker's own tools where they are."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from edgetune.agent.config import AgentConfig
from edgetune.agent.settings import configured, read
from edgetune.units import parse_bytes

ROOT = Path(__file__).resolve().parents[1]
DEPLOY = ROOT / "deploy"
UNIT = (DEPLOY / "edgetune.service").read_text("utf-8")
DOCKERFILE = (ROOT / "Dockerfile.jetson").read_text("utf-8")
MOST_EXPOSURE = 25
"""Of systemd's own judgement, times ten: 2.3 was measured (systemd 252); 0 would be a service that can do nothing."""


def _words(text: str) -> set[str]:
    return set(text.split())


def setting(name: str) -> str:
    found: list[str] = re.findall(rf"^{name}=(.*)$", UNIT, re.MULTILINE)
    assert len(found) == 1, name
    return found[0]


def verified(unit: str, folder: Path) -> str:
    """Return what systemd says of ``unit``; its program is replaced by one that is there."""
    path = folder / "edgetune.service"
    path.write_text(unit.replace("/opt/edgetune/bin/edgetune", "/bin/true"))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(path)], capture_output=True, text=True, check=False
    )
    return done.stdout + done.stderr


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_systemd_takes_the_unit_and_finds_it_hardened(tmp_path: Path) -> None:
    assert verified(UNIT, tmp_path) == ""
    assert "Unknown key" in verified(UNIT.replace("WatchdogSec", "WatchdogSecs"), tmp_path)  # it does look
    words = ["systemd-analyze", "security", "--offline=true", f"--threshold={MOST_EXPOSURE}"]
    (tmp_path / "edgetune.service").write_text(UNIT)
    done = subprocess.run([*words, str(tmp_path / "edgetune.service")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr


def test_the_unit_says_what_the_agent_does() -> None:
    assert (setting("Type"), setting("NotifyAccess")) == ("notify", "all")
    assert setting("WatchdogSec") == "5min" and setting("MemorySwapMax") == "0"
    config = example(DEPLOY / "edgetune.toml")
    budget = config.budget_bytes
    assert budget is not None and parse_bytes(setting("MemoryMax") + "iB") >= 1.25 * budget
    assert setting("RestartPreventExitStatus") == "2 5 6"
    assert setting("ExecStart").endswith("run --config /etc/edgetune/edgetune.toml")
    assert config.state == Path("/var/lib") / setting("StateDirectory")


def example(file: Path) -> AgentConfig:
    settings = read(file)
    assert settings.pop("bundle") == "/srv/edgetune/model.edgetune"
    config = configured(settings)
    config.check({"learning_rate": 0.1})
    return config


def test_the_example_is_a_configuration(tmp_path: Path) -> None:
    config = example(DEPLOY / "edgetune.toml")
    assert config.service.pause_above_c == 85.0 and config.replay.kind == "raw"
    # Every line that is commented out is a setting as well.
    text = re.sub(r"^#(?=\w+ = )", "", (DEPLOY / "edgetune.toml").read_text("utf-8"), flags=re.MULTILINE)
    (tmp_path / "all.toml").write_text(text)
    every = example(tmp_path / "all.toml")
    assert every.service.metrics_port == 9464 and every.service.hours == "22:00-06:00"


# ---- containers -----------------------------------------------------------------------------------------------------
# From the compose specification: the attributes of a service, and of its parts, as far as they are used here.
KNOWN: dict[str, set[str]] = {
    "": {"name", "services", "volumes", "networks", "configs", "secrets", "include"},
    "service": _words(
        "build image runtime environment command volumes restart stop_grace_period healthcheck mem_limit memswap_limit "
        "pids_limit network_mode read_only tmpfs cap_drop security_opt logging group_add user pid ports deploy devices "
        "entrypoint init labels ulimits working_dir"
    ),
    "build": {"context", "dockerfile", "args", "target", "cache_from", "network"},
    "healthcheck": {"test", "interval", "timeout", "start_period", "start_interval", "retries", "disable"},
    "logging": {"driver", "options"},
}


def test_the_compose_file_is_one() -> None:
    found: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text("utf-8"))
    assert found.keys() <= KNOWN[""]
    (service,) = found["services"].values()
    assert service.keys() <= KNOWN["service"]
    for part in ("build", "healthcheck", "logging"):
        assert service[part].keys() <= KNOWN[part], part
    assert service["runtime"] == "nvidia" and service["healthcheck"]["test"][1:] == [
        "edgetune",
        "status",
        "/state",
        "--check",
    ]
    volumes = [entry.split(":") for entry in service["volumes"]]
    named = {entry[0] for entry in volumes if not entry[0].startswith((".", "/"))}
    assert named == set(found["volumes"]) and all(entry[2] == "ro" for entry in volumes if entry[0] not in named)
    for entry in volumes:
        if entry[0] == "./edgetune.toml":
            assert (DEPLOY / entry[0]).is_file()
    places = {entry[1] for entry in volumes}
    assert {"/bundle", "/data", "/state", "/etc/edgetune/edgetune.toml"} <= places & {*service["command"]}
    assert (
        DEPLOY / service["build"]["context"] / service["build"]["dockerfile"]
    ).resolve() == ROOT / "Dockerfile.jetson"
    arguments = re.findall(r"^ARG (\w+)", DOCKERFILE, re.MULTILINE)
    assert set(service["build"]["args"]) == set(arguments)
    if _has_compose():
        words = ["docker", "compose", "--file", str(DEPLOY / "compose.yaml"), "config", "--quiet"]
        environment = {"PATH": "/usr/bin:/usr/local/bin:/bin", "ORT_WHEEL": "x.whl"}
        done = subprocess.run(words, capture_output=True, text=True, check=False, env=environment)
        assert done.returncode == 0, done.stderr


def _has_compose() -> bool:
    if shutil.which("docker") is None:
        return False
    return subprocess.run(["docker", "compose", "version"], capture_output=True, check=False).returncode == 0


def test_the_container_file_does_what_it_promises() -> None:
    lines = re.sub(r"\\\n", " ", re.sub(r"^#.*\n", "", DOCKERFILE, flags=re.MULTILINE)).splitlines()
    steps = [line.split(None, 1) for line in lines if line.strip()]
    known = _words("FROM ARG RUN ENV COPY USER WORKDIR VOLUME HEALTHCHECK ENTRYPOINT CMD")
    assert {step[0] for step in steps} <= known
    words = [(step[0], step[1]) for step in steps]
    assert re.fullmatch(r"BASE=nvcr\.io/nvidia/l4t-jetpack:r36\.\d+\.\d+", words[0][1]) and words[1] == (
        "FROM",
        "${BASE}",
    )
    for _, command in (word for word in words if word[0] == "RUN"):
        done = subprocess.run(["sh", "-n", "-c", command], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    users = [value for name, value in words if name == "USER"]
    after = words[words.index(("USER", "edgetune")) :]
    assert users == ["edgetune"] and not any(name in ("RUN", "COPY") for name, _ in after)
    installed = " ".join(value for name, value in words if name == "RUN" and "pip install" in value)
    assert "[device]" in installed and "host" not in installed and 'find_spec("torch") is None' in installed
    (health,) = [value for name, value in words if name == "HEALTHCHECK"]
    assert health.endswith('CMD ["edgetune", "status", "/state", "--check"]')
    for name in re.findall(r"^COPY (\S.*) \S+$", "\n".join(lines), re.MULTILINE):
        for source in name.split():
            assert source.startswith("${") or (ROOT / source).exists(), source


def test_the_health_check_fails_where_nothing_is_alive(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "edgetune", "status", str(tmp_path), "--check"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 9 and "not a state directory" in done.stderr
