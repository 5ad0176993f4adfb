# SPDX-License-Identifier: GPL-2.0-or-later
"""Fleets that Debian's Prometheus and VictoriaMetrics have stored, compared on the command line."""

from __future__ import annotations

import json
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from fleets import LOCAL, Stored, exposition, host, merged, openmetrics, relabelled
from needs import tool

Main = Callable[..., tuple[int, str, str]]

pytestmark = pytest.mark.timeout(120)


def fleet() -> Stored:
    """A base host that makes 30 calls an update, and groups of hosts to compare with it."""
    now = float(int(time.time()))
    scrapes, old = [now - 62, now - 47, now - 32, now - 17, now - 2], now - 90_000.125

    def one(updates: int, enables: int = 0, start: float = old, **labels: str) -> Stored:
        return host({**LOCAL, **labels}, scrapes, updates=updates, enables=enables, start=start)

    moved = relabelled(one(100, start=old + 3, group="moved"), scrapes[2], {"dc": "eu"})
    copies = (one(100, start=old + 4, group="copies", prometheus_replica=name) for name in "ab")
    alike = (one(100, start=old + 5, group="alike", shard=name) for name in "ab")
    return merged(
        one(100, group="agents", host="kvm1"), one(40, 17, old, group="agents", host="kvm2"), moved, *copies, *alike
    )


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextmanager
def running(command: list[str], ready: str, log: Path) -> Iterator[None]:
    """Run a command for the duration of the context, which begins when the URL `ready` answers."""
    with log.open("w") as output, subprocess.Popen(command, stdout=output, stderr=output) as process:
        try:
            end = time.monotonic() + 60
            while True:
                try:
                    urllib.request.urlopen(ready, timeout=5).close()
                    break
                except OSError:
                    assert process.poll() is None, log.read_text()
                    assert time.monotonic() < end, log.read_text()
                    time.sleep(0.1)
            yield
        finally:
            process.terminate()
            process.wait(30)


@contextmanager
def prometheus(directory: Path) -> Iterator[str]:
    """A Prometheus that has stored the fleet."""
    (directory / "fleet.txt").write_text(openmetrics(fleet()))
    (directory / "prometheus.yml").write_text("")
    blocks = [tool("promtool"), "tsdb", "create-blocks-from", "openmetrics", "fleet.txt", "data"]
    subprocess.run(blocks, cwd=directory, check=True, capture_output=True, timeout=60)
    address = f"127.0.0.1:{free_port()}"
    command = [tool("prometheus"), f"--config.file={directory}/prometheus.yml", f"--storage.tsdb.path={directory}/data"]
    with running([*command, f"--web.listen-address={address}"], f"http://{address}/-/ready", directory / "log"):
        yield f"http://{address}"


@contextmanager
def victoria_metrics(directory: Path) -> Iterator[str]:
    """A single-node VictoriaMetrics that has stored the fleet."""
    address = f"127.0.0.1:{free_port()}"
    command = [tool("victoria-metrics"), f"-storageDataPath={directory}/data", f"-httpListenAddr={address}"]
    with running(command, f"http://{address}/health", directory / "log"):
        for path, body in (("api/v1/import/prometheus", exposition(fleet()).encode()), ("internal/force_flush", None)):
            urllib.request.urlopen(f"http://{address}/{path}", data=body, timeout=30).close()
        yield f"http://{address}"


@pytest.fixture(scope="module", params=[prometheus, victoria_metrics], ids=lambda server: str(server.__name__))
def url(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a server that has stored the fleet."""
    with request.param(tmp_path_factory.mktemp(request.param.__name__)) as found:
        yield found


def counts(main: Main, url: str, new: str) -> tuple[int, int, float]:
    """Reports, filter updates and calls of the selected hosts, compared with the host without the patch."""
    sides = ("--base", 'host="kvm2"', "--new", new)
    status, out, err = main("compare", "--prometheus", url, *sides, "--format", "json")
    assert (status, err) == (0, "")
    base, other = (json.loads(out)[side] for side in ("base", "new"))
    assert (base["reports"], base["filter_updates"], base["per_filter_update"]["calls"]) == (1, 40, 30)
    assert [side["verdict"]["patched"] for side in (base, other)] == [False, True]
    return other["reports"], other["filter_updates"], other["per_filter_update"]["calls"] * other["filter_updates"]


@pytest.mark.parametrize(
    "new",
    [
        pytest.param('host="kvm1"', id="hosts with one instance and another label that differs"),
        pytest.param('group="moved"', id="a label is added in the window"),
        pytest.param('group="copies"', id="two replicas"),
    ],
)
def test_each_host_counts_once(main: Main, url: str, new: str) -> None:
    assert counts(main, url, new) == (1, 100, 1300)


def test_hosts_with_the_same_instance_are_several(main: Main, url: str) -> None:
    assert main("compare", "--prometheus", url, "--base", 'host="kvm2"', "--new", 'group="agents"')[:2] == (1, "")
    _, out, _ = main("compare", "--prometheus", url, "--base", 'group="moved"', "--new", 'group="agents"')
    assert "140 filter updates, 2 reports" in out


def test_ambiguous_series_are_refused(main: Main, url: str) -> None:
    status, out, err = main("compare", "--prometheus", url, "--base", 'host="kvm2"', "--new", 'group="alike"')
    assert (status, out) == (1, "")
    assert "differ in the label shard and their counts do not decide it; select one of them, as with {shard=" in err
