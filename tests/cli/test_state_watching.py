# SPDX-License-Identifier: GPL-2.0-or-later
"""`msrtrace state --watch` on the command line, on a fake kernel."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from command import ON_STANDIN, Running, on_standin
from standin import CLOSED, MODULE, OBSTACLE, READ, VMS

WATCHING = re.compile(r"\n\n\d\d:\d\d:\d\d\.\d{3} watching for changes, every 0\.1 s\n")
UUID = "6f1d7d5e-0c1b-4b6e-9a58-2d0a6f4f0001"
DENIED = "web-01 812 2 0xc0000100\n"


class Watching(Running):
    """A process that watches."""

    def __init__(self, directory: Path, *arguments: str, vms: str = "") -> None:
        self.directory = directory
        self.set(vms)
        super().__init__(directory, "--watch", "--interval", "0.1", *arguments, command="state")

    def set(self, vms: str) -> None:
        """The VMs of now."""
        (self.directory / "next").write_text(vms)
        (self.directory / "next").replace(self.directory / VMS)

    def lines(self) -> list[str]:
        """The lines so far on changes, without their times."""
        return [line.partition(" ")[2] for line in WATCHING.split(self.out.read_text())[1].splitlines()]

    def ended(self, number: signal.Signals = signal.SIGTERM) -> tuple[int, str]:
        """End it: the exit status, and standard error."""
        return self.end(number), self.err.read_text()


@pytest.fixture
def watching(directory: Path) -> Iterator[Watching]:
    made = Watching(directory, vms="web-01 812 2\ndb 900 1\n")
    try:
        made.until("watching")
        yield made
    finally:
        made.process.kill()
        made.process.wait()


def test_the_state_then_its_changes(watching: Watching) -> None:
    assert "\nweb-01 (pid 812): vCPU 0-1; db (pid 900): vCPU 0\n" in WATCHING.split(watching.until("watching"))[0]
    watching.set(f"{DENIED}new 7 1\n")
    watching.until("passed -> filter\n")
    assert watching.lines() == [
        "db (pid 900): vCPU 0: VM gone",
        "new (pid 7): vCPU 0: new VM, filter: none",
        "web-01 (pid 812): new filter: allows what no range decides; 0xc0000100 FS_BASE, read and write: denies it",
        "web-01 (pid 812): vCPU 0-1: read and write of 0xc0000100 FS_BASE: passed -> filter",
    ]
    assert re.fullmatch(r"\d\d:\d\d:\d\d\.\d{3}", watching.out.read_text().splitlines()[-1].partition(" ")[0])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_in_order(watching: Watching, number: signal.Signals) -> None:
    assert watching.ended(number) == (0, "")
    assert (watching.directory / f"{READ}.{CLOSED}").exists()


def test_a_reload_of_the_module_is_followed(watching: Watching) -> None:
    (watching.directory / MODULE).unlink()
    watching.until("kvm_intel was unloaded\n")
    assert watching.lines() == [
        "web-01 (pid 812): vCPU 0-1; db (pid 900): vCPU 0: VM gone",
        "kvm_intel was unloaded",
    ]
    watching.set("web-02 5 1\n")
    (watching.directory / MODULE).write_text("2")
    watching.until("new VM, filter: none\n")
    assert watching.lines()[2:] == ["kvm_intel was loaded again", "web-02 (pid 5): vCPU 0: new VM, filter: none"]
    assert watching.ended() == (0, "")


def test_an_error_ends_it_in_one_line(watching: Watching) -> None:
    watching.set("broken")
    assert watching.process.wait(30) == 1
    assert watching.err.read_text() == "msrtrace: error: what vCPUs intercept cannot be read: broken\n"
    assert (watching.directory / f"{READ}.{CLOSED}").exists()


def test_only_what_is_asked_for(directory: Path) -> None:
    made = Watching(directory, "--vm", "web-01", "--msr", "FS_BASE", vms="web-01 812 2\ndb 900 1\n")
    try:
        assert "db" not in made.until("watching")
        made.set("web-01 812 2 0xc0000100 0x174\ndb 900 1 0x174\n")
        made.until("passed -> filter\n")
        assert made.lines()[1:] == [
            "web-01 (pid 812): vCPU 0-1: read and write of 0xc0000100 FS_BASE: passed -> filter"
        ]
        assert made.ended() == (0, "")
    finally:
        made.process.kill()
        made.process.wait()


def test_a_vm_that_is_not_there_yet(directory: Path) -> None:
    made = Watching(directory, "--vm", "web-01", "--vm", UUID, vms=f"db@{UUID} 900 1\n")
    try:
        made.until("watching")
        made.set(DENIED)
        made.until("web-01 (pid 812): vCPU 0-1: new VM, filter: ")
        assert made.ended() == (0, "msrtrace: warning: no VM is called web-01 now\n")
    finally:
        made.process.kill()
        made.process.wait()


def test_a_reader_that_leaves_ends_it(directory: Path) -> None:
    (directory / VMS).write_text(DENIED)
    process = subprocess.Popen(
        [sys.executable, "-m", "standin", directory, "state", "--watch", "--interval", "0.1"],
        env=ON_STANDIN,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        assert process.stdout
        assert process.stderr
        while b"watching" not in process.stdout.readline():
            assert process.poll() is None
        process.stdout.close()
        (directory / VMS).write_text("")
        assert (process.stderr.read(), process.wait(30)) == (b"", 1)
        process.stderr.close()
        assert (directory / f"{READ}.{CLOSED}").exists()
    finally:
        process.kill()
        process.wait()


def test_a_host_that_cannot_be_read_is_an_error(directory: Path) -> None:
    (directory / OBSTACLE).write_text("no rights: use sudo")
    done = on_standin(directory, "state", "--watch")
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "msrtrace: error: no rights: use sudo\n")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--watch", "--diff", "a", "b"],
        ["--interval", "1"],
        ["--watch", "--interval", "0"],
        ["--watch", "--interval", "nan"],
        ["--watch", "--format", "json"],
        ["--watch", "-o", "/dev/null"],
        ["--diff", "a"],
        ["-o", "x.html"],
        ["--diff", "a", "b", "-o", "x.html"],
        ["--diff", "a.json", "web-01"],
        ["--diff", "web-01", "db", "--vm", "web-01"],
        ["--diff", "web-01", "db", "--pid", "1"],
    ],
)
def test_wrong_usage_is_explained(directory: Path, arguments: list[str]) -> None:
    (directory / VMS).write_text(DENIED)
    done = on_standin(directory, "state", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert "Error: " in done.stderr
    assert not (directory / READ).exists()
