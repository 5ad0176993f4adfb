# SPDX-License-Identifier: GPL-2.0-or-later
"""Traces that end, and the commands run in them: in a process of its own, with a tracer that only logs its calls."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests/support'}"}


class Recorded:
    """A running record() with options."""

    def __init__(self, prefix: list[str], **options: Any) -> None:
        self.process = subprocess.Popen(
            [*prefix, sys.executable, "-m", "recorded", json.dumps(options)],
            env=ENVIRONMENT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def until(self, text: str = "started\n") -> None:
        assert self.process.stdout
        while line := self.process.stdout.readline():
            if line == text:
                return
        raise AssertionError(f"no {text!r}")

    def signal(self, number: signal.Signals) -> None:
        time.sleep(0.1)
        self.process.send_signal(number)

    def end(self, given: str = "") -> tuple[Any, str]:
        """The result, and what else was on standard output."""
        out, _ = self.process.communicate(given, timeout=30)
        lines = out.splitlines(keepends=True)
        result = json.loads(lines[-1])
        assert result["restored"]
        return result, "".join(line for line in lines[:-1] if line != "started\n")


Start = Callable[..., Recorded]


@pytest.fixture
def start() -> Iterator[Start]:
    under_way: list[Recorded] = []

    def begin(*prefix: str, **options: Any) -> Recorded:
        under_way.append(Recorded(list(prefix), **options))
        return under_way[-1]

    yield begin
    for recorded in under_way:
        recorded.process.kill()
        recorded.process.communicate()


EXEC = "os.execvp(sys.argv[1], sys.argv[1:])"


def python(code: str) -> list[str]:
    return [sys.executable, "-c", f"import os, signal, sys, time\n{code}"]


# --- for a time ---


def test_it_ends_after_a_duration(start: Start) -> None:
    result, _ = start(seconds=0.5).end()
    assert 0.5 <= result["seconds"] < 2
    assert (result["status"], result["notes"]) == (None, [])
    assert (result["snapshots"], result["counts"]) == (2, [10])  # what was counted between the two
    assert result["progress"] >= 3
    assert result["started"].endswith("+00:00")


def test_a_tiny_duration_is_enough(start: Start) -> None:
    result, _ = start(seconds=1e-9).end()
    assert result["snapshots"] == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_it_cleanly(start: Start, number: signal.Signals) -> None:
    for seconds in (None, 20):
        recorded = start(seconds=seconds)
        recorded.until()
        recorded.signal(number)
        result, _ = recorded.end()
        assert result["seconds"] < 10
        assert (result["snapshots"], result["status"]) == (2, None)
        note = f"ended by {number.name} after {result['seconds']:.1f} of 20 s"
        assert result["notes"] == ([note] if seconds else [])


def test_a_stop_ends_no_recording(start: Start) -> None:
    """Ctrl-Z and fg: what CPython then says has come is no signal that anyone sent."""
    recorded = start(seconds=2)
    recorded.until()
    recorded.signal(signal.SIGSTOP)
    recorded.signal(signal.SIGCONT)
    result, _ = recorded.end()
    assert (result["seconds"] >= 2, result["notes"]) == (True, [])


def test_a_repeated_signal_costs_no_recording(start: Start) -> None:
    """timeout(1) sends one to its command and to the command's process group."""
    recorded = start()
    recorded.until()
    for number in (signal.SIGSTOP, signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGCONT):
        recorded.signal(number)
    result, _ = recorded.end()
    assert result["snapshots"] == 2


def test_ignored_signals_stay_ignored(start: Start) -> None:
    """Signals that were ignored at the start stay ignored."""
    recorded = start(*python("signal.signal(1, signal.SIG_IGN); " + EXEC), seconds=1)
    recorded.until()
    recorded.signal(signal.SIGHUP)
    result, _ = recorded.end()
    assert (result["notes"], result["seconds"] >= 1) == ([], True)


def test_reloads_are_followed(start: Start) -> None:
    result, _ = start(seconds=0.9, follows=["", "loaded", "refused", "broken"]).end()
    assert result["notes"] == [
        "during the trace kvm_intel was loaded again",
        "during the trace kvm_intel is not traced, trying again in 10 s: why",
        "a reload could not be followed: broken",
    ]
    assert result["snapshots"] == 2


def test_vms_are_named_while_they_live(start: Start) -> None:
    result, _ = start(seconds=0.9, by_vm=True).end()
    assert result["snapshots"] >= 4


# --- around a command ---


@pytest.mark.parametrize(
    ("command", "status"),
    [
        (["true"], 0),
        (["sh", "-c", "exit 7"], 7),
        (["sh", "-c", "exit 255"], 255),
        (["sh", "-c", "kill -TERM $$"], 128 + 15),
        (["sh", "-c", "kill -KILL $$"], 128 + 9),
    ],
)
def test_the_status_is_that_of_the_command(start: Start, command: list[str], status: int) -> None:
    result, _ = start(command=command).end()
    assert (result["status"], result["notes"], result["snapshots"]) == (status, [], 2)


def test_a_command_that_cannot_be_run_is_an_error(start: Start, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "garbage").write_bytes(b"\0\0\0\0")
    (tmp_path / "garbage").chmod(0o755)
    for command, status, why in (
        ("no-such-command", 127, "No such file or directory"),
        (str(tmp_path / "none"), 127, "No such file or directory"),
        (str(tmp_path / "file"), 126, "Permission denied"),
        (str(tmp_path), 126, "Permission denied"),
        (str(tmp_path / "garbage"), 126, "Exec format error"),
        (str(tmp_path / "file/x"), 126, "Not a directory"),
    ):
        result, _ = start(command=[command]).end()
        assert (result["error"], result["status"]) == (f"cannot run {command}: {why}", status)


def test_a_command_has_our_standard_input_and_output(start: Start) -> None:
    result, out = start(command=["sh", "-c", "tr a-z A-Z; echo done"]).end("one\ntwo\n")
    assert (out, result["status"]) == ("ONE\nTWO\ndone\n", 0)


def test_the_end_of_a_command_is_seen_at_once(start: Start) -> None:
    """SIGCHLD ends the wait: 10 times as long as the command takes would be 2 s."""
    results = [start(command=["true"]).end()[0]["seconds"] for _ in range(5)]
    assert min(results) < 0.15


def test_background_processes_of_a_command_are_not_waited_for(start: Start) -> None:
    result, out = start(command=["sh", "-c", "sleep 20 >/dev/null 2>&1 <&1 & echo $!; exit 3"]).end()
    os.kill(int(out), signal.SIGKILL)
    assert result["status"] == 3
    assert result["seconds"] < 10


def test_children_that_end_before_the_command_do_not_end_the_trace(start: Start) -> None:
    code = "for _ in range(20):\n if os.fork() == 0: os._exit(1)\ntime.sleep(0.5)\nsys.exit(5)"
    result, _ = start(command=python(code)).end()
    assert result["status"] == 5
    assert result["seconds"] >= 0.5


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_is_forwarded_to_the_command(start: Start, number: signal.Signals) -> None:
    recorded = start(
        command=python(f"signal.signal({int(number)}, lambda *_: sys.exit(42))\nprint(1, flush=True)\ntime.sleep(20)")
    )
    recorded.until("1\n")
    recorded.signal(number)
    result, _ = recorded.end()
    assert result["status"] == 42
    assert result["notes"] == [f"ended by {number.name} after {result['seconds']:.1f} s"]


def test_a_command_that_ignores_signals_is_waited_for(start: Start) -> None:
    recorded = start(
        command=python("signal.signal(15, signal.SIG_IGN)\nprint(1, flush=True)\ntime.sleep(1)\nsys.exit(4)")
    )
    recorded.until("1\n")
    recorded.signal(signal.SIGTERM)
    result, _ = recorded.end()
    assert result["status"] == 4
    assert result["seconds"] >= 1


SHOW = "import signal; print([sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])), "
SHOW += "[n for n in range(1, 32) if n not in (9, 19) and signal.getsignal(n) == signal.SIG_IGN]], flush=True)"


@pytest.mark.parametrize(
    "prefix",
    [
        [],
        python(
            "signal.signal(1, signal.SIG_IGN); signal.signal(17, signal.SIG_IGN); os.execvp(sys.argv[1], sys.argv[1:])"
        ),
        python("signal.pthread_sigmask(signal.SIG_BLOCK, [10, 15]); " + EXEC),
        python("signal.signal(2, signal.SIG_IGN); " + EXEC),
    ],
)
def test_a_command_inherits_our_signal_dispositions(start: Start, prefix: list[str]) -> None:
    command = [sys.executable, "-c", f"{SHOW}; import sys; sys.exit(9)"]
    alone = subprocess.run([*prefix, *command], capture_output=True, text=True, check=False).stdout
    result, out = start(*prefix, command=command).end()
    assert (out, result["status"]) == (alone, 9)


#: Runs its arguments on a terminal, presses Ctrl-C when they have said that they are ready, and shows what they said.
PRESS = r"""
import os, pty, sys, time

pid, terminal = pty.fork()
if pid == 0:
    os.execvp(sys.argv[1], sys.argv[1:])
out = b""
while b"ready" not in out:
    out += os.read(terminal, 99)
time.sleep(0.3)
os.write(terminal, b"\x03")
try:
    while True:
        out += os.read(terminal, 9999)
except OSError:
    print(out.decode())
"""


def test_ctrl_c_reaches_a_command_once(start: Start) -> None:
    """A terminal sends it to both, so it is not forwarded."""
    count = "hits = []\nsignal.signal(2, lambda *_: hits.append(1))\nprint('ready', flush=True)\n"
    count += "end = time.monotonic() + 1.5\nwhile time.monotonic() < end: time.sleep(0.1)\nsys.exit(len(hits))"
    driver = [sys.executable, "-m", "recorded", json.dumps({"command": python(count)})]
    done = subprocess.run(
        [sys.executable, "-c", PRESS, *driver], env=ENVIRONMENT, capture_output=True, timeout=60, check=True
    )
    result = json.loads(done.stdout[done.stdout.index(b"{") :])
    assert result["status"] == 1
    assert result["notes"] == [f"ended by SIGINT after {result['seconds']:.1f} s"]
