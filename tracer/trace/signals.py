# SPDX-License-Identifier: GPL-2.0-or-later
"""Blocked signals that are waited for, so that they interrupt nothing."""

from __future__ import annotations

import signal
from collections.abc import Set


def signal_within(numbers: Set[signal.Signals], seconds: float) -> signal.struct_siginfo | None:
    """One of these that comes in so many seconds; None if none does, or earlier, as when the process was stopped.

    Of a process that is stopped meanwhile, as by Ctrl-Z, CPython returns what has no meaning (sigtimedwait() fails with
    EINTR at SIGCONT; signal_sigtimedwait_impl(), Modules/signalmodule.c).
    """
    came = signal.sigtimedwait(numbers, seconds)
    return came if came and came.si_signo in numbers else None


def discard_repeats(numbers: Set[signal.Signals]) -> None:
    """Take what is pending of blocked signals, one of which has come: else it would kill who is about to end in order.

    timeout(1) sends a signal to its command and then to the command's process group; podman-stop(1), where a container
    has the host's pid namespace, to its first process and then to all.
    """
    while signal_within(numbers, 0):
        pass
