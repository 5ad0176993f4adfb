"""Scrapes over HTTP and HTTPS: what clients get, also at once, and beside clients that do nothing."""

from __future__ import annotations

import gzip
import re
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from threading import Semaphore
from urllib.request import Request, urlopen

import pytest
from made import crowd, toggle
from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from tracer import server as server_module
from tracer.errors import MsrtraceError
from tracer.metrics import SnapshotCollector
from tracer.server import Server
from tracer.snapshot import Outcome, Snapshot

Serve = Callable[..., Server]
DURATION = re.compile(rb"msrtrace_scrape_duration_seconds .*")


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Serves the snapshots that a function takes."""
    started: list[Server] = []

    def start(take: Callable[[], Snapshot] | Collector, **options: object) -> Server:
        registry = CollectorRegistry()
        registry.register(take if not callable(take) else SnapshotCollector(take, "0.1.0"))
        started.append(Server(registry, ("127.0.0.1", 0), **options).start())  # type: ignore[arg-type]
        return started[-1]

    yield start
    for one in started:
        one.shutdown()
        one.server_close()


@pytest.fixture
def tls(tmp_path: Path) -> dict[str, str]:
    """A certificate and its key."""
    if not shutil.which("openssl"):
        pytest.skip("openssl, which makes the certificate, is missing")
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    request = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    name = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1", "-days", "2"]
    subprocess.run([*request, *name, "-keyout", key, "-out", cert], capture_output=True, check=True)
    return {"cert": str(cert), "key": str(key)}


def scrape(server: Server, query: str = "", cert: str | None = None, **headers: str) -> tuple[bytes, dict[str, str]]:
    """The text and the headers of an answer."""
    request = Request(server.url + query, headers={name.replace("_", "-"): value for name, value in headers.items()})
    context = ssl.create_default_context(cafile=cert) if cert else None
    with urlopen(request, timeout=20, context=context) as answer:
        return answer.read(), dict(answer.headers)


# --- what clients get ---


def test_plain(serve: Serve) -> None:
    text, headers = scrape(serve(toggle))
    assert text.startswith(b"# HELP msrtrace_build_info ")
    assert headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert int(headers["Content-Length"]) == len(text)


def test_gzip(serve: Serve) -> None:
    server = serve(toggle)
    text, headers = scrape(server, Accept_Encoding="gzip")
    assert headers["Content-Encoding"] == "gzip"
    assert DURATION.sub(b"", gzip.decompress(text)) == DURATION.sub(b"", scrape(server)[0])


def test_openmetrics(serve: Serve) -> None:
    text, headers = scrape(serve(toggle), Accept="application/openmetrics-text;version=1.0.0;escaping=allow-utf-8")
    assert headers["Content-Type"].startswith("application/openmetrics-text; version=1.0.0")
    assert text.endswith(b"\n# EOF\n")


def test_a_part_of_the_metrics(serve: Serve) -> None:
    class Two(Collector):
        def describe(self) -> list[Metric]:
            return list(self.collect())

        def collect(self) -> list[Metric]:
            return [Metric(name, "", "gauge") for name in ("one", "other")]

    text, _ = scrape(serve(Two()), query="?name[]=one")
    assert b"other" not in text


def test_an_answer_that_cannot_be_made(serve: Serve) -> None:
    class Broken(Collector):
        def collect(self) -> list[Metric]:
            raise ValueError("why")

        def describe(self) -> list[Metric]:
            return []

    said: list[str] = []
    with pytest.raises(OSError, match="closed connection"):
        scrape(serve(Broken(), complain=said.append))
    assert said == ["a scrape failed: ValueError: why"]


def test_an_address_without_a_name_is_not_looked_up(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getfqdn", lambda *_: pytest.fail("a look-up"))
    assert scrape(serve(toggle))[0]


# --- at once ---


def test_scrapes_at_once_are_each_of_one_moment(serve: Serve) -> None:
    """All counts of a text are those of one snapshot, and all of them are there."""
    taken = 0

    def take() -> Snapshot:
        nonlocal taken
        taken += 1
        moment = taken
        one = crowd(20)
        return replace(one, calls=dict.fromkeys(one.calls, Outcome(moment, moment)), unpaired_returns=moment)

    server = serve(take)

    def asked(_: int) -> tuple[int, str]:
        before = taken
        return before, scrape(server)[0].decode()

    with ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(asked, range(40)))
    for before, text in texts:
        counts = set(re.findall(r"^msrtrace_(?:intercept_\w+_total\{.*\}|unpaired_returns_total) (.*)$", text, re.M))
        assert len(counts) == 1
        assert text.count("\nmsrtrace_intercept_calls_total{") == len(crowd(20).calls)
        assert text.endswith("\n")
        assert float(counts.pop()) > before  # none is older than its request


def test_who_asks_while_an_answer_is_made_shares_the_next(serve: Serve) -> None:
    """Otherwise each client that lost its patience, and comes again, makes all of them wait longer."""
    taken, go_on = Semaphore(0), Semaphore(0)

    def take() -> Snapshot:
        taken.release()
        assert go_on.acquire(timeout=20)
        return toggle()

    server = serve(take)
    with ThreadPoolExecutor(12) as pool:
        first = pool.submit(scrape, server)
        assert taken.acquire(timeout=20)
        others = [pool.submit(scrape, server) for _ in range(10)]
        end = time.monotonic() + 20
        while sum(thread.name.count("process_request") for thread in threading.enumerate()) < 11:
            assert time.monotonic() < end
            time.sleep(0.01)
        time.sleep(0.2)  # for the last of them to ask
        go_on.release(2)
        assert all(one.result() for one in (first, *others))
    assert taken.acquire(timeout=20)
    assert not taken.acquire(blocking=False)


def test_before_the_start_clients_are_refused(serve: Serve) -> None:
    server = Server(CollectorRegistry(), ("127.0.0.1", 0))
    with closing(server.socket), pytest.raises(OSError, match="refused"):
        scrape(server)


def test_an_address_that_is_taken(serve: Serve) -> None:
    """At the start, or by one that was as quick until then."""
    address = ("127.0.0.1", serve(toggle).server_address[1])
    said = f"cannot listen on 127.0.0.1:{address[1]}: Address already in use; choose another .*"
    with pytest.raises(MsrtraceError, match=said):
        Server(CollectorRegistry(), address)
    free = Server(CollectorRegistry(), ("127.0.0.1", 0))
    other = Server(CollectorRegistry(), ("127.0.0.1", free.server_address[1]))
    with closing(free.socket), closing(other.socket):
        free.server_activate()
        with pytest.raises(MsrtraceError, match="Address already in use"):
            other.start()


def connected(server: Server, said: bytes) -> socket.socket:
    """A client that SAID that and reads nothing."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.connect(("127.0.0.1", server.server_address[1]))
    client.sendall(said)
    return client


REQUEST = b"GET /metrics HTTP/1.0\r\n\r\n"


@pytest.mark.parametrize("said", [b"", REQUEST[:9], REQUEST])
def test_a_client_that_is_silent_keeps_nobody(serve: Serve, said: bytes) -> None:
    big = crowd(300)
    server = serve(lambda: big)
    with connected(server, said), connected(server, said):
        time.sleep(0.5)
        assert len(scrape(server)[0]) > 2 << 20  # more than the kernel buffers for a client


@pytest.mark.parametrize("said", [b"", b"\x16\x03\x01", REQUEST])
def test_a_client_that_is_silent_keeps_nobody_with_tls(serve: Serve, tls: dict[str, str], said: bytes) -> None:
    server = serve(toggle, **tls)
    assert server.url.startswith("https://127.0.0.1:")
    with connected(server, said), connected(server, said):
        time.sleep(0.2)
        assert scrape(server, cert=tls["cert"])[0].endswith(b"\n")


def test_a_client_that_reads_nothing_is_given_up(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """And nobody is told: it is not of what this program does."""
    monkeypatch.setattr(server_module._Handler, "timeout", 0.3)
    big, said = crowd(300), list[str]()
    server = serve(lambda: big, complain=said.append)
    before = threading.active_count()
    with connected(server, REQUEST), connected(server, b""):
        end = time.monotonic() + 20
        while threading.active_count() == before:
            assert time.monotonic() < end
        while threading.active_count() > before:
            assert time.monotonic() < end
            time.sleep(0.05)
    assert (said, capfd.readouterr()) == ([], ("", ""))


# --- TLS ---


def test_a_client_without_a_certificate(serve: Serve, tls: dict[str, str], capfd: pytest.CaptureFixture[str]) -> None:
    said: list[str] = []
    server = serve(toggle, **tls, ca=tls["cert"], complain=said.append)
    with pytest.raises(OSError, match=r"(?i)certificate|reset|eof|closed"):
        scrape(server, cert=tls["cert"])
    assert (said, capfd.readouterr()) == ([], ("", ""))


def test_files_that_are_not_there_are_named(tls: dict[str, str]) -> None:
    for missing in ("cert", "key", "ca"):
        with pytest.raises(MsrtraceError, match=r"cannot read a TLS file: .*'/none'"):
            Server(CollectorRegistry(), ("127.0.0.1", 0), **{**tls, "ca": tls["cert"], missing: "/none"})  # type: ignore[arg-type]
