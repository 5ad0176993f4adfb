# SPDX-License-Identifier: GPL-2.0-or-later
"""A Prometheus to query: an existing one, or one with the hour of hosts.py."""

from __future__ import annotations

import json
import os
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

from dashboards.queries import RECORDED
from dashboards.verdict import recorded
from tests.dashboard import hosts

START_SECONDS = 60


@dataclass(frozen=True)
class Prometheus:
    """The HTTP API under a URL, of a process of this machine if it is known."""

    url: str
    process: int | None = None

    def clock(self) -> float:
        """Seconds of CPU time that the process has taken: what else runs here does not matter. Else, of time."""
        if self.process is None:
            return time.monotonic()
        fields = Path(f"/proc/{self.process}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

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
def backfilled(directory: Path, made: hosts.Instances | None = None, step: int = hosts.STEP) -> Iterator[Prometheus]:
    """A server with the series of hosts.py, and the verdicts that rules.yml records of them, until the context ends.

    The directory must be empty or not exist.
    """
    directory.mkdir(parents=True)
    samples, blocks, rules = directory / "samples.txt", directory / "blocks", directory / "rules.yml"
    hosts.write(samples, made, step)
    _promtool("openmetrics", samples, blocks)
    samples.unlink()
    rule = {"record": RECORDED, "expr": recorded()}
    rules.write_text(json.dumps({"groups": [{"name": "verdict", "rules": [rule]}]}))  # JSON is YAML
    with _server(directory, blocks) as server:
        times = [f"--start={hosts.END - hosts.SECONDS}", f"--end={hosts.END}", f"--eval-interval={step}s"]
        _promtool("rules", f"--url={server.url}", f"--output-dir={blocks}", *times, rules)
    with _server(directory, blocks) as server:  # which reads the new blocks
        yield server


def _promtool(what: str, *arguments: str | Path) -> None:
    command = ["promtool", "tsdb", "create-blocks-from", what, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr or done.stdout)


@contextmanager
def _server(directory: Path, blocks: Path) -> Iterator[Prometheus]:
    config = directory / "prometheus.yml"
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
            yield Prometheus(f"http://{address}", server.pid)
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
