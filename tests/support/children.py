# SPDX-License-Identifier: GPL-2.0-or-later
"""A pytest plugin: a process that outlives its test is killed, and the test fails with the process's command line.

Processes that a module or session fixture starts may live as long as that. Those started by threads whose name begins
with SESSION, the boots of emulated hosts, may live until the session ends.
"""

from __future__ import annotations

import ctypes
import os
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

SESSION = "boots"
#: How long an orphaned process may take to end by itself.
PATIENCE_SECONDS = 2.0
_PR_SET_CHILD_SUBREAPER = 36
#: multiprocessing starts one for the whole process, and ends it there.
_OF_PYTHON = "multiprocessing.resource_tracker"

_before: set[int] = set()  # processes that existed when the test began
_shared: set[int] = set()  # processes that fixtures of several tests started


def of_session() -> set[int]:
    """The children of threads whose name begins with SESSION."""
    return _children(_session_threads().__contains__)


def others() -> set[int]:
    """All other running children, including their orphans."""
    threads = _session_threads()
    return _children(lambda thread: thread not in threads)


def describe(pid: int) -> str:
    """The pid and the command line."""
    return f"{pid}: {_command(pid)}"


def kill(pids: Iterable[int]) -> None:
    """Kill processes and their descendants."""
    for pid in pids:
        below = _children(lambda _: True, pid)
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        with suppress(ChildProcessError):
            os.waitpid(pid, 0)
        kill(below)


def _children(wanted: Callable[[int], bool], pid: int | None = None) -> set[int]:
    """The running children of a process (default: this one) by those of its threads that are wanted."""
    found: set[int] = set()
    for thread in Path(f"/proc/{pid or os.getpid()}/task").glob("*"):
        with suppress(OSError):
            if wanted(int(thread.name)):
                found.update(map(int, (thread / "children").read_text().split()))
    return {child for child in found if _runs(child) and _OF_PYTHON not in _command(child)}


def _session_threads() -> set[int]:
    return {thread.native_id or 0 for thread in threading.enumerate() if thread.name.startswith(SESSION)}


def _runs(pid: int) -> bool:
    """Whether the process has not ended, and is not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def _command(pid: int) -> str:
    """The command line; empty if the process has ended or has just started."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""


def _left_over(excepted: set[int]) -> set[int]:
    """The children that do not end by themselves, except the given ones."""
    end = time.monotonic() + PATIENCE_SECONDS
    while (left := others() - excepted) and time.monotonic() < end:
        time.sleep(0.02)
    return left


def _named_and_killed(left: set[int]) -> str:
    """Kill the processes; returns lines that describe them."""
    text = "".join(f"\n  {describe(pid)}" for pid in sorted(left))
    kill(left)
    return text


# --- hooks ---


def pytest_configure() -> None:
    # Orphans become children of this process, so that they are found.
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    _before.clear()
    _before.update(others())


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef[Any]) -> Generator[None, object, object]:
    before = others() if fixturedef.scope != "function" else set()
    try:
        return (yield)
    finally:
        if fixturedef.scope != "function":
            _shared.update(others() - before)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> Generator[None, object, object]:
    try:
        return (yield)
    finally:
        if nextitem is None or nextitem.path != item.path:
            _before.difference_update(_shared)
            _shared.clear()
        if left := _left_over(_before | _shared):
            pytest.fail(f"killed, because the test left it behind:{_named_and_killed(left)}", pytrace=False)


_session_left = pytest.StashKey[str]()


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Kill what the boots, which have ended by now, have left behind."""
    if left := _left_over(set()) | of_session():
        session.config.stash[_session_left] = _named_and_killed(left)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if text := config.stash.get(_session_left, ""):
        terminalreporter.section("killed, because the session left it behind", red=True, bold=True)
        terminalreporter.write_line(text.strip("\n"))
