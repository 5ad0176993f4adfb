# SPDX-License-Identifier: GPL-2.0-or-later
"""Signals that end a command in order: they are blocked and waited for, then ignored."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable, Set


def signal_within(numbers: Set[signal.Signals], seconds: float) -> signal.struct_siginfo | None:
    """One of these that comes in so many seconds; None if none does, or earlier, as when the process was stopped.

    Of a process that is stopped meanwhile, as by Ctrl-Z, CPython returns what has no meaning (sigtimedwait() fails with
    EINTR at SIGCONT; signal_sigtimedwait_impl(), Modules/signalmodule.c).
    """
    came = signal.sigtimedwait(numbers, seconds)
    return came if came and came.si_signo in numbers else None


def ignore(numbers: Iterable[signal.Signals]) -> None:
    """Ignore these from now on, and what is pending of them: this process ends in order, and nothing cuts that short.

    The sender may repeat it, at once or later: timeout(1) sends it to its command and then to the command's process
    group; podman-stop(1), where a container has the host's pid namespace, to its first process and then to all; and
    a user presses Ctrl-C again. SIGQUIT (Ctrl-\\) and SIGKILL still kill.
    """
    for number in numbers:
        signal.signal(number, signal.SIG_IGN)


class EndSignals:
    """SIGINT, SIGTERM and SIGHUP, which end a command in order: here they are waited for, and ignored after that.

    A handler could run in the middle of anything, and one that takes a lock may then wait for ever.
    """

    def __init__(self, on_hangup: Callable[[], None] | None = None) -> None:
        """With `on_hangup`, SIGHUP ends nothing: this runs during the wait. Else it ends unless it is ignored."""
        self._on_hangup = on_hangup
        self._numbers = {signal.SIGINT, signal.SIGTERM}
        # A blocked signal comes even if it is ignored, as nohup(1) has it.
        if on_hangup or signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            self._numbers.add(signal.SIGHUP)

    def __enter__(self) -> EndSignals:
        self._before = signal.pthread_sigmask(signal.SIG_BLOCK, self._numbers)
        return self

    def __exit__(self, *_: object) -> None:
        ignore(self._numbers)
        signal.pthread_sigmask(signal.SIG_SETMASK, self._before)

    def wait(self, seconds: float) -> bool:
        """Wait this long; True at once when one of the signals has come, which ends the command."""
        came = signal_within(self._numbers, seconds)
        if came and came.si_signo == signal.SIGHUP and self._on_hangup:
            self._on_hangup()
            return False
        return came is not None
