# SPDX-License-Identifier: GPL-2.0-or-later
"""The HTTP configuration file, as promtool takes it: credentials, headers, TLS; and that secrets are never shown."""

from __future__ import annotations

import ssl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from fleets import serving, success
from needs import tool

from tracer.model.errors import MsrtraceError
from tracer.report.fleet.http_config import read_http_config
from tracer.report.fleet.prometheus_api import Prometheus

NOW = 1_000_000.0
CLOCK = success({"resultType": "scalar", "result": [NOW, str(NOW)]})
BASIC = "Basic dXNlcjpzZWNyZXQ="  # user:secret


def written(directory: Path, text: str) -> Path:
    """A configuration, and files next to it that it may name."""
    (directory / "sub").mkdir(exist_ok=True)
    (directory / "sub" / "secret").write_text(" secret\n")
    (directory / "user").write_text("user\n")
    path = directory / "http.yml"
    path.write_text(text)
    return path


def sent(directory: Path, text: str) -> dict[str, str]:
    """The headers of a request with that configuration, by their names in lower case."""
    seen: list[dict[str, str]] = []

    def answer(form: dict[str, str], headers: dict[str, str]) -> tuple[int, bytes]:
        seen.append({name.lower(): value for name, value in headers.items()})
        return CLOCK

    with serving(answer) as url:
        assert Prometheus(url, read_http_config(written(directory, text))).now() == NOW
    return seen[0]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("basic_auth: {username: user, password: secret}", BASIC),
        ("basic_auth:\n  username: user\n  password_file: sub/secret\n", BASIC),
        ("basic_auth: {username_file: user, password: secret}", BASIC),
        ("basic_auth: {username: user, password: 0123}", "Basic dXNlcjowMTIz"),  # as written, not the number 83
        ("basic_auth: {username: user}", "Basic dXNlcjo="),
        ("authorization: {credentials: secret}", "Bearer secret"),
        ("authorization: {type: Token, credentials: ' secret '}", "Token secret"),
        ("authorization: {credentials_file: sub/secret}", "Bearer secret"),
        ("bearer_token: secret", "Bearer secret"),
        ("bearer_token_file: sub/secret", "Bearer secret"),
    ],
)
def test_credentials_are_sent(tmp_path: Path, text: str, value: str) -> None:
    assert sent(tmp_path, text)["authorization"] == value


def test_files_are_relative_to_the_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path, "bearer_token_file: secret\n")
    (tmp_path / "secret").write_text("next to it")
    monkeypatch.chdir(tmp_path / "sub")
    assert read_http_config(Path("..") / path.name).headers == {"Authorization": "Bearer next to it"}
    path.write_text(f"bearer_token_file: {tmp_path}/sub/secret\n")
    assert read_http_config(path).headers == {"Authorization": "Bearer secret"}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("headers: {X-Scope-OrgID: team}", "team"),
        ("http_headers: {X-Scope-OrgID: {values: [team]}}", "team"),
        ("http_headers: {X-Scope-OrgID: {values: [a], secrets: [b], files: [sub/secret]}}", "a, b, secret"),
        ("http_headers: {X-Scope-OrgID: {values: [é]}}", "é".encode().decode("latin-1")),
        ("headers: {X-Scope-OrgID: 007}", "007"),
    ],
)
def test_headers_are_sent(tmp_path: Path, text: str, value: str) -> None:
    assert sent(tmp_path, text)["x-scope-orgid"] == value


@pytest.mark.parametrize(
    "text",
    ["", "# nothing\n", "{}", "basic_auth:\n", "follow_redirects: true\nenable_http2: false\n", "tls_config: {}"],
)
def test_what_sets_nothing_is_valid(tmp_path: Path, text: str) -> None:
    config = read_http_config(written(tmp_path, text))
    assert (config.headers, config.tls) == ({}, None)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("basic_aut: {}", "unknown key basic_aut (basic_auth, authorization, "),
        ("a: 1\nb: 2\n", "unknown keys a, b ("),
        ("basic_auth: {user: x}", "unknown key basic_auth.user (username, username_file, password, password_file)"),
        ("tls_config: {cafile: x}", "unknown key tls_config.cafile ("),
        ("http_headers: {X-A: {value: secret}}", "unknown key http_headers.X-A.value (values, secrets, files)"),
        ("oauth2: {client_secret: secret}", "oauth2 is not supported by msrtrace: "),
        ("proxy_url: http://secret:secret@proxy", "proxy_url is not supported by msrtrace: set HTTPS_PROXY and "),
        ("no_proxy: x", "no_proxy is not supported"),
        ("proxy_connect_header: {A: [secret]}", "proxy_connect_header is not supported"),
        ("tls_config: {cert: secret}", "tls_config.cert is not supported by msrtrace: use cert_file"),
        ("basic_auth: {password_ref: x}", "basic_auth.password_ref is not supported"),
        ("- a", "the file is not a mapping"),
        ("secret", "the file is not a mapping"),
        ("basic_auth: secret", "basic_auth is not a mapping"),
        ("basic_auth: {username: [secret]}", "basic_auth.username is not a text"),
        ("http_headers: {X-A: {values: secret}}", "http_headers.X-A.values is not a list of texts"),
        ("http_headers: {X-A: {}}", "http_headers.X-A has no value"),
        ("basic_auth: {password: secret, password_file: x}", "at most one of basic_auth.password and basic_auth.pass"),
        ("basic_auth: {username: 'a:secret'}", "basic_auth.username contains a colon"),
        (
            "bearer_token: secret\nbearer_token_file: x",
            "at most one of bearer_token and bearer_token_file may be given",
        ),
        ("bearer_token: secret\nbasic_auth: {username: x}", "at most one of basic_auth and bearer_token may be given"),
        ("authorization: {credentials: secret}\nbearer_token: x", "at most one of authorization and bearer_token"),
        ("authorization: {type: basic, credentials: secret}", "authorization.type cannot be Basic: use basic_auth"),
        ("authorization: {type: Bearer}", "authorization.credentials is empty"),
        ('authorization: {credentials: "secret\\nX-Evil: 1"}', "authorization.credentials contains a line break"),
        ('headers: {X-A: "secret\\r"}', "headers.X-A contains a line break"),
        ("headers: {Authorization: secret}", "headers.Authorization cannot be set"),
        ("http_headers: {content-length: {values: [secret]}}", "http_headers.content-length cannot be set"),
        ("headers: {'X A': secret}", "headers.X... is not the name of a header"),
        (
            "basic_auth: {username: x, password:secret}",
            "unknown key basic_auth.password... (",
        ),  # one key
        ("headers: {X-A: a}\nhttp_headers: {x-a: {values: [secret]}}", "the header x-a is given twice"),
        ("bearer_token: secret\nbearer_token: secret", "line 2: bearer_token is given twice"),
        ("bearer_token: 'secret", "is not valid YAML (line 1, column 22)"),
        ("bearer_token: *secret", "is not valid YAML (line 1, column 15)"),
        ("a: &a [*a]", "is nested too deeply"),
        ("bearer_token: a\n---\nbearer_token: secret", "is not valid YAML (line 2, column 1)"),
        ("follow_redirects: maybe", "follow_redirects is neither true nor false"),
        ("tls_config: {insecure_skip_verify: 1}", "tls_config.insecure_skip_verify is neither true nor false"),
        ("tls_config: {min_version: TLS9}", "tls_config.min_version is none of TLS10, TLS11, TLS12, TLS13"),
        ("tls_config: {min_version: TLS13, max_version: TLS12}", "tls_config.max_version is lower than the minimum"),
        ("tls_config: {cert_file: x}", "tls_config.cert_file and tls_config.key_file are needed together"),
        ("tls_config: {ca_file: user}", "user is not a certificate in PEM format"),
        ("tls_config: {ca: secret}", "tls_config.ca is not a certificate in PEM format"),
        ("tls_config: {cert_file: user, key_file: sub/secret}", "sub/secret are not a certificate and its key in PEM"),
    ],
)
def test_a_wrong_configuration_is_an_error_that_names_the_key(tmp_path: Path, text: str, why: str) -> None:
    with pytest.raises(MsrtraceError) as error:
        read_http_config(written(tmp_path, text))
    message = str(error.value)
    assert message.startswith(f"{tmp_path}/http.yml: ")
    assert why in message
    assert "secret" not in message.replace("sub/secret", "").replace("client_secret", "").replace(
        "secrets", ""
    ).replace("secret manager", "")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("bearer_token_file: none", "{0}/http.yml: cannot read {0}/none: No such file or directory"),
        ("tls_config: {ca_file: sub}", "{0}/http.yml: cannot read {0}/sub: Is a directory"),
    ],
)
def test_an_unreadable_file_is_named(tmp_path: Path, text: str, why: str) -> None:
    with pytest.raises(MsrtraceError) as error:
        read_http_config(written(tmp_path, text))
    assert str(error.value) == why.format(tmp_path)


def test_without_pyyaml_an_error_names_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(
        MsrtraceError, match=r"PyYAML is missing: install Debian's python3-yaml, or pip install 'msrtrace\[web\]'"
    ):
        read_http_config(written(tmp_path, ""))


def test_yaml_is_imported_only_for_the_option() -> None:
    code = "import sys, tracer.cli.compare, tracer.report.fleet.fleet, tracer.report.fleet.http_config as _; "
    done = subprocess.run(
        [sys.executable, "-c", code + "print('yaml' in sys.modules)"], capture_output=True, check=True
    )
    assert done.stdout == b"False\n"


def test_two_sets_of_credentials_are_an_error(tmp_path: Path) -> None:
    config = read_http_config(written(tmp_path, "bearer_token: secret"))
    with pytest.raises(MsrtraceError, match=r"both the URL and --http\.config\.file have credentials"):
        Prometheus("http://user:secret@127.0.0.1:1", config)


@pytest.mark.parametrize(
    "body",
    [b'{"status":"error","error":"bad token secret"}', b'{"status":"error","error":"user:secret"}'],
)
def test_a_secret_that_the_server_repeats_is_not_shown(tmp_path: Path, body: bytes) -> None:
    config = read_http_config(written(tmp_path, "bearer_token: secret"))
    with serving(lambda form, headers: (400, body)) as url, pytest.raises(MsrtraceError) as error:
        Prometheus(url, config).now()
    assert "<secret>" in str(error.value)
    assert "secret" not in str(error.value).replace("<secret>", "")


@pytest.mark.parametrize(
    ("text", "lowest", "highest"),
    [
        ("min_version: TLS10", ssl.TLSVersion.TLSv1, ssl.TLSVersion.MAXIMUM_SUPPORTED),
        ("min_version: TLS11, max_version: TLS11", ssl.TLSVersion.TLSv1_1, ssl.TLSVersion.TLSv1_1),
        ("max_version: TLS12", ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_2),
        ("min_version: TLS13", ssl.TLSVersion.TLSv1_3, ssl.TLSVersion.MAXIMUM_SUPPORTED),
    ],
)
def test_tls_versions(tmp_path: Path, text: str, lowest: ssl.TLSVersion, highest: ssl.TLSVersion) -> None:
    tls = read_http_config(written(tmp_path, f"tls_config: {{{text}}}")).tls
    assert tls is not None
    assert (tls.minimum_version, tls.maximum_version) == (lowest, highest)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate for prometheus.example, which is its own authority, with its key; and one of a client."""
    directory = tmp_path_factory.mktemp("certificates")
    request = [tool("openssl"), "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    for name in ("prometheus.example", "client"):
        subject = ["-subj", f"/CN={name}", "-addext", f"subjectAltName=DNS:{name}", "-days", "2"]
        files = ["-keyout", f"{directory}/{name}.key", "-out", f"{directory}/{name}.pem"]
        subprocess.run([*request, *subject, *files], capture_output=True, check=True)
    return directory


@pytest.fixture
def https(certificates: Path) -> Iterator[str]:
    """A Prometheus that asks for the client's certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates / "prometheus.example.pem", certificates / "prometheus.example.key")
    context.load_verify_locations(certificates / "client.pem")
    context.verify_mode = ssl.CERT_REQUIRED
    context.maximum_version = ssl.TLSVersion.TLSv1_2  # a refusal is then part of the handshake
    with serving(lambda form, headers: CLOCK, context) as url:
        yield url


CLIENT = "cert_file: client.pem, key_file: client.key"
AUTHORITY = "ca_file: prometheus.example.pem"
NAME = "server_name: prometheus.example"


@pytest.mark.parametrize(
    "more", [f"{AUTHORITY}, {NAME}", "insecure_skip_verify: true", f"{AUTHORITY}, {NAME}, min_version: TLS12"]
)
def test_tls_with_a_client_certificate(certificates: Path, https: str, more: str) -> None:
    (certificates / "http.yml").write_text(f"tls_config: {{{CLIENT}, {more}}}")
    assert Prometheus(https, read_http_config(certificates / "http.yml")).now() == NOW


@pytest.mark.parametrize(
    ("tls", "why"),
    [
        (f"{CLIENT}, {AUTHORITY}", "certificate is not valid for '127.0.0.1'"),
        (f"{CLIENT}, {NAME}", "self.signed certificate"),
        (f"{AUTHORITY}, {NAME}", "HANDSHAKE_FAILURE"),
        (f"{CLIENT}, {AUTHORITY}, {NAME}, min_version: TLS13", "PROTOCOL_VERSION"),
    ],
)
def test_tls_that_does_not_fit_is_an_error(certificates: Path, https: str, tls: str, why: str) -> None:
    (certificates / "http.yml").write_text(f"tls_config: {{{tls}}}")
    with pytest.raises(MsrtraceError, match=rf"^cannot query Prometheus at https://[0-9.:]+: .*{why}"):
        Prometheus(https, read_http_config(certificates / "http.yml")).now()
