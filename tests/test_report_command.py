# SPDX-License-Identifier: GPL-2.0-or-later
"""`msrtrace report` as it is typed, on a made-up kernel."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tracer.reportfile import decode, read

ROOT = Path(__file__).parents[1]
VERDICT = "patch present: 101 filter updates asked for the MSRs that KVM passes through and left alone those that it"

DRIVER = """
import os, sys
from functools import partial

from made import HOOK, toggle

import tracer.cli, tracer.engine, tracer.report_command, tracer.tracer
from tracer.symbols import Symbol, Symbols
from tracer.snapshot import Probe


class Engine:
    def __init__(self, layout, symbols, options, machine):
        self.pid, self.updates = os.getpid() if options.by_vm else 0, -100
        self.warnings = ["something is not as it should be"] * ("WARN" in os.environ)
        self.probes = [Probe(HOOK, HOOK, True, HOOK)]

    def snapshot(self, patience=0):
        self.updates += 101
        if "COUNTING" in os.environ:
            open(os.environ["COUNTING"], "w").close()
        return toggle(self.updates, pid=self.pid, vcpus=1 + (self.updates > 1), probes=tuple(self.probes))

    def detach(self):
        pass

    def close(self):
        if "CLOSED" in os.environ:
            print("closed", file=sys.stderr)


FUNCTIONS = (HOOK, "vmx_enable_intercept_for_msr", "vmx_disable_intercept_for_msr")
Symbols.read = lambda *_: Symbols.of([Symbol(64, name, "kvm_intel") for name in FUNCTIONS])
tracer.report_command.obstacle = lambda machine: os.environ.get("OBSTACLE")
tracer.engine.Engine = Engine
tracer.tracer.Tracer = partial(tracer.tracer.Tracer, symbols=Symbols.read, module=lambda: 1)
tracer.cli.main()
"""
COMMAND = [sys.executable, "-c", DRIVER, "report"]
PYTHONPATH = f"{ROOT}:{ROOT / 'tests/support'}"


def run(*arguments: str, given: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """`msrtrace report ARGUMENTS`."""
    return subprocess.run(
        [*COMMAND, *arguments],
        env={**os.environ, "PYTHONPATH": PYTHONPATH, **environment},
        input=given,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


# --- report ---


def test_for_a_time() -> None:
    done = run("-d", "0.2", CLOSED="1")
    assert (done.returncode, done.stderr) == (0, "closed\n")
    assert done.stdout.startswith(VERDICT)
    assert "\n13 calls per filter update, 11 of them redundant" in done.stdout


def test_json() -> None:
    done = run("-d", "0.2", "--format", "json", "--label", "mine")
    made = decode(done.stdout.encode())
    assert (done.returncode, done.stderr) == (0, "")
    assert (made.label, made.command, made.exit_status, made.totals.filter_updates) == ("mine", None, None, 101)
    assert made.host.kernel == os.uname().release
    assert made.duration_seconds >= 0.2


def test_the_suffix_says_the_format_unless_the_option_does(tmp_path: Path) -> None:
    starts = {
        "a.json": '{\n "schema": "msrtrace-report/1"',
        "b.JSON": '{\n "schema": "msrtrace-report/1"',
        "a.txt": "patch present: ",
        "a": "patch present: ",
        "a.json.gz": "patch present: ",
        "a.md": "**patch present: ",
        "a.html": "<!doctype html>",
        "a.htm": "<!doctype html>",
    }
    outputs = [word for name in starts for word in ("-o", str(tmp_path / name))]
    done = run("-d", "0.01", *outputs)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    for name, start in starts.items():
        assert (tmp_path / name).read_text().lower().startswith(start), name
    run("-d", "0.01", *outputs, "--format", "markdown")
    for name in starts:
        assert (tmp_path / name).read_text().startswith("**patch present: "), name


def test_several_files(tmp_path: Path) -> None:
    done = run("-d", "0.01", "-o", str(tmp_path / "a.json"), "-o", "-", "-o", str(tmp_path / "a.md"))
    assert done.stdout.startswith(VERDICT)
    assert read(tmp_path / "a.json").totals.filter_updates == 101
    assert (tmp_path / "a.md").read_text().startswith("**patch present")


@pytest.mark.parametrize("status", [0, 7, 255])
def test_a_command(status: int) -> None:
    """Its output is its own, and its status is ours."""
    done = run("--", "sh", "-c", f"cat; exit {status}", given="text\n")
    assert (done.returncode, done.stdout) == (status, "text\n")
    assert done.stderr.startswith(VERDICT)
    assert f"ran: sh -c 'cat; exit {status}'" in done.stderr
    assert ("which ended with status" in done.stderr) == bool(status)


def test_options_of_a_command_are_its_own() -> None:
    done = run("-o", "-", "--label", "x", "echo", "-d", "1", "--label", "--help")
    assert done.returncode == 0
    assert done.stdout.startswith(f"-d 1 --label --help\n{VERDICT}")
    assert done.stderr == ""


def test_a_command_that_is_killed(tmp_path: Path) -> None:
    done = run("-o", str(tmp_path / "a.json"), "sh", "-c", "kill -KILL $$")
    assert (done.returncode, done.stdout, done.stderr) == (137, "", "")
    assert read(tmp_path / "a.json").exit_status == 137


def test_a_command_that_is_not_there() -> None:
    done = run("no-such-command", CLOSED="1")
    expected = "msrtrace: error: cannot run no-such-command: No such file or directory\n"  # nothing was attached
    assert (done.returncode, done.stdout, done.stderr) == (127, "", expected)
    assert run("/").returncode == 126


def test_a_command_that_is_no_text(tmp_path: Path) -> None:
    done = run("-o", str(tmp_path / "a.json"), os.fsdecode(b"true"), os.fsdecode(b"\xff\x1b[2J\n"))
    assert (done.returncode, done.stderr) == (0, "")
    assert read(tmp_path / "a.json").command == ["true", r"\udcff\x1b[2J\n"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_until_a_signal(number: signal.Signals, tmp_path: Path) -> None:
    counting = tmp_path / "counting"
    with subprocess.Popen(
        [*COMMAND, "--format", "json"],
        env={**os.environ, "PYTHONPATH": PYTHONPATH, "COUNTING": str(counting)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        end = time.monotonic() + 30
        while not counting.exists() and process.poll() is None and time.monotonic() < end:
            time.sleep(0.02)
        process.send_signal(number)
        out, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (0, b"")
    assert decode(out).notes == []


def test_by_vm() -> None:
    made = decode(run("-d", "0.5", "--by-vm", "--format", "json").stdout.encode())
    assert made.vms
    assert made.vms[0].name.startswith("python")


def test_warnings_are_said_and_kept() -> None:
    done = run("-d", "0.01", "--format", "json", WARN="1")
    assert done.stderr == "msrtrace: warning: something is not as it should be\n"
    assert decode(done.stdout.encode()).notes == ["something is not as it should be"]


def test_an_obstacle() -> None:
    done = run("-d", "9", OBSTACLE="kvm_intel is not loaded")
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "msrtrace: error: kvm_intel is not loaded\n")


def test_a_file_that_cannot_be_written_is_found_before_tracing(tmp_path: Path) -> None:
    done = run("-d", "99", "-o", str(tmp_path / "none/a.json"), OBSTACLE="not asked")
    expected = f"msrtrace: error: cannot write {tmp_path}/none/a.json: there is no directory {tmp_path}/none\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", expected)
    assert run("-d", "99", "-o", str(tmp_path)).returncode == 2


def test_a_report_that_cannot_be_written_at_last_is_not_lost(tmp_path: Path) -> None:
    done = run("-d", "0.01", "-o", "/dev/full", "-o", str(tmp_path / "a.txt"))
    error = "msrtrace: error: cannot write /dev/full: No space left on device\n"
    assert (done.returncode, done.stderr) == (1, error)
    assert done.stdout.startswith(VERDICT)
    assert (tmp_path / "a.txt").read_text().startswith(VERDICT)
    done = run("-o", "/dev/full", "echo", "own")
    assert (done.returncode, done.stdout) == (1, "own\n")
    assert done.stderr.startswith(VERDICT)
    assert done.stderr.endswith(error)


Main = Callable[..., tuple[int, str, str]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-d", "1", "true"], "-d and COMMAND exclude each other"),
        (["-d", "0"], "0.0 is not in the range x>0"),
        (["-d", "-1"], "-1.0 is not in the range x>0"),
        (["-d", "nan"], "-d nan: at most"),
        (["-d", "inf"], "-d inf: at most"),
        (["-d", "1e9"], "-d 1e+09: at most"),
        (["-d", "soon"], "'soon' is not a valid float"),
        (["--format", "changelog"], "'changelog' is not one of"),
        (["--pid", "0"], "0 is not in the range"),
    ],
)
def test_wrong_usage(main: Main, arguments: list[str], message: str) -> None:
    status, out, err = main("report", *arguments)
    assert (status, out) == (2, "")
    assert message in err


# --- report, on a terminal ---


def on_a_terminal(*arguments: str) -> tuple[str, str]:
    """What `msrtrace report ARGUMENTS` writes to a terminal on standard error, and to standard output."""
    terminal, end = pty.openpty()
    process = subprocess.Popen(
        [*COMMAND, *arguments],
        env={**os.environ, "PYTHONPATH": PYTHONPATH, "TERM": "xterm"},
        stdout=subprocess.PIPE,
        stderr=end,
        start_new_session=True,
    )
    os.close(end)
    shown = b""
    if "-d" not in arguments and "true" not in arguments:
        while b"Ctrl-C" not in shown:
            shown += os.read(terminal, 9999)
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
    try:
        while got := os.read(terminal, 9999):
            shown += got
    except OSError:  # nobody has the other end open any more
        pass
    out, _ = process.communicate(timeout=30)
    os.close(terminal)
    assert process.returncode == 0
    return shown.decode(), out.decode()


def test_progress_is_shown_on_a_terminal() -> None:
    shown, out = on_a_terminal("-d", "0.7")
    assert "tracing for 0.7 s" in shown
    assert "100%" in shown
    assert out.startswith(VERDICT)
    assert "tracing" not in out
    shown, _ = on_a_terminal()
    assert "msrtrace: tracing until Ctrl-C" in shown
    shown, _ = on_a_terminal("true")
    assert shown.startswith(VERDICT)  # a command has the terminal for itself
