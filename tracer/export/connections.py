# SPDX-License-Identifier: GPL-2.0-or-later
"""Who is connected, for how long, and who has to go where there is no room for all."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

#: How long a new connection waits until others have their answers, or threads whose connections were closed have ended.
_ROOM_IN = 2.0


class Connection:
    """A connection, which has a thread of its own.

    It waits for its client from the beginning until there is a request, and again while an answer is sent.
    """

    def __init__(self, connections: Connections, sock: socket.socket) -> None:
        self._connections, self._socket = connections, sock
        #: Whether there is no room for it, so that nothing but this can be answered.
        self.refused = False
        self.closed = False

    def close(self) -> None:
        """End what its thread waits for. Its thread closes the socket."""
        self.closed = True
        with suppress(OSError):
            socket.socket.shutdown(self._socket, socket.SHUT_RDWR)  # not TLS's, which another thread is inside of

    def uses(self, sock: socket.socket) -> None:
        """The socket is from now on that of TLS, which took the descriptor from the one before."""
        with self._connections.lock:
            self._socket = sock
            if self.closed:  # while the descriptor had no socket
                self.close()

    @contextmanager
    def working(self) -> Iterator[None]:
        """In this context it is not its client that is waited for."""
        self._connections.waits(self, False)
        try:
            yield
        finally:
            self._connections.waits(self, True)


class Connections:
    """The connections of a server, of which so many at once are answered, and as many as `refusals` are told to wait.

    None waits for its client longer than `patience` seconds, however slowly that sends or reads. Where all are taken,
    the one that has waited for its client longest is closed for the new one: whoever connects and sends nothing, or
    does not read, keeps nobody else out. Where none waits for its client, a new one waits for an answer to be ready.
    """

    def __init__(self, answered: int, refusals: int, patience: float) -> None:
        self.lock = threading.RLock()
        self._changed = threading.Condition(self.lock)
        self._answered, self._most, self._patience = answered, answered + refusals, patience
        self._by_socket: dict[socket.socket, Connection] = {}
        self._open: set[Connection] = set()  # neither refused nor closed
        self._stuck = False  # none has had its answer since a new one waited for that in vain
        self._closed: set[Connection] = set()  # by us, and their threads have not ended yet
        self._waiting: dict[Connection, float] = {}  # since when, the longest first

    def __len__(self) -> int:
        return len(self._by_socket)

    def __getitem__(self, sock: socket.socket) -> Connection:
        """The connection that `add` was given this socket for."""
        with self.lock:
            return self._by_socket[sock]

    def add(self, sock: socket.socket) -> None:
        """A new one. Raises ConnectionAbortedError if there are too many even to refuse it."""
        with self.lock:
            if not self._changed.wait_for(self._has_room, 0 if self._stuck else _ROOM_IN):
                self._stuck = True
            if len(self._open) >= self._answered:
                self.make_room()
            if len(self._by_socket) >= self._most and self._closed:
                self._changed.wait_for(lambda: len(self._by_socket) < self._most, _ROOM_IN)
            if len(self._by_socket) >= self._most:
                raise ConnectionAbortedError("too many connections")
            connection = self._by_socket[sock] = Connection(self, sock)
            connection.refused = len(self._open) >= self._answered
            if not connection.refused:
                self._open.add(connection)
            self._waiting[connection] = time.monotonic()

    def remove(self, sock: socket.socket) -> None:
        """That of this socket has ended, if there was one; before the socket is closed, as its number may be reused."""
        with self.lock:
            connection = self._by_socket.pop(sock, None)
            if connection:
                self._open.discard(connection)
                self._closed.discard(connection)
                self._waiting.pop(connection, None)
                self._changes()

    def waits(self, connection: Connection, waits: bool) -> None:
        """It waits for its client from now on, or it does not."""
        with self.lock:
            self._waiting.pop(connection, None)
            if waits and not connection.closed:
                self._waiting[connection] = time.monotonic()
                self._changes()

    def make_room(self) -> None:
        """Close the one that has waited for its client longest, if any waits. Its thread is still to end."""
        with self.lock:
            if self._waiting:
                self._close(next(iter(self._waiting)))

    def close_overdue(self) -> None:
        """Close those that have waited for their clients too long."""
        with self.lock:
            end = time.monotonic() - self._patience
            while self._waiting and next(iter(self._waiting.values())) < end:
                self._close(next(iter(self._waiting)))

    def _has_room(self) -> bool:
        return len(self._open) < self._answered or bool(self._waiting)

    def _changes(self) -> None:
        self._stuck = False
        self._changed.notify_all()

    def _close(self, connection: Connection) -> None:
        del self._waiting[connection]
        self._open.discard(connection)
        self._closed.add(connection)
        connection.close()
