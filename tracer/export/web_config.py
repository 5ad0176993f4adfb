# SPDX-License-Identifier: GPL-2.0-or-later
"""The file of --web.config.file, in the format of Prometheus' exporter toolkit, read again when it has changed.

github.com/prometheus/exporter-toolkit, docs/web-configuration.md. What Python's ssl cannot do is an error, never
ignored.
"""

from __future__ import annotations

import re
import ssl
from collections.abc import Callable, Mapping
from pathlib import Path

from tracer.export.passwords import Passwords, is_hash
from tracer.export.security import Files, Followed, Setup, no_password, server_context
from tracer.model.errors import MsrtraceError
from tracer.model.yaml_config import InvalidConfigError, Section, missing, parse, read_file

_VERSIONS = {"TLS12": ssl.TLSVersion.TLSv1_2, "TLS13": ssl.TLSVersion.TLSv1_3}
_CLIENT_AUTH = {
    "NoClientCert": ssl.CERT_NONE,
    "VerifyClientCertIfGiven": ssl.CERT_OPTIONAL,
    "RequireAndVerifyClientCert": ssl.CERT_REQUIRED,
}
_KEYS = ("tls_server_config", "http_server_config", "basic_auth_users")
_FILES = ("cert_file", "key_file", "client_ca_file")
_TLS_KEYS = (*_FILES, "client_auth_type", "min_version", "max_version", "prefer_server_cipher_suites")
#: What the toolkit knows and msrtrace does not, and what to do instead.
_UNSUPPORTED = {
    "rate_limit": "use a proxy that has one",
    "tls_server_config.cert": "use cert_file",
    "tls_server_config.key": "use key_file",
    "tls_server_config.client_ca": "use client_ca_file",
    "tls_server_config.client_allowed_sans": "use a CA of its own for those who may scrape",
    "tls_server_config.cipher_suites": "all that there are have forward secrecy and authenticated encryption",
    "tls_server_config.curve_preferences": "the curves are those of OpenSSL",
}
#: The headers that the toolkit allows, and what their values may be.
_HEADERS = {
    "strict-transport-security": r"[\x20-\x7e]+",
    "content-security-policy": r"[\x20-\x7e]+",
    "x-content-type-options": r"(?i:nosniff)",
    "x-frame-options": r"(?i:deny|sameorigin)",
    "x-xss-protection": r"[\x20-\x7e]+",
}


class WebConfig(Followed):
    """The setup that a file, and those that it names, describe."""

    def __init__(self, path: str, on_error: Callable[[str], None] = lambda _: None) -> None:
        """Read the file; `on_error` gets a line when it becomes invalid later.

        :raises MsrtraceError: if it cannot be read, is invalid, or needs a Python package that is not installed
        """
        self._path, self._passwords = Path(path), Passwords()
        try:
            super().__init__(f"{path}: ", on_error)
        except InvalidConfigError as error:
            raise MsrtraceError(f"--web.config.file {path}: {error}") from None

    def _read(self) -> tuple[Setup, Files]:
        """Read all files. Raises InvalidConfigError."""
        content = read_file(self._path)
        top = parse(content, self._path.parent)
        top.check(_KEYS, _UNSUPPORTED)
        tls, http, users = (top.section(key) for key in _KEYS)
        tls.check(_TLS_KEYS, _UNSUPPORTED)
        http.check(("headers", "http2"), _UNSUPPORTED)
        http.flag("http2", True)  # an offer that a server need not make
        paths = {name: tls.file(tls.text(name)) for name in _FILES if tls.text(name)}
        files = ((self._path, content), *((file, read_file(file)) for file in paths.values()))
        hashes = _users(users)
        admits = self._passwords.checker(hashes) if hashes else Setup().admits
        setup = Setup(_context(tls, paths) if tls.names() else None, _headers(http.section("headers")), admits)
        return setup, files


def _context(tls: Section, paths: Mapping[str, Path]) -> ssl.SSLContext:
    for name in ("cert_file", "key_file"):
        if name not in paths:
            raise InvalidConfigError(f"tls_server_config.{name} is missing")
    mode = tls.choice("client_auth_type", _CLIENT_AUTH) or ssl.CERT_NONE
    ca = paths.get("client_ca_file")
    if ca and mode == ssl.CERT_NONE:
        raise InvalidConfigError("tls_server_config.client_ca_file needs a client_auth_type that verifies")
    lowest = tls.choice("min_version", _VERSIONS) or ssl.TLSVersion.TLSv1_2
    highest = tls.choice("max_version", _VERSIONS) or ssl.TLSVersion.TLSv1_3
    if highest < lowest:
        raise InvalidConfigError("tls_server_config.max_version is below min_version")
    context = server_context()
    context.minimum_version, context.maximum_version = lowest, highest
    if tls.flag("prefer_server_cipher_suites", True):
        context.options |= ssl.OP_CIPHER_SERVER_PREFERENCE
    names = ["client_ca_file"]
    try:
        if mode != ssl.CERT_NONE:
            if ca:
                context.load_verify_locations(ca)
            else:
                context.load_default_certs(ssl.Purpose.CLIENT_AUTH)
        names = ["cert_file", "key_file"]
        context.load_cert_chain(paths["cert_file"], paths["key_file"], password=no_password)
    except (OSError, ValueError) as error:  # ssl.SSLError is the former
        used = " and ".join(str(paths[name]) for name in names if name in paths)
        raise InvalidConfigError(f"cannot use {used}: {error}") from None
    context.verify_mode = mode
    return context


def _headers(section: Section) -> dict[str, str]:
    headers = {name: section.text(name) for name in section.names()}
    for name, text in headers.items():
        pattern = _HEADERS.get(name.lower())
        if pattern is None:
            raise InvalidConfigError(f"{section.path(name)} cannot be configured")
        if text and not re.fullmatch(pattern, text):
            raise InvalidConfigError(f"{section.path(name)} has an invalid value")
    return {name: text for name, text in headers.items() if text}


def _users(section: Section) -> dict[str, str]:
    """The hashes of passwords by user."""
    users = {user: section.text(user) for user in section.names()}
    for user, text in users.items():
        if not is_hash(text):
            raise InvalidConfigError(f"{section.path(user)} is no bcrypt hash")
    if users:
        try:
            import bcrypt  # noqa: F401
        except ImportError:
            raise missing("bcrypt", "python3-bcrypt") from None
    return users
