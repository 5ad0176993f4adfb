# SPDX-License-Identifier: GPL-2.0-or-later
"""How a server is protected: TLS, passwords, headers."""

from __future__ import annotations

import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from tracer.model.errors import MsrtraceError


@dataclass(frozen=True)
class Setup:
    """What protects one connection.

    :param context: for TLS; without it HTTP is served
    :param headers: that all answers have
    :param admits: whether an Authorization header (None: there is none) is good enough
    """

    context: ssl.SSLContext | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    admits: Callable[[str | None], bool] = lambda _: True


class Security(Protocol):
    """Knows the setup at any time."""

    def now(self) -> Setup:
        """The setup for a new connection. Raises nothing."""

    def reload(self) -> None:
        """Read all files again. Raises nothing: what is invalid is reported, and the setup before it stays."""


class TlsFiles:
    """TLS with a certificate and its key, if any; with a CA, only for clients with a certificate by it."""

    def __init__(
        self,
        cert: str | None = None,
        key: str | None = None,
        ca: str | None = None,
        *,
        on_error: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Read the files; `on_error` gets a line when they are invalid later. Raises MsrtraceError if they are now."""
        self._files, self._on_error = (cert, key, ca), on_error
        self._setup = _setup_of(*self._files)

    def now(self) -> Setup:
        """The setup of when the files were read."""
        return self._setup

    def reload(self) -> None:
        """Read the files again. Those that cannot be used leave the setup before them."""
        try:
            self._setup = _setup_of(*self._files)
        except MsrtraceError as error:
            self._on_error(f"{error}; the files before stay in force")


def _setup_of(cert: str | None, key: str | None, ca: str | None) -> Setup:
    """The setup of files. Raises MsrtraceError if one cannot be used."""
    if not cert:
        return Setup()
    try:
        for file in (cert, key, ca):
            if file:
                Path(file).read_bytes()  # ssl's errors do not name the file
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=ca)
        # Python 3.13 and newer refuse what Go and OpenSSL accept, such as a CA without a key usage.
        context.verify_flags &= ~ssl.VERIFY_X509_STRICT
        context.load_cert_chain(cert, key)
    except ssl.SSLError as error:
        raise MsrtraceError(f"the TLS files cannot be used: {error}") from None
    except OSError as error:
        raise MsrtraceError(f"cannot read a TLS file: {error}") from None
    if ca:
        context.verify_mode = ssl.CERT_REQUIRED
    return Setup(context)
