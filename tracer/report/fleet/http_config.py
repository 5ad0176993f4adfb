# SPDX-License-Identifier: GPL-2.0-or-later
"""How to talk HTTP to a server: the file that promtool's `--http.config.file` takes.

Its keys, defaults and rules are those of Prometheus' clients
(https://prometheus.io/docs/prometheus/latest/configuration/configuration/#http_config, config/http_config.go in
github.com/prometheus/common). Secrets are in no message.
"""

from __future__ import annotations

import ssl
import warnings
from pathlib import Path
from string import ascii_letters, digits

from tracer.model.errors import MsrtraceError
from tracer.model.yaml_config import InvalidConfigError, Section, parse, read_file
from tracer.report.fleet.http_client import HttpConfig, basic_credentials

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
_HEADER_NAME = frozenset(ascii_letters + digits + "!#$%&'*+-.^_`|~")  # RFC 9110


def read_http_config(path: Path) -> HttpConfig:
    """The configuration in a file; files that it names are relative to its directory.

    Raises MsrtraceError, which names the file and the key.
    """
    content = read_file(path)
    try:
        return _config(parse(content, path.parent))
    except InvalidConfigError as error:
        raise MsrtraceError(f"{path}: {error}") from None


def _text(path: Path) -> str:
    """The content of a file."""
    try:
        return read_file(path).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise InvalidConfigError(f"{path} is not UTF-8") from None


def _secret(section: Section, key: str) -> str:
    """The text under a key, or in the file under KEY_file, stripped as Prometheus does."""
    section.at_most_one(key, f"{key}_file")
    name = section.text(f"{key}_file")
    return _text(section.file(name)).strip() if name else section.text(key)


def _config(top: Section) -> HttpConfig:
    top.check(_CONFIG, _UNSUPPORTED)
    top.flag("follow_redirects", True)
    top.flag("enable_http2", True)
    headers, secrets = _authorization(top)
    for more, hidden in (_plain_headers(top.section("headers")), _headers(top.section("http_headers"))):
        for name, value in more.items():
            if name.lower() in map(str.lower, headers):
                raise InvalidConfigError(f"the header {name} is given twice")
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


def _authorization(top: Section) -> tuple[dict[str, str], list[str]]:
    """The header Authorization, if there are credentials, and these."""
    top.at_most_one("basic_auth", "authorization", "bearer_token", "bearer_token_file")
    if "basic_auth" in top:
        basic = top.section("basic_auth")
        basic.check(_BASIC, _UNSUPPORTED)
        user, password = _secret(basic, "username"), _secret(basic, "password")
        if ":" in user:
            raise InvalidConfigError(
                f"{basic.path('username')} contains a colon"
            )  # RFC 7617: the password begins there
        return {"Authorization": basic_credentials(user, password)}, [password]
    if "authorization" in top:
        section = top.section("authorization")
        section.check(_AUTHORIZATION, _UNSUPPORTED)
        kind = section.text("type").strip() or "Bearer"
        if kind.lower() == "basic":
            raise InvalidConfigError(f"{section.path('type')} cannot be Basic: use basic_auth")
        token, where = _secret(section, "credentials").strip(), section.path("credentials")
        kind = _header_value(kind, section.path("type"))
    else:
        kind, token, where = "Bearer", _secret(top, "bearer_token").strip(), "bearer_token"
    if not token:
        if "authorization" in top or "bearer_token" in top or "bearer_token_file" in top:
            raise InvalidConfigError(f"{where} is empty")
        return {}, []
    return {"Authorization": f"{kind} {_header_value(token, where)}"}, [token]


def _plain_headers(section: Section) -> tuple[dict[str, str], list[str]]:
    """The headers of `headers`, as remote_write has them: a text for each name."""
    found = {name: _header_value(section.text(name), section.path(name)) for name in section.names()}
    _check_names(section)
    return found, []


def _headers(section: Section) -> tuple[dict[str, str], list[str]]:
    """The headers of `http_headers`, and those of their values that are secret."""
    _check_names(section)
    found, hidden = {}, []
    for name in section.names():
        one = section.section(name)
        one.check(("values", "secrets", "files"), _UNSUPPORTED)
        secrets = [*one.texts("secrets"), *(_text(one.file(file)).strip() for file in one.texts("files"))]
        values = [_header_value(value, one.name) for value in (*one.texts("values"), *secrets)]
        if not values:
            raise InvalidConfigError(f"{one.name} has no value")
        found[name] = ", ".join(values)
        hidden += secrets
    return found, hidden


def _check_names(section: Section) -> None:
    for name in section.names():
        if not name or not _HEADER_NAME.issuperset(name):
            raise InvalidConfigError(f"{section.path(name)} is not the name of a header")
        if name.title() in _RESERVED:
            raise InvalidConfigError(f"{section.path(name)} cannot be set")


def _header_value(text: str, where: str) -> str:
    """A header's value, sent as UTF-8 (http.client encodes as Latin-1). Raises InvalidConfigError without the value."""
    if any((ord(character) < 32 and character != "\t") or ord(character) == 127 for character in text):
        raise InvalidConfigError(f"{where} contains a line break or another control character")
    return text.encode("utf-8", "surrogateescape").decode("latin-1")


def _tls(section: Section) -> ssl.SSLContext | None:
    """The TLS context; None without a tls_config."""
    section.check(_TLS, _UNSUPPORTED)
    if not section.names():
        return None
    section.at_most_one("ca", "ca_file")
    if ("cert_file" in section) != ("key_file" in section):
        raise InvalidConfigError(f"{section.path('cert_file')} and {section.path('key_file')} are needed together")
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
            raise InvalidConfigError(
                f"{cert} and {key} are not a certificate and its key in PEM format, without a password"
            ) from None
    return context


def _verifying(section: Section) -> ssl.SSLContext:
    """A context that trusts the given certificate authority, or the system's."""
    file = section.file(section.text("ca_file")) if "ca_file" in section else None
    text = _text(file) if file else section.text("ca")
    try:
        context = ssl.create_default_context(cadata=text or None)
    except (ssl.SSLError, ValueError):
        raise InvalidConfigError(f"{file or section.path('ca')} is not a certificate in PEM format") from None
    # Python 3.13 and newer refuse what Go and OpenSSL accept, such as a CA without a key usage.
    context.verify_flags &= ~getattr(ssl, "VERIFY_X509_STRICT", 0)
    return context


def _set_versions(context: ssl.SSLContext, section: Section) -> None:
    lowest = section.choice("min_version", _TLS_VERSIONS) or ssl.TLSVersion.TLSv1_2  # Go's default
    highest = section.choice("max_version", _TLS_VERSIONS)
    if highest and highest < lowest:
        raise InvalidConfigError(f"{section.path('max_version')} is lower than the minimum")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of TLS 1.0 and 1.1, which the user asks for
        context.minimum_version = lowest
        if highest:
            context.maximum_version = highest
