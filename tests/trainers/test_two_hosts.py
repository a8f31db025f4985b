"""Rehearse a training on two hosts, of which one is lost; the hosts are network namespaces, joined by a virtual cable."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from .test_parallel import WORKER, assert_close, settings, weights

PORT, TORCHRUN = "29533", "torch.distributed.run"


@dataclass
class Host:
    """A network namespace with one cable.

    Attributes
    ----------
    name, address, cable
        Name of the namespace, address, and device of the cable's end.
    """

    name: str
    address: str
    cable: str

    def start(self, *command: object, **environment: str) -> subprocess.Popen[str]:
        """Start a command on this host, in a process group of its own."""
        inside = ["ip", "netns", "exec", self.name, sys.executable, *map(str, command)]
        variables = {**os.environ, "GLOO_SOCKET_IFNAME": self.cable, **environment}
        return subprocess.Popen(
            inside, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )

    def unplug(self) -> None:
        """Cut the cable: from now on, packets are lost, and no connection is closed."""
        ip("netns", "exec", self.name, "ip", "link", "set", self.cable, "down")


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True, timeout=20)


@pytest.fixture
def hosts(lacking: Callable[[str], None]) -> Iterator[tuple[Host, Host]]:
    """Two hosts with addresses of their own; skips where a system does not allow namespaces, which nothing can install."""
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("needs network namespaces: Linux and root")
    if shutil.which("ip") is None:
        lacking("needs `ip` (package iproute2)")
    number = os.getpid() % 100_000
    pair = Host(f"tt{number}a", "10.203.7.1", f"tt{number}va"), Host(f"tt{number}b", "10.203.7.2", f"tt{number}vb")
    try:
        try:
            for host in pair:
                ip("netns", "add", host.name)
            first, second = pair
            ip("link", "add", first.cable, "netns", first.name, "type", "veth", "peer", "name", second.cable, "netns", second.name)
        except subprocess.CalledProcessError as error:
            pytest.skip(f"needs network namespaces, which this system refuses: {error.stderr.strip()}")
        for host in pair:
            ip("-n", host.name, "address", "add", f"{host.address}/24", "dev", host.cable)
            for device in ("lo", host.cable):
                ip("-n", host.name, "link", "set", device, "up")
        yield pair
    finally:
        for host in pair:
            subprocess.run(["ip", "netns", "del", host.name], check=False, capture_output=True, timeout=20)


def end(process: subprocess.Popen[str]) -> None:
    """Kill the command and all that it started, as when the power fails."""
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()  # of torchrun, each in its own session
    os.killpg(process.pid, signal.SIGKILL)
    for worker in workers:
        kill_quietly(int(worker))
    process.wait(timeout=20)


def kill_quietly(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def wait_for(condition: Callable[[], bool], seconds: float, running: list[subprocess.Popen[str]]) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert all(process.poll() is None for process in running), [process.communicate()[0][-3000:] for process in running]
        assert time.monotonic() < until, f"nothing happened within {seconds} s"
        time.sleep(0.1)


def losses(run: Path) -> dict[int, float]:
    """Return the loss of each step."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows if "learning_rate" in row}


@pytest.mark.slow
@pytest.mark.parametrize(("lost", "unplugged"), [(1, False), (0, True)], ids=["the second is killed", "the first is unplugged"])
def test_a_run_goes_on_with_the_host_that_is_left(town, tmp_path, hosts, lost, unplugged):
    config, out = settings(rows=True, eval_every_epochs=0.25, patience=100, log_every=1), tmp_path / "shared"
    rendezvous = ["--nnodes", "2", "--nproc-per-node", "1", "--master-addr", hosts[0].address, "--master-port", PORT]
    running = [
        host.start("-m", TORCHRUN, *rendezvous, "--node-rank", rank, WORKER, "hang", town.folder, out, config, HANGS=str(lost))
        for rank, host in enumerate(hosts)
    ]
    left = 1 - lost
    try:
        wait_for((out / "hangs").exists, 120, running)
        if unplugged:
            hosts[lost].unplug()
        end(running[lost])
        said, _ = running[left].communicate(timeout=90)  # 20 s of them are its patience with a silent connection
        assert running[left].returncode != 0
        assert "Training needs all" in said, said[-3000:]
    finally:
        for process in running:
            if process.poll() is None:
                end(process)
            assert process.stdout is not None
            process.stdout.close()
    at = torch.load(out / "last.pt", weights_only=True)["progress"]["step"]
    assert 0 < at < 13

    alone = hosts[left].start("-m", TORCHRUN, "--nnodes", "1", "--nproc-per-node", "1", "--master-addr", hosts[left].address,
                              "--master-port", PORT, WORKER, "resume", town.folder, out, config)  # fmt: skip
    said, _ = alone.communicate(timeout=300)
    assert alone.returncode == 0, said[-3000:]
    whole = hosts[left].start(WORKER, "train", town.folder, tmp_path / "whole", config)
    said, _ = whole.communicate(timeout=300)
    assert whole.returncode == 0, said[-3000:]

    resumed, undisturbed = losses(out), losses(tmp_path / "whole")
    assert list(resumed) == list(undisturbed) == list(range(1, 51))
    later = range(at + 1, 51)
    assert [resumed[step] for step in later] == pytest.approx([undisturbed[step] for step in later], rel=1e-4, abs=1e-4)
    assert_close(weights(out), weights(tmp_path / "whole"), 1e-4, "resumed on one host")
