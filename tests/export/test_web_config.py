# SPDX-License-Identifier: GPL-2.0-or-later
"""The file of --web.config.file: what it may have, and what a change of it does to a server."""

from __future__ import annotations

import base64
import re
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import bcrypt
import pytest
from needs import tool
from prometheus_client import CollectorRegistry

from tracer.export import passwords, security
from tracer.export.server import Server
from tracer.export.web_config import WebConfig
from tracer.model.errors import MsrtraceError
from tracer.model.yaml_config import InvalidConfigError

#: Of `secret`, with a salt that is always the same: it is in the names of tests.
HASH = bcrypt.hashpw(b"secret", b"$2b$04$nd4Ub/0qwF04FfWVYxn78e").decode()
USERS = f"basic_auth_users:\n  alice: {HASH}\n"


def certificate(directory: Path, name: str = "server") -> tuple[Path, Path]:
    cert, key = directory / f"{name}.pem", directory / f"{name}.key"
    request = [tool("openssl"), "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    subject = ["-subj", f"/CN={name}", "-addext", "subjectAltName=IP:127.0.0.1", "-days", "2"]
    subprocess.run([*request, *subject, "-keyout", key, "-out", cert], capture_output=True, check=True)
    return cert, key


TLS = "tls_server_config:\n  cert_file: server.pem\n  key_file: server.key\n"


class Served:
    """A server with a configuration, which can be changed."""

    def __init__(self, directory: Path, text: str) -> None:
        self.file, self.said = directory / "web.yml", list[str]()
        self.file.write_text(text)
        config = WebConfig(str(self.file), self.said.append)
        self.server = Server(CollectorRegistry(), ("127.0.0.1", 0), security=config, on_error=self.said.append).start()

    def get(
        self, path: str = "/metrics", user: str | None = None, context: ssl.SSLContext | None = None, header: str = ""
    ) -> tuple[int, dict[str, str]]:
        request = Request(self.server.url.replace("/metrics", path))
        if user:
            header = "Basic " + base64.b64encode(user.encode()).decode()
        if header:
            request.add_header("Authorization", header)
        try:
            with urlopen(request, timeout=20, context=context) as answer:
                return answer.status, dict(answer.headers)
        except HTTPError as error:
            with error:
                return error.code, dict(error.headers)


Serve = Callable[[str], Served]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    started: list[Served] = []

    def start(text: str) -> Served:
        started.append(Served(tmp_path, text))
        return started[-1]

    yield start
    for one in started:
        one.server.shutdown()
        one.server.server_close()


# --- what is in it ---


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a", "the file is not a mapping"),
        ("a: b", "unknown key a (tls_server_config, http_server_config, basic_auth_users)"),
        ("a: {", "is not valid YAML (line 1, column 5): while parsing a flow node"),
        ("\0", "is not valid YAML (line 1): it contains a control character"),
        (f"{USERS}  alice: {HASH}\n", "line 3: alice is given twice"),
        ("? [a]\n: b", "line 1: a key is not a text"),
        ("rate_limit: {}\n", "rate_limit is not supported by msrtrace: use a proxy"),
        ("basic_auth_users: {a: {b: c}}", "basic_auth_users.a is not a text"),
        ("basic_auth_users: {a: plain}", "basic_auth_users.a is no bcrypt hash"),
        (f"basic_auth_users: {{a: {HASH[:-1]}}}", "basic_auth_users.a is no bcrypt hash"),
        ("http_server_config: {headers: {X-Other: a}}", "http_server_config.headers.X-Other cannot be configured"),
        ("http_server_config: {headers: {X-Frame-Options: allow}}", "X-Frame-Options has an invalid value"),
        ('http_server_config: {headers: {X-XSS-Protection: "1\\r\\nA: b"}}', "X-XSS-Protection has an invalid value"),
        ("http_server_config: {http2: maybe}", "http_server_config.http2 is neither true nor false"),
        ("tls_server_config: {cert_file: server.pem}", "tls_server_config.key_file is missing"),
        ("tls_server_config: {key_file: server.key}", "tls_server_config.cert_file is missing"),
        ("tls_server_config: {cert_file: none, key_file: server.key}", "none: No such file or directory"),
        ("tls_server_config: {cert_file: server.key, key_file: server.key}", "server.key: "),
        (f"{TLS}  cipher_suites: [TLS_AES_128_GCM_SHA256]", "tls_server_config.cipher_suites is not supported"),
        (f"{TLS}  client_allowed_sans: [a]", "tls_server_config.client_allowed_sans is not supported"),
        (f"{TLS}  min_version: TLS10", "tls_server_config.min_version is none of TLS12, TLS13"),
        (f"{TLS}  min_version: TLS13\n  max_version: TLS12", "max_version is below min_version"),
        (
            f"{TLS}  client_auth_type: RequireAnyClientCert",
            "tls_server_config.client_auth_type is none of NoClientCert, Verify",
        ),
        (f"{TLS}  client_ca_file: server.pem", "client_ca_file needs a client_auth_type that verifies"),
    ],
)
def test_what_is_invalid_is_an_error_that_says_where(tmp_path: Path, text: str, message: str) -> None:
    certificate(tmp_path)
    (tmp_path / "web.yml").write_text(text)
    with pytest.raises(MsrtraceError, match=re.escape(message)) as error:
        WebConfig(str(tmp_path / "web.yml"))
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("text", ["", "# nothing\n", "{}", "tls_server_config:\nbasic_auth_users: {}\n"])
def test_an_empty_file_protects_nothing(serve: Serve, text: str) -> None:
    served = serve(text)
    assert served.server.url.startswith("http://")
    assert served.get()[0] == 200


def test_an_encrypted_key_is_not_asked_for_at_the_terminal(tmp_path: Path) -> None:
    _, key = certificate(tmp_path)
    command = [tool("openssl"), "ec", "-in", str(key), "-aes128", "-passout", "pass:x", "-out", str(key)]
    subprocess.run(command, capture_output=True, check=True)
    (tmp_path / "web.yml").write_text(TLS)
    with pytest.raises(MsrtraceError, match="the key is encrypted"):
        WebConfig(str(tmp_path / "web.yml"))


@pytest.mark.parametrize(("module", "package"), [("yaml", "python3-yaml"), ("bcrypt", "python3-bcrypt")])
def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, package: str) -> None:
    (tmp_path / "web.yml").write_text(USERS)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MsrtraceError, match=package):
        WebConfig(str(tmp_path / "web.yml"))


def test_answers_have_the_headers(serve: Serve) -> None:
    served = serve("http_server_config:\n  headers:\n    X-Frame-Options: deny\n    X-Content-Type-Options: nosniff\n")
    for path in ("/metrics", "/none"):
        headers = served.get(path)[1]
        assert (headers["X-Frame-Options"], headers["X-Content-Type-Options"]) == ("deny", "nosniff")


# --- passwords ---


def test_only_users_with_their_passwords_are_admitted(serve: Serve) -> None:
    served = serve(USERS + f'  "0x1": {HASH}\n  yes: {HASH.replace("$2b$", "$2y$")}\n')
    for user in ("alice:secret", "0x1:secret", "yes:secret"):
        assert served.get(user=user)[0] == 200
    for user in ("alice:Secret", "alice:", "bob:secret", ":secret", "alice:secret\0", "alice:" + "x" * 100, "secret"):
        for path in ("/metrics", "/", "/-/healthy", "/none"):
            status, headers = served.get(path, user=user)
            assert (status, headers["WWW-Authenticate"]) == (401, 'Basic realm="msrtrace"')
    good = base64.b64encode(b"alice:secret").decode()
    for header in ("Basic", "Basic !", f"Bearer {good}", good, f"Basic {good} {good}"):
        assert served.get(header=header)[0] == 401
    assert served.get(header=f"basic  {good}")[0] == 200
    assert served.said == []


def test_a_long_password_is_compared_as_bcrypt_does(serve: Serve) -> None:
    hashed = bcrypt.hashpw(b"x" * 72, bcrypt.gensalt(4)).decode()
    assert serve(f"basic_auth_users: {{a: {hashed}}}").get(user="a:" + "x" * 80)[0] == 200


def test_a_password_is_compared_once(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[bytes] = []

    def compare(password: bytes, hashed: str) -> bool:
        compared.append(password)
        return password == b"secret"

    monkeypatch.setattr(passwords, "_compare", compare)
    served = serve(USERS)
    for _ in range(3):
        assert served.get(user="alice:secret")[0] == 200
        assert served.get(user="alice:wrong")[0] == 401
        assert served.get(user="bob:secret")[0] == 401  # compared, too, so that it takes as long
    assert compared == [b"secret", b"wrong", b"secret"]
    for number in range(150):
        served.get(user=f"alice:{number}")
    assert served.get(user="alice:secret")[0] == 200
    assert compared.count(b"secret") == 2  # guesses do not displace it


def test_a_slow_comparison_blocks_nobody_known(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    served = serve(USERS)
    assert served.get(user="alice:secret")[0] == 200
    go_on = threading.Event()
    monkeypatch.setattr(passwords, "_compare", lambda *_: not go_on.wait(20))
    guesses = [threading.Thread(target=served.get, kwargs={"user": f"alice:{number}"}) for number in range(5)]
    for one in guesses:
        one.start()
    started = time.monotonic()
    assert served.get(user="alice:secret")[0] == 200
    assert time.monotonic() - started < 5
    go_on.set()
    for one in guesses:
        one.join()


# --- TLS ---


def test_tls_and_client_certificates(serve: Serve, tmp_path: Path) -> None:
    cert, _ = certificate(tmp_path)
    client, client_key = certificate(tmp_path, "client")
    anybody, known = (ssl.create_default_context(cafile=str(cert)) for _ in range(2))
    known.load_cert_chain(client, client_key)
    served = serve(f"{TLS}  min_version: TLS13\n")
    assert served.server.url.startswith("https://")
    assert served.get(context=anybody)[0] == 200
    old = ssl.create_default_context(cafile=str(cert))
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises(OSError):  # noqa: PT011 (alert, reset or closed)
        served.get(context=old)
    served.file.write_text(f"{TLS}  client_ca_file: client.pem\n  client_auth_type: RequireAndVerifyClientCert\n")
    assert served.get(context=known)[0] == 200
    with pytest.raises(OSError):  # noqa: PT011
        served.get(context=anybody)
    served.file.write_text(f"{TLS}  client_ca_file: client.pem\n  client_auth_type: VerifyClientCertIfGiven\n")
    assert [served.get(context=context)[0] for context in (anybody, known)] == [200, 200]
    assert served.said == []


def test_a_renewed_certificate_is_used_without_a_restart(serve: Serve, tmp_path: Path) -> None:
    old, _ = certificate(tmp_path)
    served = serve(TLS)
    assert served.get(context=ssl.create_default_context(cafile=str(old)))[0] == 200
    before = ssl.create_default_context(cafile=str(old))
    new, key = certificate(tmp_path, "new")
    after = ssl.create_default_context(cafile=str(new))
    new.rename(tmp_path / "server.pem")  # for a moment it does not match its key
    assert [served.get(context=before)[0] for _ in range(2)] == [200, 200]
    key.rename(tmp_path / "server.key")
    assert served.get(context=after)[0] == 200
    assert len(served.said) == 1
    assert "server.key" in served.said[0]


# --- changes ---


def test_an_invalid_change_keeps_the_old_and_is_said_once(serve: Serve) -> None:
    served = serve(USERS)
    for text in ("a: {", "basic_auth_users: {a: b}", TLS):
        served.file.write_text(text)
        for _ in range(2):
            assert [served.get()[0], served.get(user="alice:secret")[0]] == [401, 200]
    assert len(served.said) == 3
    assert all(line.endswith("; the configuration before it stays in force") for line in served.said)
    served.file.write_text(USERS)
    assert served.get()[0] == 401
    served.file.write_text("")
    assert served.get()[0] == 200
    assert len(served.said) == 3


def test_tls_is_not_switched_off_by_a_change(serve: Serve, tmp_path: Path) -> None:
    cert, _ = certificate(tmp_path)
    served = serve(TLS)
    served.file.write_text("")
    assert served.get(context=ssl.create_default_context(cafile=str(cert)))[0] == 200
    assert "TLS is switched on or off by a restart only" in served.said[0]


def test_a_file_that_cannot_be_read_any_more_keeps_the_old(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    served = serve(USERS)
    moved = served.file.rename(served.file.with_suffix(".away"))
    assert [served.get()[0], served.get(user="alice:secret")[0]] == [401, 200]
    assert served.said == [
        f"{served.file}: cannot read {served.file}: No such file or directory; "
        "the configuration before it stays in force"
    ]
    moved.rename(served.file)
    assert served.get(user="alice:secret")[0] == 200

    def refused(_: Path) -> bytes:
        raise InvalidConfigError("cannot read it: Permission denied")

    monkeypatch.setattr(security, "read_file", refused)
    assert served.get(user="alice:secret")[0] == 200
    assert len(served.said) == 2
