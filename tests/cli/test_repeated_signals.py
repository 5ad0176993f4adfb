# SPDX-License-Identifier: GPL-2.0-or-later
"""Ctrl-C again and again, from when a command works until its process is gone: it ends in order all the same.

And Ctrl-C before there is a command, and after it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command import ROOT, Running
from faults import Figures
from recorded import ENDING
from standin import CLOSED, COUNTED, MODULE, READ, VMS

from tracer.report.file import decode

#: How each command that goes on until a signal is started, and what is on its standard output when it does.
ENDLESS: dict[str, tuple[list[str], str]] = {
    "run": (["--web.listen-address", "127.0.0.1:0"], "serving"),
    "state --watch": (["--interval", "0.1"], "watching"),
    "top": (["-d", "0.1"], "calls"),
    "report": (["--format", "json"], ""),
}


@pytest.mark.fault(
    "killed",
    "a signal again and again ({name})",
    "SIGINT, SIGTERM or SIGHUP, each millisecond until the process is gone",
)
@pytest.mark.parametrize("name", ENDLESS)
def test_it_ends_in_order(tmp_path: Path, figures: Figures, name: str) -> None:
    sent = {number.name: _signals_until_it_ends(tmp_path / number.name, name, number) for number in ENDING}
    figures["ended in order after"] = ", ".join(f"{number} {signal}" for signal, number in sent.items())
    assert min(sent.values()) > 1


def _signals_until_it_ends(directory: Path, name: str, number: signal.Signals) -> int:
    """Send a signal as long as there is a process to send it to; how often that was. Asserts that nothing is undone."""
    (arguments, ready), (command, *options) = ENDLESS[name], name.split()
    directory.mkdir()
    (directory / MODULE).write_text("1")
    (directory / VMS).write_text("web-01 812 2\n")
    running, sent = Running(directory, *options, *arguments, command=command), 0
    try:
        running.until(ready)
        end = time.monotonic() + 30
        while command == "report" and not (directory / COUNTED).exists():
            assert time.monotonic() < end
            time.sleep(0.02)
        while running.process.poll() is None:
            assert time.monotonic() < end
            running.process.send_signal(number)
            sent += 1
            time.sleep(0.001)
    finally:
        running.process.kill()
        running.process.wait()
    said = [line for line in running.err.read_text().splitlines() if not line.startswith("msrtrace: warning: ")]
    assert (running.process.returncode, said) == (0, [])
    if command == "report":
        assert decode(running.out.read_bytes()).calls
    else:
        assert (directory / (f"{READ}.{CLOSED}" if command == "state" else CLOSED)).exists()
    return sent


#: A module of the name click that is interrupted while it is imported; and what interrupts when all is done.
EARLY = "import os; os.kill(os.getpid(), 2); import time; time.sleep(20)\n"
LATE = "import atexit, os; atexit.register(lambda: os.kill(os.getpid(), 2))\n"


@pytest.mark.parametrize(("module", "text"), [("click", EARLY), ("sitecustomize", LATE)], ids=["early", "late"])
def test_ctrl_c_shows_no_traceback(tmp_path: Path, module: str, text: str) -> None:
    (tmp_path / f"{module}.py").write_text(text)
    done = subprocess.run(
        [sys.executable, "-m", "tracer.cli", "--version"],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"},
        capture_output=True,
        text=True,
        check=False,
        timeout=20,
    )
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "")
