# SPDX-License-Identifier: GPL-2.0-or-later
"""Scrapes over HTTP and HTTPS: answers to single, concurrent and misbehaving clients."""

from __future__ import annotations

import gzip
import re
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path
from threading import Semaphore
from urllib.request import Request, urlopen

import pytest
from made import crowd, toggle
from needs import tool
from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from tracer.export import server as server_module
from tracer.export.metrics import SnapshotCollector
from tracer.export.security import TlsFiles
from tracer.export.server import Server
from tracer.model.errors import MsrtraceError
from tracer.model.snapshot import Outcome, Snapshot

Serve = Callable[..., Server]


class Made(Collector):
    """Families that do not change."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self.families = list(families)

    def describe(self) -> Iterable[Metric]:
        return []

    def collect(self) -> Iterable[Metric]:
        return self.families


DURATION = re.compile(rb"msrtrace_scrape_duration_seconds .*")


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Serves the snapshots that a function takes."""
    started: list[Server] = []

    def start(take: Callable[[], Snapshot] | Snapshot | Collector, **options: object) -> Server:
        registry = CollectorRegistry()
        if isinstance(take, Snapshot):
            registry.register(SnapshotCollector(lambda: take, "0.1.0"))
        else:
            registry.register(SnapshotCollector(take, "0.1.0") if callable(take) else take)
        started.append(Server(registry, ("127.0.0.1", 0), **options).start())  # type: ignore[arg-type]
        return started[-1]

    yield start
    for one in started:
        one.shutdown()
        one.server_close()


@pytest.fixture
def tls(tmp_path: Path) -> dict[str, str]:
    """A certificate and its key."""
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    request = [tool("openssl"), "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
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


def test_the_text_format(serve: Serve) -> None:
    text, headers = scrape(serve(toggle))
    assert text.startswith(b"# HELP msrtrace_build_info ")
    assert headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert int(headers["Content-Length"]) == len(text)


def test_gzip_is_used_if_accepted(serve: Serve) -> None:
    server = serve(toggle)
    text, headers = scrape(server, Accept_Encoding="gzip")
    assert headers["Content-Encoding"] == "gzip"
    assert DURATION.sub(b"", gzip.decompress(text)) == DURATION.sub(b"", scrape(server)[0])


def test_openmetrics_is_used_if_accepted(serve: Serve) -> None:
    text, headers = scrape(serve(toggle), Accept="application/openmetrics-text;version=1.0.0;escaping=allow-utf-8")
    assert headers["Content-Type"].startswith("application/openmetrics-text; version=1.0.0")
    assert text.endswith(b"\n# EOF\n")


OPENMETRICS = "application/openmetrics-text;version=1.0.0"
#: What a client may accept, each of which gives other bytes.
ACCEPTED = ("*/*", OPENMETRICS)


def lines_of(text: bytes) -> dict[str, list[bytes]]:
    """The lines of an exposition by family, the HELP line first."""
    found: dict[str, list[bytes]] = {}
    for line in text.splitlines():
        if line.startswith(b"# HELP "):
            found[name := line.split()[2].decode()] = []
        if line != b"# EOF":
            found[name].append(line)
    return found


@pytest.mark.parametrize("accept", ACCEPTED)
def test_each_family_can_be_selected(serve: Serve, accept: str) -> None:
    """By its name in either format: the lines that it has in the whole text."""
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    registry.register(SnapshotCollector(lambda: crowd(2), "0.1.0"))
    made = Made(registry.collect())
    server = serve(made)
    whole = lines_of(scrape(server, Accept=accept)[0])
    assert len(whole) == len(made.families) > 20
    for family, (shown, lines) in zip(made.families, whole.items(), strict=True):
        in_text = family.name + {"counter": "_total", "info": "_info"}.get(family.type, "")
        for name in (family.name, in_text):
            for query in (f"?name[]={name}", f"?x=1&name%5B%5D={name}&name="):
                text, headers = scrape(server, query, Accept=accept, Accept_Encoding="gzip")
                assert lines_of(gzip.decompress(text)) == {shown: lines}
                assert headers["Content-Type"] == scrape(server, Accept=accept)[1]["Content-Type"]


def test_the_version_can_be_selected(serve: Serve) -> None:
    text, _ = scrape(serve(toggle), "?name[]=msrtrace_build_info")
    assert re.fullmatch(
        rb"# HELP msrtrace_build_info .*\n# TYPE msrtrace_build_info gauge\nmsrtrace_build_info\{.*\} 1.0\n", text
    )


def test_the_name_of_samples_selects_only_those(serve: Serve) -> None:
    server, family = serve(crowd(2)), "msrtrace_filter_update_duration_seconds"
    lines = lines_of(scrape(server)[0])[family]
    for suffix, count in {"_bucket": 2 * 25, "_count": 2, "_sum": 2}.items():
        found = lines_of(scrape(server, f"?name[]={family}{suffix}")[0])
        assert found == {family: [line for line in lines if line.startswith((b"#", f"{family}{suffix}".encode()))]}
        assert len(found[family]) == 2 + count


def test_several_names_can_be_selected(serve: Serve) -> None:
    """In the order of the whole text; unknown names are ignored."""
    server = serve(toggle)
    names = ["msrtrace_open_calls", "no_such_metric", "msrtrace_intercept_calls", "msrtrace_build_info"]
    found = lines_of(scrape(server, "?" + "&".join(f"name[]={name}" for name in names))[0])
    assert list(found) == ["msrtrace_build_info", "msrtrace_intercept_calls_total", "msrtrace_open_calls"]
    assert all(lines_of(scrape(server)[0])[name] == lines for name, lines in found.items())


def test_an_unknown_name_selects_nothing(serve: Serve) -> None:
    server = serve(toggle)
    for name in ("msrtrace", "msrtrace_intercept_calls_tota", "msrtrace_build_info{}", ".*", "%00%ff"):
        assert scrape(server, f"?name[]={name}")[0] == b""
        assert scrape(server, f"?name[]={name}", Accept=OPENMETRICS)[0] == b"# EOF\n"


def test_other_parameters_are_ignored(serve: Serve) -> None:
    server = serve(toggle)
    whole = DURATION.sub(b"", scrape(server)[0])
    for query in ("?", "?name=msrtrace_open_calls", "?names[]=msrtrace_open_calls", "?target=a&b"):
        assert DURATION.sub(b"", scrape(server, query)[0]) == whole


def test_a_failed_collection_is_reported(serve: Serve) -> None:
    class Broken(Collector):
        def collect(self) -> list[Metric]:
            raise ValueError("why")

        def describe(self) -> list[Metric]:
            return []

    said: list[str] = []
    with pytest.raises(OSError, match="closed connection"):
        scrape(serve(Broken(), on_error=said.append))
    assert said == ["a scrape failed: ValueError: why"]


def test_an_address_without_a_name_is_not_looked_up(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getfqdn", lambda *_: pytest.fail("a look-up"))
    assert scrape(serve(toggle))[0]


# --- at once ---


def test_concurrent_scrapes_are_each_of_one_snapshot(serve: Serve) -> None:
    """All counts in a text are of one snapshot, and none is missing."""
    taken = 0

    def take() -> Snapshot:
        nonlocal taken
        taken += 1
        moment = taken
        one = crowd(20)
        return replace(one, calls=dict.fromkeys(one.calls, Outcome(moment, moment)), unpaired_returns=moment)

    server = serve(take)

    def asked(number: int) -> tuple[int, str]:
        accept, before = ACCEPTED[number % len(ACCEPTED)], taken
        return before, scrape(server, Accept=accept)[0].decode().removesuffix("# EOF\n")

    with ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(asked, range(40)))
    for before, text in texts:
        counts = set(re.findall(r"^msrtrace_(?:intercept_\w+_total\{.*\}|unpaired_returns_total) (.*)$", text, re.M))
        assert len(counts) == 1
        assert text.count("\nmsrtrace_intercept_calls_total{") == len(crowd(20).calls)
        assert text.endswith("\n")
        assert float(counts.pop()) > before  # none is older than its request


Asked = tuple[str, str]  # the query and what is accepted
ALIKE: dict[str, list[Asked]] = {accept: [("", accept)] for accept in ACCEPTED}
ALIKE |= {
    "as Prometheus asks": [("", f"{OPENMETRICS};escaping=allow-utf-8;q=0.5,text/plain;version=0.0.4;q=0.2")],
    "a part": [("?name[]=msrtrace_open_calls&name[]=up", OPENMETRICS), ("?name[]=up&name[]=msrtrace_open_calls&x", "")],
    "all formats": [("", accept) for accept in ACCEPTED],
    "all different": [(f"?name[]=name_{number}", accept) for number in range(2) for accept in ACCEPTED],
}


@pytest.mark.parametrize("requests", ALIKE.values(), ids=ALIKE)
def test_requests_during_a_collection_share_the_next(serve: Serve, requests: list[Asked]) -> None:
    """Otherwise each client that retries would make all of them wait longer."""
    taken, go_on = Semaphore(0), Semaphore(0)

    def take() -> Snapshot:
        taken.release()
        assert go_on.acquire(timeout=20)
        return toggle()

    server = serve(take)
    with ThreadPoolExecutor(12) as pool:
        first = pool.submit(scrape, server)
        assert taken.acquire(timeout=20)
        others = [pool.submit(scrape, server, query, Accept=accept) for query, accept in islice(cycle(requests), 10)]
        end = time.monotonic() + 20
        while sum(thread.name.count("process_request") for thread in threading.enumerate()) < 11:
            assert time.monotonic() < end
            time.sleep(0.01)
        time.sleep(0.2)  # for the last of them to ask
        go_on.release(11)  # more than should be needed
        assert first.result()
        answers = {one.result()[1]["Content-Type"] for one in others}
    assert len(answers) == len({accept for _, accept in requests})
    assert taken.acquire(timeout=20)
    assert not taken.acquire(blocking=False)


def test_clients_that_come_at_once_share_a_collection(serve: Serve) -> None:
    """Otherwise they trickle in, as a collection keeps the GIL from the thread that accepts them."""
    taken, busy = 0, 0.02

    def take() -> Snapshot:
        nonlocal taken
        taken += 1
        end = time.monotonic() + busy
        while time.monotonic() < end:
            pass
        return toggle()

    server = serve(take)
    with ExitStack() as stack:
        clients = [stack.enter_context(connected(server, REQUEST)) for _ in range(200)]
        for client in clients:
            while client.recv(1 << 16):
                pass
    assert taken < 40


def test_connections_are_refused_before_the_start(serve: Serve) -> None:
    server = Server(CollectorRegistry(), ("127.0.0.1", 0))
    with closing(server.socket), pytest.raises(OSError, match="refused"):
        scrape(server)


def test_an_address_in_use_is_an_error(serve: Serve) -> None:
    """Before the server was made, or between that and its start."""
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
    """A client that sent something and reads nothing."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.connect(("127.0.0.1", server.server_address[1]))
    client.sendall(said)
    return client


REQUEST = b"GET /metrics HTTP/1.0\r\n\r\n"


@pytest.mark.parametrize("said", [b"", REQUEST[:9], REQUEST])
def test_a_silent_client_blocks_nobody(serve: Serve, said: bytes) -> None:
    big = crowd(300)
    server = serve(lambda: big)
    with connected(server, said), connected(server, said):
        time.sleep(0.5)
        assert len(scrape(server)[0]) > 2 << 20  # more than the kernel buffers for a client


@pytest.mark.parametrize("said", [b"", b"\x16\x03\x01", REQUEST])
def test_a_silent_client_blocks_nobody_with_tls(serve: Serve, tls: dict[str, str], said: bytes) -> None:
    server = serve(toggle, security=TlsFiles(tls["cert"], tls["key"]))
    assert server.url.startswith("https://127.0.0.1:")
    with connected(server, said), connected(server, said):
        time.sleep(0.2)
        assert scrape(server, cert=tls["cert"])[0].endswith(b"\n")


def test_a_client_that_reads_nothing_is_disconnected(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Without a message, as it is no error of the server."""
    monkeypatch.setattr(server_module, "_PATIENCE", 0.3)
    big, said = crowd(300), list[str]()
    server = serve(lambda: big, on_error=said.append)
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


def test_a_client_without_a_certificate_is_refused(
    serve: Serve, tls: dict[str, str], capfd: pytest.CaptureFixture[str]
) -> None:
    said: list[str] = []
    server = serve(toggle, security=TlsFiles(tls["cert"], tls["key"], tls["cert"]), on_error=said.append)
    with pytest.raises(OSError, match=r"(?i)certificate|reset|eof|closed"):
        scrape(server, cert=tls["cert"])
    assert (said, capfd.readouterr()) == ([], ("", ""))


def test_missing_files_are_named(tls: dict[str, str]) -> None:
    for missing in ("cert", "key", "ca"):
        files = {**tls, "ca": tls["cert"], missing: "/none"}
        with pytest.raises(MsrtraceError, match="cannot read /none: No such file or directory"):
            TlsFiles(files["cert"], files["key"], files["ca"])


def test_files_that_become_invalid_leave_those_before_them(tls: dict[str, str], tmp_path: Path) -> None:
    said: list[str] = []
    cert = tmp_path / "used.pem"
    cert.write_text(Path(tls["cert"]).read_text())
    files = TlsFiles(str(cert), tls["key"], on_error=said.append)
    before = files.now()
    cert.write_text("nothing")
    files.reload()
    assert files.now() is before
    [line] = said
    assert line.startswith("the TLS files cannot be used: ")
    assert line.endswith("; the configuration before it stays in force")
    cert.write_text(Path(tls["cert"]).read_text())
    files.reload()
    assert files.now() is not before
    assert len(said) == 1


# --- whether it works, and how it ends ---


def test_a_collection_that_hangs_is_no_work(serve: Serve) -> None:
    hangs, goes_on = threading.Event(), threading.Event()

    def take() -> Snapshot:
        hangs.set()
        goes_on.wait(30)
        return toggle()

    server = serve(take)
    assert server.works(5)
    with connected(server, REQUEST) as client:
        assert hangs.wait(10)
        time.sleep(0.3)
        assert server.works(20)
        assert not server.works(0.2)
        goes_on.set()
        assert client.recv(15) == b"HTTP/1.0 200 OK"
    eventually_works = time.monotonic() + 10
    while not server.works(1):
        assert time.monotonic() < eventually_works


def test_a_loop_that_accepts_nothing_more_is_no_work(serve: Serve) -> None:
    server = serve(toggle)
    server.shutdown()
    time.sleep(0.3)
    assert not server.works(0.2)


def test_at_the_end_connections_are_answered_and_no_more_accepted(serve: Serve) -> None:
    goes_on = threading.Event()

    def take() -> Snapshot:
        goes_on.wait(30)
        return toggle()

    server = serve(take)
    with connected(server, REQUEST) as client:
        while not server._connections:
            time.sleep(0.01)
        threading.Timer(0.5, goes_on.set).start()
        begun = time.monotonic()
        server.finish(20)
        assert time.monotonic() - begun < 10
        assert client.recv(15) == b"HTTP/1.0 200 OK"
        with connected(server, REQUEST) as late:
            late.settimeout(0.5)
            with pytest.raises(TimeoutError):
                late.recv(1)


def test_a_silent_client_does_not_keep_it_from_ending(serve: Serve) -> None:
    server = serve(toggle)
    with connected(server, b""):
        while not server._connections:
            time.sleep(0.01)
        begun = time.monotonic()
        server.finish(0.5)
        assert 0.5 <= time.monotonic() - begun < 5


# --- paths and methods ---


def asked(server: Server, request: str, address: str = "127.0.0.1") -> tuple[int, dict[str, str], bytes]:
    """Status, headers and content of the answer to a request, as it is on the wire."""
    with socket.create_connection((address, server.server_address[1]), timeout=20) as client:
        client.sendall(request.encode())
        data = b"".join(iter(lambda: client.recv(1 << 16), b""))
    head, _, content = data.partition(b"\r\n\r\n")
    status, *lines = head.decode().split("\r\n")
    return int(status.split()[1]), dict(line.split(": ", 1) for line in lines), content


def get(server: Server, path: str, method: str = "GET", more: str = "") -> tuple[int, dict[str, str], bytes]:
    return asked(server, f"{method} {path} HTTP/1.1\r\nHost: x\r\n{more}\r\n")


@pytest.fixture
def taken() -> list[int]:
    """An element for each collection of the server."""
    return []


@pytest.fixture
def server(serve: Serve, taken: list[int]) -> Server:
    def take() -> Snapshot:
        taken.append(1)
        return toggle()

    return serve(take, version="1.2.3<4>")


@pytest.mark.parametrize("accept", ['text/plain;version="0.0.4"', "text/plain;version=v1", "a;;=,/;q", "\xff"])
def test_a_malformed_accept_header_is_answered(server: Server, accept: str) -> None:
    status, headers, text = get(server, "/metrics", more=f"Accept: {accept}\r\n")
    assert (status, headers["Content-Type"]) == (200, "text/plain; version=0.0.4; charset=utf-8")
    assert b"msrtrace_build_info{" in text


def test_several_accept_headers_are_one(server: Server) -> None:
    more = f"Accept: text/plain;q=0.5\r\nAccept: {OPENMETRICS}\r\nAccept-Encoding: gzip;q=0\r\n"
    _, headers, text = get(server, "/metrics", more=more)
    assert headers["Content-Type"].startswith("application/openmetrics-text")
    assert text.endswith(b"# EOF\n")


@pytest.mark.parametrize(
    ("path", "status"), [("/", 200), ("/metrics?name[]=msrtrace_build_info", 200), ("/-/healthy", 200), ("/x", 404)]
)
def test_head_has_the_headers_of_get_and_no_content(server: Server, path: str, status: int) -> None:
    got, headers, content = get(server, path)
    assert (got, len(content)) == (status, int(headers["Content-Length"]))
    got, again, nothing = get(server, path, "HEAD")
    assert (got, {**again, "Date": headers["Date"]}, nothing) == (status, headers, b"")


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "TRACE", "get", "BREW"])
@pytest.mark.parametrize("path", ["/metrics", "/", "/x"])
def test_other_methods_are_not_allowed(server: Server, taken: list[int], method: str, path: str) -> None:
    body = "x" * 50000
    status, headers, _ = get(server, path, method, f"Content-Length: {len(body)}\r\n\r\n{body}")
    assert (status, headers["Allow"], taken) == (405, "GET, HEAD", [])


def test_the_landing_page_leads_to_the_metrics(server: Server, taken: list[int]) -> None:
    for path in ("/", "/?x=1"):
        status, headers, content = get(server, path)
        assert (status, headers["Content-Type"]) == (200, "text/html; charset=utf-8")
        page = content.decode()
        assert "<h1>msrtrace 1.2.3&lt;4&gt;</h1>" in page
        assert '<a href="/metrics">' in page
        assert "//" not in page.replace("</", "")  # nothing from elsewhere
    assert taken == []


@pytest.mark.parametrize(
    "path", ["/favicon.ico", "/metrics/", "/metricsx", "/-/", "/-/reload", "//", "/%00", "*", "/.."]
)
def test_nothing_else_is_there_and_nothing_is_collected(server: Server, taken: list[int], path: str) -> None:
    if path == "//":  # is / for http.server
        assert get(server, path)[0] == 200
    else:
        assert get(server, path)[0] == 404
    assert taken == []


def test_the_path_may_be_escaped_or_absolute(server: Server) -> None:
    for path in ("/%6detrics", "http://host/metrics"):
        assert b"msrtrace_build_info{" in get(server, path)[2]


def test_it_is_ready_when_there_are_counts(server: Server, taken: list[int]) -> None:
    assert get(server, "/-/ready")[::2] == (200, b"msrtrace has counts.\n")
    server.waiting = "Why."
    assert get(server, "/-/ready")[::2] == (503, b"Why.\n")
    assert get(server, "/-/healthy")[0] == 200
    assert taken == []


# --- many connections, and addresses ---


def test_connections_in_a_row_do_not_wait(serve: Serve) -> None:
    """Also while nobody accepts them: the kernel has room for them."""
    server = Server(CollectorRegistry(), ("127.0.0.1", 0))
    server.server_activate()
    clients = []
    started = time.monotonic()
    for _ in range(200):
        clients.append(socket.create_connection(("127.0.0.1", server.server_address[1]), timeout=5))
    assert time.monotonic() - started < 1
    for one in (*clients, server.socket):
        one.close()


def test_too_many_connections_are_refused_in_words(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where none of them waits for its client, so that none can be closed for another."""
    monkeypatch.setattr(server_module, "CONNECTIONS", 4)
    monkeypatch.setattr(server_module, "_REFUSALS", 3)
    said, go_on = list[str](), threading.Event()

    def take() -> Snapshot:
        assert go_on.wait(20)
        return toggle()

    server = serve(take, on_error=said.append)
    before = threading.active_count()
    waiting = [connected(server, REQUEST) for _ in range(4)]
    while threading.active_count() < before + 4:
        time.sleep(0.01)
    time.sleep(0.3)  # for the last of them to ask
    status, headers, text = get(server, "/metrics")
    assert (status, headers["Retry-After"], text) == (503, "5", b"There are too many connections.\n")
    silent = [connected(server, b"") for _ in range(20)]
    time.sleep(0.3)
    assert threading.active_count() <= before + 7
    go_on.set()
    for one in (*waiting, *silent):
        one.close()
    end = time.monotonic() + 20
    while threading.active_count() > before:
        assert time.monotonic() < end
        time.sleep(0.01)
    assert get(server, "/metrics")[0] == 200
    assert said == []


def has_ipv6() -> bool:
    return bool(Path("/proc/net/if_inet6").exists() and Path("/proc/net/if_inet6").read_text())


def listening(address: str) -> Server:
    return Server(CollectorRegistry(), (address, 0))


def test_no_host_means_every_address(serve: Serve) -> None:
    server = listening("").start()
    try:
        assert get(server, "/-/healthy")[0] == 200
        assert server.exposed == server.places
        if has_ipv6():
            assert asked(server, "GET /-/healthy HTTP/1.0\r\n\r\n", "::1")[0] == 200
            assert server.url == f"http://[::]:{server.server_address[1]}/metrics"
    finally:
        server.shutdown()
        server.server_close()


def test_no_host_means_every_address_of_a_kernel_without_ipv6(monkeypatch: pytest.MonkeyPatch) -> None:
    class Socket(socket.socket):
        def __init__(self, family: int = -1, *arguments: object) -> None:
            if family == socket.AF_INET6:
                raise OSError(97, "Address family not supported by protocol")
            super().__init__(family, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(socket, "socket", Socket)
    server = listening("")
    assert server.url == f"http://0.0.0.0:{server.server_address[1]}/metrics"
    server.server_close()


def test_every_address_is_not_half_of_them() -> None:
    """Where the port is in use with IPv6 alone, IPv4 alone is not what was asked for."""
    if not has_ipv6():
        return
    with socket.socket(socket.AF_INET6) as taken:
        taken.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        taken.bind(("::", 0))
        taken.listen()
        with pytest.raises(MsrtraceError, match=r"cannot listen on :[0-9]+: Address already in use"):
            Server(CollectorRegistry(), ("", taken.getsockname()[1]))


@pytest.mark.parametrize(
    ("host", "leaves"),
    [("127.0.0.1", False), ("127.1.2.3", False), ("::1", False), ("localhost", False), ("0.0.0.0", True)],
)
def test_loopback_does_not_leave_the_machine(host: str, leaves: bool) -> None:
    if host == "::1" and not has_ipv6():
        return
    server = listening(host)
    assert bool(server.exposed) is leaves
    assert server.url.startswith("http://[::1]:" if host == "::1" else f"http://{host}:")
    server.server_close()
