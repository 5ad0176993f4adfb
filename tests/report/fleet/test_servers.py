# SPDX-License-Identifier: GPL-2.0-or-later
"""Fleets that Debian's Prometheus and VictoriaMetrics have stored, compared on the command line."""

from __future__ import annotations

import json
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from fleets import LOCAL, Stored, exposition, host, merged, openmetrics, relabelled, upgraded
from monitoring import answers, free_port, running
from needs import tool

from tracer.model.errors import MsrtraceError
from tracer.report.fleet.http_config import read_http_config
from tracer.report.fleet.prometheus_api import Prometheus

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
    agents = (one(100, group="agents", host="kvm1"), one(40, 17, old, group="agents", host="kvm2"))
    return merged(*agents, moved, *copies, *alike, upgraded({**LOCAL, "group": "upgraded"}, now - 5400))


@contextmanager
def prometheus(directory: Path) -> Iterator[str]:
    """A Prometheus that has stored the fleet."""
    (directory / "fleet.txt").write_text(openmetrics(fleet()))
    (directory / "prometheus.yml").write_text("")
    blocks = [tool("promtool"), "tsdb", "create-blocks-from", "openmetrics", "fleet.txt", "data"]
    subprocess.run(blocks, cwd=directory, check=True, capture_output=True, timeout=60)
    address = f"127.0.0.1:{free_port()}"
    command = [tool("prometheus"), f"--config.file={directory}/prometheus.yml", f"--storage.tsdb.path={directory}/data"]
    ready = answers(f"http://{address}/-/ready")
    with running([*command, f"--web.listen-address={address}"], ready, directory / "log"):
        yield f"http://{address}"


@contextmanager
def victoria_metrics(directory: Path) -> Iterator[str]:
    """A single-node VictoriaMetrics that has stored the fleet."""
    address = f"127.0.0.1:{free_port()}"
    command = [tool("victoria-metrics"), f"-storageDataPath={directory}/data", f"-httpListenAddr={address}"]
    with running(command, answers(f"http://{address}/health"), directory / "log"):
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


def test_a_host_before_and_after_an_upgrade(main: Main, url: str) -> None:
    upgrade = int(time.time()) - 5400 + 60  # the fleet was made within the last minute or so
    sides = ("--base", 'group="upgraded"', "--new", 'group="upgraded"', "--base-at", str(upgrade))
    status, out, err = main("compare", "--prometheus", url, *sides, "--since", "1h", "--format", "json")
    assert (status, err) == (0, "")
    base, new = (json.loads(out)[side] for side in ("base", "new"))
    assert [(side["filter_updates"], side["per_filter_update"]["calls"]) for side in (base, new)] == [
        (100, 30),
        (60, 13),
    ]
    assert [side["host"]["kernel"] for side in (base, new)] == ["5.19.17", "6.1.0"]


#: Of the password "secret", for Prometheus' --web.config.file.
BCRYPT = "$2b$04$MLvz.5yCd8.s8gvIE7n/2eZ0UN13YusyJjLWb.5rGJ3KB3vBzEE5O"


def secured_prometheus(directory: Path, address: str) -> list[str]:
    """A Prometheus with TLS, which asks for a user and a password."""
    request = [tool("openssl"), "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    subject = ["-subj", "/CN=prometheus.example", "-addext", "subjectAltName=DNS:prometheus.example", "-days", "2"]
    files = ["-keyout", f"{directory}/key.pem", "-out", f"{directory}/cert.pem"]
    subprocess.run([*request, *subject, *files], capture_output=True, check=True)
    web = f"tls_server_config: {{cert_file: cert.pem, key_file: key.pem}}\nbasic_auth_users: {{user: '{BCRYPT}'}}\n"
    (directory / "web.yml").write_text(web)
    (directory / "prometheus.yml").write_text("")
    options = {"config.file": "prometheus.yml", "storage.tsdb.path": "data", "web.config.file": "web.yml"}
    paths = [f"--{option}={directory}/{name}" for option, name in options.items()]
    return [tool("prometheus"), *paths, f"--web.listen-address={address}"]


def secured_victoria_metrics(directory: Path, address: str) -> list[str]:
    """A VictoriaMetrics that asks for a user and a password."""
    credentials = ["-httpAuth.username=user", "-httpAuth.password=secret"]
    return [tool("victoria-metrics"), f"-storageDataPath={directory}/data", f"-httpListenAddr={address}", *credentials]


@pytest.mark.parametrize(
    ("command", "scheme", "tls"),
    [
        (secured_prometheus, "https", "tls_config: {ca_file: cert.pem, server_name: prometheus.example}\n"),
        (secured_victoria_metrics, "http", ""),
    ],
)
def test_a_server_with_a_password(
    tmp_path: Path, command: Callable[[Path, str], list[str]], scheme: str, tls: str
) -> None:
    config, wrong = tmp_path / "http.yml", tmp_path / "wrong.yml"
    config.write_text(f"{tls}basic_auth: {{username: user, password_file: password}}\n")
    wrong.write_text(f"{tls}basic_auth: {{username: user, password: hidden}}\n")
    (tmp_path / "password").write_text("secret\n")
    address = f"127.0.0.1:{free_port()}"
    server = command(tmp_path, address)
    allowed = Prometheus(f"{scheme}://{address}", read_http_config(config))
    with running(server, allowed.now, tmp_path / "log"):
        assert abs(allowed.now() - time.time()) < 60
        with pytest.raises(MsrtraceError, match="refused the query: 401 Unauthorized") as error:
            Prometheus(f"{scheme}://{address}", read_http_config(wrong)).now()
    assert "hidden" not in str(error.value)
