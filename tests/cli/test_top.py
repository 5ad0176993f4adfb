# SPDX-License-Identifier: GPL-2.0-or-later
"""`msrtrace top` in a terminal of its own, on a made-up kernel."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from terminal import clean_environment, command

_SGR = re.compile(rb"\x1b\[[\d;]*m")


class Terminal:
    """A process that leads a session on a pseudo-terminal, of which this is the other side."""

    def __init__(
        self, directory: Path, *command: str | Path, size: tuple[int, int] = (24, 80), **environment: str
    ) -> None:
        self.directory = directory
        self.master, self.slave = pty.openpty()
        self.resize(*size)
        self.before = termios.tcgetattr(self.slave)
        self.sent = b""
        self.process = subprocess.Popen(
            [sys.executable, *command],
            env={**clean_environment(), **environment},
            stdin=self.slave,
            stdout=self.slave,
            stderr=self.slave,
            preexec_fn=_lead_session,  # noqa: PLW1509 (there is no other thread)
        )

    def resize(self, rows: int, columns: int) -> None:
        """Change the size; the kernel signals the foreground process group."""
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def read(self, seconds: float) -> bool:
        """Read output for at most so many seconds; returns whether there was any."""
        if not select.select([self.master], [], [], seconds)[0]:
            return False
        self.sent += os.read(self.master, 65536)
        return True

    def screen(self) -> str:
        """The screen: lines are drawn at CSI row;1H, and CSI 2J clears it."""
        last = self.sent.rpartition(b"\x1b[2J")[2]
        rows: dict[int, bytes] = {}
        for row, text in re.findall(rb"\x1b\[(\d+);1H\x1b\[K([^\x1b]*(?:\x1b\[[\d;]*m[^\x1b]*)*)", last):
            rows[int(row)] = _SGR.sub(b"", text)
        return "\n".join(rows.get(n, b"").decode() for n in range(1, max(rows, default=0) + 1))

    def until(self, *texts: str) -> str:
        """Wait until the screen has these texts; returns all of it."""
        end = time.monotonic() + 30
        while not all(text in self.screen() for text in texts):
            assert time.monotonic() < end, f"no {texts} in {self.screen()!r}; sent: {self.sent!r}"
            if not self.read(0.1):
                assert self.process.poll() is None, f"ended: {self.sent!r}"
        return self.screen()

    def type(self, keys: str) -> None:
        os.write(self.master, keys.encode())

    def end(self) -> int:
        """Wait for the exit, which must restore the terminal."""
        end = time.monotonic() + 30
        while self.process.poll() is None:
            assert time.monotonic() < end
            self.read(0.05)
        while self.read(0.05):
            pass
        assert termios.tcgetattr(self.slave) == self.before
        return self.process.returncode

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for file in (self.master, self.slave):
            if file >= 0:
                os.close(file)


def _lead_session() -> None:
    os.setsid()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


Start = Callable[..., Terminal]


@pytest.fixture
def start(directory: Path) -> Iterator[Start]:
    started: list[Terminal] = []

    def run(*arguments: str, size: tuple[int, int] = (24, 80), **environment: str) -> Terminal:
        started.append(Terminal(directory, *command(directory, "-d", "0.3", *arguments), size=size, **environment))
        return started[-1]

    yield run
    for terminal in started:
        terminal.close()


ENTER, LEAVE = b"\x1b[?1049h", b"\x1b[0m\x1b[?7h\x1b[?25h\x1b[?1049l"


ORDER = re.compile(r"IA32_TSC .*IA32_SPEC_CTRL ", re.DOTALL)


def test_keys_control_the_screen(start: Start) -> None:
    terminal = start()
    drawn = terminal.until("IA32_SPEC_CTRL", "sorted by calls; ? for help, q to quit")
    assert ORDER.search(drawn)
    assert "2 calls per filter update, 1 of them redundant" in drawn
    assert termios.tcgetattr(terminal.slave)[3] & (termios.ICANON | termios.ECHO) == 0
    terminal.type("s")
    assert not ORDER.search(terminal.until("sorted by share"))
    terminal.type("u")
    assert ORDER.search(terminal.until("sorted by cause"))
    terminal.type("r")
    terminal.until("sorted by redundant")
    terminal.type("m")
    terminal.until("sorted by msr")
    terminal.type("c")
    terminal.until("sorted by calls")
    terminal.type("?")
    terminal.until("space pauses", "q quits")
    terminal.type("h")
    terminal.until("q to quit")
    terminal.type("t")
    terminal.until(" all ", "     calls  redundant")
    terminal.type("t")
    terminal.until("over 0.")
    terminal.type("q")
    assert terminal.end() == 0
    assert terminal.sent.count(ENTER) == 1
    assert terminal.sent.rstrip().endswith(LEAVE)
    assert (terminal.directory / "closed").exists()


def test_a_key_switches_between_exits_and_calls(start: Start) -> None:
    terminal = start("--exits")
    drawn = terminal.until("FS_BASE ", "PLATFORM_INFO ", "sorted by what a filter alone causes, then exits")
    assert re.search(r"filtered +\d.* 70.0%  filter *\n", drawn)
    terminal.type("m")
    assert terminal.until("sorted by msr").find("PLATFORM_INFO") < terminal.screen().find("FS_BASE")
    terminal.type("e")
    terminal.until("sorted by calls", "redundant", "exits ")
    terminal.type("ef")
    terminal.until("intercepted by", "sorted by what")
    terminal.type("q")
    assert terminal.end() == 0


def test_a_pause_keeps_the_screen(start: Start) -> None:
    terminal = start()
    terminal.until("IA32_TSC")
    terminal.type(" ")
    held = terminal.until("PAUSED")
    while terminal.read(1.0):
        pass
    assert terminal.screen() == held
    terminal.type("s")
    assert terminal.until("sorted by share").splitlines()[0] == held.splitlines()[0]
    terminal.type(" ")
    terminal.until("over")
    end = time.monotonic() + 30
    while "PAUSED" in terminal.screen():
        assert terminal.read(1.0)
        assert time.monotonic() < end
    terminal.type("q")
    assert terminal.end() == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT])
def test_signals_end_it_cleanly(start: Start, number: signal.Signals) -> None:
    terminal = start()
    terminal.until("IA32_TSC")
    terminal.process.send_signal(number)
    assert terminal.end() == 0
    assert terminal.sent.rstrip().endswith(LEAVE)
    assert (terminal.directory / "closed").exists()


def test_ctrl_c_ends_it_cleanly(start: Start) -> None:
    terminal = start()
    terminal.until("IA32_TSC")
    terminal.type("\x03")
    assert terminal.end() == 0


def test_an_exception_restores_the_terminal(start: Start) -> None:
    terminal = start()
    terminal.until("IA32_TSC")
    (terminal.directory / "interrupt").touch()
    assert terminal.end() == 1
    assert LEAVE in terminal.sent
    assert (terminal.directory / "closed").exists()
    assert b"Traceback" not in terminal.sent


def test_a_closed_terminal_ends_it(start: Start) -> None:
    terminal = start()
    terminal.until("IA32_TSC")
    for name in ("slave", "master"):
        os.close(getattr(terminal, name))
        setattr(terminal, name, -1)
    assert terminal.process.wait(30) == 0
    assert (terminal.directory / "closed").exists()


def test_it_redraws_after_a_stop(start: Start) -> None:
    """After SIGSTOP, which cannot be handled, and whatever a shell then did to the terminal."""
    terminal = start()
    terminal.until("IA32_TSC")
    terminal.process.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, terminal.process.pid, os.WSTOPPED)
    attributes = termios.tcgetattr(terminal.slave)
    attributes[3] |= termios.ECHO | termios.ICANON  # as a shell has it
    termios.tcsetattr(terminal.slave, termios.TCSANOW, attributes)
    terminal.sent = b""
    terminal.process.send_signal(signal.SIGCONT)
    terminal.until("IA32_TSC")
    assert ENTER in terminal.sent
    assert termios.tcgetattr(terminal.slave)[3] & (termios.ICANON | termios.ECHO) == 0
    terminal.type("q")
    assert terminal.end() == 0


JOB_CONTROL = """
import os, signal, sys, termios
signal.signal(signal.SIGTTOU, signal.SIG_IGN)
before = termios.tcgetattr(0)
def foreground(group):
    os.tcsetpgrp(0, group)
pid = os.fork()
if not pid:
    os.setpgid(0, 0)
    foreground(os.getpid())
    signal.signal(signal.SIGTTOU, signal.SIG_DFL)
    os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
def stopped():
    _, status = os.waitpid(pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status), status
    foreground(os.getpgrp())
    print("STOPPED", termios.tcgetattr(0) == before, flush=True)
stopped()
os.kill(pid, signal.SIGCONT)  # bg
stopped()
foreground(pid)
os.kill(pid, signal.SIGCONT)  # fg
stopped()
os.kill(pid, signal.SIGTERM)
os.kill(pid, signal.SIGCONT)  # kill %1
_, status = os.waitpid(pid, 0)
print("ENDED", os.waitstatus_to_exitcode(status), termios.tcgetattr(0) == before, flush=True)
"""


def test_job_control_restores_the_terminal(directory: Path) -> None:
    """Ctrl-Z, bg, fg, Ctrl-Z, kill, as a shell does them."""
    shell = directory / "shell.py"
    shell.write_text(JOB_CONTROL)
    terminal = Terminal(directory, shell, *command(directory, "-d", "0.3"))

    def said(text: bytes, times: int) -> None:
        end = time.monotonic() + 30
        while terminal.sent.count(text) < times:
            assert time.monotonic() < end, terminal.sent
            assert terminal.read(0.1) or terminal.process.poll() is None, terminal.sent

    try:
        terminal.until("IA32_TSC")
        terminal.type("\x1a")
        said(b"STOPPED True", 2)  # by Ctrl-Z, and when continued in the background
        assert LEAVE in terminal.sent
        said(ENTER, 2)
        terminal.until("IA32_TSC")
        terminal.type("\x1a")
        said(b"ENDED 0 True", 1)
        assert terminal.sent.count(b"STOPPED True") == 3
        assert terminal.sent.count(ENTER) == terminal.sent.count(LEAVE) == 2
        assert terminal.end() == 0
        assert (directory / "closed").exists()
    finally:
        terminal.close()


def test_a_resize_redraws(start: Start) -> None:
    terminal = start()
    assert len(terminal.until("q to quit", "IA32_TSC").splitlines()) == 24
    assert "filter_change" in terminal.screen()
    terminal.resize(12, 40)
    end = time.monotonic() + 30
    while len(drawn := terminal.screen().splitlines()) != 12 or "IA32_TSC" not in terminal.screen():
        assert time.monotonic() < end
        terminal.read(0.1)
    assert max(map(len, drawn)) <= 40
    assert "filter_change" not in terminal.screen()
    terminal.type("q")
    assert terminal.end() == 0


def test_a_terminal_without_a_size_has_24_lines(start: Start) -> None:
    terminal = start(size=(0, 0))
    assert len(terminal.until("q to quit").splitlines()) == 24
    terminal.type("q")
    assert terminal.end() == 0


@pytest.mark.parametrize("term", ["vt100", "linux"])
def test_a_serial_console_gets_ascii(start: Start, term: str) -> None:
    terminal = start(TERM=term)
    terminal.until("100 us each")
    terminal.type("q")
    assert terminal.end() == 0
    assert terminal.sent.isascii()
    assert b"1049" not in terminal.sent
    assert terminal.sent.endswith(b"\x1b[24;1H\r\n")
    assert (b"\x1b[31m" in terminal.sent) == (term == "linux")


def test_no_color_is_respected(start: Start) -> None:
    terminal = start(NO_COLOR="1")
    terminal.until("IA32_TSC", "100 µs each")
    terminal.type("q")
    assert terminal.end() == 0
    assert not re.search(rb"\x1b\[[\d;]*3\dm", terminal.sent)


def test_without_utf_8_it_is_ascii(start: Start) -> None:
    terminal = start(LANG="C")
    terminal.until("100 us each")
    terminal.type("q")
    assert terminal.end() == 0
    assert terminal.sent.isascii()


def test_a_dumb_terminal_gets_frames_one_after_another(start: Start) -> None:
    terminal = start("-n", "2", TERM="dumb")
    assert terminal.end() == 0
    assert b"\x1b" not in terminal.sent
    assert terminal.sent.count(b"redundancy exact") == 2


def test_it_ends_after_n_frames(start: Start) -> None:
    terminal = start("-n", "2")
    assert terminal.end() == 0
    assert terminal.sent.rstrip().endswith(LEAVE)


def test_b_switches_to_vms(start: Start) -> None:
    terminal = start("--by-vm")
    terminal.until("pid VM ", "IA32_TSC")
    terminal.type("b")
    assert "IA32_TSC" not in terminal.until("updates/s")
    terminal.type("b")
    terminal.until("access", "IA32_TSC")
    terminal.type("b")
    terminal.until("pid VM", "IA32_TSC")
    terminal.type("?")
    terminal.until("b MSRs by VM")
    terminal.type("q")
    assert terminal.end() == 0


def test_a_reload_and_a_failure_are_shown(start: Start) -> None:
    terminal = start()
    terminal.until("IA32_TSC")
    (terminal.directory / "module").unlink()
    terminal.until("kvm_intel was unloaded; its counts are kept", "nothing is traced now")
    (terminal.directory / "module").write_text("2")
    terminal.until("kvm_intel was loaded again (", "LOWER BOUND", "kvm_intel unloaded: 1")
    terminal.until("kvm_intel unloaded: 1", "IA32_TSC")
    (terminal.directory / "broken").touch()
    terminal.until("reading failed at", "the numbers are older: OSError: broken map", "IA32_TSC")
    (terminal.directory / "broken").unlink()
    end = time.monotonic() + 30
    while "reading failed" in terminal.screen():
        assert time.monotonic() < end
        terminal.read(0.1)
    terminal.type("q")
    assert terminal.end() == 0
