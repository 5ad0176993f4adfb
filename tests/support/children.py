# SPDX-License-Identifier: GPL-2.0-or-later
"""A process that outlives its test is killed, and the test fails with its command line.

A plugin of pytest. What a fixture of a module or of the session starts may live as long as that. What threads whose
name begins with SESSION start, the boots of emulated hosts, may live until the session ends.
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
#: How long a process may take to end by itself, when who made it is gone.
PATIENCE_SECONDS = 2.0
_PR_SET_CHILD_SUBREAPER = 36
#: multiprocessing starts one for the whole process, and ends it there.
_OF_PYTHON = "multiprocessing.resource_tracker"

_before: set[int] = set()  # what was there when the test began
_shared: set[int] = set()  # what fixtures of more than one test started


def of_session() -> set[int]:
    """The children of the threads whose name begins with SESSION."""
    return _children(_session_threads().__contains__)


def others() -> set[int]:
    """All other children that run, orphans of theirs included."""
    threads = _session_threads()
    return _children(lambda thread: thread not in threads)


def describe(pid: int) -> str:
    """Its number and command line."""
    return f"{pid}: {_command(pid)}"


def kill(pids: Iterable[int]) -> None:
    """Kill processes and all that they have started."""
    for pid in pids:
        below = _children(lambda _: True, pid)
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        with suppress(ChildProcessError):
            os.waitpid(pid, 0)
        kill(below)


def _children(wanted: Callable[[int], bool], pid: int | None = None) -> set[int]:
    """The children of PID, or of this process, that run, by the threads that are WANTED."""
    found: set[int] = set()
    for thread in Path(f"/proc/{pid or os.getpid()}/task").glob("*"):
        with suppress(OSError):
            if wanted(int(thread.name)):
                found.update(map(int, (thread / "children").read_text().split()))
    return {child for child in found if _runs(child) and _OF_PYTHON not in _command(child)}


def _session_threads() -> set[int]:
    return {thread.native_id or 0 for thread in threading.enumerate() if thread.name.startswith(SESSION)}


def _runs(pid: int) -> bool:
    """Whether it has not ended, and waits for no more than to be waited for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def _command(pid: int) -> str:
    """Its command line; nothing if it has ended, or has just begun."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""


def _left_over(excepted: set[int]) -> set[int]:
    """The children that are not EXCEPTED and do not end by themselves."""
    end = time.monotonic() + PATIENCE_SECONDS
    while (left := others() - excepted) and time.monotonic() < end:
        time.sleep(0.02)
    return left


def _named_and_killed(left: set[int]) -> str:
    """The lines that say which processes were LEFT; they are killed."""
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
    """What boots have left; they have ended by now."""
    if left := _left_over(set()) | of_session():
        session.config.stash[_session_left] = _named_and_killed(left)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if text := config.stash.get(_session_left, ""):
        terminalreporter.section("killed, because the session left it behind", red=True, bold=True)
        terminalreporter.write_line(text.strip("\n"))
