# SPDX-License-Identifier: GPL-2.0-or-later
"""The metrics over HTTP or HTTPS. No client can block another's scrape, whatever it does or fails to do."""

from __future__ import annotations

import gzip
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from html import escape
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import BaseServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from prometheus_client.registry import Collector

from tracer.export.exposition import Families, Selection, exposed
from tracer.export.listening import bound, cannot_listen, leaves_machine, place
from tracer.export.negotiation import content_type, gzip_accepted, is_openmetrics
from tracer.export.security import Security, Setup, TlsFiles

#: Connections that are answered at once; as many more are told to come back as `_REFUSALS`; others are closed.
CONNECTIONS, _REFUSALS = 512, 32
#: How often the loop that accepts connections looks around.
_TURN_SECONDS = 0.5
_LARGEST_BODY = 1 << 16  # bytes of a request that are read before it is refused, so that the client reads why

_TEXT = "text/plain; charset=utf-8"
_PAGE = """<!DOCTYPE html>
<html lang="en">
<head><meta charset="utf-8"><title>msrtrace</title></head>
<body>
<h1>msrtrace {version}</h1>
<p>What KVM does to the MSR intercepts of this host's guests.</p>
<ul>
<li><a href="/metrics">/metrics</a></li>
<li><a href="/-/healthy">/-/healthy</a>: whether the process answers</li>
<li><a href="/-/ready">/-/ready</a>: whether it has counts</li>
</ul>
</body>
</html>
"""


@dataclass(frozen=True)
class Wanted:
    """What a request asks for, which determines its text: the format, and the names of metrics (None: all)."""

    as_openmetrics: bool
    names: frozenset[str] | None

    def of(self, registry: Collector) -> bytes:
        """The text of the registry, or of the named part."""
        part = registry if self.names is None else Selection(registry, self.names)
        return exposed(part, self.as_openmetrics)


class Server(ThreadingHTTPServer):
    """Serves a registry, each request in its own thread, from `start` until it is closed.

    Clients whose requests arrive during a collection share the next one, and those with the same request share its
    text. So under more requests than it can answer, from many clients or impatient ones that retry, the server falls
    behind by no more than one collection.
    """

    request_queue_size = 512  # connections that the kernel accepts in advance; beyond, a client waits a second
    daemon_threads = True

    def __init__(
        self,
        registry: Collector,
        where: tuple[str, int] | Sequence[socket.socket],
        *,
        version: str = "",
        security: Security | None = None,
        on_error: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Bind the address. Until `start`, connections are refused, so clients need not wait for an answer.

        :param where: an address, of which an empty host means all of the machine, IPv6 and IPv4; or sockets that listen
        :param version: of msrtrace, for the page at /
        :param security: TLS, passwords and headers
        :param on_error: gets a line for each answer that fails
        :raises MsrtraceError: if the address cannot be used
        """
        self.registry, self.version, self._on_error = registry, version, on_error
        self.security = security or TlsFiles()
        self.tls = self.security.now().context is not None
        #: Why there are no counts yet, a sentence; empty when there are.
        self.waiting = ""
        if isinstance(where, tuple):
            self._asked: tuple[str, int] | None = where
            self.sockets = [bound(where)]
        else:
            self._asked, self.sockets = None, list(where)
        BaseServer.__init__(self, self.sockets[0].getsockname(), _Handler)  # type: ignore[arg-type]
        self.socket = self.sockets[0]
        self._asking = threading.Lock()
        self._reading = threading.Lock()
        self._next: dict[Wanted, Future[bytes]] = {}
        self._connections, self._counting = 0, threading.Lock()
        self._loop: threading.Thread | None = None
        self._ending = threading.Event()
        self._turned = time.monotonic()  # when the loop last was about to wait for connections
        self._reading_since: float | None = None

    def start(self, prepare: Callable[[], None] = lambda: None) -> Server:
        """Listen and answer, in threads with the capabilities of the caller. Raises MsrtraceError.

        :param prepare: runs first in the thread that the threads of all requests are started by
        """
        self.server_activate()
        self._serve(prepare)
        return self

    def server_activate(self) -> None:
        """Listen, unless the sockets do. Raises MsrtraceError."""
        if self._asked:
            try:
                self.socket.listen(self.request_queue_size)
            except OSError as error:  # another process bound the address at the same time
                raise cannot_listen(self._asked, error) from None

    def ready(self, registry: Collector) -> None:
        """Serve this registry, which has counts, from now on, as after `start`. Raises MsrtraceError."""
        if self._loop:
            self.shutdown()  # connections wait meanwhile
        self.registry, self.waiting = registry, ""
        self.start()

    def finish(self, seconds: float) -> None:
        """Accept no more connections, and let those that are accepted be answered, if that takes no longer."""
        self.shutdown()
        deadline = time.monotonic() + seconds
        while self._connections and time.monotonic() < deadline:
            time.sleep(_TURN_SECONDS / 10)

    def works(self, seconds: float) -> bool:
        """Whether connections are accepted and counts are collected, and neither has waited longer for anything."""
        begun, now = self._reading_since, time.monotonic()
        return now - self._turned <= seconds and (begun is None or now - begun <= seconds)

    def _serve(self, prepare: Callable[[], None]) -> None:
        def loop() -> None:
            prepare()
            self.serve_forever()

        self._ending.clear()
        self._turned = time.monotonic()
        self._loop = threading.Thread(target=loop, daemon=True)
        self._loop.start()

    def serve_forever(self, poll_interval: float = _TURN_SECONDS) -> None:
        """Accept connections on all sockets, until `shutdown`."""
        with selectors.DefaultSelector() as selector:
            for listening in self.sockets:
                selector.register(listening, selectors.EVENT_READ, listening)
            while not self._ending.is_set():
                self._turned = time.monotonic()
                for key, _ in selector.select(poll_interval):
                    self.socket = key.data  # which a connection is accepted from
                    self._handle_request_noblock()  # type: ignore[attr-defined]

    def shutdown(self) -> None:
        """Accept no more connections; they wait. Returns when none is being accepted."""
        self._ending.set()
        if self._loop:
            self._loop.join()

    def server_close(self) -> None:
        """Close the sockets."""
        for listening in self.sockets:
            listening.close()

    @property
    def places(self) -> list[str]:
        """The hosts and ports that it serves on, as in a URL: as they were asked for."""
        asked = self._asked[0] if self._asked else ""
        names = [listening.getsockname() for listening in self.sockets]
        return [place(asked or str(host), port) for host, port, *_ in names]

    @property
    def exposed(self) -> list[str]:
        """Those of them that other machines may reach."""
        return [where for where, one in zip(self.places, self.sockets, strict=True) if leaves_machine(one)]

    @property
    def urls(self) -> list[str]:
        """The URLs of the metrics."""
        return [f"{'https' if self.tls else 'http'}://{where}/metrics" for where in self.places]

    @property
    def url(self) -> str:
        """The first of them."""
        return self.urls[0]

    def text(self, wanted: Wanted) -> bytes:
        """The requested text, from a collection that begins after this call."""
        with self._asking:
            first = not self._next
            text = self._next.setdefault(wanted, Future())
        if first:
            with self._reading:
                with self._asking:
                    texts, self._next = self._next, {}  # requests from here on need a newer collection
                self._reading_since = time.monotonic()
                try:
                    self._make(texts)
                finally:
                    self._reading_since = None
        return text.result()

    def _make(self, texts: dict[Wanted, Future[bytes]]) -> None:
        """Make all texts from one collection."""
        try:
            # For a single text, the usual case, the families need not all be in memory at once.
            registry = self.registry if len(texts) == 1 else Families(self.registry.collect())
        except Exception as error:
            for text in texts.values():
                text.set_exception(error)
            return
        for wanted, text in texts.items():
            try:
                text.set_result(wanted.of(registry))
            except Exception as error:
                text.set_exception(error)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer in a thread of its own, unless there are too many."""
        with self._counting:
            self._connections += 1
            number = self._connections
        try:
            if number > CONNECTIONS + _REFUSALS:
                raise ConnectionAbortedError("too many connections")
            super().process_request(request, client_address)
        except BaseException:  # also if no thread can be started
            self._disconnected()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answer, in this thread."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._disconnected()

    def _disconnected(self) -> None:
        with self._counting:
            self._connections -= 1

    def finish_request(self, request: Any, client_address: Any) -> None:
        """Answer, by what was configured when the client connected."""
        handler = _Refusal if self._connections > CONNECTIONS else _Handler
        setup = self.security.now()
        if not setup.context:
            handler(request, client_address, self, setup)
            return
        # The handshake is done here, in the connection's thread, as a silent client would block all others.
        request.settimeout(handler.timeout)
        with setup.context.wrap_socket(request, server_side=True) as connection:
            handler(connection, client_address, self, setup)
            connection.shutdown(socket.SHUT_WR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Report an error, unless a client disconnected or has no certificate."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            self._on_error(f"a scrape failed: {type(error).__name__}: {error}")


class _Handler(BaseHTTPRequestHandler):
    timeout = 30.0  # seconds without data from or to the client
    server: Server

    def __init__(self, request: Any, client_address: Any, server: Server, protection: Setup) -> None:
        self.protection = protection
        super().__init__(request, client_address, server)

    def parse_request(self) -> bool:
        """Parse a request, and answer it here if none of its kind is served."""
        if not super().parse_request():
            return False
        if not self.protection.admits(self.headers.get("Authorization")):
            self.answer(HTTPStatus.UNAUTHORIZED, "Unauthorized\n", WWW_Authenticate='Basic realm="msrtrace"')
        elif self.command not in ("GET", "HEAD"):
            self._discard_body()
            self.answer(HTTPStatus.METHOD_NOT_ALLOWED, "Only GET and HEAD are served.\n", Allow="GET, HEAD")
        else:
            return True
        return False

    def do_GET(self) -> None:
        """Answer a request."""
        url = urlsplit(self.path)
        answers: dict[str, Callable[[], None]] = {
            "/": self._page,
            "/metrics": partial(self._metrics, url.query),
            "/-/healthy": self._healthy,
            "/-/ready": self._ready,
        }
        answers.get(unquote(url.path), self._nothing)()

    do_HEAD = do_GET

    def _page(self) -> None:
        page = _PAGE.format(version=escape(self.server.version))
        self.answer(HTTPStatus.OK, page, "text/html; charset=utf-8")

    def _healthy(self) -> None:
        self.answer(HTTPStatus.OK, "msrtrace is running.\n")

    def _ready(self) -> None:
        if self.server.waiting:
            self.answer(HTTPStatus.SERVICE_UNAVAILABLE, f"{self.server.waiting}\n")
        else:
            self.answer(HTTPStatus.OK, "msrtrace has counts.\n")

    def _nothing(self) -> None:
        self.answer(HTTPStatus.NOT_FOUND, "There is nothing here; the metrics are at /metrics.\n")

    def _metrics(self, query: str) -> None:
        kind = content_type(self._all("Accept"))
        names = parse_qs(query).get("name[]")
        text = self.server.text(Wanted(is_openmetrics(kind), frozenset(names) if names else None))
        if gzip_accepted(self._all("Accept-Encoding")):
            text = gzip.compress(text, compresslevel=1)  # the default, 9, takes six times as long
            self.answer(HTTPStatus.OK, text, kind, Content_Encoding="gzip")
        else:
            self.answer(HTTPStatus.OK, text, kind)

    def _all(self, name: str) -> str:
        """The elements of all headers of this name."""
        return ", ".join(self.headers.get_all(name, []))

    def answer(self, status: HTTPStatus, content: str | bytes, content_type: str = _TEXT, **headers: str) -> None:
        """Send an answer, without its content if the request is HEAD. An underscore in `headers` is a hyphen."""
        if isinstance(content, str):
            content = content.encode()
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def end_headers(self) -> None:
        """Add those that every answer has."""
        for name, value in self.protection.headers.items():
            self.send_header(name, value)
        super().end_headers()

    def _discard_body(self) -> None:
        """Read what comes with a request: closing a connection with unread data takes the answer away, too."""
        length = self.headers.get("Content-Length", "")
        if length.isdecimal() and "Expect" not in self.headers:
            self.rfile.read(min(int(length[:9]), _LARGEST_BODY))

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing."""


class _Refusal(_Handler):
    timeout = 2.0

    def parse_request(self) -> bool:
        """Parse a request, so that the client reads the answer, and refuse it."""
        if BaseHTTPRequestHandler.parse_request(self):
            self.answer(HTTPStatus.SERVICE_UNAVAILABLE, "There are too many connections.\n", Retry_After="5")
        return False
