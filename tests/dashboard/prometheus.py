# SPDX-License-Identifier: GPL-2.0-or-later
"""A Prometheus to query: an existing one, or one with the hour of hosts.py."""

from __future__ import annotations

import json
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.dashboard import hosts

START_SECONDS = 60


@dataclass(frozen=True)
class Prometheus:
    """The HTTP API under a URL."""

    url: str

    def query(self, expression: str, at: float) -> list[dict[str, Any]]:
        """The instant vector at a time, a dictionary for each series."""
        return self._ask("query", query=expression, time=at)

    def query_range(self, expression: str, start: float, end: float, step: float) -> list[dict[str, Any]]:
        """The matrix of a range, a dictionary for each series."""
        return self._ask("query_range", query=expression, start=start, end=end, step=step)

    def _ask(self, path: str, **parameters: str | float) -> list[dict[str, Any]]:
        data = urllib.parse.urlencode(parameters).encode()
        try:
            with urllib.request.urlopen(f"{self.url}/api/v1/{path}", data, timeout=60) as answer:
                found = json.load(answer)
        except urllib.error.HTTPError as error:
            found = json.load(error)
        if found["status"] != "success":
            raise ValueError(f"{found['error']} in {parameters['query']}")
        return list(found["data"]["result"])


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
    return port


@contextmanager
def backfilled(directory: Path) -> Iterator[Prometheus]:
    """A server with the series of hosts.py, until the context ends. The directory must be empty or not exist."""
    directory.mkdir(parents=True)
    samples, blocks, config = directory / "samples.txt", directory / "blocks", directory / "prometheus.yml"
    hosts.write(samples)
    fill = ["promtool", "tsdb", "create-blocks-from", "openmetrics", str(samples), str(blocks)]
    subprocess.run(fill, check=True, stdout=subprocess.DEVNULL)
    config.write_text("{}\n")
    address = f"127.0.0.1:{_free_port()}"
    with (directory / "log").open("wb") as log:
        server = subprocess.Popen(
            [
                "prometheus",
                f"--config.file={config}",
                f"--storage.tsdb.path={blocks}",
                "--storage.tsdb.retention.time=100y",
                f"--web.listen-address={address}",
            ],
            stdout=log,
            stderr=log,
        )
        try:
            _wait_for(f"http://{address}/-/ready", server, directory / "log")
            yield Prometheus(f"http://{address}")
        finally:
            server.terminate()
            server.wait()


def _wait_for(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and server.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            time.sleep(0.1)
    raise TimeoutError(f"Prometheus does not answer:\n{log.read_text()[-2000:]}")
