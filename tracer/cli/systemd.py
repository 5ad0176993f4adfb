# SPDX-License-Identifier: GPL-2.0-or-later
"""What systemd and its journal are told, and the sockets that they hand over.

sd_notify(3), sd_watchdog_enabled(3), sd_listen_fds(3), sd-daemon(3), systemd.exec(5) on $JOURNAL_STREAM.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, TextIO

from tracer.model.errors import MsrtraceError

if TYPE_CHECKING:  # every command imports this module
    import socket

_FIRST_DESCRIPTOR = 3
#: syslog(3)
ERROR, WARNING, INFO = 3, 4, 6


class Service:
    """This process as a service of systemd; if it is none, nothing is told to anybody."""

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        self._notified = environment.get("NOTIFY_SOCKET", "")
        wanted = environment.get("WATCHDOG_USEC", "")
        watched = wanted.isdecimal() and environment.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        #: After how many seconds without a sign of life systemd ends this process; None: never.
        self.watchdog = int(wanted) / 1e6 if watched else None
        self._alive_at = float("-inf")

    @property
    def managed(self) -> bool:
        """Whether systemd waits for messages of this process."""
        return bool(self._notified)

    def ready(self, status: str) -> None:
        """It has started, and does what the status says."""
        self._tell("READY=1", f"STATUS={status}")

    def status(self, status: str) -> None:
        """What it does now."""
        self._tell(f"STATUS={status}")

    def stopping(self) -> None:
        """It has begun to end."""
        self._tell("STOPPING=1", "STATUS=ending")

    def reload(self, read_again: Callable[[], None]) -> None:
        """Read the configuration again, and say when that begins and ends."""
        self._tell("RELOADING=1", f"MONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")
        read_again()
        self._tell("READY=1")

    def alive(self, works: Callable[[float], bool]) -> None:
        """To be called often: gives a sign of life when it is time to, if all `works`.

        :param works: gets how many seconds anything may take that is under way
        """
        now = time.monotonic()
        if self.watchdog and now - self._alive_at >= self.watchdog / 2 and works(self.watchdog / 2):
            self._alive_at = now
            self._tell("WATCHDOG=1")

    def _tell(self, *assignments: str) -> None:
        if not self._notified:
            return

        import socket

        address = self._notified
        if address.startswith("@"):  # an abstract one
            address = "\0" + address[1:]
        with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as to:
            to.connect(address)
            to.sendall("\n".join(assignments).encode())


def listening_sockets(environment: Mapping[str, str] = os.environ) -> list[socket.socket]:
    """The sockets that systemd listens on for this process. Raises MsrtraceError if there are none, or others."""
    import socket

    number = environment.get("LISTEN_FDS", "")
    if environment.get("LISTEN_PID") != str(os.getpid()) or not number.isdecimal() or not int(number):
        raise MsrtraceError("--web.systemd-socket: systemd has handed over no socket; start a .socket unit")
    found = []
    for descriptor in range(_FIRST_DESCRIPTOR, _FIRST_DESCRIPTOR + int(number)):
        os.set_inheritable(descriptor, False)
        try:
            one = socket.socket(fileno=descriptor)
            listens = one.type == socket.SOCK_STREAM and one.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        except OSError:  # no socket at all
            listens = False
        if not listens or one.family not in (socket.AF_INET, socket.AF_INET6):
            raise MsrtraceError("--web.systemd-socket: a socket is none of ListenStream= with an IP address or a port")
        found.append(one)
    return found


def prefix(priority: int, stream: TextIO) -> str:
    """What a line begins with so that the journal has its priority; "" where the stream is not the journal."""
    device, _, inode = os.environ.get("JOURNAL_STREAM", "").partition(":")
    if not inode:
        return ""
    try:
        status = os.fstat(stream.fileno())
    except (OSError, ValueError):  # ValueError: closed
        return ""
    return f"<{priority}>" if (device, inode) == (str(status.st_dev), str(status.st_ino)) else ""
