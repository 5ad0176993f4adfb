# SPDX-License-Identifier: GPL-2.0-or-later
"""How a server is protected: TLS, passwords, headers."""

from __future__ import annotations

import ssl
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn, Protocol

from tracer.model.yaml_config import InvalidConfigError, read_file


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


Files = tuple[tuple[Path, bytes], ...]  # with their content


class Followed(ABC):
    """The setup that files describe, at any time. Invalid or unreadable files leave the valid setup before them."""

    def __init__(self, name: str, on_error: Callable[[str], None]) -> None:
        """Read the files; `on_error` gets a line, which begins with `name`, when they become invalid later.

        Raises InvalidConfigError.
        """
        self._name, self._on_error = name, on_error
        self._lock, self._complaint = threading.Lock(), ""
        self._setup, self._files = self._read()

    @abstractmethod
    def _read(self) -> tuple[Setup, Files]:
        """The setup, and what it was made of. Raises InvalidConfigError."""

    def now(self) -> Setup:
        """The setup for a new connection, from the files as they are now."""
        with self._lock:
            self._follow(lambda: any(read_file(file) != content for file, content in self._files))
            return self._setup

    def reload(self) -> None:
        """Read all files again, also those that look the same; what is invalid is reported again."""
        with self._lock:
            self._complaint = ""
            self._follow(lambda: True)

    def _follow(self, changed: Callable[[], bool]) -> None:
        try:
            if changed():
                setup, files = self._read()
                if (setup.context is None) != (self._setup.context is None):
                    raise InvalidConfigError("TLS is switched on or off by a restart only")
                self._setup, self._files = setup, files
            self._complaint = ""
        except InvalidConfigError as error:
            if str(error) != self._complaint:
                self._on_error(f"{self._name}{error}; the configuration before it stays in force")
            self._complaint = str(error)


def server_context() -> ssl.SSLContext:
    """A context for TLS 1.2 and 1.3, with forward secrecy and authenticated encryption, as all of 1.3 has."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers("ECDHE+AESGCM:ECDHE+CHACHA20")  # Debian's Python has what OpenSSL calls DEFAULT
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION
    return context


def no_password() -> NoReturn:
    """For `load_cert_chain`, which else asks for a password at the terminal."""
    raise ValueError("the key is encrypted")


class TlsFiles(Followed):
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
        self._paths = (cert, key, ca)
        super().__init__("", on_error)

    def _read(self) -> tuple[Setup, Files]:
        cert, key, ca = self._paths
        if not cert:
            return Setup(), ()
        files = tuple((Path(file), read_file(Path(file))) for file in self._paths if file)
        context = server_context()
        try:
            if ca:
                context.load_verify_locations(ca)
                context.verify_mode = ssl.CERT_REQUIRED
            context.load_cert_chain(cert, key, password=no_password)
        except (OSError, ValueError) as error:  # ssl.SSLError is the former
            raise InvalidConfigError(f"the TLS files cannot be used: {error}") from None
        return Setup(context), files
