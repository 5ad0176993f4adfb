# SPDX-License-Identifier: GPL-2.0-or-later
"""Any bytes sent to the server: the answer is HTTP or none, nothing is logged or waited for, the next scrape works."""

from __future__ import annotations

import re
import socket
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress

import pytest
from bad_clients import connect, scrape
from faults import Figures
from hypothesis import example, given, settings
from hypothesis import strategies as st
from serving import Served, served

HEAD = re.compile(rb"HTTP/1\.[01] ([1-5][0-9]{2}) [ -~]*\r\n((?:[A-Za-z-]+: [ -~]*\r\n)*)\r\n", re.DOTALL)
LENGTH = re.compile(rb"^Content-Length: ([0-9]+)\r$", re.MULTILINE)

words = st.sampled_from(
    b"GET HEAD POST get PRI CONNECT / * /metrics /-/ready http://[/ //x ?name[]=a %00 %ff HTTP/1.0 HTTP/1.1 HTTP/0.9 "
    b"HTTP/2.0 HTTP/1.1.1 HTTP/-1 HTTP/99999999999 Host: Accept: Accept-Encoding: gzip;q=0 */*;q=1e9 Authorization: "
    b"Basic Content-Length: -1 5 99999999999999 Transfer-Encoding: chunked Expect: 100-continue Connection: close "
    b'keep-alive 0 : ; , = " \\'.split()
)
spaces = st.sampled_from([b" ", b"\r\n", b"\n", b"\r", b"\t", b"\r\n ", b"\0", b"\x85", b"", b": "])
#: Words of HTTP in any order, or what begins as a request.
texts = st.lists(st.one_of(words, spaces, st.binary(max_size=9)), max_size=40).map(b"".join)
starts = st.sampled_from([b"", b"GET ", b"GET /metrics HTTP/1.1\r\n", b"HEAD / HTTP/1.0\r\nAccept: ", b"\x16\x03\x01"])
ends = st.sampled_from([b"", b"\r\n\r\n", b"\n\n"])
requests = st.tuples(starts, st.one_of(texts, st.binary(max_size=300)), ends).map(b"".join)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """With a patience that no example may need."""
    with served(tmp_path_factory.mktemp("server"), patience=600) as one:
        yield one


def answer(server: Served, pieces: list[bytes]) -> bytes | None:
    """What comes back for pieces that are sent one after another; None if the connection is reset."""
    with connect(server) as client:
        with suppress(OSError):  # also ENOTCONN, of a connection that is reset by then
            for piece in pieces:
                client.sendall(piece)
            client.shutdown(socket.SHUT_WR)
        try:
            return b"".join(iter(lambda: client.recv(1 << 16), b""))
        except ConnectionError:
            return None


def check(said: bytes) -> str:
    """The status of an answer, which must be all of one."""
    found = HEAD.match(said)
    assert found, said[:300]
    length = LENGTH.search(found[2])
    content = said[found.end() :]
    assert content == b"" or length, said[:300]
    assert content == b"" or len(content) == int(length[1] if length else 0)
    assert b"Python" not in found[0]
    return found[1].decode()


@pytest.mark.fault(
    "clients", "any bytes as a request (hypothesis)", "words of HTTP and random bytes, in any order and pieces"
)
def test_any_bytes_are_answered_or_refused(server: Served, figures: Figures) -> None:
    statuses: Counter[str] = Counter()

    @settings(max_examples=max(200, settings().max_examples))
    @given(requests, st.integers(0, 400))
    @example(b"GET http://[/ HTTP/1.1\r\n\r\n", 0)
    @example(b"GET //\xe2\x84\x80/ HTTP/1.1\r\n\r\n", 0)
    @example(b"GET http://\xe2\x84\x80/ HTTP/1.1\r\n\r\n", 0)
    @example(b"GET / HTTP/1.1\r\nA" + b":" * 16_000 + b"\r\n\r\n", 9)
    @example(b"G\xff /metrics\r\n", 3)
    @example(b"POST /metrics HTTP/1.1\r\nContent-Length: 9\r\n\r\n", 3)
    @example(b"HEAD /x HTTP/1.1\r\n\r\n", 3)
    def send(said: bytes, at: int) -> None:
        found = answer(server, [said[:at], said[at:]])
        statuses["closed" if not found else check(found)] += 1
        assert server.said() == ""
        assert scrape(server)[0].count(b"\n") > 50

    send()
    assert {"200", "400", "404", "405", "closed"} <= statuses.keys()
    figures["requests"] = f"{statuses.total()}, after each of which a scrape worked"
    figures["answers"] = ", ".join(f"{count} x {status}" for status, count in sorted(statuses.items()))
    figures["lines on stderr"] = "0"
