# SPDX-License-Identifier: GPL-2.0-or-later
"""`make run` where there is neither VMX nor SVM: an emulated host whose metrics are read from outside."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import pytest
from cache import REPO
from conftest import HERE
from dispositions import as_begun
from metrics_text import Metrics

BOOT_SECONDS = 900


@dataclass(frozen=True)
class Demonstration:
    """What was seen of one: two scrapes, and what was left after Ctrl-C."""

    port: int
    scrapes: list[Metrics]
    status: int
    log: str
    left: list[str]  # processes and files
    tried: subprocess.CompletedProcess[str]  # the command that it offers


def demonstration(folder: Path) -> Demonstration:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    log = folder / "log"
    with log.open("w") as out:
        demo = subprocess.Popen(
            as_begun([HERE / "demo", str(port)]),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
        )
    try:
        first = _scrape(port, demo, log, more_than=0)
        scrapes = [first, _scrape(port, demo, log, more_than=first.updates())]
        emulators = subprocess.run(
            ["ps", "-ww", "--ppid", str(demo.pid), "-o", "pid=,args="], capture_output=True, text=True, check=True
        ).stdout.splitlines()
    finally:
        demo.send_signal(signal.SIGINT)
        status = demo.wait(60)
    assert emulators
    [run] = {Path(found) for line in emulators for found in re.findall(r"/[^\s=]*/runs/[^/\s]+", line)}
    left = [line for line in emulators if Path("/proc", line.split()[0]).exists()]
    if run.exists():
        left.append(str(run))
    return Demonstration(port, scrapes, status, log.read_text(), left, _tried(log.read_text()))


def _tried(log: str) -> subprocess.CompletedProcess[str]:
    """Type what the last line says, in the checkout."""
    command = log.splitlines()[-1].rpartition(": ")[2].removeprefix("sudo ")
    return subprocess.run(
        ["bash", "-c", command], cwd=REPO, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )


def _scrape(port: int, demo: subprocess.Popen[bytes], log: Path, more_than: int) -> Metrics:
    """What /metrics shows once it has MORE_THAN so many filter updates."""
    deadline = time.monotonic() + BOOT_SECONDS
    while time.monotonic() < deadline and demo.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as answer:
                metrics = Metrics.of(answer.read().decode())
        except OSError:
            time.sleep(1)  # nobody answers before msrtrace is up
            continue
        if metrics.updates() > more_than:
            return metrics
    pytest.fail(f"no more than {more_than} filter updates were seen:\n{log.read_text()}", pytrace=False)


@pytest.mark.beside(boot=demonstration, host="trixie-amd")
def test_the_demonstration_is_traced_and_ends_on_ctrl_c(beside: Demonstration) -> None:
    first, second = beside.scrapes
    assert second.updates() > first.updates() > 0  # the VMs go on
    assert not second.lost()
    assert beside.status == 130
    url, try_ = beside.log.splitlines()[-2:]
    assert url == f"msrtrace: serving http://127.0.0.1:{beside.port}/metrics"
    assert try_.startswith("make run: in another terminal, ")
    assert "unpatched" not in beside.log  # built for nobody
    assert beside.left == []


@pytest.mark.beside(boot=demonstration, host="trixie-amd")
def test_what_the_demonstration_offers_to_try_works(beside: Demonstration) -> None:
    assert beside.tried.returncode == 0, beside.tried.stderr
    assert "workload" in beside.tried.stdout  # the VM
    assert "FS_BASE" in beside.tried.stdout  # which its filter denies or allows
