# SPDX-License-Identifier: GPL-2.0-or-later
"""A trace that ends: after a time, on a signal, or with a command."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Protocol

from tracer.model.errors import MsrtraceError
from tracer.model.module_change import FOLLOW_SECONDS, Change
from tracer.model.snapshot import Snapshot
from tracer.trace.signals import ignore, signal_within

_SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD}
_PATIENCE_SECONDS = 1.0  # for calls in progress when the trace ends
_SI_KERNEL = 0x80  # siginfo(7): sent by the kernel, as a terminal's Ctrl-C is to all its processes


@dataclass(frozen=True)
class Recording:
    """The counts of `seconds` from `started` on; `status` is the command's exit status, as a shell gives it."""

    counted: Snapshot
    started: datetime
    seconds: float
    status: int | None
    notes: tuple[str, ...]


class Traced(Protocol):
    """The part of `Tracer` that this module needs."""

    def snapshot(self, patience: float = 0) -> Snapshot:
        """The present counts."""

    def follow(self) -> Change | None:
        """Follow a reload of the module."""


class CommandError(MsrtraceError):
    """The command could not be started; `status` is the exit status of a shell in that case."""

    def __init__(self, text: str, status: int) -> None:
        super().__init__(text)
        self.status = status


def check_command(command: Sequence[str]) -> None:
    """Raise the CommandError that `record` would, as far as it can be known without starting the command."""
    if not shutil.which(command[0]):
        there = os.path.dirname(command[0]) and os.path.exists(command[0])
        why, status = (errno.EACCES, 126) if there else (errno.ENOENT, 127)
        raise CommandError(f"cannot run {command[0]}: {os.strerror(why)}", status)


def record(
    tracer: Traced,
    *,
    seconds: float | None = None,
    command: Sequence[str] = (),
    by_vm: bool = False,
    progress: Callable[[float], None] = lambda _: None,
) -> Recording:
    """Record for a time, while a command runs, or (neither given) until a signal; a signal ends any recording cleanly.

    A signal is forwarded to the command, unless the terminal sent it to both; the recording then goes on until the
    command has ended. From then on signals are ignored: what was recorded is still to be delivered.

    :param by_vm: name VMs while they live
    :param progress: called with the seconds that have passed
    :raises CommandError: if the command cannot be started
    """
    notes: list[str] = []
    # What is ignored (by nohup, or in the background of a script) stays ignored.
    ignored = {number for number in _SIGNALS if signal.getsignal(number) is signal.SIG_IGN}
    handled = _SIGNALS - ignored | {signal.SIGCHLD}
    if signal.SIGCHLD in ignored:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # else the kernel would discard the command's status
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, handled)
    interrupted = ""
    try:
        before = tracer.snapshot()
        started, begin = datetime.now(timezone.utc), time.monotonic()
        child = _start(command, blocked, ignored) if command else None
        while True:
            passed = time.monotonic() - begin
            with suppress(OSError):  # the terminal has been closed
                progress(passed)
            if child.poll() is not None if child else interrupted or (seconds is not None and passed >= seconds):
                break
            wait = FOLLOW_SECONDS if seconds is None else min(FOLLOW_SECONDS, max(0.0, seconds - passed))
            info = signal_within(handled, wait)
            if info and info.si_signo != signal.SIGCHLD:
                interrupted = signal.Signals(info.si_signo).name
                if child and info.si_code != _SI_KERNEL:
                    child.send_signal(info.si_signo)
            if not info:
                _keep_up(tracer, by_vm, notes)
        spent = time.monotonic() - begin
        _keep_up(tracer, by_vm, notes)
        counted = tracer.snapshot(_PATIENCE_SECONDS).since(before)
    finally:
        ignore((handled - {signal.SIGCHLD}) | ignored)
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    if interrupted and (child or seconds is not None):
        after = "" if child else f" of {seconds:g}"
        notes.append(f"ended by {interrupted} after {spent:.1f}{after} s")
    return Recording(counted, started, spent, _status(child), tuple(dict.fromkeys(notes)))


def _start(
    command: Sequence[str], mask: set[signal.Signals] | set[int], ignored: set[signal.Signals]
) -> subprocess.Popen[bytes]:
    """Start the command with the signal mask and the ignored signals that we were started with."""

    def restore() -> None:
        for number in ignored:
            signal.signal(number, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    try:
        return subprocess.Popen(command, preexec_fn=restore)  # noqa: PLW1509 (no other thread runs yet)
    except OSError as error:
        status = 127 if isinstance(error, FileNotFoundError) else 126
        raise CommandError(f"cannot run {command[0]}: {os.strerror(error.errno or 0)}", status) from None
    except ValueError as error:
        raise CommandError(f"cannot run {command[0]!r}: {error}", 126) from None


def _keep_up(tracer: Traced, by_vm: bool, notes: list[str]) -> None:
    """Follow a reload of the module and name new VMs. A failure becomes a note, as the trace must go on."""
    try:
        if change := tracer.follow():
            notes.append(f"during the trace {change}")
        if by_vm:
            tracer.snapshot()
    except Exception as error:
        notes.append(f"a reload could not be followed: {error}")


def _status(child: subprocess.Popen[bytes] | None) -> int | None:
    if child is None:
        return None
    return child.returncode if child.returncode >= 0 else 128 - child.returncode
