# SPDX-License-Identifier: GPL-2.0-or-later
"""The command line: its output and exit status, in this process and in a process of its own."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import click
import pytest
from click.testing import CliRunner, Result
from made import patched, unpatched
from needs import tool

from tracer.cli import doctor as doctor_command
from tracer.cli import main as cli
from tracer.cli import session
from tracer.cli.run import Address
from tracer.doctor.examination import examine
from tracer.kernel.machine import Machine
from tracer.model.errors import MsrtraceError
from tracer.report.file import encode

ROOT = Path(__file__).parents[2]
NOBODY = "4194305"  # above the kernel's highest pid (PID_MAX_LIMIT)
COMMANDS = cli.cli.list_commands(click.Context(cli.cli))


def named(name: str) -> click.Command:
    found = cli.cli.get_command(click.Context(cli.cli), name)
    assert found
    return found


def invoke(*arguments: str) -> Result:
    """The command without `main`, which turns errors into lines."""
    return CliRunner().invoke(cli.cli, arguments, prog_name="msrtrace")


Main = Callable[..., tuple[int, str, str]]


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """As a user starts it."""
    return subprocess.run(
        [sys.executable, "-m", "tracer.cli.main", *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


# --- usage ---


@pytest.mark.parametrize("option", ["-h", "--help"])
@pytest.mark.parametrize("name", [None, *COMMANDS])
def test_help_is_shown(name: str | None, option: str) -> None:
    result = invoke(*([name] if name else []), option)
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.startswith(f"Usage: msrtrace {f'{name} [OPTIONS]' if name else '[OPTIONS] COMMAND'}")
    known = named(name) if name else cli.cli
    assert known.help
    assert " ".join(known.help.split()) in " ".join(result.stdout.split())
    options = [parameter for parameter in known.params if isinstance(parameter, click.Option)]
    assert all(option.opts[0] in result.stdout for option in options)
    assert name or all(f"\n  {other} " in result.stdout for other in COMMANDS)


def test_every_command_is_listed() -> None:
    assert COMMANDS == ["compare", "doctor", "report", "run", "top"]
    assert [named(name).name for name in COMMANDS] == COMMANDS


@pytest.mark.parametrize("name", COMMANDS)
def test_the_list_has_the_first_line_of_each_help(name: str) -> None:
    known = " ".join((named(name).help or "").split())
    assert known.startswith(cli.commands()[name])
    assert " ".join(f"{name} {cli.commands()[name]}".split()) in " ".join(invoke("--help").stdout.split())


def test_the_version_is_that_of_the_package() -> None:
    done = command("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"msrtrace, version {version('msrtrace')}\n", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trace"], "No such command 'trace'"),
        (["run", "--bogus"], "No such option '--bogus'"),
        (["run", "--pid", "0"], "0 is not in the range x>=1"),
        (["run", "--pid", "web"], "'web' is not a valid int"),
        (["run", "--web.listen-address", "localhost"], "'localhost' is not HOST:PORT"),
        (["run", "--web.listen-address", "localhost:"], "'localhost:' is not HOST:PORT"),
        (["run", "--web.listen-address", "9753"], "'9753' is not HOST:PORT"),
        (["run", "--web.listen-address", ""], "'' is not HOST:PORT"),
        (["run", "--web.listen-address", ":65536"], "':65536' is not HOST:PORT"),
        (["run", "--web.listen-address", ":-1"], "':-1' is not HOST:PORT"),
        (["run", "--web.listen-address", ":http"], "':http' is not HOST:PORT"),
        (["run", "--web.listen-address", ":8\u00b2"], "':8\u00b2' is not HOST:PORT"),
        (["run", "--web.tls-key-file", "key.pem"], "--web.tls-client-ca-file need --web.tls-cert-file"),
        (["run", "--web.tls-client-ca-file", "ca.pem"], "--web.tls-client-ca-file need --web.tls-cert-file"),
        (["run", "--web.tls-cert-file", "/"], "'/' is a directory"),
    ],
)
def test_wrong_usage_is_explained(main: Main, arguments: list[str], message: str) -> None:
    status, out, err = main(*arguments)
    assert (status, out) == (2, "")
    usage, hint, blank, error = err.splitlines()
    assert usage.startswith("Usage: msrtrace ")
    assert (hint, blank) == (f"Try 'msrtrace {'run ' * (arguments[0] == 'run')}--help' for help.", "")
    assert error.startswith("Error: ")
    assert message in error


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:9753", ("127.0.0.1", 9753)),
        ("localhost:0", ("localhost", 0)),
        (":65535", ("0.0.0.0", 65535)),
        ("[::1]:9753", ("::1", 9753)),
        ("[::]:80", ("::", 80)),
    ],
)
def test_addresses_are_parsed(text: str, address: tuple[str, int]) -> None:
    assert Address().convert(text, None, None) == address


# --- start-up ---

NOTED = """
import atexit, sys
before = set(sys.modules)
atexit.register(lambda: print(*(sys.modules.keys() - before), file=sys.stderr))
from tracer.cli.main import main
main()
"""
HEAVY = {"asyncio", "ctypes", "email", "http", "importlib.metadata", "socket", "ssl", "subprocess", "urllib.request"}
TRACING = ("tracer.kernel.", "tracer.program.", "tracer.trace.", "tracer.doctor.", "tracer.export.", "tracer.live.")
STARTS = ["--help"], ["compare", "u.json", "p.json"]


@pytest.fixture
def reports(tmp_path: Path) -> Path:
    (tmp_path / "u.json").write_bytes(encode(unpatched()))
    (tmp_path / "p.json").write_bytes(encode(patched()))
    return tmp_path


def start_up(directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run msrtrace with arguments in a directory; stderr has the modules that it imports."""
    return subprocess.run(
        [sys.executable, "-c", NOTED, *arguments],
        cwd=directory,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_a_command_imports_nothing_slow(tmp_path: Path, name: str) -> None:
    found = set(start_up(tmp_path, name, "--help").stderr.split())
    assert f"tracer.cli.{name}" in found
    assert not found & HEAVY
    assert others(found) <= {"click", "msgspec"}


def test_help_imports_no_command(tmp_path: Path) -> None:
    found = set(start_up(tmp_path, "--help").stderr.split())
    rooms = {"tracer.cli", "tracer.model"}
    modules = {"tracer.cli.main", "tracer.model.errors", "tracer.model.text"}
    assert {name for name in found if name.startswith("tracer.")} == rooms | modules
    assert not found & HEAVY
    assert others(found) == {"click"}


def test_compare_imports_nothing_that_tracing_needs(reports: Path) -> None:
    found = set(start_up(reports, "compare", "u.json", "p.json").stderr.split())
    assert not found & HEAVY
    assert [name for name in found if name.startswith(TRACING)] == []
    assert others(found) == {"click", "msgspec"}


def others(modules: set[str]) -> set[str]:
    """The packages of other projects. msgspec imports typing_extensions if it is installed."""
    return {name.partition(".")[0] for name in modules} - sys.stdlib_module_names - {"tracer", "typing_extensions"}


@pytest.mark.parametrize("arguments", STARTS)
def test_starting_takes_little_time(reports: Path, arguments: list[str]) -> None:
    """The goal is 0.2 s on an idle core; the limit is twice that, as emulated hosts may run at the same time."""

    def took() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        start_up(reports, *arguments)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(took() for _ in range(5)) < 0.4


# --- errors ---


def fail(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """Make `msrtrace doctor` raise an error."""

    def broken(_: Machine) -> None:
        raise error

    monkeypatch.setattr(doctor_command, "examine", broken)


def test_a_pid_without_a_process_is_an_error() -> None:
    done = command("run", "--pid", NOBODY)
    expected = f"msrtrace: error: there is no process {NOBODY}\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", expected)


def test_an_error_is_one_line(monkeypatch: pytest.MonkeyPatch, main: Main) -> None:
    fail(monkeypatch, MsrtraceError("what is wrong: what to do"))
    assert main("doctor") == (1, "", "msrtrace: error: what is wrong: what to do\n")


@pytest.mark.parametrize("message", ["not foreseen", "not\nforeseen\n"])
def test_an_internal_error_is_one_line(monkeypatch: pytest.MonkeyPatch, main: Main, message: str) -> None:
    monkeypatch.delenv("MSRTRACE_DEBUG", raising=False)
    fail(monkeypatch, ValueError(message))
    expected = "msrtrace: internal error: ValueError: not foreseen (MSRTRACE_DEBUG=1 shows where)\n"
    assert main("doctor") == (1, "", expected)


def test_debugging_shows_where(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MSRTRACE_DEBUG", "1")
    monkeypatch.setattr(sys, "argv", ["msrtrace", "doctor"])
    fail(monkeypatch, ValueError("not foreseen"))
    with pytest.raises(ValueError, match="not foreseen"):
        cli.main()


def test_an_error_has_no_control_characters(monkeypatch: pytest.MonkeyPatch, main: Main) -> None:
    fail(monkeypatch, MsrtraceError("\x1b[2J\u202e"))
    assert main("doctor") == (1, "", "msrtrace: error: \\x1b[2J\\u202e\n")


def test_an_error_has_its_own_exit_status(monkeypatch: pytest.MonkeyPatch, main: Main) -> None:
    error = MsrtraceError("why")
    error.status = 3
    fail(monkeypatch, error)
    assert main("doctor") == (3, "", "msrtrace: error: why\n")


def test_what_prevents_tracing_is_the_error(monkeypatch: pytest.MonkeyPatch, main: Main) -> None:
    """run fails with the first finding of doctor; with --wait-module the module may be missing."""
    ignored = []

    def obstacle(_: Machine, ignore: tuple[str, ...] = ()) -> str:
        ignored.append(ignore)
        return "kvm_intel is not loaded: sudo modprobe kvm_intel"

    monkeypatch.setattr(session, "obstacle", obstacle)
    expected = (1, "", "msrtrace: error: kvm_intel is not loaded: sudo modprobe kvm_intel\n")
    assert main("run") == expected
    assert main("run", "--wait-module") == expected
    assert ignored == [(), ("module", "symbols")]


# --- doctor ---


def test_doctor_prints_every_check_and_fails_if_one_does() -> None:
    names = [check.name for check in examine(Machine.here())]
    done = command("doctor", "--json")
    document = json.loads(done.stdout)
    assert [check["name"] for check in document["checks"]] == names
    assert (document["schema"], document["kernel"]) == ("msrtrace-doctor/1", os.uname().release)
    failed = any(check["state"] == "failed" for check in document["checks"])
    assert (document["ok"], done.returncode, done.stderr) == (not failed, int(failed), "")
    text = command("doctor")
    assert (text.returncode, text.stderr) == (done.returncode, "")
    assert "\x1b" not in text.stdout  # not a terminal
    assert [line.split()[1] for line in text.stdout.split("\n\n")[0].splitlines() if line[0] != " "] == names


# --- run, with a stand-in for the engine ---


class Running:
    """`msrtrace run` in a process of its own, on a fake kernel that is files in a directory."""

    def __init__(self, directory: Path, *arguments: str) -> None:
        self.directory = directory
        self.out, self.err = directory / "out", directory / "err"
        with self.out.open("w") as out, self.err.open("w") as err:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "standin", directory, "run", *arguments],
                env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests/support'}"},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
            )

    def until(self, text: str, file: Path | None = None) -> str:
        """Wait until stdout (or a file) has the text; returns all of it."""
        end = time.monotonic() + 30
        while text not in (content := (file or self.out).read_text()):
            assert time.monotonic() < end, f"no {text!r} in {content!r}; stderr: {self.err.read_text()}"
            assert self.process.poll() is None, f"ended: {content!r}; stderr: {self.err.read_text()}"
            time.sleep(0.05)
        return content

    def url(self) -> str:
        return self.until("/metrics\n").rpartition("serving ")[2].splitlines()[0]

    def warnings(self) -> list[str]:
        """The lines on stderr, without those on capabilities unless run by root."""
        lines = self.err.read_text().splitlines()
        return lines if os.geteuid() == 0 else [line for line in lines if "capabilities" not in line]

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(30)


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
    assert not (running.directory / "closed").exists()
    assert running.end(number) == 0
    assert (running.directory / "closed").exists()
    assert running.warnings() == ["msrtrace: warning: vmx_vcpu_create is not probed: none"]


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


def test_run_can_wait_for_the_module(start: Start, tmp_path: Path) -> None:
    (tmp_path / "module").unlink()
    running = start("--wait-module")
    assert running.until("waiting") == "msrtrace: waiting for kvm_intel to be loaded\n"
    (tmp_path / "module").write_text("1")
    assert f"{SERIES}}} 7.0\n" in scrape(running.url())


def test_a_signal_ends_the_wait(start: Start, tmp_path: Path) -> None:
    (tmp_path / "module").unlink()
    running = start("--wait-module")
    running.until("waiting")
    assert (running.end(signal.SIGINT), running.err.read_text()) == (0, "")


def failed(running: Running) -> str:
    """The error line of a run that cannot serve; no probe may be left."""
    assert running.process.wait(30) == 1
    assert (running.directory / "closed").exists() == (running.directory / "attached").exists()
    assert "serving" not in running.out.read_text()
    error = running.err.read_text().splitlines()[-1]
    assert error.startswith("msrtrace: error: ")
    return error.removeprefix("msrtrace: error: ")


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


# --- run, with TLS ---


@pytest.mark.parametrize("missing", ["cert", "key", "client-ca"])
def test_missing_tls_files_are_an_error(start: Start, tmp_path: Path, missing: str) -> None:
    options = [f"--web.tls-{name}-file={tmp_path / name}.pem" for name in ("cert", "key", "client-ca")]
    for name in {"cert", "key", "client-ca"} - {missing}:
        (tmp_path / f"{name}.pem").write_text("")
    assert failed(start(*options)).startswith(("cannot read a TLS file: ", "the TLS files cannot be used: "))


def test_invalid_tls_files_are_an_error(start: Start, tmp_path: Path) -> None:
    (tmp_path / "pem").write_text("nothing")
    error = failed(start(f"--web.tls-cert-file={tmp_path}/pem", f"--web.tls-key-file={tmp_path}/pem"))
    assert error.startswith("the TLS files cannot be used: ")


def test_a_certificate_without_a_key_is_not_served_in_the_clear(start: Start, tmp_path: Path) -> None:
    """prometheus_client silently serves HTTP unless it is given both."""
    (tmp_path / "cert.pem").write_text("nothing")
    running = start("--web.tls-cert-file", str(tmp_path / "cert.pem"))
    with suppress(subprocess.TimeoutExpired):
        running.process.wait(5)
    assert running.process.returncode in (1, 2)
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
