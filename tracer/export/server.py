# SPDX-License-Identifier: GPL-2.0-or-later
"""The metrics over HTTP or HTTPS. No client can block another's scrape, whatever it does or fails to do."""

from __future__ import annotations

import gzip
import socket
import ssl
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from http.server import ThreadingHTTPServer
from pathlib import Path
from socketserver import TCPServer
from typing import Any
from urllib.parse import parse_qs

from prometheus_client import MetricsHandler
from prometheus_client.exposition import gzip_accepted
from prometheus_client.registry import Collector

from tracer.export.exposition import Encoder, Families, Selection, encoder
from tracer.model.errors import MsrtraceError


@dataclass(frozen=True)
class Wanted:
    """What a request asks for, which determines its text: the encoder, and the names of metrics (None: all)."""

    encode: Encoder
    names: frozenset[str] | None

    def of(self, registry: Collector) -> bytes:
        """The text of the registry, or of the named part."""
        return self.encode(registry if self.names is None else Selection(registry, self.names))


class Server(ThreadingHTTPServer):
    """Serves a registry, each request in its own thread, from `start` until it is closed.

    Clients whose requests arrive during a collection share the next one, and those with the same request share its
    text. So under more requests than it can answer, from many clients or impatient ones that retry, the server falls
    behind by no more than one collection.
    """

    def __init__(
        self,
        registry: Collector,
        address: tuple[str, int],
        *,
        cert: str | None = None,
        key: str | None = None,
        ca: str | None = None,
        on_error: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Bind the address. Until `start`, connections are refused, so clients need not wait for an answer.

        :param cert: a certificate file, for TLS; `key` is its private key
        :param ca: clients need a certificate by this CA
        :param on_error: gets a line for each answer that fails
        :raises MsrtraceError: if the address or a file cannot be used
        """
        self.registry, self.tls, self._on_error = registry, bool(cert), on_error
        context = _context(cert, key, ca) if cert else None
        host, port = address
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
            self.address_family, where = found[0][0], found[0][4]
            super().__init__((str(where[0]), port), _Handler, bind_and_activate=False)
            try:
                self.server_bind()
            except OSError:
                self.server_close()
                raise
        except OSError as error:
            raise _cannot_listen(address, error) from None
        if context:
            # The handshake is done in the connection's thread: here a silent client would block all others.
            self.socket = context.wrap_socket(self.socket, server_side=True, do_handshake_on_connect=False)
        self._address = address
        self._asking = threading.Lock()
        self._reading = threading.Lock()
        self._next: dict[Wanted, Future[bytes]] = {}

    def start(self) -> Server:
        """Listen and answer, in threads with the capabilities of the caller. Raises MsrtraceError."""
        try:
            self.server_activate()
        except OSError as error:  # another process bound the address at the same time
            raise _cannot_listen(self._address, error) from None
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    @property
    def url(self) -> str:
        """The URL of the metrics."""
        return f"{'https' if self.tls else 'http'}://{_shown(self._address[0])}:{self.server_address[1]}/metrics"

    def text(self, wanted: Wanted) -> bytes:
        """The requested text, from a collection that begins after this call."""
        with self._asking:
            first = not self._next
            text = self._next.setdefault(wanted, Future())
        if first:
            with self._reading:
                with self._asking:
                    texts, self._next = self._next, {}  # requests from here on need a newer collection
                self._make(texts)
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

    def server_bind(self) -> None:
        """Bind the address without looking up its host name, which may take seconds and is not needed."""
        TCPServer.server_bind(self)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Report an error, unless a client disconnected or has no certificate."""
        error = sys.exception()
        if not isinstance(error, OSError):
            self._on_error(f"a scrape failed: {type(error).__name__}: {error}")


class _Handler(MetricsHandler):
    timeout = 30.0  # seconds without data from or to the client

    def do_GET(self) -> None:
        """Answer a scrape."""
        assert isinstance(self.server, Server)
        encode, content_type = encoder(self.headers.get("Accept"))
        names = parse_qs(self.path.partition("?")[2]).get("name[]")
        text = self.server.text(Wanted(encode, frozenset(names) if names else None))
        self.send_response(200)
        self.send_header("Content-Type", content_type)
        if gzip_accepted(self.headers.get("Accept-Encoding", "")):
            text = gzip.compress(text, compresslevel=1)  # the default, 9, takes six times as long
            self.send_header("Content-Encoding", "gzip")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)


def _context(cert: str, key: str | None, ca: str | None) -> ssl.SSLContext:
    try:
        for file in (cert, key, ca):
            if file:
                Path(file).read_bytes()  # ssl's errors do not name the file
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=ca)
        context.load_cert_chain(cert, key)
    except ssl.SSLError as error:
        raise MsrtraceError(f"the TLS files cannot be used: {error}") from None
    except OSError as error:
        raise MsrtraceError(f"cannot read a TLS file: {error}") from None
    if ca:
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def _cannot_listen(address: tuple[str, int], error: OSError) -> MsrtraceError:
    return MsrtraceError(
        f"cannot listen on {_shown(address[0])}:{address[1]}: {error.strerror}; "
        "choose another address with --web.listen-address"
    )


def _shown(host: str) -> str:
    return f"[{host}]" if ":" in host else host
