# SPDX-License-Identifier: GPL-2.0-or-later
"""TLS: handshakes that stop, certificates that change, and what openssl can and cannot negotiate."""

from __future__ import annotations

import ssl
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from bad_clients import COLLECTION, PATIENCE, SCRAPES, SLACK, connect, repeatedly, scrape, settled
from faults import Figures
from needs import tool
from serving import Served, certificate, served


@pytest.mark.fault(
    "clients",
    "TLS handshakes that stop",
    "300 of each of 1.2 and 1.3: after each message, and in the middle of it",
    dear=True,
)
def test_a_handshake_that_stops_holds_up_nobody(tmp_path: Path, figures: Figures) -> None:
    cert, key = certificate(tmp_path, "server")
    good = ssl.create_default_context(cafile=str(cert))
    stops = 0
    options = {"cert": str(cert), "key": str(key)}
    with served(tmp_path, collection=COLLECTION, patience=PATIENCE, **options) as server, ExitStack() as stack:
        normal = max(scrape(server, good)[1] for _ in range(3))
        threads, descriptors = server.threads(), server.descriptors()
        for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
            for number in range(300):
                stops += stopped(server, stack, cert, version, number)
        times = [scrape(server, good)[1] for _ in range(SCRAPES)]
        assert max(times) < normal + COLLECTION + SLACK
        back = settled(server, threads, descriptors)
        assert server.said() == ""
    figures["places at which it stopped"] = f"{stops}"
    figures["scrape alone"] = f"{normal * 1000:.0f} ms"
    figures["beside them, longest"] = f"{max(times) * 1000:.0f} ms"
    figures["threads and descriptors as before"] = f"after {back:.1f} s"


def stopped(server: Served, stack: ExitStack, cert: Path, version: ssl.TLSVersion, number: int) -> bool:
    """A connection whose handshake has stopped somewhere, chosen by a number; whether that was within the handshake."""
    context = ssl.create_default_context(cafile=str(cert))
    context.minimum_version = context.maximum_version = version
    into, out = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = context.wrap_bio(into, out, server_hostname="127.0.0.1")
    client = stack.enter_context(connect(server))
    for message in range(2):
        with suppress(ssl.SSLWantReadError):
            tls.do_handshake()
        said = out.read()
        if number % 2 == message:
            client.sendall(said[: len(said) * (number // 2 % 10) // 9])
            return True
        client.sendall(said)
        into.write(client.recv(1 << 16))
    return False


@pytest.mark.fault("clients", "a certificate is renewed ({how})", "12 times, while 8 clients scrape", dear=True)
@pytest.mark.parametrize("how", ["flags", "file"])
def test_no_scrape_fails_while_a_certificate_is_renewed(tmp_path: Path, figures: Figures, how: str) -> None:
    """As certbot does: each file is replaced, the key after the certificate. What comes afterwards gets the new one."""
    cert, key = (path.rename(tmp_path / f"now{path.suffix}") for path in certificate(tmp_path, "old"))
    options = {"cert": str(cert), "key": str(key)}
    if how == "--web.config.file":
        (tmp_path / "web.yml").write_text("tls_server_config: {cert_file: now.pem, key_file: now.key}\n")
        options = {"config": str(tmp_path / "web.yml")}
    renewed = [certificate(tmp_path, f"new{number}") for number in range(12)]
    trusted = ssl.create_default_context(cafile=str(cert))
    for path, _ in renewed:
        trusted.load_verify_locations(path)
    failed, done = list[str](), [0]
    with served(tmp_path, **options) as server, ExitStack() as stack:

        def ask() -> None:
            try:
                scrape(server, trusted)
                done[0] += 1
            except OSError as error:
                failed.append(str(error))

        for _ in range(8):
            repeatedly(stack, ask, 0.005)
        for new, new_key in renewed:
            content = new.read_text()
            before = done[0]
            new.rename(cert)
            time.sleep(0.05)
            new_key.rename(key)
            assert ssl.get_server_certificate(("127.0.0.1", server.port)).split() == content.split()
            end = time.monotonic() + 20
            while done[0] < before + 16:
                assert time.monotonic() < end
                time.sleep(0.01)
        stack.close()
        said = server.said().splitlines()
    assert failed == []
    assert len(said) <= 12  # while certificate and key do not match
    assert all(line.endswith("; the configuration before it stays in force") for line in said)
    figures["scrapes"] = f"{done[0]}, of which 0 failed"
    figures["connections after a renewal with the old certificate"] = "0"


def expired(directory: Path) -> tuple[Path, Path]:
    """A certificate of the second day of 2020, and its key."""
    cert, key = directory / "expired.pem", directory / "expired.key"
    (directory / "ca.cnf").write_text(
        "[ca]\ndefault_ca=d\n[d]\ndatabase=index\nserial=serial\nnew_certs_dir=.\ndefault_md=sha256\npolicy=p\n"
        "x509_extensions=e\n[p]\ncommonName=supplied\n[e]\nsubjectAltName=IP:127.0.0.1\n"
    )
    (directory / "index").touch()
    (directory / "serial").write_text("01")
    curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout", str(key)]
    days = ["-startdate", "20200102000000Z", "-enddate", "20200103000000Z"]
    for command in (
        ["req", "-new", *curve, "-subj", "/CN=expired", "-out", "request"],
        ["ca", "-config", "ca.cnf", "-batch", "-notext", "-selfsign", "-keyfile", str(key), "-in", "request", *days],
    ):
        out = ["-out", str(cert)] if command[0] == "ca" else []
        subprocess.run([tool("openssl"), *command, *out], cwd=directory, capture_output=True, check=True, timeout=60)
    return cert, key


@pytest.mark.fault("clients", "a certificate that has expired", "at the start, and renewed later")
def test_an_expired_certificate_is_renewed_without_a_restart(tmp_path: Path, figures: Figures) -> None:
    """The server goes on, and its clients say what is wrong, as long as nobody renews it."""
    cert, key = expired(tmp_path)
    new, new_key = certificate(tmp_path, "new")
    trusted = ssl.create_default_context(cafile=str(cert))
    trusted.load_verify_locations(new)
    with served(tmp_path, cert=str(cert), key=str(key)) as server:
        with pytest.raises(OSError, match="certificate has expired"):
            scrape(server, trusted)
        new.rename(cert)
        new_key.rename(key)
        assert scrape(server, trusted)[0]
        assert server.said() == ""
    figures["the first scrape after it was renewed"] = "works"


# --- by openssl ---


def asked(port: int, *options: str, said: str = "GET /-/healthy HTTP/1.0\r\n\r\n") -> tuple[int, str]:
    """The status and the output of `openssl s_client`."""
    command = [tool("openssl"), "s_client", "-connect", f"127.0.0.1:{port}", *options]
    command += ["-ign_eof"] if "GET" in said else []  # with it, R is no command
    done = subprocess.run(command, input=said, capture_output=True, text=True, check=False, timeout=30)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("files")
    for name in ("server", "client", "stranger"):
        certificate(directory, name)
    request = [tool("openssl"), "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=rsa", "-days", "2"]
    names = [
        "-addext",
        "subjectAltName=IP:127.0.0.1",
        "-keyout",
        f"{directory}/rsa.key",
        "-out",
        f"{directory}/rsa.pem",
    ]
    subprocess.run([*request, *names], capture_output=True, check=True, timeout=60)
    return directory


def options(files: Path, how: str, name: str = "server", ca: str = "") -> dict[str, str]:
    """Those of a server with this certificate, given by flags or in a file; with a CA, for its clients alone."""
    cert, key = files / f"{name}.pem", files / f"{name}.key"
    if how == "flags":
        return {"cert": str(cert), "key": str(key)} | ({"ca": str(files / ca)} if ca else {})
    text = f"tls_server_config:\n  cert_file: {cert}\n  key_file: {key}\n"
    if ca:
        text += f"  client_ca_file: {ca}\n  client_auth_type: RequireAndVerifyClientCert\n"
    config = files / f"{name}{ca}.yml"
    config.write_text(text)
    return {"config": str(config)}


@pytest.fixture(scope="module", params=["flags", "file"])
def servers(
    request: pytest.FixtureRequest, files: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[list[Served]]:
    """One with a key on a curve, one with an RSA key; both as openssl's client may ask anything of them."""
    with ExitStack() as stack:
        yield [
            stack.enter_context(served(tmp_path_factory.mktemp(name), **options(files, request.param, name)))
            for name in ("server", "rsa")
        ]


#: Each may be asked for by a client that allows everything.
WEAK = (
    *("RSA", "AES128-SHA", "AES256-SHA256", "AES128-GCM-SHA256", "ECDHE+SHA1", "ECDHE+SHA256:!AESGCM:!CHACHA20"),
    *("3DES", "NULL", "aNULL", "EXPORT", "RC4", "DHE", "CAMELLIA", "ARIA", "AESCCM", "PSK", "MD5", "SEED", "IDEA"),
)


@pytest.mark.fault("access", "weak TLS", "all that openssl s_client can ask for ({servers})", dear=True)
def test_there_is_no_weak_tls(servers: list[Served], files: Path, figures: Figures) -> None:
    refused = 0
    for server in servers:
        for version in ("-tls1", "-tls1_1"):
            status, out = asked(server.port, version, "-cipher", "ALL:@SECLEVEL=0")
            assert (status, "msrtrace is running" in out) == (1, False)
            assert "protocol version" in out or "unsupported protocol" in out
            refused += 1
        for suites in WEAK:
            status, out = asked(server.port, "-tls1_2", "-cipher", f"{suites}:@SECLEVEL=0")
            assert (status, "msrtrace is running" in out) == (1, False), suites
            refused += "alert" in out  # else this openssl has none of them
        for version in ("-tls1_2", "-tls1_3"):
            _, out = asked(server.port, version, "-comp", "-cipher", "ALL:@SECLEVEL=0")
            assert "msrtrace is running" in out
            assert "Compression: NONE" in out
            assert "GCM" in out or "CHACHA20" in out
        _, out = asked(server.port, "-tls1_2", said="R\n")
        assert "RENEGOTIATING" in out
        assert "no renegotiation" in out
        assert server.said() == ""
    assert refused >= 2 * 10
    figures["refused"] = f"{refused} of {refused} versions and kinds of ciphers, renegotiation"


@pytest.mark.fault("access", "client certificates", "none, and a stranger's, with TLS 1.2 and 1.3 ({how})")
@pytest.mark.parametrize("how", ["flags", "file"])
def test_only_clients_with_a_certificate_are_answered(tmp_path: Path, files: Path, figures: Figures, how: str) -> None:
    known = ["-cert", f"{files}/client.pem", "-key", f"{files}/client.key"]
    stranger = ["-cert", f"{files}/stranger.pem", "-key", f"{files}/stranger.key"]
    with served(tmp_path, **options(files, how, ca="client.pem")) as server:
        for version in ("-tls1_2", "-tls1_3"):
            for given in ([], stranger):
                out = asked(server.port, version, *given)[1]
                assert "alert" in out
                assert "HTTP/" not in out.replace("HTTP/1.0\r", "")
            assert "msrtrace is running" in asked(server.port, version, *known)[1]
        assert server.said() == ""
    figures["answered"] = "2 of 2 with one, 0 of 4 without"
