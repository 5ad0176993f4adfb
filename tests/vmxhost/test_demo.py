"""`make run` where there is no VMX: an emulated host whose metrics are read from outside."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
import urllib.request
from pathlib import Path

import pytest
from conftest import HERE, WHOLE
from metrics_text import Metrics

BOOT_SECONDS = 900


def test_the_demonstration_is_traced_and_ends_on_ctrl_c(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    hosts = str(request.config.getoption("--hosts")).split(",")
    if not set(hosts) & set(WHOLE):
        pytest.skip(f"--hosts without {WHOLE}: nothing was to be booted")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    log = tmp_path / "log"
    with log.open("w") as out:
        demo = subprocess.Popen(
            [HERE / "demo", str(port)], stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT
        )
    try:
        first = _updates(port, demo, log, more_than=0)
        assert _updates(port, demo, log, more_than=first) > first  # the VMs go on
    finally:
        os.kill(demo.pid, signal.SIGINT)
        status = demo.wait(60)
    assert status == 130
    assert f"http://127.0.0.1:{port}/metrics" in log.read_text()
    assert not subprocess.run(["pgrep", "-f", f"bochs.*{port}"], capture_output=True, check=False).stdout


def _updates(port: int, demo: subprocess.Popen[bytes], log: Path, more_than: int) -> int:
    """The filter updates that /metrics shows once there are MORE_THAN so many."""
    deadline = time.monotonic() + BOOT_SECONDS
    while time.monotonic() < deadline and demo.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as answer:
                metrics = Metrics.of(answer.read().decode())
        except OSError:
            time.sleep(1)  # nobody answers before msrtrace is up
            continue
        if metrics.updates() > more_than:
            assert not metrics.lost()
            return metrics.updates()
    pytest.fail(f"no more than {more_than} filter updates were seen:\n{log.read_text()}")
