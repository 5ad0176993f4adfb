# SPDX-License-Identifier: GPL-2.0-or-later
"""How requests to a server are sent: with which headers and certificates, and no further than asked for."""

from __future__ import annotations

import base64
import http.client
import ssl
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import IO, Any


@dataclass(frozen=True)
class HttpConfig:
    """What each request has, and how it is sent.

    `headers` include Authorization. `secrets` are the texts that no message may contain. `tls` is None for the system's
    certificate authorities. `proxies`: whether HTTPS_PROXY and the like are heeded.
    """

    headers: Mapping[str, str] = field(default_factory=dict)
    secrets: tuple[str, ...] = ()
    tls: ssl.SSLContext | None = None
    server_name: str = ""
    proxies: bool = True

    def opener(self) -> urllib.request.OpenerDirector:
        """What opens URLs so. Redirects are errors: they would take a query, or its credentials, elsewhere."""
        handlers: list[urllib.request.BaseHandler] = [_NoRedirects()]
        if self.tls:
            handlers.append(_Https(self.tls, self.server_name))
        if not self.proxies:
            handlers.append(urllib.request.ProxyHandler({}))
        return urllib.request.build_opener(*handlers)


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect is an HTTPError with its status and headers."""

    def redirect_request(  # noqa: PLR0917 (as urllib calls it)
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Any, newurl: str
    ) -> None:
        """Follow none."""


class _Https(urllib.request.HTTPSHandler):
    """HTTPS with a context, and with another name to verify than that in the URL."""

    def __init__(self, context: ssl.SSLContext, server_name: str) -> None:
        self._tls, self._server_name = context, server_name
        super().__init__(context=context)

    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        """Open a URL."""
        context, name = self._tls, self._server_name

        class Connection(http.client.HTTPSConnection):
            def connect(self) -> None:
                if not name:
                    super().connect()
                    return
                http.client.HTTPConnection.connect(self)  # and the tunnel of a proxy
                self.sock = context.wrap_socket(self.sock, server_hostname=name)

        return self.do_open(Connection, req, context=context)


def basic_credentials(user: str, password: str) -> str:
    """The value of Authorization for a user and a password."""
    return f"Basic {base64.b64encode(f'{user}:{password}'.encode()).decode()}"
