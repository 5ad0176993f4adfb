# SPDX-License-Identifier: GPL-2.0-or-later
"""Hosts that real servers scrape: replicas, a federating server, and agents, while labels and processes change.

test_servers.py has what is stored made up; here it is what Debian's Prometheus and VictoriaMetrics make of it.
"""

from __future__ import annotations

import json
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from fleets import CALLS, DISABLED, REDUNDANT, START, UPDATES
from monitoring import answers, free_port, running
from needs import tool

from tracer.report.fleet.prometheus_api import Prometheus

Main = Callable[..., tuple[int, str, str]]
Json = dict[str, object]

pytestmark = pytest.mark.timeout(240)
_INFO = {
    "version": "1",
    "vendor": "vmx",
    "kernel": "6.1",
    "layout": "toggle",
    "backend": "kprobe",
    "redundancy": "exact",
}
_PATIENCE_SECONDS = 60.0


@dataclass
class Host:
    """An exporter of msrtrace's metrics, whose filter updates make 13 calls, and `enables` more."""

    name: str
    group: str
    updates: int
    enables: int = 0
    made: int = 0  # updates since it was first scraped
    late: float = 0.0  # seconds that it takes to answer
    started: float = field(default_factory=time.time)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def restart(self) -> None:
        """Begin again from 0."""
        with self.lock:
            self.updates, self.started = 0, time.time()

    def update(self, number: int) -> None:
        """Make filter updates."""
        self.updates += number
        self.made += number

    def text(self) -> str:
        """Its metrics."""
        with self.lock:
            updates, started = self.updates, self.started
        found = [("msrtrace_build_info", _INFO, 1.0), (START, {}, started), (UPDATES, {}, updates)]
        kinds = [(msr, access, "disable") for msr, access in DISABLED]
        kinds += [(hex(0x3F0 + number), "read", "enable") for number in range(self.enables)]
        for metric in (CALLS, REDUNDANT) if updates else ():
            for msr, access, action in kinds:
                labels = {"msr": msr, "name": "?", "access": access, "action": action, "cause": "filter_change"}
                found.append((metric, labels, updates))
        rows = []
        for metric, labels, value in found:
            inside = ",".join(f"{name}={json.dumps(text)}" for name, text in labels.items())
            rows.append(f"{metric}{{{inside}}} {value!r}\n")
        return "".join(rows)

    def serve(self) -> ThreadingHTTPServer:
        """Serve them."""
        host = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                time.sleep(host.late)
                self.send_response(200)
                self.send_header("Content-Type", "text/plain; version=0.0.4")
                self.end_headers()
                self.wfile.write(host.text().encode())

            def log_message(self, format: str, *args: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        return server


class Scraper:
    """A Prometheus, or with `--enable-feature=agent` one that stores nothing."""

    def __init__(self, directory: Path, name: str, config: Json, *options: str) -> None:
        self.directory = directory / name
        self.directory.mkdir()
        self.configure(config)
        self.address = f"127.0.0.1:{free_port()}"
        store = "agent.path" if "--enable-feature=agent" in options else "tsdb.path"
        self.command = [
            tool("prometheus"),
            f"--config.file={self.directory}/prometheus.yml",
            f"--storage.{store}={self.directory}/data",
            f"--web.listen-address={self.address}",
            *options,
        ]

    @property
    def url(self) -> str:
        """Its URL."""
        return f"http://{self.address}"

    def configure(self, config: Json) -> None:
        """Write its configuration."""
        (self.directory / "prometheus.yml").write_text(json.dumps(config))


class Fleet:
    """Hosts, and what scrapes and stores them."""

    def __init__(self, directory: Path, stack: ExitStack) -> None:
        self.hosts = [Host("kvm0", "new", 1000, late=0.1), Host("kvm1", "new", 500), Host("kvm2", "base", 70, 17)]
        for number, host in enumerate(self.hosts):
            host.started -= 90_000 + 7 * number
        self._stack, self._log = stack, directory / "log"
        servers = [stack.enter_context(host.serve()) for host in self.hosts]
        for server in servers:
            stack.callback(server.shutdown)
        self._addresses = [f"127.0.0.1:{server.server_port}" for server in servers]
        storage = f"127.0.0.1:{free_port()}"
        victoria = [tool("victoria-metrics"), f"-storageDataPath={directory}/vm", f"-httpListenAddr={storage}"]
        stack.enter_context(running(victoria, answers(f"http://{storage}/health"), directory / "vm.log"))
        self._into_victoria = f"http://{storage}/api/v1/write"
        self.received = Scraper(directory, "received", self._config(), "--web.enable-remote-write-receiver")
        self.replicas = [Scraper(directory, name, self._replica(name)) for name in "ab"]
        self.agents = [
            Scraper(directory, f"agent{number}", self._agent(number), "--enable-feature=agent")
            for number in range(len(self.hosts))
        ]
        above = [Scraper(directory, f"above-{honor}", self._above(honor)) for honor in (False, True)]
        self.urls = {
            "replica a": self.replicas[0].url,
            "both replicas, in VictoriaMetrics": f"http://{storage}",
            "above both, labels renamed": above[0].url,
            "above both, labels kept": above[1].url,
            "agents": self.received.url,
        }
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        scrapers = (self.received, *self.replicas, *self.agents, *above)
        for scraper in scrapers:
            self._start(scraper)
        for scraper in scrapers:
            self.until(lambda scraper=scraper: answered(f"{scraper.url}/-/ready"))  # type: ignore[misc]

    def _start(self, scraper: Scraper) -> None:
        with self._log.open("a") as output:
            process = subprocess.Popen(scraper.command, stdout=output, stderr=output)
        self._processes[scraper.address] = process
        self._stack.callback(process.wait, 30)
        self._stack.callback(process.terminate)

    def reload(self, scraper: Scraper, config: Json) -> None:
        """Give it another configuration."""
        scraper.configure(config)
        self._processes[scraper.address].send_signal(signal.SIGHUP)

    def end(self, scraper: Scraper) -> None:
        """End it."""
        process = self._processes[scraper.address]
        process.terminate()
        process.wait(30)

    def _config(self, **more: object) -> Json:
        return {"global": {"scrape_interval": "1s", "scrape_timeout": "1s"}, **more}

    def _replica(self, name: str, **labels: str) -> Json:
        targets = [
            {"targets": [address], "labels": {"group": host.group, **labels}}
            for host, address in zip(self.hosts, self._addresses, strict=True)
        ]
        config = self._config(
            scrape_configs=[{"job_name": "msrtrace", "static_configs": targets}],
            remote_write=[{"url": self._into_victoria, "queue_config": {"batch_send_deadline": "1s"}}],
        )
        config["global"] = {"scrape_interval": "1s", "external_labels": {"prometheus_replica": name}}
        return config

    def _agent(self, number: int, **labels: str) -> Json:
        """Each finds its host at the same address, so to say."""
        host = self.hosts[number]
        labels = {"instance": "127.0.0.1:9753", "host": host.name, "group": host.group, **labels}
        target = {"targets": [self._addresses[number]], "labels": labels}
        into = {"url": f"{self.received.url}/api/v1/write", "queue_config": {"batch_send_deadline": "1s"}}
        return self._config(scrape_configs=[{"job_name": "msrtrace", "static_configs": [target]}], remote_write=[into])

    def _above(self, honor_labels: bool) -> Json:
        job = {"job_name": "federate", "metrics_path": "/federate", "params": {"match[]": ['{job="msrtrace"}']}}
        targets = [{"targets": [replica.address for replica in self.replicas]}]
        return self._config(scrape_configs=[{**job, "honor_labels": honor_labels, "static_configs": targets}])

    def until(self, holds: Callable[[], bool]) -> None:
        """Wait until something holds."""
        end = time.monotonic() + _PATIENCE_SECONDS
        while not holds():
            assert time.monotonic() < end, self._log.read_text()[-3000:]
            time.sleep(0.2)

    def until_stored(self, **labels: str) -> None:
        """Wait until every server has stored what each host counts now, and where there are labels, with them."""
        for url in self.urls.values():
            self.until(lambda url=url: self._has_stored(url, labels))  # type: ignore[misc]

    def _has_stored(self, url: str, labels: dict[str, str]) -> bool:
        server = Prometheus(url)
        selector = ", ".join(f'{name}="{value}"' for name, value in labels.items())
        series = server.series(UPDATES, selector, 600, time.time())
        newest = {(one.samples.values[-1]) for one in series}
        return {host.updates for host in self.hosts} <= newest

    def work(self, seconds: float) -> None:
        """Make filter updates for a while."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for number, host in enumerate(self.hosts):
                host.update(number + 1)
            time.sleep(0.05)

    def change(self) -> None:
        """All that happens in the window."""
        self.until_stored()
        self.work(2)
        self.reload(self.replicas[0], self._replica("a", dc="eu"))
        for number in range(len(self.agents)):
            self.reload(self.agents[number], self._agent(number, dc="eu"))
        self.work(1.5)
        self.reload(self.replicas[1], self._replica("b", dc="eu"))
        self.work(1)
        self.until_stored(dc="eu")
        self.hosts[1].restart()
        self.work(1.5)
        self.until_stored(dc="eu")
        self.end(self.replicas[1])
        self.work(1)
        self.until_stored()


def answered(url: str) -> bool:
    """Whether a URL answers."""
    try:
        answers(url)()
    except OSError:
        return False
    return True


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """A fleet after all that happened."""
    with ExitStack() as stack:
        found = Fleet(tmp_path_factory.mktemp("scraped"), stack)
        found.change()
        yield found


NAMES = [
    "replica a",
    "both replicas, in VictoriaMetrics",
    "above both, labels renamed",
    "above both, labels kept",
    "agents",
]


@pytest.mark.parametrize("name", NAMES)
def test_every_update_counts_once(main: Main, fleet: Fleet, name: str) -> None:
    """A label was added, first at one replica; a host was restarted; a replica ended; one host answers late."""
    sides = ("--base", 'group="base"', "--new", 'group="new"', "--since", "10m", "--format", "json")
    status, out, err = main("compare", "--prometheus", fleet.urls[name], *sides)
    assert (status, err) == (0, "")
    found = {side: json.loads(out)[side] for side in ("base", "new")}
    made = {side: sum(host.made for host in fleet.hosts if host.group == side) for side in found}
    assert {side: one["filter_updates"] for side, one in found.items()} == made
    assert [(one["reports"], one["per_filter_update"]["calls"]) for one in found.values()] == [(1, 30), (2, 13)]
    assert [one["verdict"]["patched"] for one in found.values()] == [False, True]
