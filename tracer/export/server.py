# SPDX-License-Identifier: GPL-2.0-or-later
"""The metrics over HTTP or HTTPS. No client can block another's scrape, whatever it does or fails to do."""

from __future__ import annotations

import errno
import io
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from html import escape
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import BaseServer
from typing import Any, ClassVar
from urllib.parse import parse_qs, unquote, urlsplit

from prometheus_client.registry import Collector

from tracer.export.connections import Connection, Connections
from tracer.export.listening import bound, cannot_listen, leaves_machine, place
from tracer.export.negotiation import content_type, gzip_accepted, is_openmetrics
from tracer.export.security import Security, Setup, TlsFiles
from tracer.export.texts import Texts, Wanted

#: Connections that are answered at once. Where none of them waits for its client, as many more are told to come back
#: as `_REFUSALS`; others are closed.
CONNECTIONS, _REFUSALS = 512, 32
_PATIENCE = 30.0  # seconds that a client may take to send its request, and again to receive the answer
_LARGEST_HEAD = 1 << 14  # bytes of a request without its body; Prometheus' have 300
_SEND_BUFFER = 1 << 16  # bytes; by itself the kernel keeps megabytes for each client that does not read
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


class Server(ThreadingHTTPServer):
    """Serves a registry, each request in its own thread, from `start` until it is closed."""

    request_queue_size = 4096  # connections that the kernel accepts in advance; beyond, a client waits a second
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
        self._all_in = threading.Event()  # no client waits to be accepted
        self._all_in.set()
        self._texts = Texts(self._all_in)
        self._connections = Connections(CONNECTIONS, _REFUSALS, _PATIENCE)
        self._loop: threading.Thread | None = None
        self._ending = threading.Event()
        self._turned = time.monotonic()  # when the loop last was about to wait for connections

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
        begun, now = self._texts.collecting_since, time.monotonic()
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
                self._connections.close_overdue()
                if not (waiting := selector.select(0)):
                    self._all_in.set()
                    waiting = selector.select(poll_interval)
                self._all_in.clear()
                for key, _ in waiting:
                    self.socket = key.data  # which a connection is accepted from
                    self._handle_request_noblock()  # type: ignore[attr-defined]
        self._all_in.set()

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
        return self._texts.of(self.registry, wanted)

    def get_request(self) -> Any:
        """The next connection. Where there is no descriptor for it, the one that has waited longest makes room."""
        try:
            found, address = super().get_request()
            found.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
            return found, address
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                self._connections.make_room()
                time.sleep(0.01)  # if there was none: the client is there still, and the loop would not rest
            raise

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer in a thread of its own, unless there are too many."""
        self._connections.add(request)
        try:
            super().process_request(request, client_address)
        except BaseException:  # also if no thread can be started
            self._connections.remove(request)
            raise

    def finish_request(self, request: Any, client_address: Any) -> None:
        """Answer, by what was configured when the client connected."""
        connection = self._connections[request]
        handler = _Refusal if connection.refused else _Handler
        try:
            setup = self.security.now()
            if not setup.context:
                handler(request, client_address, self, setup, connection)
                return
            # The handshake is done here, in the connection's thread, as a silent client would block all others.
            request.settimeout(handler.timeout)
            with setup.context.wrap_socket(request, server_side=True, do_handshake_on_connect=False) as encrypted:
                connection.uses(encrypted)
                try:
                    encrypted.do_handshake()
                    handler(encrypted, client_address, self, setup, connection)
                    encrypted.shutdown(socket.SHUT_WR)
                finally:
                    self._connections.remove(request)
        finally:
            self._connections.remove(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Report an error, unless a client disconnected or has no certificate."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            self._on_error(f"a scrape failed: {type(error).__name__}: {error}")


class _Handler(BaseHTTPRequestHandler):
    server: Server
    timeout: ClassVar[float | None] = None  # its time is limited as a whole, by Connections
    default_request_version = "HTTP/1.0"  # else http.server answers what has no version, as in HTTP/0.9, without a head

    def __init__(self, request: Any, client_address: Any, server: Server, protection: Setup, slot: Connection) -> None:
        self.protection, self.slot = protection, slot
        super().__init__(request, client_address, server)

    def setup(self) -> None:
        """Read no more of a head than anybody needs: http.server would keep 6 MB for each connection."""
        super().setup()
        self.rfile = _Head(self.rfile, _LARGEST_HEAD)

    def version_string(self) -> str:
        """The header Server: what serves, and not which Python it runs on."""
        return "msrtrace"

    def parse_request(self) -> bool:
        """Parse a request, and answer it here if none of its kind is served."""
        if not super().parse_request() or self.slot.closed:  # closed in its headers, which then seem to end
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
        try:
            url = urlsplit(self.path)
        except ValueError:
            self.answer(HTTPStatus.BAD_REQUEST, "That is no URL.\n")
            return
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
        compressed = gzip_accepted(self._all("Accept-Encoding"))
        with self.slot.working():
            text = self.server.text(Wanted(is_openmetrics(kind), frozenset(names) if names else None, compressed))
        self.answer(HTTPStatus.OK, text, kind, **{"Content_Encoding": "gzip"} if compressed else {})

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

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answer what http.server cannot read, without what that would say: it repeats what was sent."""
        status = HTTPStatus(code)
        self.close_connection = True
        self.answer(status, f"{status.phrase}\n")

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


class _Head(io.BufferedIOBase):
    """What a client sends, of which so many bytes may be lines. A line beyond them is too long for http.server, too."""

    def __init__(self, file: io.BufferedIOBase, most: int) -> None:
        self._file, self._left = file, most

    def readline(self, size: int | None = -1, /) -> bytes:
        """A line, of at most `size` bytes, or `size` bytes of nothing."""
        line = self._file.readline(self._left + 1)
        self._left -= len(line)
        return line if self._left >= 0 else line.ljust(size or 0)

    def read(self, size: int | None = -1, /) -> bytes:
        """So many bytes of what follows."""
        return self._file.read(-1 if size is None else size)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class _Refusal(_Handler):
    timeout: ClassVar[float | None] = 2.0

    def parse_request(self) -> bool:
        """Parse a request, so that the client reads the answer, and refuse it."""
        if BaseHTTPRequestHandler.parse_request(self):
            self.answer(HTTPStatus.SERVICE_UNAVAILABLE, "There are too many connections.\n", Retry_After="5")
        return False
