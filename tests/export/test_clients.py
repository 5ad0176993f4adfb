# SPDX-License-Identifier: GPL-2.0-or-later
"""Clients that are slow, silent, many or mad: what a good one notices, and what is left of them."""

from __future__ import annotations

import socket
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from itertools import cycle
from pathlib import Path

import pytest
from bad_clients import COLLECTION, PATIENCE, SCRAPES, SLACK, connect, many, repeatedly, scrape, settled
from faults import Figures
from needs import tool
from serving import Served, served

Misbehave = Callable[[Served, ExitStack], object]


def exchange(server: Served, said: bytes) -> bytes:
    """What the server answers to this."""
    with connect(server) as client:
        client.sendall(said)
        return b"".join(iter(lambda: client.recv(1 << 16), b""))


REQUEST = b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"


def silent(server: Served, stack: ExitStack) -> None:
    many(server, stack, 1000)


def unread(server: Served, stack: ExitStack) -> None:
    many(server, stack, 1000, REQUEST, read_buffer=2048)


def dripping(server: Served, stack: ExitStack) -> None:
    clients, letters = many(server, stack, 600, REQUEST[:-4]), cycle(b"\r\nx: y")

    def drip() -> None:
        letter = bytes([next(letters)])
        for client in clients:
            with suppress(OSError):
                client.send(letter)

    repeatedly(stack, drip, 0.1)


def reading_slowly(server: Served, stack: ExitStack) -> None:
    clients = many(server, stack, 600, REQUEST, read_buffer=2048)

    def read() -> None:
        for client in clients:
            client.settimeout(0)
            with suppress(OSError):
                client.recv(1)

    repeatedly(stack, read, 0.1)


def endless_headers(server: Served, stack: ExitStack) -> None:
    def pour() -> None:
        with connect(server) as client:
            client.sendall(b"GET /metrics HTTP/1.1\r\n")
            while True:
                client.sendall(b"x-%d: %s\r\n" % (time.monotonic_ns(), b"y" * 60_000))

    for _ in range(4):
        repeatedly(stack, pour, 0.01)


def huge_lines(server: Served, stack: ExitStack) -> None:
    for _ in range(4):
        repeatedly(stack, lambda: exchange(server, b"GET /" + b"x" * (4 << 20)), 0.01)


def resets(server: Served, stack: ExitStack) -> None:
    def reset() -> None:
        with connect(server) as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            client.sendall(REQUEST)

    for _ in range(2):
        repeatedly(stack, reset, 0.005)


def impatient(server: Served, stack: ExitStack) -> None:
    def ask() -> None:
        with connect(server) as client:
            client.sendall(REQUEST)
            time.sleep(0.05)

    for _ in range(20):
        repeatedly(stack, ask)


def different_parts(server: Served, stack: ExitStack) -> None:
    """All ask for nearly everything, but no two for the same."""
    names = (
        "msrtrace_intercept_calls",
        "msrtrace_intercept_redundant_calls",
        "msrtrace_filter_update_duration_seconds",
    )
    query = "&".join(f"name[]={name}" for name in names)

    def ask(number: int) -> None:
        exchange(server, f"GET /metrics?{query}&name[]={number} HTTP/1.0\r\nAccept-Encoding: gzip\r\n\r\n".encode())

    for number in range(20):
        repeatedly(stack, lambda number=number: ask(number))  # type: ignore[misc]


BAD: dict[str, tuple[str, str, Misbehave]] = {
    "unread": ("a thousand clients that never read", "1,000 requests for 0.8 MB, of which nothing is read", unread),
    "dripping": ("slowloris", "600 requests whose headers go on with a byte each 0.1 s", dripping),
    "slow": ("answers read a byte at a time", "600 requests whose answers are read at 10 bytes/s", reading_slowly),
    "endless": ("headers without end", "4 clients that send headers of 60 KB until they are closed", endless_headers),
    "huge": ("huge request lines", "4 clients that send request lines of 4 MB, again and again", huge_lines),
    "resets": ("connections that are reset", "2 clients that ask and reset, 200 times a second", resets),
    "impatient": ("clients that retry", "20 clients that give up after 50 ms and ask again", impatient),
    "parts": ("as many different texts as there are clients", "20 clients, each for other metrics", different_parts),
}


@pytest.mark.fault("clients", "{fault}", "{done}", dear=True)
@pytest.mark.parametrize(("fault", "done", "misbehave"), BAD.values(), ids=BAD)
def test_a_good_client_waits_for_one_collection_more_at_most(
    tmp_path: Path, figures: Figures, fault: str, done: str, misbehave: Misbehave
) -> None:
    beside(tmp_path, figures, misbehave)


@pytest.mark.fault("clients", "a thousand silent connections", "that send nothing, 512 of which may be open")
def test_silent_clients_keep_nobody_out(tmp_path: Path, figures: Figures) -> None:
    beside(tmp_path, figures, silent)


def beside(tmp_path: Path, figures: Figures, misbehave: Misbehave) -> None:
    """Where reading the counts waits, as it may for the kernel; and where it only computes, with Python's lock."""
    waits, computes = (beside_collections(tmp_path, misbehave, seconds) for seconds in (COLLECTION, 0.0))
    for figure in waits:
        figures[figure] = f"{waits[figure]} if reading waits, {computes[figure]} if it computes"


def beside_collections(tmp_path: Path, misbehave: Misbehave, seconds: float) -> dict[str, str]:
    """And those that misbehave are closed, although they would stay; nothing is left of them, and nothing is logged."""
    with served(tmp_path, collection=seconds, patience=PATIENCE, vms=100) as server, ExitStack() as stack:
        text, _ = scrape(server)
        assert len(text) > 800_000
        normal = max(scrape(server)[1] for _ in range(3))
        threads, descriptors = server.threads(), server.descriptors()
        misbehave(server, stack)
        times, most = [], 0
        for _ in range(SCRAPES):
            found, took = scrape(server)
            times.append(took)
            most = max(most, server.threads())
            assert found.count(b"\n") == text.count(b"\n")
            time.sleep(0.1)
        assert most <= threads + 512 + 32 + 1
        assert max(times) < normal + seconds + SLACK
        if misbehave not in (silent, unread, dripping, reading_slowly):
            stack.close()  # others come back
        back = settled(server, threads, descriptors)
        assert server.said() == ""
        longest = max(server.collected())
        assert longest < seconds + SLACK
    return {
        "scrape alone": f"{normal * 1000:.0f} ms",
        "beside them, longest": f"{max(times) * 1000:.0f} ms",
        "reading the counts": f"{longest * 1000:.0f} ms",
        "threads and descriptors as before": f"after {back:.1f} s",
    }


@pytest.mark.fault(
    "clients", "bad clients all day", "6 times: 1,000 silent, 1,000 that never read, 200 of 60 KB", dear=True
)
def test_bad_clients_leave_no_memory_behind(tmp_path: Path, figures: Figures) -> None:
    with served(tmp_path, patience=1.0, vms=100) as server:
        scrape(server)
        threads, descriptors = server.threads(), server.descriptors()
        before, in_use = server.resident(), []
        for _ in range(6):
            with ExitStack() as stack:
                silent(server, stack)
                unread(server, stack)
                many(server, stack, 200, b"GET / HTTP/1.1\r\n" + b"x: " + b"y" * 60_000)
                settled(server, threads, descriptors)
            scrape(server)
            in_use.append(server.in_use())
        after = server.resident()
        assert server.said() == ""
    memory, blocks = zip(*in_use, strict=True)
    # What is left of each client would add up: 11,000 since the first time. The allocator may keep what it once needed.
    assert memory[-1] < memory[0] + 0.5
    assert blocks[-1] < blocks[0] + 2000
    assert after < before + 60
    figures["in use after each time"] = ", ".join(f"{one:.1f}" for one in memory) + " MB"
    figures["resident before and after"] = f"{before:.0f} and {after:.0f} MB"


@pytest.mark.fault(
    "clients", "requests that are large and do not end", "500 at once, each with 99 headers of 60 KB", dear=True
)
def test_requests_do_not_take_the_memory(tmp_path: Path, figures: Figures) -> None:
    """http.server alone keeps 6 MB for each."""
    with served(tmp_path, patience=20, vms=1) as server, ExitStack() as stack:
        scrape(server)
        before = server.resident()
        for client in many(server, stack, 500, b"GET / HTTP/1.1\r\n"):
            with suppress(OSError):
                for _ in range(99):
                    client.send(b"x: " + b"y" * 60_000 + b"\r\n", socket.MSG_DONTWAIT)
        scrape(server)
        after = server.resident()
    assert after < before + 100
    figures["memory"] = f"{before:.0f} MB, with them {after:.0f} MB"


@pytest.mark.fault("clients", "a request that never ends", "a header of which a byte comes each 0.1 s")
def test_a_request_has_one_limit_however_it_is_sent(tmp_path: Path, figures: Figures) -> None:
    with served(tmp_path, patience=1.0) as server, connect(server) as client:
        client.sendall(REQUEST[:-4])
        started = time.monotonic()
        with suppress(OSError):
            while time.monotonic() < started + 20:
                client.send(b"x")
                time.sleep(0.1)
        lasted = time.monotonic() - started
        assert server.said() == ""
    assert 0.9 < lasted < 1.0 + 0.7 + SLACK  # looked at twice a second
    figures["closed"] = f"after {lasted:.1f} s of 1 s"


@pytest.mark.fault("clients", "no descriptor is left", "RLIMIT_NOFILE at 40, 100 silent connections")
def test_without_descriptors_the_silent_make_room(tmp_path: Path, figures: Figures) -> None:
    with served(tmp_path, collection=COLLECTION) as server, ExitStack() as stack:
        _, normal = scrape(server)
        subprocess.run([tool("prlimit"), "--nofile=40:40", f"--pid={server.process.pid}"], check=True, timeout=20)
        many(server, stack, 100)
        used = server.processor()
        times = [scrape(server)[1] for _ in range(SCRAPES)]
        time.sleep(0.5)
        used = server.processor() - used
        assert server.descriptors() <= 40
        assert server.said() == ""
    assert max(times) < normal + COLLECTION + SLACK
    assert used < 1  # accept() that fails at once is not tried again and again
    figures["scrape alone"] = f"{normal * 1000:.0f} ms"
    figures["beside them, longest"] = f"{max(times) * 1000:.0f} ms"


CHUNKED = b"POST /metrics HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n"
ODD: dict[str, tuple[bytes, bytes]] = {
    "HTTP/0.9": (b"GET /metrics\r\n\r\n", b"HTTP/1.0 200 "),
    "HTTP/2 preface": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0", b"HTTP/1.0 505 "),
    "TLS hello": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\n" * 9, b"HTTP/1.0 400 "),
    "no URL": (b"GET http://[/ HTTP/1.1\r\n\r\n", b"HTTP/1.0 400 "),
    "a method like none": (b"\x00\xff\r\n HTTP/1.1\r\n\r\n", b"HTTP/1.0 400 "),
    "a version like none": (b"GET / HTTP/1.x\r\n\r\n", b"HTTP/1.0 400 "),
    "a long line": (b"GET /" + b"x" * 70_000, b"HTTP/1.0 414 "),
    "too many headers": (b"GET / HTTP/1.1\r\n" + b"x: y\r\n" * 200, b"HTTP/1.0 431 "),
    "large headers": (b"GET / HTTP/1.1\r\nx: " + b"y" * 20_000, b"HTTP/1.0 431 "),
    "a chunked body": (CHUNKED, b"HTTP/1.0 405 "),
    "a body never sent": (b"PUT / HTTP/1.1\r\nContent-Length: 5\r\nExpect: 100-continue\r\n\r\n", b"HTTP/1.0 405 "),
    "pipelined": (REQUEST * 100, b"HTTP/1.0 200 "),
    "folded headers": (b"GET /-/healthy HTTP/1.1\r\nAccept: a\r\n b\r\n\r\n", b"HTTP/1.0 200 "),
    "bare line feeds": (b"GET /-/healthy HTTP/1.1\nHost: x\n\n", b"HTTP/1.0 200 "),
}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(tmp_path_factory.mktemp("shared")) as server:
        yield server


@pytest.mark.fault("clients", "requests of other protocols, or none", f"{len(ODD)} kinds: {', '.join(ODD)}")
def test_what_is_no_request_of_ours_is_answered_as_http(shared: Served, figures: Figures) -> None:
    """Or, where the rest of what was sent takes the answer away, the connection is reset."""
    answered = 0
    for name, (said, start) in ODD.items():
        try:
            answer = exchange(shared, said)
        except ConnectionError:
            assert len(said) > 10_000 or name == "pipelined", name
            continue
        assert answer.startswith(start), name
        assert b"Python" not in answer
        answered += 1
    assert shared.said() == ""
    assert scrape(shared)[0]
    figures["answered"] = f"{answered} of {len(ODD)}" + (", the others closed" if answered < len(ODD) else "")
    figures["lines on stderr"] = "0"


@pytest.mark.fault("clients", "requests of every method", "in either case, or of no standard, on each of 4 paths")
def test_only_get_and_head_do_anything(shared: Served, figures: Figures) -> None:
    known = b"POST PUT PATCH DELETE OPTIONS TRACE CONNECT PROPFIND PROPPATCH MKCOL COPY MOVE LOCK UNLOCK SEARCH PURGE"
    odd = b"M-SEARCH BREW __init__ G GETT GET\0 \xff"
    methods = [*known.split(), *known.lower().split(), b"get", b"head", *odd.split()]
    for method in methods:
        for path in (b"/metrics", b"/", b"/-/ready", b"*"):
            assert exchange(shared, b"%s %s HTTP/1.1\r\n\r\n" % (method, path)).startswith(b"HTTP/1.0 405 ")
    assert shared.said() == ""
    figures["answered with 405"] = f"all, of {len(methods)} methods"
