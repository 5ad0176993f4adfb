# SPDX-License-Identifier: GPL-2.0-or-later
"""The whole chain: emulated hosts under a workload, msrtrace on them, and a real Prometheus that scrapes them all."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
REPO = HERE.parents[1]
RULES = REPO / "dashboards/rules.yml"
SCRAPE_SECONDS = 2
START_SECONDS = 30
RUN_SECONDS = 1200


@dataclass(frozen=True)
class Node:
    """An emulated host: the modules that it loads in turn, the value of its label `patch`, its filter updates."""

    name: str
    modules: tuple[str, ...]
    patch: str
    updates: int = 47  # of each VM, four a second
    host: str = "bookworm"


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
    return port


@dataclass(frozen=True)
class Prometheus:
    """A server that runs, and its URL."""

    url: str
    process: subprocess.Popen[bytes]

    def ask(self, path: str, **parameters: str) -> Any:
        """The `data` of an answer of the HTTP API."""
        query = f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        with urllib.request.urlopen(query, timeout=30) as answer:
            return json.load(answer)["data"]

    def query(self, expression: str) -> dict[tuple[tuple[str, str], ...], float]:
        """The values of an instant query by their labels."""
        found = self.ask("query", query=expression)["result"]
        return {tuple(sorted(one["metric"].items())): float(one["value"][1]) for one in found}

    def value(self, expression: str) -> float:
        """The one value of EXPRESSION."""
        [value] = self.query(expression).values()
        return value


@contextmanager
def prometheus(folder: Path, targets: Sequence[tuple[str, dict[str, str]]]) -> Iterator[Prometheus]:
    """Debian's Prometheus with the repo's rules, scraping TARGETS (address, labels); its data stays in FOLDER."""
    program = shutil.which("prometheus")
    assert program, "prometheus is a package of Debian: `make test` installs it"
    configuration = {
        "global": {"scrape_interval": f"{SCRAPE_SECONDS}s", "evaluation_interval": f"{SCRAPE_SECONDS}s"},
        "rule_files": [str(RULES)],
        "scrape_configs": [
            {
                "job_name": "msrtrace",
                "static_configs": [{"targets": [address], "labels": labels} for address, labels in targets],
            }
        ],
    }
    (folder / "prometheus.json").write_text(json.dumps(configuration))  # JSON is YAML
    port = free_port()
    with (folder / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(
            [
                program,
                f"--config.file={folder}/prometheus.json",
                f"--storage.tsdb.path={folder}/data",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    server = Prometheus(f"http://127.0.0.1:{port}", process)
    try:
        _until_ready(server, folder / "prometheus.log")
        yield server
    finally:
        process.terminate()
        process.wait(30)


def _until_ready(server: Prometheus, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and server.process.poll() is None:
        try:
            with urllib.request.urlopen(f"{server.url}/-/ready", timeout=5):
                return
        except OSError:
            time.sleep(0.2)
    raise RuntimeError(f"Prometheus does not start:\n{log.read_text()}")


@contextmanager
def chain(folder: Path, nodes: Sequence[Node]) -> Iterator[Prometheus]:
    """Run NODES to their end, scraped all the while; then Prometheus goes on to answer.

    Leaves FOLDER/NODE/MODULE.json, the report of what the node did with a module, and FOLDER/NODE/log.
    """
    ports = {node.name: free_port() for node in nodes}
    labels = {node.name: {"host": node.name, "patch": node.patch} for node in nodes}
    with prometheus(folder, [(f"127.0.0.1:{ports[n.name]}", labels[n.name]) for n in nodes]) as server:
        running = [(node, _boot(folder / node.name, node, ports[node.name])) for node in nodes]
        try:
            for node, process in running:
                if process.wait(RUN_SECONDS):
                    raise RuntimeError(f"{node.name} failed:\n{(folder / node.name / 'log').read_text()[-5000:]}")
        finally:
            for _, process in running:
                if process.poll() is None:
                    process.terminate()
                    process.wait(60)
        yield server


def _boot(folder: Path, node: Node, port: int) -> subprocess.Popen[bytes]:
    folder.mkdir(parents=True)
    command = [sys.executable, f"{HERE}/run", "--host", node.host, "--module", node.modules[0]]
    shared = ["--in", f"{HERE}/scenarios", "--out", str(folder)]
    options = ["--forward", f"{port}:9753", *shared, "--timeout", str(RUN_SECONDS)]
    what = ["python3", "/in/chain_node.py", "10.0.2.15:9753", str(node.updates), *node.modules]
    with (folder / "log").open("wb") as log:
        return subprocess.Popen(
            [*command, *options, "--", *what], stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
        )
