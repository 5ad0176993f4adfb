# SPDX-License-Identifier: GPL-2.0-or-later
"""How to talk HTTP to a server: the file that promtool's `--http.config.file` takes.

Its keys, defaults and rules are those of Prometheus' clients
(https://prometheus.io/docs/prometheus/latest/configuration/configuration/#http_config, config/http_config.go in
github.com/prometheus/common). Secrets are in no message: neither are values, nor YAML's own errors, which quote them.
"""

from __future__ import annotations

import ssl
import warnings
from itertools import takewhile
from pathlib import Path
from string import ascii_letters, digits

from tracer.model.errors import MsrtraceError
from tracer.report.fleet.http_client import HttpConfig, basic_credentials

#: A file with a password or a token is not larger.
_LARGEST = 1 << 20
_TLS_VERSIONS = {
    "TLS10": ssl.TLSVersion.TLSv1,
    "TLS11": ssl.TLSVersion.TLSv1_1,
    "TLS12": ssl.TLSVersion.TLSv1_2,
    "TLS13": ssl.TLSVersion.TLSv1_3,
}
_BASIC = ("username", "username_file", "password", "password_file")
_AUTHORIZATION = ("type", "credentials", "credentials_file")
_TLS = ("ca", "ca_file", "cert_file", "key_file", "server_name", "insecure_skip_verify", "min_version", "max_version")
_CONFIG = (
    "basic_auth",
    "authorization",
    "bearer_token",
    "bearer_token_file",
    "tls_config",
    "headers",
    "http_headers",
    "follow_redirects",
    "enable_http2",
    "proxy_from_environment",
)
#: What Prometheus knows and msrtrace does not, and what to do instead.
_UNSUPPORTED = {
    "oauth2": "get a token, and give it as authorization with credentials_file",
    "proxy_url": "set HTTPS_PROXY and proxy_from_environment: true",
    "no_proxy": "set NO_PROXY and proxy_from_environment: true",
    "proxy_connect_header": "use a proxy that needs none",
    "tls_config.cert": "use cert_file",
    "tls_config.key": "use key_file",
} | {
    f"{key}_ref": "there is no secret manager; use a file"
    for key in (
        *(f"tls_config.{name}" for name in ("ca", "cert", "key")),
        *(f"basic_auth.{name}" for name in ("username", "password")),
        "authorization.credentials",
    )
}
#: ReservedHeaders of github.com/prometheus/common/config/headers.go, and what this client sets itself.
_RESERVED = {
    *("Accept", "Accept-Encoding", "Authorization", "Connection", "Content-Encoding", "Content-Length", "Content-Type"),
    *("Host", "Keep-Alive", "Proxy-Authenticate", "Proxy-Authorization", "Transfer-Encoding", "User-Agent"),
    *("Www-Authenticate", "X-Prometheus-Remote-Write-Version", "X-Prometheus-Remote-Read-Version"),
    *("X-Prometheus-Scrape-Timeout-Seconds", "X-Amz-Date", "X-Amz-Security-Token", "X-Amz-Content-Sha256"),
}
_KEY = frozenset(ascii_letters + digits + "-_.")
_HEADER_NAME = _KEY | frozenset("!#$%&'*+^`|~")  # RFC 9110


def read_http_config(path: Path) -> HttpConfig:
    """The configuration in a file; files that it names are relative to its directory.

    Raises MsrtraceError, which names the file and the key.
    """
    try:
        return _config(_Section(_parsed(path), "", path.parent))
    except _Wrong as error:
        raise MsrtraceError(f"{path}: {error}") from None


def _shown(key: str) -> str:
    """The key up to what no key has: YAML takes `{password:secret}`, without a space, for a key."""
    start = "".join(takewhile(_KEY.__contains__, key))
    return start[:80] if start == key and len(key) <= 80 else f"{start[:80]}..."


class _Wrong(Exception):
    """What is wrong with a configuration; the file is not named."""


def _parsed(path: Path) -> object:
    """The file's mappings, lists and texts. A text is as written: Go has `password: 0123` as "0123", YAML as 83."""
    try:
        import yaml
    except ImportError:
        raise MsrtraceError(
            "--http.config.file needs PyYAML: install python3-yaml (Debian) or, with pip, msrtrace[web]"
        ) from None

    def plain(node: yaml.Node | None, depth: int = 0) -> object:
        if depth > 8:
            raise _Wrong("is nested too deeply")
        if isinstance(node, yaml.SequenceNode):
            return [plain(item, depth + 1) for item in node.value]
        if isinstance(node, yaml.MappingNode):
            result: dict[str, object] = {}
            for key, value in node.value:
                line = key.start_mark.line + 1
                if not isinstance(key, yaml.ScalarNode):
                    raise _Wrong(f"line {line}: a key is not a text")
                if key.value in result:
                    raise _Wrong(f"line {line}: {_shown(key.value)} is given twice")
                result[key.value] = plain(value, depth + 1)
            return result
        return None if node is None or node.tag == "tag:yaml.org,2002:null" else node.value

    try:
        return plain(yaml.compose(_text(path), Loader=yaml.SafeLoader))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise _Wrong(
            f"is not valid YAML{f' (line {mark.line + 1}, column {mark.column + 1})' if mark else ''}"
        ) from None
    except (yaml.YAMLError, RecursionError):
        raise _Wrong("is not valid YAML") from None


def _text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(_LARGEST + 1)
        if len(content) > _LARGEST:
            raise MsrtraceError(f"{path} is too large")
        return content.decode("utf-8-sig")
    except OSError as error:
        raise MsrtraceError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise MsrtraceError(f"{path} is not UTF-8") from None


class _Section:
    """A mapping of the file; errors name its keys with those above it."""

    def __init__(self, content: object, name: str, directory: Path) -> None:
        if content is not None and not isinstance(content, dict):
            raise _Wrong(f"{name or 'the file'} is not a mapping")
        self.name, self._directory = name, directory
        self._content: dict[str, object] = content or {}

    def __contains__(self, key: str) -> bool:
        return self._content.get(key) is not None

    def names(self) -> list[str]:
        """The keys, as written."""
        return list(self._content)

    def path(self, key: str) -> str:
        """The key with those above it."""
        shown = _shown(key)
        return f"{self.name}.{shown}" if self.name else shown

    def check(self, known: tuple[str, ...]) -> None:
        """Raise _Wrong for keys that are unknown or unsupported."""
        for key in self._content:
            path = self.path(key)
            if path in _UNSUPPORTED:
                raise _Wrong(f"{path} is not supported: {_UNSUPPORTED[path]}")
        unknown = [self.path(key) for key in self._content if key not in known]
        if unknown:
            raise _Wrong(f"unknown {'key' if len(unknown) == 1 else 'keys'} {', '.join(unknown)} ({', '.join(known)})")

    def section(self, key: str) -> _Section:
        """The mapping under a key; empty if there is none."""
        return _Section(self._content.get(key), self.path(key), self._directory)

    def text(self, key: str) -> str:
        """The text under a key; empty if there is none."""
        value = self._content.get(key)
        if value is not None and not isinstance(value, str):
            raise _Wrong(f"{self.path(key)} is not a text")
        return value or ""

    def texts(self, key: str) -> list[str]:
        """The list of texts under a key; empty if there is none."""
        value = self._content.get(key) or []
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise _Wrong(f"{self.path(key)} is not a list of texts")
        return value

    def flag(self, key: str, default: bool) -> bool:
        """A boolean."""
        text = self.text(key).lower()
        if text in ("true", "yes", "on", "y"):
            return True
        if text in ("false", "no", "off", "n"):
            return False
        if text:
            raise _Wrong(f"{self.path(key)} is neither true nor false")
        return default

    def file(self, name: str) -> Path:
        """A file that the configuration names."""
        return self._directory / name

    def one_of(self, *keys: str) -> None:
        """Raise _Wrong if several of these keys are given."""
        given = [self.path(key) for key in keys if key in self]
        if len(given) > 1:
            raise _Wrong(f"at most one of {' and '.join(given)} may be given")

    def secret(self, key: str) -> str:
        """The text under a key, or in the file under KEY_file, stripped as Prometheus does."""
        self.one_of(key, f"{key}_file")
        name = self.text(f"{key}_file")
        return _text(self.file(name)).strip() if name else self.text(key)


def _config(top: _Section) -> HttpConfig:
    top.check(_CONFIG)
    top.flag("follow_redirects", True)
    top.flag("enable_http2", True)
    headers, secrets = _authorization(top)
    for more, hidden in (_plain_headers(top.section("headers")), _headers(top.section("http_headers"))):
        for name, value in more.items():
            if name.lower() in map(str.lower, headers):
                raise _Wrong(f"the header {name} is given twice")
            headers[name] = value
        secrets += hidden
    tls = top.section("tls_config")
    return HttpConfig(
        headers=headers,
        secrets=tuple(secret for secret in secrets if secret),
        tls=_tls(tls),
        server_name=tls.text("server_name"),
        proxies=top.flag("proxy_from_environment", False),
    )


def _authorization(top: _Section) -> tuple[dict[str, str], list[str]]:
    """The header Authorization, if there are credentials, and these."""
    top.one_of("basic_auth", "authorization", "bearer_token", "bearer_token_file")
    if "basic_auth" in top:
        basic = top.section("basic_auth")
        basic.check(_BASIC)
        user, password = basic.secret("username"), basic.secret("password")
        if ":" in user:
            raise _Wrong(f"{basic.path('username')} contains a colon")  # RFC 7617: the password begins there
        return {"Authorization": basic_credentials(user, password)}, [password]
    if "authorization" in top:
        section = top.section("authorization")
        section.check(_AUTHORIZATION)
        kind = section.text("type").strip() or "Bearer"
        if kind.lower() == "basic":
            raise _Wrong(f"{section.path('type')} cannot be Basic: use basic_auth")
        token, where = section.secret("credentials").strip(), section.path("credentials")
        kind = _header_value(kind, section.path("type"))
    else:
        kind, token, where = "Bearer", top.secret("bearer_token").strip(), "bearer_token"
    if not token:
        if "authorization" in top or "bearer_token" in top or "bearer_token_file" in top:
            raise _Wrong(f"{where} is empty")
        return {}, []
    return {"Authorization": f"{kind} {_header_value(token, where)}"}, [token]


def _plain_headers(section: _Section) -> tuple[dict[str, str], list[str]]:
    """The headers of `headers`, as remote_write has them: a text for each name."""
    found = {name: _header_value(section.text(name), section.path(name)) for name in section.names()}
    _check_names(section)
    return found, []


def _headers(section: _Section) -> tuple[dict[str, str], list[str]]:
    """The headers of `http_headers`, and those of their values that are secret."""
    _check_names(section)
    found, hidden = {}, []
    for name in section.names():
        one = section.section(name)
        one.check(("values", "secrets", "files"))
        secrets = [*one.texts("secrets"), *(_text(one.file(file)).strip() for file in one.texts("files"))]
        values = [_header_value(value, one.name) for value in (*one.texts("values"), *secrets)]
        if not values:
            raise _Wrong(f"{one.name} has no value")
        found[name] = ", ".join(values)
        hidden += secrets
    return found, hidden


def _check_names(section: _Section) -> None:
    for name in section.names():
        if not name or not _HEADER_NAME.issuperset(name):
            raise _Wrong(f"{section.path(name)} is not the name of a header")
        if name.title() in _RESERVED:
            raise _Wrong(f"{section.path(name)} cannot be set")


def _header_value(text: str, where: str) -> str:
    """A header's value, sent as UTF-8 (http.client encodes as Latin-1). Raises _Wrong without the value."""
    if any((ord(character) < 32 and character != "\t") or ord(character) == 127 for character in text):
        raise _Wrong(f"{where} contains a line break or another control character")
    return text.encode("utf-8", "surrogateescape").decode("latin-1")


def _tls(section: _Section) -> ssl.SSLContext | None:
    """The TLS context; None without a tls_config."""
    section.check(_TLS)
    if not section.names():
        return None
    section.one_of("ca", "ca_file")
    if ("cert_file" in section) != ("key_file" in section):
        raise _Wrong(f"{section.path('cert_file')} and {section.path('key_file')} are needed together")
    context = _verifying(section)
    if section.flag("insecure_skip_verify", False):
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    _set_versions(context, section)
    if "cert_file" in section:
        cert, key = (section.file(section.text(name)) for name in ("cert_file", "key_file"))
        for file in (cert, key):
            _text(file)  # ssl's errors do not name the file
        try:
            context.load_cert_chain(cert, key, password="")  # else OpenSSL asks for one on the terminal
        except (ssl.SSLError, ValueError):
            raise _Wrong(
                f"{cert} and {key} are not a certificate and its key in PEM format, without a password"
            ) from None
    return context


def _verifying(section: _Section) -> ssl.SSLContext:
    """A context that trusts the given certificate authority, or the system's."""
    file = section.file(section.text("ca_file")) if "ca_file" in section else None
    text = _text(file) if file else section.text("ca")
    try:
        context = ssl.create_default_context(cadata=text or None)
    except (ssl.SSLError, ValueError):
        raise _Wrong(f"{file or section.path('ca')} is not a certificate in PEM format") from None
    # Python 3.13 and newer refuse what Go and OpenSSL accept, such as a CA without a key usage.
    context.verify_flags &= ~getattr(ssl, "VERIFY_X509_STRICT", 0)
    return context


def _set_versions(context: ssl.SSLContext, section: _Section) -> None:
    lowest = _version(section, "min_version") or ssl.TLSVersion.TLSv1_2  # Go's default
    highest = _version(section, "max_version")
    if highest and highest < lowest:
        raise _Wrong(f"{section.path('max_version')} is lower than the minimum")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of TLS 1.0 and 1.1, which the user asks for
        context.minimum_version = lowest
        if highest:
            context.maximum_version = highest


def _version(section: _Section, key: str) -> ssl.TLSVersion | None:
    text = section.text(key)
    if text and text not in _TLS_VERSIONS:
        raise _Wrong(f"{section.path(key)} is none of {', '.join(_TLS_VERSIONS)}")
    return _TLS_VERSIONS.get(text)
