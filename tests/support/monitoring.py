# SPDX-License-Identifier: GPL-2.0-or-later
"""Servers of metrics, as programs that run."""

from __future__ import annotations

import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tracer.model.errors import MsrtraceError


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextmanager
def running(command: list[str], ready: Callable[[], object], log: Path) -> Iterator[None]:
    """Run a command for the duration of the context, which begins when `ready` raises nothing."""
    with log.open("w") as output, subprocess.Popen(command, stdout=output, stderr=output) as process:
        try:
            end = time.monotonic() + 60
            while True:
                try:
                    ready()
                    break
                except (OSError, MsrtraceError):
                    assert process.poll() is None, log.read_text()
                    assert time.monotonic() < end, log.read_text()
                    time.sleep(0.1)
            yield
        finally:
            process.terminate()
            process.wait(30)


def answers(url: str) -> Callable[[], object]:
    """Asks a URL."""
    return lambda: urllib.request.urlopen(url, timeout=5).close()
