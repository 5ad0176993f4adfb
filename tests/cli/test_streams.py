# SPDX-License-Identifier: GPL-2.0-or-later
"""Standard streams that are closed or full, a reader that leaves, and terminals without escape sequences."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
from command import ROOT
from made import patched, unpatched

from tracer.report.file import encode

#: Every way to print something that needs no host to trace.
COMMANDS = (
    "--version",
    "--help",
    "report --help",
    "doctor",
    "doctor --json",
    "show u.json",
    "show u.json --format html -o -",
    "compare u.json p.json",
    "compare u.json p.json --format json",
)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "u.json").write_bytes(encode(unpatched()))
    (tmp_path / "p.json").write_bytes(encode(patched()))
    return tmp_path


def shell(directory: Path, command: str, redirection: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """msrtrace, started by a shell."""
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", f"{sys.executable} -m tracer.cli.main {command} {redirection}"],
        cwd=directory,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


@pytest.mark.parametrize(
    ("redirection", "why"), [(">&-", "Bad file descriptor"), (">/dev/full", "No space left on device")]
)
@pytest.mark.parametrize("command", COMMANDS)
def test_output_that_cannot_be_written_is_an_error_in_one_line(
    directory: Path, command: str, redirection: str, why: str
) -> None:
    done = shell(directory, command, redirection)
    expected = f"msrtrace: error: cannot write to standard output: {why}\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", expected)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_reader_may_leave(directory: Path, command: str) -> None:
    done = shell(directory, command, "| true")
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "")


@pytest.mark.parametrize("redirection", ["2>&-", "2>/dev/full"])
def test_without_standard_error_the_status_remains(directory: Path, redirection: str) -> None:
    done = shell(directory, "show none.json", redirection)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "")
    assert shell(directory, "compare u.json p.json", redirection).returncode == 0


def test_what_is_not_written_to_needs_not_be_open(directory: Path) -> None:
    done = shell(directory, "show u.json -o out.md", "<&- >&- 2>&-")
    assert (done.returncode, (directory / "out.md").read_text()[:15]) == (0, "**patch missing")
    done = shell(directory, "show -", "<&-")
    assert (done.returncode, done.stderr) == (1, "msrtrace: error: cannot read -: Bad file descriptor\n")


FULL = "msrtrace: error: cannot write to standard output: No space left on device\n"


@pytest.mark.parametrize(
    ("command", "redirection", "status", "error"),
    [
        ("-d 0.1", ">/dev/full", 1, FULL),
        ("-o - true", ">/dev/full", 125, FULL),
        ("true", "2>/dev/full", 125, ""),  # there the report goes to standard error: only the status can say so
        ("-d 0.1", "| true", 1, ""),
        ("-o - true", "| true", 125, ""),
    ],
)
def test_a_report_that_cannot_be_printed_is_an_error(
    directory: Path, command: str, redirection: str, status: int, error: str
) -> None:
    (directory / "module").write_text("1")
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", f"{sys.executable} -m standin {directory} report {command} {redirection}"],
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests/support'}"},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (done.returncode, done.stdout, done.stderr) == (status, "", error)
    assert (directory / "closed").exists()


def on_a_terminal(*arguments: str, **environment: str) -> str:
    """The output of msrtrace to a terminal."""
    terminal, end = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-m", "tracer.cli.main", *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm", "NO_COLOR": "", **environment},
        stdout=end,
        stderr=end,
    ):
        os.close(end)
        shown = b""
        try:
            while got := os.read(terminal, 9999):
                shown += got
        except OSError:  # nobody has the other end open any more
            pass
    os.close(terminal)
    return shown.decode()


def test_doctor_colours_only_terminals_that_can_show_it() -> None:
    assert "\x1b[" in on_a_terminal("doctor")
    for environment in ({"TERM": "dumb"}, {"TERM": ""}, {"NO_COLOR": "1"}):
        assert "\x1b" not in on_a_terminal("doctor", **environment)
