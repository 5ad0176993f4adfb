# SPDX-License-Identifier: GPL-2.0-or-later
"""Good clients and bad ones of a server, which is a process of its own."""

from __future__ import annotations

import gzip
import socket
import ssl
import threading
import time
import urllib.request
from collections.abc import Callable
from contextlib import ExitStack, suppress

from serving import Served

#: Seconds that a collection takes, and a client may; and what this machine may add, which others use, too.
COLLECTION, PATIENCE, SLACK = 0.3, 2.0, 2.5
SCRAPES = 5


def connect(server: Served, read_buffer: int = 0) -> socket.socket:
    client = socket.socket()
    if read_buffer:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, read_buffer)
    client.settimeout(20)
    client.connect(("127.0.0.1", server.port))
    return client


def scrape(server: Served, context: ssl.SSLContext | None = None, query: str = "") -> tuple[bytes, float]:
    """The text, and how long it took in seconds."""
    request = urllib.request.Request(server.url + query, headers={"Accept-Encoding": "gzip"})
    started = time.monotonic()
    with urllib.request.urlopen(request, timeout=60, context=context) as answer:
        text = gzip.decompress(answer.read())
    return text, time.monotonic() - started


def many(server: Served, stack: ExitStack, count: int, said: bytes = b"", read_buffer: int = 0) -> list[socket.socket]:
    """So many connections, each of which sends something. They stay open."""
    clients = []
    for _ in range(count):
        clients.append(stack.enter_context(connect(server, read_buffer)))
        with suppress(OSError):  # closed in favour of a later one
            clients[-1].sendall(said)
    return clients


def repeatedly(stack: ExitStack, act: Callable[[], object], pause: float = 0.0) -> None:
    """Do something again and again in a thread, until the stack is closed."""
    stop = threading.Event()

    def work() -> None:
        while not stop.wait(pause):
            with suppress(OSError):
                act()

    thread = threading.Thread(target=work)
    thread.start()
    stack.callback(thread.join, 20)
    stack.callback(stop.set)


def settled(server: Served, threads: int, descriptors: int) -> float:
    """How long it takes until the server has no more threads and descriptors than this, in seconds."""
    started = time.monotonic()
    while server.threads() > threads or server.descriptors() > descriptors:
        assert time.monotonic() - started < PATIENCE + 10, (server.threads(), server.descriptors())
        time.sleep(0.05)
    return time.monotonic() - started
