"""The metrics over HTTP or HTTPS. No client keeps another from its scrape, whatever it does or does not do."""

from __future__ import annotations

import gzip
import socket
import ssl
import sys
import threading
from collections.abc import Callable
from http.server import ThreadingHTTPServer
from pathlib import Path
from socketserver import TCPServer
from typing import Any
from urllib.parse import urlsplit

from prometheus_client import MetricsHandler
from prometheus_client.exposition import gzip_accepted
from prometheus_client.registry import Collector

from tracer.errors import MsrtraceError
from tracer.exposition import encoder


class Server(ThreadingHTTPServer):
    """Serves a registry, each request in a thread of its own, from its start until it is closed."""

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
        """Listen on ADDRESS, with TLS if there are a CERT and its KEY; with a CA clients need its certificate.

        COMPLAIN gets a line for each answer that could not be made. Raises MsrtraceError.
        """
        self.registry, self.tls, self._complain = registry, bool(cert), complain
        context = _context(cert, key, ca) if cert else None
        host, port = address
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
            self.address_family, where = found[0][0], found[0][4]
            super().__init__((str(where[0]), port), _Handler)
        except OSError as error:
            raise MsrtraceError(
                f"cannot listen on {_shown(host)}:{port}: {error.strerror}; "
                "choose another address with --web.listen-address"
            ) from None
        if context:
            # The handshake is done by the thread of the connection: here it would wait for a client that says nothing.
            self.socket = context.wrap_socket(self.socket, server_side=True, do_handshake_on_connect=False)
        self._host = host

    def start(self) -> Server:
        """Answer, in threads that have the rights of the caller. Clients that came before have waited."""
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    @property
    def url(self) -> str:
        """Where the metrics are."""
        return f"{'https' if self.tls else 'http'}://{_shown(self._host)}:{self.server_address[1]}/metrics"

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
        if urlsplit(self.path).query:  # name[]=..., a part of the metrics
            self.registry = self.server.registry
            super().do_GET()
            return
        encode, content_type = encoder(self.headers.get("Accept"))
        text = encode(self.server.registry)
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


def _shown(host: str) -> str:
    return f"[{host}]" if ":" in host else host
