# SPDX-License-Identifier: GPL-2.0-or-later
"""The command line: usage, start-up, errors."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from importlib.metadata import version
from pathlib import Path

import click
import pytest
from command import ROOT, command
from made import patched, unpatched

from tracer.cli import doctor as doctor_command
from tracer.cli import main as cli
from tracer.cli.run import host_and_port
from tracer.doctor import examination
from tracer.kernel.machine import Machine
from tracer.model.errors import MsrtraceError
from tracer.report.file import encode

Main = Callable[..., tuple[int, str, str]]

NOBODY = "4194305"  # above the kernel's highest pid (PID_MAX_LIMIT)


COMMANDS = cli.cli.list_commands(click.Context(cli.cli))


def named(name: str) -> click.Command:
    found = cli.cli.get_command(click.Context(cli.cli), name)
    assert found
    return found


@pytest.mark.parametrize("option", ["-h", "--help"])
@pytest.mark.parametrize("name", [None, *COMMANDS])
def test_help_is_shown(main: Main, name: str | None, option: str) -> None:
    status, out, err = main(*([name] if name else []), option)
    assert (status, err) == (0, "")
    assert out.startswith(f"Usage: msrtrace {f'{name} [OPTIONS]' if name else '[OPTIONS] [COMMAND]'}")
    known = named(name) if name else cli.cli
    assert known.help
    assert " ".join(known.help.split()) in " ".join(out.split())
    options = [parameter for parameter in known.params if isinstance(parameter, click.Option)]
    assert all(option.opts[0] in out for option in options)
    assert name or all(f"\n  {other} " in out for other in COMMANDS)


def test_every_command_is_listed() -> None:
    assert {"compare", "doctor", "report", "run", "show", "top"} <= {*COMMANDS}
    assert sorted(COMMANDS) == COMMANDS
    assert [named(name).name for name in COMMANDS] == COMMANDS


@pytest.mark.parametrize("name", COMMANDS)
def test_the_list_has_the_first_line_of_each_help(main: Main, name: str) -> None:
    known = " ".join((named(name).help or "").split())
    assert known.startswith(cli.commands()[name])
    assert " ".join(f"{name} {cli.commands()[name]}".split()) in " ".join(main("--help")[1].split())


def test_the_version_is_that_of_the_package() -> None:
    done = command("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"msrtrace, version {version('msrtrace')}\n", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        # The other words are click's, and differ between its versions
        (["trace"], "trace"),
        (["run", "--bogus"], "--bogus"),
        (["run", "--pid", "0"], "0 "),
        (["run", "--pid", "web"], "web"),
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
        (["run", "--web.config.file", "/"], "'/' is a directory"),
        (
            ["run", "--web.config.file", "x", "--web.tls-cert-file", "x", "--web.tls-key-file", "x"],
            "excludes --web.tls-cert-file",
        ),
    ],
)
def test_wrong_usage_is_explained(main: Main, arguments: list[str], message: str) -> None:
    status, out, err = main(*arguments)
    assert (status, out) == (2, "")
    assert err.startswith(f"Usage: msrtrace {'run ' * (arguments[0] == 'run')}")
    assert len(err.splitlines()) == 4  # how to get help, too
    error = err.splitlines()[-1]
    assert error.startswith("Error: ")
    assert message in error


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:9753", ("127.0.0.1", 9753)),
        ("localhost:0", ("localhost", 0)),
        (":65535", ("", 65535)),
        ("0.0.0.0:1", ("0.0.0.0", 1)),
        ("[::1]:9753", ("::1", 9753)),
        ("[::]:80", ("::", 80)),
    ],
)
def test_addresses_are_parsed(text: str, address: tuple[str, int]) -> None:
    assert host_and_port(text) == address


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
    assert not found & HEAVY - brought_by_msgspec()
    assert others(found) <= {"click", "msgspec"}


def test_help_imports_no_command(tmp_path: Path) -> None:
    found = set(start_up(tmp_path, "--help").stderr.split())
    rooms = {"tracer.cli", "tracer.model"}
    ours = {f"tracer.{name}" for name in ("cli.command", "cli.main", "cli.streams", "model.errors", "model.text")}
    assert {name for name in found if name.startswith("tracer.")} == rooms | ours
    assert not found & HEAVY - brought_by_msgspec()
    assert others(found) == {"click"}


def test_compare_imports_nothing_that_tracing_needs(reports: Path) -> None:
    found = set(start_up(reports, "compare", "u.json", "p.json").stderr.split())
    assert not found & HEAVY - brought_by_msgspec()
    assert [name for name in found if name.startswith(TRACING)] == []
    assert others(found) == {"click", "msgspec"}


@cache
def brought_by_msgspec() -> set[str]:
    """What it imports itself: uuid, which imports subprocess in Python 3.10."""
    script = "import sys; before = set(sys.modules); import msgspec; print(*(sys.modules.keys() - before))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    return set(done.stdout.split())


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

    monkeypatch.setattr(examination, "obstacle", obstacle)
    expected = (1, "", "msrtrace: error: kvm_intel is not loaded: sudo modprobe kvm_intel\n")
    assert main("run") == expected
    assert main("run", "--wait-module") == expected
    assert ignored == [(), ("module", "symbols")]


@pytest.mark.parametrize(("limits", "after"), [((64, 4096), 1024), ((64, 200), 200), ((2000, 4096), 2000)])
def test_a_low_limit_on_open_files_is_raised_as_far_as_allowed(limits: tuple[int, int], after: int) -> None:
    """In a process of its own: a lowered hard limit is for good."""
    code = (
        f"import resource; resource.setrlimit(resource.RLIMIT_NOFILE, {limits})\n"
        "from tracer.cli.session import _allow_descriptors\n"
        "_allow_descriptors(); print(*resource.getrlimit(resource.RLIMIT_NOFILE))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(after), str(limits[1])]
