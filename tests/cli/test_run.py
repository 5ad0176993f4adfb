# SPDX-License-Identifier: GPL-2.0-or-later
"""`msrtrace run` as it is typed, on a made-up kernel."""

from __future__ import annotations

import os
import re
import signal
import socket
import ssl
import subprocess
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import urlopen

import pytest
from command import Running, failed
from needs import tool


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Running]]:
    """Starts `msrtrace run` where kvm_intel is loaded."""
    started: list[Running] = []
    (tmp_path / "module").write_text("1")

    def run(*arguments: str, address: str = "127.0.0.1:0") -> Running:
        started.append(Running(tmp_path, "--web.listen-address", address, *arguments))
        return started[-1]

    yield run
    for running in started:
        running.process.kill()
        running.process.wait()


Start = Callable[..., Running]


def scrape(url: str, context: ssl.SSLContext | None = None) -> str:
    with urlopen(url, timeout=20, context=context) as answer:
        text: bytes = answer.read()
    return text.decode()


SERIES = 'msrtrace_intercept_calls_total{access="read",action="disable",cause="vcpu_create",msr="0x10",name="IA32_TSC"'


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_run_serves_until_a_signal(start: Start, number: signal.Signals) -> None:
    running = start()
    url = running.url()
    assert running.out.read_text() == (
        "msrtrace: probing vmx_msr_filter_changed: vmx_msr_filter_changed [kvm_intel]\n"
        "msrtrace: NOT probing vmx_vcpu_create: none\n"
        "msrtrace: backend kprobe\n"
        f"msrtrace: serving {url}\n"
    )
    if os.geteuid() == 0:
        status = Path(f"/proc/{running.process.pid}/status").read_text()
        assert "NoNewPrivs:\t1\n" in status
        bounding = int(re.findall(r"^CapBnd:\s*(\w+)", status, re.MULTILINE)[0], 16)
        # CAP_BPF, CAP_PERFMON, CAP_SYSLOG, and where probing asks for it CAP_SYS_ADMIN
        assert bounding & ~(1 << 21) == 1 << 39 | 1 << 38 | 1 << 34
    metrics = scrape(url)
    assert f"{SERIES}}} 7.0\n" in metrics
    assert f'kernel="{os.uname().release}",layout="filter-only"' in metrics
    assert f'version="{version("msrtrace")}"' in metrics
    assert "\nprocess_resident_memory_bytes " in metrics
    assert "python_info" not in metrics
    assert not (running.directory / "nested").exists()  # no metric is of nested guests, so nothing is read of them
    assert not (running.directory / "closed").exists()
    assert running.end(number) == 0
    assert (running.directory / "closed").exists()
    assert running.warnings() == ["msrtrace: warning: vmx_vcpu_create is not probed: none"]


def test_a_repeated_signal_changes_nothing(start: Start) -> None:
    """podman-stop(1) sends one to a container's first process and, if that has the host's pids, to all."""
    running = start()
    running.url()
    for number in (signal.SIGSTOP, signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGCONT):
        running.process.send_signal(number)
    assert running.process.wait(20) == 0
    assert (running.directory / "closed").exists()


def test_an_amd_host_is_served_as_one(start: Start, tmp_path: Path) -> None:
    (tmp_path / "vendor").touch()
    running = start()
    metrics = scrape(running.url())
    assert running.out.read_text().startswith(
        "msrtrace: probing set_msr_interception_bitmap: set_msr_interception_bitmap [kvm_amd]\n"
    )
    assert 'layout="pass",redundancy="exact",vendor="svm",' in metrics
    (running.directory / "module").unlink()
    running.until("kvm_amd was unloaded; its counts are kept, and it is traced again when it comes back\n")


def test_run_by_vm_adds_the_labels(start: Start) -> None:
    running = start("--by-vm", "--pid", str(os.getpid()))
    assert f'{SERIES},pid="{os.getpid()}",vm="' in scrape(running.url())


def test_run_follows_a_reload(start: Start) -> None:
    running = start()
    url = running.url()
    (running.directory / "module").unlink()
    running.until("kvm_intel was unloaded; its counts are kept, and it is traced again when it comes back\n")
    metrics = scrape(url)
    assert f"{SERIES}}} 7.0\n" in metrics
    assert 'msrtrace_probe_attached{function="vmx_msr_filter_changed"} 0.0\n' in metrics
    (running.directory / "module").write_text("2")
    after = running.until("kvm_intel was loaded again\n")
    assert after.count("serving") == 1
    assert f"{SERIES}}} 14.0\n" in scrape(url)
    assert running.end() == 0


def test_a_module_that_cannot_be_traced_is_reported_once(start: Start) -> None:
    running = start()
    url = running.url()
    (running.directory / "refusal").write_text("why")
    (running.directory / "module").write_text("2")
    running.until("why\n", running.err)
    time.sleep(1.5)
    assert f"{SERIES}}} 7.0\n" in scrape(url)
    assert running.warnings()[1:] == ["msrtrace: warning: kvm_intel is not traced, trying again in 10 s: why"]
    assert running.end() == 0


@pytest.mark.parametrize(
    ("cpuinfo", "awaited"),
    [
        ("vendor_id\t: GenuineIntel\nflags\t\t: fpu vmx\n", "kvm_intel"),
        ("vendor_id\t: AuthenticAMD\nflags\t\t: fpu svm\n", "kvm_amd"),
        ("", "kvm_intel or kvm_amd"),
    ],
)
def test_run_can_wait_for_the_module(start: Start, tmp_path: Path, cpuinfo: str, awaited: str) -> None:
    (tmp_path / "machine/proc").mkdir(parents=True)
    (tmp_path / "machine/proc/cpuinfo").write_text(cpuinfo)
    (tmp_path / "module").unlink()
    running = start("--wait-module")
    assert running.until("waiting") == f"msrtrace: waiting for {awaited} to be loaded\n"
    (tmp_path / "module").write_text("1")
    assert f"{SERIES}}} 7.0\n" in scrape(running.url())


def status_of(url: str) -> tuple[int, str]:
    try:
        with urlopen(url, timeout=20) as answer:
            return answer.status, answer.read().decode()
    except HTTPError as error:
        with error:
            return error.code, error.read().decode()


def test_run_answers_while_it_waits_for_the_module(start: Start, tmp_path: Path) -> None:
    """A waiting exporter is not a dead one."""
    (tmp_path / "module").unlink()
    (tmp_path / "machine/proc").mkdir(parents=True)
    (tmp_path / "machine/proc/cpuinfo").write_text("vendor_id\t: GenuineIntel\nflags\t\t: fpu vmx\n")
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    running = start("--wait-module", address=address)
    running.until("waiting")
    base = f"http://{address}"
    assert status_of(f"{base}/-/healthy")[0] == 200
    assert status_of(f"{base}/-/ready") == (503, "msrtrace is waiting for kvm_intel to be loaded.\n")
    text = scrape(f"{base}/metrics")
    assert 'msrtrace_probe_attached{function="vmx_vcpu_create"} 0.0\n' in text
    assert "process_start_time_seconds " in text
    assert "msrtrace_build_info" not in text
    assert not (tmp_path / "attached").exists()
    (tmp_path / "module").write_text("1")
    assert running.url() == f"{base}/metrics"
    assert status_of(f"{base}/-/ready") == (200, "msrtrace has counts.\n")
    assert f"{SERIES}}} 7.0\n" in scrape(f"{base}/metrics")
    if os.geteuid() == 0:
        for task in Path(f"/proc/{running.process.pid}/task").iterdir():
            assert "NoNewPrivs:\t1\n" in (task / "status").read_text()
    assert running.end() == 0


def test_a_port_in_use_is_reported_before_the_wait(start: Start, tmp_path: Path) -> None:
    (tmp_path / "module").unlink()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        running = start("--wait-module", address=f"127.0.0.1:{taken.getsockname()[1]}")
        assert "Address already in use" in failed(running)
    assert running.out.read_text() == ""


@pytest.mark.parametrize("host", ["", "0.0.0.0"])
def test_plain_http_that_leaves_the_machine_is_warned_of(start: Start, host: str) -> None:
    running = start(address=f"{host}:0")
    port = running.url().rpartition(":")[2].removesuffix("/metrics")
    assert f"{SERIES}}} 7.0\n" in scrape(f"http://127.0.0.1:{port}/metrics")
    shown = host or "[::]" if Path("/proc/net/if_inet6").exists() else "0.0.0.0"
    warning = f"msrtrace: warning: {shown}:{port} is served as plain HTTP, which other machines can reach and read"
    assert running.warnings()[0] == warning


def test_a_signal_ends_the_wait(start: Start, tmp_path: Path) -> None:
    (tmp_path / "module").unlink()
    running = start("--wait-module")
    running.until("waiting")
    assert (running.end(signal.SIGINT), running.err.read_text()) == (0, "")


def test_a_port_in_use_is_an_error(start: Start) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        error = failed(start(address=address))
    assert (
        error == f"cannot listen on {address}: Address already in use; choose another address with --web.listen-address"
    )


def test_an_unknown_address_is_an_error(start: Start) -> None:
    error = failed(start(address="host.invalid:9753"))
    assert error.startswith("cannot listen on host.invalid:9753: ")


@pytest.mark.parametrize("missing", ["cert", "key", "client-ca"])
def test_missing_tls_files_are_an_error(start: Start, tmp_path: Path, missing: str) -> None:
    options = [f"--web.tls-{name}-file={tmp_path / name}.pem" for name in ("cert", "key", "client-ca")]
    for name in {"cert", "key", "client-ca"} - {missing}:
        (tmp_path / f"{name}.pem").write_text("")
    assert failed(start(*options)).startswith(("cannot read ", "the TLS files cannot be used: "))


def test_invalid_tls_files_are_an_error(start: Start, tmp_path: Path) -> None:
    (tmp_path / "pem").write_text("nothing")
    error = failed(start(f"--web.tls-cert-file={tmp_path}/pem", f"--web.tls-key-file={tmp_path}/pem"))
    assert error.startswith("the TLS files cannot be used: ")


def test_a_certificate_without_a_key_is_not_served_in_the_clear(start: Start, tmp_path: Path) -> None:
    """prometheus_client silently serves HTTP unless it is given both."""
    (tmp_path / "cert.pem").write_text("nothing")
    running = start("--web.tls-cert-file", str(tmp_path / "cert.pem"))
    assert running.process.wait(30) in (1, 2)
    assert "serving" not in running.out.read_text()


def test_https_with_client_certificates(start: Start, tmp_path: Path) -> None:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    request = [tool("openssl"), "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    name = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1", "-days", "2"]
    subprocess.run([*request, *name, "-keyout", key, "-out", cert], capture_output=True, check=True)
    options = ["--web.tls-cert-file", str(cert), "--web.tls-key-file", str(key)]
    url = start(*options).url()
    assert url.startswith("https://127.0.0.1:")
    anybody = ssl.create_default_context(cafile=str(cert))
    assert SERIES in scrape(url, anybody)
    with pytest.raises(URLError, match="CERTIFICATE_VERIFY_FAILED"):
        scrape(url, ssl.create_default_context())
    url = start(*options, "--web.tls-client-ca-file", str(cert)).url()
    with pytest.raises((OSError, URLError)):
        scrape(url, anybody)
    known = ssl.create_default_context(cafile=str(cert))
    known.load_cert_chain(cert, key)
    assert SERIES in scrape(url, known)


HASH = "$2b$04$" + "." * 53


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("basic_auth_users: {a: secret}", "basic_auth_users.a is no bcrypt hash"),
        ("tls_server_config: {cert_file: none.pem, key_file: none.pem}", "none.pem: No such file or directory"),
        ("a: [", "is not valid YAML (line 1, column 5): "),
        ("tls_config: {}", "unknown key tls_config (tls_server_config"),
        (None, "No such file or directory"),
    ],
)
def test_an_invalid_web_configuration_is_an_error(start: Start, tmp_path: Path, text: str | None, message: str) -> None:
    file = tmp_path / "web.yml"
    if text is not None:
        file.write_text(text)
    running = start("--web.config.file", str(file))
    error = failed(running)
    assert error.startswith(f"--web.config.file {file}: ")
    assert message in error
    assert len(running.err.read_text().splitlines()) == 1


def test_a_web_configuration_protects_and_is_read_again(start: Start, tmp_path: Path) -> None:
    file = tmp_path / "web.yml"
    file.write_text(f"basic_auth_users: {{a: {HASH}}}")
    running = start("--web.config.file", str(file))
    url = running.url()
    assert [status_of(url)[0], status_of(url.replace("/metrics", "/-/healthy"))[0]] == [401, 401]
    file.write_text("basic_auth_users: {}")
    assert f"{SERIES}}} 7.0\n" in scrape(url)
    file.write_text("basic_auth_users: []")
    assert [status_of(url)[0] for _ in range(3)] == [200] * 3
    error = "basic_auth_users is not a mapping; the configuration before it stays in force"
    assert [line for line in running.warnings() if "web.yml" in line] == [f"msrtrace: warning: {file}: {error}"]
    if os.geteuid() == 0:  # without the right to read every file, which was given up
        file.write_text(f"basic_auth_users: {{a: {HASH}}}")
        assert status_of(url)[0] == 401
        file.chmod(0o600)
        os.chown(file, 65534, 65534)
        assert [status_of(url)[0] for _ in range(2)] == [401, 401]
        assert [line for line in running.warnings() if "web.yml" in line][1:] == [
            f"msrtrace: warning: {file}: cannot read {file}: Permission denied; "
            "the configuration before it stays in force"
        ]
