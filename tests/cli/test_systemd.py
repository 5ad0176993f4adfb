# SPDX-License-Identifier: GPL-2.0-or-later
"""`msrtrace run` as a service of systemd, whose part these tests play."""

from __future__ import annotations

import os
import re
import signal
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
from command import Running, failed
from needs import tool

from tracer.cli.systemd import Service


class Manager:
    """Gets what a service tells systemd, and starts services."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.address = str(directory / "notify")
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(self.address)
        self.socket.settimeout(30)
        self.started: list[Running] = []

    def start(self, *arguments: str, **options: Any) -> Running:
        options = {"NOTIFY_SOCKET": self.address} | options
        self.started.append(Running(self.directory, *arguments, **options))
        return self.started[-1]

    def serve(self, *arguments: str, **options: Any) -> Running:
        return self.start("--web.listen-address", "127.0.0.1:0", *arguments, **options)

    def told(self) -> dict[str, str]:
        """The next message."""
        return dict(line.split("=", 1) for line in self.socket.recv(4096).decode().splitlines())

    def silent_for(self, seconds: float) -> bool:
        self.socket.settimeout(seconds)
        try:
            return not self.socket.recv(4096)
        except TimeoutError:
            return True
        finally:
            self.socket.settimeout(30)


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    (tmp_path / "module").write_text("1")
    made = Manager(tmp_path)
    yield made
    for running in made.started:
        running.process.kill()
        running.process.wait()
    made.socket.close()


def scrape(url: str, context: ssl.SSLContext | None = None) -> str:
    with urlopen(url, timeout=20, context=context) as answer:
        text: bytes = answer.read()
    return text.decode()


COUNTS = "msrtrace_intercept_calls_total{"


# --- readiness, status, end ---


def test_it_is_ready_when_it_traces_and_serves(manager: Manager) -> None:
    running = manager.serve()
    ready = manager.told()
    assert (running.directory / "attached").exists()
    url = running.url()
    status = f"tracing kvm_intel (layout filter-only, backend kprobe), serving {url}"
    assert ready == {"READY": "1", "STATUS": status}
    assert COUNTS in scrape(url)
    (running.directory / "module").unlink()
    assert manager.told() == {"STATUS": f"waiting for kvm_intel to be loaded again, serving {url}"}
    (running.directory / "module").write_text("2")
    assert manager.told() == {"STATUS": status}
    running.process.send_signal(signal.SIGTERM)
    assert manager.told() == {"STOPPING": "1", "STATUS": "ending"}
    assert running.process.wait(30) == 0


def test_waiting_for_the_module_is_no_failure_to_start(manager: Manager) -> None:
    (manager.directory / "module").unlink()
    (manager.directory / "machine/proc").mkdir(parents=True)
    (manager.directory / "machine/proc/cpuinfo").write_text("vendor_id\t: GenuineIntel\nflags\t\t: fpu vmx\n")
    running = manager.serve("--wait-module")
    assert manager.told() == {"READY": "1", "STATUS": "waiting for kvm_intel to be loaded"}
    (manager.directory / "module").write_text("1")
    assert manager.told()["STATUS"].startswith("tracing kvm_intel ")
    assert running.end() == 0


def test_a_service_that_cannot_start_is_not_ready(manager: Manager) -> None:
    (manager.directory / "obstacle").write_text("there is no KVM")
    assert failed(manager.serve())
    assert manager.silent_for(0.2)


def test_without_systemd_nobody_is_told(manager: Manager) -> None:
    running = manager.serve(NOTIFY_SOCKET="")
    running.url()
    assert manager.silent_for(0.2)


def test_abstract_sockets_are_told_too() -> None:
    name = f"msrtrace-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as told:
        told.bind(f"\0{name}")
        told.settimeout(5)
        Service({"NOTIFY_SOCKET": f"@{name}"}).status("well")
        assert told.recv(100) == b"STATUS=well"


# --- watchdog ---


def test_the_watchdog_is_answered_while_it_works(manager: Manager) -> None:
    running = manager.serve(WATCHDOG_USEC="1000000")
    assert manager.told()["READY"] == "1"
    begun = time.monotonic()
    assert [manager.told() for _ in range(4)] == [{"WATCHDOG": "1"}] * 4
    assert time.monotonic() - begun >= 1.5  # every half of the interval, not more often
    running.process.send_signal(signal.SIGSTOP)
    assert not manager.silent_for(0.1) or manager.silent_for(1.5)
    running.process.send_signal(signal.SIGCONT)
    assert manager.told() == {"WATCHDOG": "1"}


def test_the_watchdog_is_answered_during_the_wait_for_the_module(manager: Manager) -> None:
    (manager.directory / "module").unlink()
    manager.serve("--wait-module", WATCHDOG_USEC="1000000")
    assert manager.told()["READY"] == "1"
    assert [manager.told() for _ in range(3)] == [{"WATCHDOG": "1"}] * 3


@pytest.mark.parametrize(("pid", "seconds"), [("", 2.0), ("own", 2.0), ("1", None)])
def test_the_watchdog_may_be_another_processs(pid: str, seconds: float | None) -> None:
    given = {"WATCHDOG_PID": pid.replace("own", str(os.getpid()))} if pid else {}
    assert Service({"WATCHDOG_USEC": "2000000", **given}).watchdog == seconds


def test_what_does_not_work_is_not_alive(manager: Manager) -> None:
    service = Service({"NOTIFY_SOCKET": manager.address, "WATCHDOG_USEC": "100000"})
    asked: list[float] = []

    def works(seconds: float) -> bool:
        asked.append(seconds)
        return len(asked) > 1

    service.alive(works)
    assert manager.silent_for(0.1)
    service.alive(works)
    assert manager.told() == {"WATCHDOG": "1"}
    assert asked == [0.05, 0.05]


# --- SIGHUP ---


@pytest.fixture
def certificates(tmp_path: Path) -> tuple[Path, Path]:
    """Two files with a certificate and its key each."""
    made = []
    for name in ("one", "two"):
        file = tmp_path / f"{name}.pem"
        request = [tool("openssl"), "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"]
        names = ["-nodes", "-subj", f"/CN={name}", "-addext", "subjectAltName=IP:127.0.0.1", "-days", "2"]
        key = tmp_path / f"{name}.key"
        subprocess.run([*request, *names, "-keyout", key, "-out", file], capture_output=True, check=True)
        file.write_text(file.read_text() + key.read_text())
        made.append(file)
    return made[0], made[1]


def test_a_reload_reads_the_tls_files_again(manager: Manager, certificates: tuple[Path, Path]) -> None:
    one, two = certificates
    used = manager.directory / "used.pem"
    used.write_bytes(one.read_bytes())
    running = manager.serve("--web.tls-cert-file", str(used), "--web.tls-key-file", str(used))
    assert manager.told()["READY"] == "1"
    url = running.url()
    first, second = (ssl.create_default_context(cafile=str(file)) for file in (one, two))
    assert COUNTS in scrape(url, first)
    for content, context in ((two.read_bytes(), second), (b"nothing", second), (one.read_bytes(), first)):
        used.write_bytes(content)
        before = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        running.process.send_signal(signal.SIGHUP)
        reloading = manager.told()
        assert reloading.keys() == {"RELOADING", "MONOTONIC_USEC"}
        assert before <= int(reloading["MONOTONIC_USEC"]) <= time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        assert manager.told() == {"READY": "1"}
        assert COUNTS in scrape(url, context)
    [warning] = [line for line in running.warnings() if "TLS" in line]
    assert re.fullmatch(
        r"msrtrace: warning: the TLS files cannot be used: .*; the configuration before it stays in force", warning
    )
    assert running.end() == 0


def test_a_reload_reads_the_web_configuration_again_and_says_what_is_wrong(manager: Manager) -> None:
    file = manager.directory / "web.yml"
    file.write_text("{}")
    running = manager.serve("--web.config.file", str(file))
    assert manager.told()["READY"] == "1"
    file.write_text("basic_auth_users: []")
    for _ in range(2):
        running.process.send_signal(signal.SIGHUP)
        assert "RELOADING" in manager.told()
        assert manager.told() == {"READY": "1"}
    said = f"msrtrace: warning: {file}: basic_auth_users is not a mapping; the configuration before it stays in force"
    assert [line for line in running.warnings() if "web.yml" in line] == [said, said]
    assert COUNTS in scrape(running.url())


def test_a_terminal_that_is_closed_ends_it_in_order(manager: Manager) -> None:
    running = manager.serve(NOTIFY_SOCKET="")
    running.url()
    assert running.end(signal.SIGHUP) == 0
    assert (running.directory / "closed").exists()


def test_one_that_was_stopped_goes_on(manager: Manager) -> None:
    """As by Ctrl-Z and `fg`."""
    running = manager.serve(NOTIFY_SOCKET="")
    url = running.url()
    for _ in range(4):
        time.sleep(0.07)
        running.process.send_signal(signal.SIGSTOP)
        time.sleep(0.5)
        running.process.send_signal(signal.SIGCONT)
    time.sleep(0.5)
    assert COUNTS in scrape(url)
    assert running.end() == 0


def test_nohup_is_respected(manager: Manager) -> None:
    running = manager.serve(NOTIFY_SOCKET="", shell="trap '' HUP")
    url = running.url()
    running.process.send_signal(signal.SIGHUP)
    time.sleep(1)
    assert COUNTS in scrape(url)
    assert running.end() == 0


# --- sockets ---


def activated(manager: Manager, *sockets: socket.socket, **options: Any) -> Running:
    """The service, started for these sockets."""
    moved = " ".join(f"{number}<&{one.fileno()}" for number, one in enumerate(sockets, 3))
    return manager.start(
        "--web.systemd-socket",
        shell=f"exec {moved}; export LISTEN_PID=$$",
        descriptors=[one.fileno() for one in sockets],
        LISTEN_FDS=str(len(sockets)),
        **options,
    )


def test_all_sockets_of_systemd_are_served(manager: Manager) -> None:
    """Connections that were made before it started, too."""
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as two:
        early = socket.create_connection(one.getsockname())
        early.sendall(b"GET /-/ready HTTP/1.0\r\n\r\n")
        activated(manager, one, two)
        urls = [f"http://127.0.0.1:{listening.getsockname()[1]}/metrics" for listening in (one, two)]
        assert manager.told()["STATUS"].endswith(f"serving {' '.join(urls)}")
        assert early.recv(100).startswith(b"HTTP/1.0 200 ")
        for url in urls:
            assert COUNTS in scrape(url)
        early.close()


def test_no_connection_is_lost_over_a_restart(manager: Manager) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        url = f"http://127.0.0.1:{listening.getsockname()[1]}/metrics"
        answers, errors, enough = list[str](), list[Exception](), threading.Event()

        def client() -> None:
            while not enough.is_set():
                try:
                    answers.append(scrape(url))
                except OSError as error:
                    errors.append(error)

        clients = [threading.Thread(target=client) for _ in range(3)]
        running = activated(manager, listening)
        assert manager.told()["READY"] == "1"
        for one in clients:
            one.start()
        for _ in range(2):
            time.sleep(0.3)
            running.process.send_signal(signal.SIGTERM)
            assert running.process.wait(30) == 0
            manager.told()
            before = len(answers)
            running = activated(manager, listening)
            assert manager.told()["READY"] == "1"
            deadline = time.monotonic() + 30
            while len(answers) < before + 10 and not errors:
                assert time.monotonic() < deadline
                time.sleep(0.05)
        enough.set()
        for one in clients:
            one.join()
    assert errors == []
    assert all(COUNTS in answer for answer in answers)


@pytest.mark.parametrize("given", [{}, {"LISTEN_FDS": "1"}, {"LISTEN_FDS": "1", "LISTEN_PID": "1"}])
def test_without_a_socket_it_says_so(manager: Manager, given: dict[str, str]) -> None:
    error = failed(manager.start("--web.systemd-socket", **given))
    assert error == "--web.systemd-socket: systemd has handed over no socket; start a .socket unit"


def test_a_socket_that_is_none_for_http_is_refused(manager: Manager) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams, Path("/dev/null").open() as file:
        for other in (datagrams, file):
            error = failed(activated(manager, other))  # type: ignore[arg-type]
            assert error == "--web.systemd-socket: a socket is none of ListenStream= with an IP address or a port"


def test_two_sources_of_the_address_are_one_too_many(manager: Manager) -> None:
    running = manager.serve("--web.systemd-socket")
    assert running.process.wait(30) == 2
    assert "--web.systemd-socket excludes --web.listen-address" in running.err.read_text()


# --- the journal ---


def test_the_journal_gets_priorities_and_files_do_not(manager: Manager) -> None:
    (manager.directory / "warning").write_text("counts are incomplete")
    plain = manager.serve()
    plain.url()
    assert plain.end() == 0
    assert "<" not in plain.out.read_text() + plain.err.read_text()
    journal = 'export JOURNAL_STREAM="$(stat -L -c %d:%i /proc/$$/fd/{})"'
    running = manager.serve(shell=journal.format(2))
    running.url()
    assert running.end() == 0
    assert {line[:13] for line in running.err.read_text().splitlines()} == {"<4>msrtrace: "}
    assert "<" not in running.out.read_text()
    running = manager.serve(shell=journal.format(1))
    running.url()
    assert running.end() == 0
    assert {line[:13] for line in running.out.read_text().splitlines()} == {"<6>msrtrace: "}
    assert "<" not in running.err.read_text()
    (manager.directory / "obstacle").write_text("there is no KVM")
    running = manager.serve(shell=journal.format(2))
    assert running.process.wait(30) == 1
    assert running.err.read_text().splitlines()[-1].startswith("<3>msrtrace: error: ")
