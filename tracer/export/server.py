# SPDX-License-Identifier: GPL-2.0-or-later
"""The metrics over HTTP or HTTPS. No client keeps another from its scrape, whatever it does or does not do."""

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
    """What a request asks for, and what so makes its text: the encoder, and the names of metrics, None for all."""

    encode: Encoder
    names: frozenset[str] | None

    def of(self, registry: Collector) -> bytes:
        """The text of REGISTRY, or of what is named of it."""
        return self.encode(registry if self.names is None else Selection(registry, self.names))


class Server(ThreadingHTTPServer):
    """Serves a registry, each request in a thread of its own, from its start until it is closed.

    Clients that ask while answers are being made share what is collected next, and those that ask for the same share
    its text. So a server that is asked faster than it can answer, as by many or by impatient ones that come again,
    falls behind by one collection and no more.
    """

    def __init__(
        self,
        registry: Collector,
        address: tuple[str, int],
        *,
        cert: str | None = None,
        key: str | None = None,
        ca: str | None = None,
        complain: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Take ADDRESS, with TLS if there are a CERT and its KEY; with a CA clients need its certificate.

        Before the start clients are refused: they know better what to do than to wait.

        COMPLAIN gets a line for each answer that could not be made. Raises MsrtraceError.
        """
        self.registry, self.tls, self._complain = registry, bool(cert), complain
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
            # The handshake is done by the thread of the connection: here it would wait for a client that says nothing.
            self.socket = context.wrap_socket(self.socket, server_side=True, do_handshake_on_connect=False)
        self._address = address
        self._asking = threading.Lock()
        self._reading = threading.Lock()
        self._next: dict[Wanted, Future[bytes]] = {}

    def start(self) -> Server:
        """Listen and answer, in threads that have the rights of the caller. Raises MsrtraceError."""
        try:
            self.server_activate()
        except OSError as error:  # another that took the address at the same time
            raise _cannot_listen(self._address, error) from None
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    @property
    def url(self) -> str:
        """Where the metrics are."""
        return f"{'https' if self.tls else 'http'}://{_shown(self._address[0])}:{self.server_address[1]}/metrics"

    def text(self, wanted: Wanted) -> bytes:
        """What is WANTED of the registry as it is at a moment that is yet to come."""
        with self._asking:
            first = not self._next
            text = self._next.setdefault(wanted, Future())
        if first:
            with self._reading:
                with self._asking:
                    texts, self._next = self._next, {}  # who comes from here on needs one that is newer
                self._make(texts)
        return text.result()

    def _make(self, texts: dict[Wanted, Future[bytes]]) -> None:
        """Make TEXTS, all of one moment."""
        try:
            # For one text alone, as there is mostly, families need not be held until all of them are there.
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
        """Bind the address, and do not look up what it is called, which may take seconds and is not needed."""
        TCPServer.server_bind(self)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Complain, but not of a client that goes away or has no certificate."""
        error = sys.exception()
        if not isinstance(error, OSError):
            self._complain(f"a scrape failed: {type(error).__name__}: {error}")


class _Handler(MetricsHandler):
    timeout = 30.0  # seconds that a client may be silent, or not read

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
