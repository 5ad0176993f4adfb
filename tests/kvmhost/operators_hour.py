#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""`make operators-hour`: what a new operator does in an hour, on fresh emulated Debian 12 and 13 hosts with systemd.

The package is installed by apt, configured, scraped by a Prometheus on one of the hosts, upgraded, followed through a
reload of KVM's module and a reboot, and removed. scenarios/operating.py is what is typed on the hosts, and what must
be true after it; here both are booted and kept in step, the dashboard is asked from outside, and the log is printed.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "packaging"))
sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from answers import PER_UPDATE
from cache import BUILD, RigError
from chain import free_port
from chroots import older
from deb import packages, version
from dispositions import as_begun
from hosts import HOSTS
from repository import repository

from tests.dashboard.answers import Range, ask
from tests.dashboard.prometheus import Prometheus

HERE = Path(__file__).resolve().parent
#: By their names in the log, the emulated hosts, and the port of each that can be reached from outside.
NODES = {"debian12": ("bookworm-amd", 9753), "debian13": ("trixie-amd", 9090)}
#: Who comes to a meeting, if not both hosts.
MEETINGS = {"dashboard": {"debian13", "outside"}, "asked": {*NODES, "outside"}}
#: Panels that have nothing to show, or not by every query: of Intel's hosts; of filters that some vCPU has not applied
#: yet; of accesses that KVM wants intercepted as well as the filter, and of those of which that is unknown.
NOTHING_TO_SHOW = ("Hosts without the patch",)
SCRAPE_SECONDS = 2
LIMIT_SECONDS = 2400
#: The version that is installed first, and upgraded.
BEFORE = "0.0.1"


@dataclass
class Hour:
    """What came of it: the log, the status of each host's run, and what the dashboard was without an answer to."""

    lines: list[str] = field(default_factory=list)
    statuses: dict[str, int] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    queries: int = 0
    complaints: list[str] = field(default_factory=list)


class Coordinator:
    """Keeps the hosts in step, and takes down what they log."""

    def __init__(self, hour: Hour, show: Callable[[str], None]) -> None:
        self._hour, self._show = hour, show
        self._come: dict[str, dict[str, Any]] = {}
        self._changed = threading.Condition()

    def log(self, host: str, line: str) -> None:
        """Take down a line."""
        with self._changed:
            self._hour.lines.append(f"{host}  {line}")
            self._show(self._hour.lines[-1])

    def failed(self, host: str, why: str) -> None:
        """Give up: nobody waits any longer."""
        with self._changed:
            self._hour.failures.append(f"{host}: {why}")
            self._changed.notify_all()

    def meet(self, host: str, step: str, content: Any = None) -> dict[str, Any]:
        """Wait until all have come to a step; what they brought. Raises RuntimeError if one has failed."""
        with self._changed:
            come = self._come.setdefault(step, {})
            come[host] = content
            self._changed.notify_all()
            wanted = MEETINGS.get(step, {*NODES})
            if not self._changed.wait_for(lambda: wanted <= come.keys() or self._hour.failures, LIMIT_SECONDS):
                raise RuntimeError(f"nobody came to {step} but {', '.join(come)}")
            if self._hour.failures:
                raise RuntimeError(self._hour.failures[0])
            return come


class _Handler(BaseHTTPRequestHandler):
    coordinator: Coordinator

    def do_POST(self) -> None:
        """`/log`, `/failed`, `/meet/STEP`."""
        told = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        host, (what, _, step) = told["host"], self.path.strip("/").partition("/")
        answer: Any = {}
        try:
            if what == "log":
                self.coordinator.log(host, told["line"])
            elif what == "failed":
                self.coordinator.failed(host, told["why"])
            else:
                answer = self.coordinator.meet(host, step, told["content"])
        except RuntimeError as error:
            self.send_error(500, str(error)[:100])
            return
        content = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing."""


def sent(name: str, folder: Path) -> Path:
    """The directory that a host sees as /in."""
    host = HOSTS[NODES[name][0]]
    built = packages(host.userland)
    debs = [file for file in sorted(built.glob("*.deb")) if "dbgsym" not in file.name]
    [own] = [file for file in debs if file.name.startswith("msrtrace_")]
    made = folder / f"{name}-in"
    made.mkdir()
    others = ["prometheus"] if name == "debian13" else ["python3-bcrypt", "python3-yaml"]
    repository(host, [*debs, older(own, made)], made / "repository", others=others)
    shutil.copy(HERE / "scenarios/operating.py", made)
    settings = {
        "version": version(host.userland.name),
        "before": BEFORE,
        "expected": PER_UPDATE[host.name]["unpatched"][0],
    }
    (made / "operating.json").write_text(json.dumps(settings))
    return made


def hour(folder: Path, show: Callable[[str], None] = lambda _: None) -> Hour:
    """Let it pass, with what it needs in an empty folder."""
    found = Hour()
    coordinator = Coordinator(found, show)
    handler = type("Handler", (_Handler,), {"coordinator": coordinator})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    ports = {name: free_port() for name in NODES}
    running: dict[str, subprocess.Popen[bytes]] = {}
    try:
        inputs = {name: sent(name, folder) for name in NODES}
        for name, (host, port) in NODES.items():
            other = next(ports[one] for one in NODES if one != name)
            options = ["--host", host, "--init", "systemd", "--fresh", "--stock", "--in", str(inputs[name])]
            options += ["--forward", f"{ports[name]}:{port}", "--timeout", str(LIMIT_SECONDS)]
            what = ["python3", "/in/operating.py", name, str(server.server_address[1]), str(other)]
            with (folder / f"{name}.log").open("wb") as log:
                running[name] = subprocess.Popen(
                    as_begun([sys.executable, str(HERE / "run"), *options, "--", *what]),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
        threading.Thread(target=partial(_ask, coordinator, found, ports["debian13"]), daemon=True).start()
        found.statuses = _wait(running, coordinator, folder)
    finally:
        for process in running.values():
            if process.poll() is None:
                process.terminate()
                process.wait(60)
        server.shutdown()
        server.server_close()
    return found


def _wait(running: dict[str, subprocess.Popen[bytes]], coordinator: Coordinator, folder: Path) -> dict[str, int]:
    """The status of each run; one that fails ends the others."""
    deadline = time.monotonic() + LIMIT_SECONDS
    while any(process.poll() is None for process in running.values()) and time.monotonic() < deadline:
        time.sleep(0.5)
        for name, process in running.items():
            if process.poll():
                printed = (folder / f"{name}.log").read_text(errors="replace")
                coordinator.failed(name, f"status {process.returncode}: {printed[-2000:]}")
                return {name: process.returncode}
    return {name: -1 if process.poll() is None else process.returncode for name, process in running.items()}


def _ask(coordinator: Coordinator, hour: Hour, port: int) -> None:
    """Ask the host's Prometheus all that the dashboard of the package asks, of the minutes before by its clock."""
    try:
        brought = json.loads(coordinator.meet("outside", "dashboard")["debian13"])
        shown = Range(brought["began"], brought["now"], SCRAPE_SECONDS)
        asked = ask(Prometheus(f"http://127.0.0.1:{port}"), brought["dashboard"], shown, at_once=1)
        hour.queries = len(asked.seconds)
        hour.complaints = [one for one in asked.complaints if not _nothing_to_show(one)]
        empty = len(asked.complaints) - len(hour.complaints)
        verdict = "; ".join(hour.complaints) or f"answered; {empty} have nothing to show on these hosts"
        coordinator.log("outside ", f"    the dashboard's {len(asked.seconds)} queries: {verdict}")
        coordinator.meet("outside", "asked")
    except Exception as error:
        coordinator.failed("outside", f"{type(error).__name__}: {error}")


def _nothing_to_show(complaint: str) -> bool:
    """Whether a query of NOTHING_TO_SHOW has no answer. An error, or what is no number, is none of that."""
    return ": no answer to " in complaint and any(f", '{title}', query " in complaint for title in NOTHING_TO_SHOW)


def main() -> int:
    """Let it pass, and show it."""
    BUILD.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="operators-hour-", dir=BUILD) as folder:
        found = hour(Path(folder), partial(print, flush=True))
    for failure in found.failures:
        print(f"FAILED: {failure}", file=sys.stderr)
    return 1 if found.failures or found.complaints or any(found.statuses.values()) else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except RigError as error:
        sys.exit(str(error))
