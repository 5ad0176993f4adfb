# SPDX-License-Identifier: GPL-2.0-or-later
"""The metrics over HTTP or HTTPS. No client can block another's scrape, whatever it does or fails to do."""

from __future__ import annotations

import errno
import io
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from html import escape
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import IPv6Address, ip_address
from socketserver import TCPServer
from typing import Any, ClassVar
from urllib.parse import parse_qs, unquote, urlsplit

from prometheus_client.registry import Collector

from tracer.export.connections import Connection, Connections
from tracer.export.negotiation import content_type, gzip_accepted, is_openmetrics
from tracer.export.security import Security, Setup, of_files
from tracer.export.texts import Texts, Wanted
from tracer.model.errors import MsrtraceError

#: Connections that are answered at once. Where none of them waits for its client, as many more are told to come back
#: as `_REFUSALS`; others are closed.
CONNECTIONS, _REFUSALS = 512, 32
_PATIENCE = 30.0  # seconds that a client may take to send its request, and again to receive the answer
_LARGEST_HEAD = 1 << 14  # bytes of a request without its body; Prometheus' have 300
_SEND_BUFFER = 1 << 16  # bytes; by itself the kernel keeps megabytes for each client that does not read
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
        address: tuple[str, int],
        *,
        version: str = "",
        cert: str | None = None,
        key: str | None = None,
        ca: str | None = None,
        security: Security | None = None,
        on_error: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Bind the address. Until `start`, connections are refused, so clients need not wait for an answer.

        :param address: an empty host means all of the machine, IPv6 and IPv4
        :param version: of msrtrace, for the page at /
        :param cert: a certificate file, for TLS; `key` is its private key
        :param ca: clients need a certificate by this CA
        :param security: in place of those three: TLS, passwords and headers
        :param on_error: gets a line for each answer that fails
        :raises MsrtraceError: if the address or a file cannot be used
        """
        self.registry, self.version, self._on_error = registry, version, on_error
        self.security = security or of_files(cert, key, ca, on_error)
        self.tls = self.security.now().context is not None
        #: Why there are no counts yet, a sentence; empty when there are.
        self.waiting = ""
        self._address = address
        self._bind(address)
        self._texts = Texts()
        self._connections = Connections(CONNECTIONS, _REFUSALS, _PATIENCE)
        self._loop: threading.Thread | None = None

    def _bind(self, address: tuple[str, int]) -> None:
        """Bind the first of a name's addresses that this machine has."""
        problem: OSError | None = None
        try:
            candidates = list(_candidates(*address))
        except OSError as error:
            raise _cannot_listen(address, error) from None
        for self.address_family, where in candidates:
            try:
                super().__init__(where, _Handler, bind_and_activate=False)  # type: ignore[arg-type]
            except OSError as error:
                if error.errno != errno.EAFNOSUPPORT:  # a kernel without IPv6
                    raise _cannot_listen(address, error) from None
                problem = problem or error
                continue
            try:
                if not address[0] and self.address_family == socket.AF_INET6:
                    self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
                self.server_bind()
                return
            except OSError as error:
                self.server_close()
                problem = problem or error
                if error.errno != errno.EADDRNOTAVAIL:
                    break
        assert problem
        raise _cannot_listen(address, problem) from None

    def start(self, prepare: Callable[[], None] = lambda: None) -> Server:
        """Listen and answer, in threads with the capabilities of the caller. Raises MsrtraceError.

        :param prepare: runs first in the thread that the threads of all requests are started by
        """
        try:
            self.server_activate()
        except OSError as error:  # another process bound the address at the same time
            raise _cannot_listen(self._address, error) from None
        self._serve(prepare)
        return self

    def ready(self, registry: Collector) -> None:
        """Serve this registry, which has counts, from now on, as after `start`. Raises MsrtraceError."""
        if self._loop:
            self.shutdown()  # connections wait meanwhile
            self._loop.join()
        self.registry, self.waiting = registry, ""
        self.start()

    def _serve(self, prepare: Callable[[], None]) -> None:
        def loop() -> None:
            prepare()
            self.serve_forever()

        self._loop = threading.Thread(target=loop, daemon=True)
        self._loop.start()

    @property
    def place(self) -> str:
        """The host and the port, as in a URL."""
        return f"{_shown(self._address[0] or str(self.server_address[0]))}:{self.server_address[1]}"

    @property
    def url(self) -> str:
        """The URL of the metrics."""
        return f"{'https' if self.tls else 'http'}://{self.place}/metrics"

    @property
    def leaves_machine(self) -> bool:
        """Whether other machines may reach it."""
        address = ip_address(str(self.server_address[0]).partition("%")[0])
        if isinstance(address, IPv6Address):
            address = address.ipv4_mapped or address
        return not address.is_loopback

    def text(self, wanted: Wanted) -> bytes:
        """The requested text, from a collection that begins after this call."""
        return self._texts.of(self.registry, wanted)

    def server_bind(self) -> None:
        """Bind the address without looking up its host name, which may take seconds and is not needed."""
        TCPServer.server_bind(self)

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

    def service_actions(self) -> None:
        """Close what is overdue: after each connection, and twice a second."""
        self._connections.close_overdue()

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


def _candidates(host: str, port: int) -> Iterator[tuple[socket.AddressFamily, tuple[Any, ...]]]:
    """The families and addresses to try in turn. Raises OSError if the host is not known."""
    if not host:
        yield socket.AF_INET6, ("::", port)
        yield socket.AF_INET, ("0.0.0.0", port)
        return
    for family, _, _, _, where in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE):
        yield family, where


def _cannot_listen(address: tuple[str, int], error: OSError) -> MsrtraceError:
    return MsrtraceError(
        f"cannot listen on {_shown(address[0])}:{address[1]}: {error.strerror}; "
        "choose another address with --web.listen-address"
    )


def _shown(host: str) -> str:
    return f"[{host}]" if ":" in host else host
