# SPDX-License-Identifier: GPL-2.0-or-later
"""The file of --web.config.file, in the format of Prometheus' exporter toolkit, read again when it has changed.

github.com/prometheus/exporter-toolkit, docs/web-configuration.md. What Python's ssl cannot do is an error, never
ignored.
"""

from __future__ import annotations

import re
import ssl
import threading
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from tracer.export.passwords import Passwords, is_hash
from tracer.export.security import Setup
from tracer.model.errors import MsrtraceError

_VERSIONS = {"TLS12": ssl.TLSVersion.TLSv1_2, "TLS13": ssl.TLSVersion.TLSv1_3}
_CLIENT_AUTH = {
    "NoClientCert": ssl.CERT_NONE,
    "VerifyClientCertIfGiven": ssl.CERT_OPTIONAL,
    "RequireAndVerifyClientCert": ssl.CERT_REQUIRED,
}
_KEYS = frozenset(("tls_server_config", "http_server_config", "basic_auth_users"))
_TLS_KEYS = frozenset((
    "cert_file", "key_file", "client_ca_file", "client_auth_type", "min_version", "max_version",
    "prefer_server_cipher_suites",
))  # fmt: skip
_TLS_UNSUPPORTED = frozenset(("cert", "key", "client_ca", "cipher_suites", "curve_preferences", "client_allowed_sans"))
#: The headers that the toolkit allows, and what their values may be.
_HEADERS = {
    "strict-transport-security": r"[\x20-\x7e]+",
    "content-security-policy": r"[\x20-\x7e]+",
    "x-content-type-options": r"(?i:nosniff)",
    "x-frame-options": r"(?i:deny|sameorigin)",
    "x-xss-protection": r"[\x20-\x7e]+",
}
_TRUE, _FALSE = ("true", "yes", "on"), ("false", "no", "off")


class _InvalidError(Exception):
    """What is wrong with the file, in words."""


class WebConfig:
    """The setup that a file describes, at any time. An invalid or unreadable file leaves the valid one before it."""

    def __init__(self, path: str, on_error: Callable[[str], None] = lambda _: None) -> None:
        """Read the file; `on_error` gets a line when it becomes invalid later.

        :raises MsrtraceError: if it cannot be read, is invalid, or needs a Python package that is not installed
        """
        self._path, self._on_error = Path(path), on_error
        self._passwords = Passwords()
        self._lock = threading.Lock()
        self._text, self._files = b"", tuple[tuple[Path, bytes], ...]()
        self._complaint = ""
        try:
            self._setup = self._read()
        except _InvalidError as error:
            raise MsrtraceError(f"--web.config.file {path}: {error}") from None
        self._tls = self._setup.context is not None

    def now(self) -> Setup:
        """The setup for a new connection, from the files as they are now."""
        with self._lock:
            try:
                if self._changed():
                    setup = self._read()
                    if (setup.context is not None) != self._tls:
                        raise _InvalidError("TLS is switched on or off by a restart only")
                    self._setup = setup
                self._complaint = ""
            except _InvalidError as error:
                self._text = b"\0"  # no valid file: it is read again for the next connection
                if str(error) != self._complaint:
                    self._on_error(f"{self._path}: {error}; the configuration before it stays in force")
                self._complaint = str(error)
            return self._setup

    def _changed(self) -> bool:
        return _content(self._path) != self._text or any(_content(file) != content for file, content in self._files)

    def _read(self) -> Setup:
        """Read all files. Raises _InvalidError."""
        text = _content(self._path)
        top = _mapping(_parsed(text), "", _KEYS, frozenset({"rate_limit"}))
        tls = _mapping(top.get("tls_server_config"), "tls_server_config", _TLS_KEYS, _TLS_UNSUPPORTED)
        http = _mapping(top.get("http_server_config"), "http_server_config", {"headers", "http2"})
        _boolean(http, "http2", "http_server_config")  # HTTP/2 is an offer that a server need not make
        names = [name for name in ("cert_file", "key_file", "client_ca_file") if _string(tls, name)]
        paths = {name: self._path.parent / _string(tls, name) for name in names}
        files = tuple((file, _content(file)) for file in paths.values())
        users = _users(top.get("basic_auth_users"))
        admits = self._passwords.checker(users) if users else Setup().admits
        setup = Setup(_context(tls, paths) if tls else None, _headers(http.get("headers")), admits)
        self._text, self._files = text, files
        return setup


def _content(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise _InvalidError(f"cannot read {file}: {error.strerror}") from None


def _parsed(text: bytes) -> object:
    """The YAML, all of whose scalars are strings: the format says what each of them is."""
    try:
        import yaml
    except ImportError:
        raise _InvalidError(
            "the Python package PyYAML is missing: pip install 'msrtrace[web]', or Debian's python3-yaml"
        ) from None

    class Loader(yaml.BaseLoader):
        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
            names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            for name in names:
                if names.count(name) > 1:
                    raise yaml.constructor.ConstructorError(None, None, f"{name} is there twice", node.start_mark)
            return super().construct_mapping(node, deep)

    try:
        found: object = yaml.load(text, Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f", line {mark.line + 1}" if mark else ""
        raise _InvalidError(f"no valid YAML{where}: {error.problem}") from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise _InvalidError(f"no valid YAML: {' '.join(str(error).split())}") from None
    return found


def _mapping(
    value: object, name: str, known: frozenset[str] | set[str], unsupported: frozenset[str] = frozenset()
) -> dict[str, object]:
    """A mapping, which may be left out, with these keys and no others."""
    found = _any_mapping(value, name or "the file")
    prefix = f"{name}." if name else ""
    for key in found:
        if key in unsupported:
            raise _InvalidError(f"{prefix}{key} is not supported by msrtrace")
        if key not in known:
            raise _InvalidError(f"there is no {prefix}{key}")
    return found


def _any_mapping(value: object, name: str) -> dict[str, object]:
    if value in (None, "", "null", "~"):
        return {}
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise _InvalidError(f"{name} is not a mapping")
    return value


def _string(mapping: Mapping[str, object], key: str) -> str:
    value = mapping.get(key, "")
    if not isinstance(value, str):
        raise _InvalidError(f"{key} is not a string")
    return value


def _boolean(mapping: Mapping[str, object], key: str, name: str) -> bool:
    text = _string(mapping, key).lower() or "true"
    if text not in _TRUE + _FALSE:
        raise _InvalidError(f"{name}.{key} is neither true nor false")
    return text in _TRUE


def _chosen(tls: Mapping[str, object], key: str, default: str, choices: Mapping[str, object]) -> str:
    text = _string(tls, key) or default
    if text not in choices:
        raise _InvalidError(f"tls_server_config.{key} {text} is not supported: {', '.join(choices)}")
    return text


def _context(tls: Mapping[str, object], paths: Mapping[str, Path]) -> ssl.SSLContext:
    for name in ("cert_file", "key_file"):
        if name not in paths:
            raise _InvalidError(f"tls_server_config.{name} is missing")
    mode = _CLIENT_AUTH[_chosen(tls, "client_auth_type", "NoClientCert", _CLIENT_AUTH)]
    ca = paths.get("client_ca_file")
    if ca and mode == ssl.CERT_NONE:
        raise _InvalidError("tls_server_config.client_ca_file needs a client_auth_type that verifies")
    lowest = _VERSIONS[_chosen(tls, "min_version", "TLS12", _VERSIONS)]
    highest = _VERSIONS[_chosen(tls, "max_version", "TLS13", _VERSIONS)]
    if highest < lowest:
        raise _InvalidError("tls_server_config.max_version is below min_version")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version, context.maximum_version = lowest, highest
    if _boolean(tls, "prefer_server_cipher_suites", "tls_server_config"):
        context.options |= ssl.OP_CIPHER_SERVER_PREFERENCE
    names = ["client_ca_file"]
    try:
        if mode != ssl.CERT_NONE:
            if ca:
                context.load_verify_locations(ca)
            else:
                context.load_default_certs(ssl.Purpose.CLIENT_AUTH)
        names = ["cert_file", "key_file"]
        context.load_cert_chain(paths["cert_file"], paths["key_file"], password=_no_password)
    except (OSError, ValueError) as error:  # ssl.SSLError is the former
        used = " and ".join(str(paths[name]) for name in names if name in paths)
        raise _InvalidError(f"cannot use {used}: {error}") from None
    context.verify_mode = mode
    return context


def _no_password() -> NoReturn:
    raise ValueError("the key is encrypted")  # else ssl asks for a password at the terminal


def _headers(value: object) -> dict[str, str]:
    headers = _any_mapping(value, "http_server_config.headers")
    for name in headers:
        pattern, text = _HEADERS.get(name.lower()), _string(headers, name)
        if pattern is None:
            raise _InvalidError(f"http_server_config.headers: {name} cannot be configured")
        if text and not re.fullmatch(pattern, text):
            raise _InvalidError(f"http_server_config.headers: {name} has an invalid value")
    return {name: text for name, text in headers.items() if isinstance(text, str) and text}


def _users(value: object) -> dict[str, str]:
    users = _any_mapping(value, "basic_auth_users")
    for user in users:
        if not is_hash(_string(users, user)):
            raise _InvalidError(f"basic_auth_users: what {user} has is no bcrypt hash")
    if users:
        try:
            import bcrypt  # noqa: F401
        except ImportError:
            raise _InvalidError(
                "the Python package bcrypt is missing: pip install 'msrtrace[web]', or Debian's python3-bcrypt"
            ) from None
    return {user: str(text) for user, text in users.items()}
