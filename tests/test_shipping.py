"""Test the container image without a container engine: run the steps of the Dockerfile, and read the compose file.

The steps run below a folder that represents the root of the image's file system.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import socket
import string
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import click
import pytest
import yaml

from twotower.cli import app
from twotower.serving.redis_store import RedisStore
from twotower.utils.config import parse_config

ROOT = Path(__file__).parents[1]
COMPOSE = yaml.safe_load((ROOT / "compose.yaml").read_text())
SERVICES = COMPOSE["services"]
OWN = re.compile(r"(?<![\w.])/(opt|src|data|bundles)\b")  # paths of the image that stand below the folder instead
PORT = "8000"
START_S = 60


class Step(NamedTuple):
    """An instruction and what it says."""

    word: str
    text: str

    @property
    def words(self) -> list[str]:
        """Return the words of a command in shell or JSON form, without options."""
        found = json.loads(self.text) if self.text.startswith("[") else shlex.split(self.text)
        return [word for word in found if self.text.startswith("[") or not word.startswith("--")]


def stages() -> list[list[Step]]:
    """The instructions of the Dockerfile, by stage."""
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if line.strip() and not line.startswith("#")]
    read = [Step(*line.split(None, 1)) for line in re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines()]
    begins = [number for number, step in enumerate(read) if step.word == "FROM"]
    return [read[begin:end] for begin, end in zip(begins, [*begins[1:], len(read)], strict=True)]


def last(word: str) -> Step:
    """The instruction of this name that holds for the image."""
    return next(step for step in reversed(stages()[-1]) if step.word == word)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


# The files, read.


def test_a_linter_finds_nothing_in_the_dockerfile(lacking: Any) -> None:
    hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if hadolint is None:
        lacking("needs hadolint")
    done = subprocess.run([str(hadolint), "--no-color", ROOT / "Dockerfile"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_image_runs_without_root_and_has_a_health_check() -> None:
    uid = last("USER").text.partition(":")[0]
    assert uid.isdigit() and int(uid) > 0
    assert "/health/ready" in last("HEALTHCHECK").text
    assert not [step for stage in stages() for step in stage if step.word == "ADD"]
    for word in ("ENTRYPOINT", "CMD"):  # a shell in between would not pass on the signal to stop
        assert last(word).text.startswith("[")


def images() -> Iterator[str]:
    yield from (stage[0].words[0] for stage in stages())
    yield from (service["image"] for service in SERVICES.values() if "build" not in service)


@pytest.mark.parametrize("image", sorted(set(images())))
def test_an_image_is_named_with_its_version(image: str) -> None:
    name, _, tag = image.partition(":")
    assert re.match(r"v?\d+\.\d+", tag), f"{name} may be another tomorrow"


def test_what_is_copied_into_the_image_exists_and_is_let_in() -> None:
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {name for step in stages()[0] if step.word == "COPY" for name in step.words[:-1]}
    assert copied == allowed
    assert all((ROOT / name).exists() for name in copied)


def test_the_installed_settings_are_those_of_the_project() -> None:
    (install,) = [step.text for step in stages()[0] if step.word == "RUN" and "[serve,otel]" in step.text]
    assert "pip install --no-cache-dir -c constraints.txt '.[serve,otel]'" in install
    pinned = re.search(r"^torch==(.+)$", (ROOT / "constraints.txt").read_text(), re.M)
    assert pinned and "+" not in pinned[1]  # a build of its own kind must pass the pin


@pytest.mark.parametrize("name", [*SERVICES])
def test_a_service_can_change_nothing_but_its_volumes(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] and service["cap_drop"] == ["ALL"] and "no-new-privileges:true" in service["security_opt"]
    assert "healthcheck" in service or "build" in service
    for volume in service["volumes"]:
        source, _, rest = volume.rpartition(":")[0].rpartition(":") if volume.endswith(":ro") else volume.partition(":")
        named = re.fullmatch(r"[a-z]+", source)
        assert source in COMPOSE["volumes"] if named else volume.endswith(":ro"), volume
        assert not source.startswith("./") or (ROOT / source).exists(), rest or volume


def test_ports_are_open_to_this_machine_alone_and_redis_has_none() -> None:
    ports = {name: service.get("ports", []) for name, service in SERVICES.items()}
    assert {name for name, opened in ports.items() if opened} == {"server", "prometheus"}
    assert all(port.startswith("127.0.0.1:") for opened in ports.values() for port in opened)


def test_the_server_waits_for_services_that_say_they_are_healthy() -> None:
    for name, how in SERVICES["server"]["depends_on"].items():
        assert how == {"condition": "service_healthy"} and "healthcheck" in SERVICES[name]


def test_prometheus_scrapes_the_port_of_the_server() -> None:
    (job,) = yaml.safe_load((ROOT / "deploy" / "prometheus" / "prometheus.yml").read_text())["scrape_configs"]
    (target,) = job["static_configs"][0]["targets"]
    name, _, port = target.partition(":")
    assert port == PORT and port in SERVICES[name]["command"] and "metrics_path" not in job


def commands() -> Iterator[list[str]]:
    """Every `twotower …` that an image, a composition or a page would run."""
    yield last("ENTRYPOINT").words[1:] + last("CMD").words
    yield SERVICES["server"]["command"]
    for page in ("README.md", "docs/serving.md"):
        for block in re.findall(r"```bash\n(.*?)```", (ROOT / page).read_text(), re.S):
            for line in re.sub(r"\\\n\s*", " ", block).splitlines():
                found = re.match(r"(?:\w+=\S+ )*twotower (.+?)(?: +#.*| &)?$", line)
                if found and "…" not in line:
                    yield shlex.split(found[1])


@pytest.mark.parametrize("words", [*commands()], ids=" ".join)
def test_every_suggested_command_exists(words: list[str]) -> None:
    command = app.commands[words[0]]
    with click.Context(app) as parent:
        command.make_context(words[0], list(words[1:]), parent=parent)  # raises on what it does not know


def test_a_redis_of_the_composition_keeps_what_it_acknowledged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, lacking: Any
) -> None:
    if shutil.which("redis-server") is None:
        lacking("needs redis-server")
    port = free_port()
    own = ["--port", str(port), "--bind", "127.0.0.1", "--dir", str(tmp_path)]
    with subprocess.Popen([*SERVICES["redis"]["command"], *own], stdout=subprocess.DEVNULL) as redis:
        try:
            end = time.monotonic() + 20
            while subprocess.run(["redis-cli", "-p", str(port), "ping"], capture_output=True).returncode:
                assert time.monotonic() < end, "Redis did not start"
                time.sleep(0.02)
            RedisStore(f"redis://127.0.0.1:{port}/0").close()
        finally:
            redis.kill()
    assert "may lose" not in caplog.text


# The steps, taken.


class Machine:
    """A folder that represents a container: the instructions of the Dockerfile run below it."""

    def __init__(self, root: Path, port: int) -> None:
        self.root, self.port, self.folder = root, port, root
        shim = root / "bin" / "python"  # the one `python` of the base image
        shim.parent.mkdir()
        shim.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
        shim.chmod(0o755)
        inherited = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
        # Bytecode is left to the first start, which saves time. (pip takes a 0 here for --no-compile.)
        self.env = {**inherited, "PATH": f"{shim.parent}:{os.environ['PATH']}", "PIP_NO_COMPILE": "0"}

    def placed(self, text: str) -> str:
        """The text with the image's paths and port as they are here."""
        return OWN.sub(rf"{self.root}/\1", text).replace(PORT, str(self.port))

    def take(self, step: Step) -> None:
        """Do what an instruction says."""
        if step.word == "RUN":
            self.run(["sh", "-ec", re.sub(r"^(--\S+ )+", "", self.placed(step.text))])
        elif step.word == "ARG":
            name, _, value = step.text.partition("=")
            self.env.setdefault(name, value)
        elif step.word == "ENV":
            for assigned in shlex.split(self.placed(step.text)):
                name, _, value = assigned.partition("=")
                self.env[name] = string.Template(value).substitute(self.env)
        elif step.word == "WORKDIR":
            self.folder = Path(self.placed(step.text))
            self.folder.mkdir(exist_ok=True)
        elif step.word == "COPY":
            self._copy(step)
        else:
            assert step.word in ("FROM", "USER", "EXPOSE", "STOPSIGNAL", "HEALTHCHECK", "ENTRYPOINT", "CMD"), step

    def _copy(self, step: Step) -> None:
        *sources, to = step.words
        if "--from=" in step.text:  # both stages are this folder
            assert sources == [to] and Path(self.placed(to)).is_dir()
            return
        for name in sources:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, self.folder / to, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(ROOT / name, self.folder / to)

    def run(self, command: list[str], *, check: bool = True) -> int:
        """Run a command to its end."""
        done = subprocess.run(command, cwd=self.folder, env=self.env, capture_output=True, text=True)
        assert not check or done.returncode == 0, f"{command}:\n{done.stdout}{done.stderr}"
        return done.returncode

    def command(self, *words: str) -> list[str]:
        """A command line with this machine's paths."""
        first, *rest = (self.placed(word) for word in words)
        return [shutil.which(first, path=self.env["PATH"]) or first, *rest]


def wait_until_healthy(machine: Machine, check: list[str], server: subprocess.Popen[Any]) -> None:
    end = time.monotonic() + START_S
    while machine.run(check, check=False):
        assert server.poll() is None and time.monotonic() < end, "the server did not become ready"
        time.sleep(0.3)


@pytest.mark.slow
def test_the_steps_of_the_image_end_in_a_server_that_is_ready(town: Any, tmp_path: Path) -> None:
    from twotower.pipeline.stages import train_stage

    tower = {"embedding_dim": 8, "hidden_dims": [8]}
    settings = {"model": {"user_tower": tower, "item_tower": tower}, "training": {"max_steps": 1}}
    machine = Machine(tmp_path, free_port())
    train_stage(parse_config(settings), town.folder, tmp_path / "run", bundle=tmp_path / "bundles" / "bundle")
    for stage in stages():
        for step in stage:
            machine.take(step)

    check = machine.command(*json.loads(last("HEALTHCHECK").text.partition("CMD ")[2]))
    assert machine.run(check, check=False) == 1  # nobody answers yet
    command = machine.command(*last("ENTRYPOINT").words, *last("CMD").words)
    assert command[0] == f"{tmp_path}/opt/twotower/bin/twotower"
    environment = {**machine.env, "TWOTOWER_API_KEY": "a-key-of-this-test"}
    with subprocess.Popen(command, cwd=machine.folder, env=environment) as server:
        try:
            wait_until_healthy(machine, check, server)
            server.send_signal(signal.Signals[last("STOPSIGNAL").text])
            assert server.wait(20) == 0
        finally:
            server.kill()
    assert list((tmp_path / "data").iterdir()), "events go to the volume"
