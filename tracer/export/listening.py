# SPDX-License-Identifier: GPL-2.0-or-later
"""Sockets to serve on, and how their addresses are shown."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator
from ipaddress import IPv6Address, ip_address
from typing import Any

from tracer.model.errors import MsrtraceError


def bound(address: tuple[str, int]) -> socket.socket:
    """A socket with the first of a name's addresses that this machine has, not yet listening. Raises MsrtraceError.

    :param address: an empty host means all of the machine, IPv6 and IPv4
    """
    problem: OSError | None = None
    try:
        candidates = list(_candidates(*address))
    except OSError as error:
        raise cannot_listen(address, error) from None
    for family, where in candidates:
        try:
            made = socket.socket(family, socket.SOCK_STREAM)
        except OSError as error:
            if error.errno != errno.EAFNOSUPPORT:  # a kernel without IPv6
                raise cannot_listen(address, error) from None
            problem = problem or error
            continue
        try:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if not address[0] and family == socket.AF_INET6:
                made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            made.bind(where)
            return made
        except OSError as error:
            made.close()
            problem = problem or error
            if error.errno != errno.EADDRNOTAVAIL:
                break
    assert problem
    raise cannot_listen(address, problem) from None


def _candidates(host: str, port: int) -> Iterator[tuple[socket.AddressFamily, tuple[Any, ...]]]:
    """The families and addresses to try in turn. Raises OSError if the host is not known."""
    if not host:
        yield socket.AF_INET6, ("::", port)
        yield socket.AF_INET, ("0.0.0.0", port)
        return
    for family, _, _, _, where in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE):
        yield family, where


def cannot_listen(address: tuple[str, int], error: OSError) -> MsrtraceError:
    """The error that an address cannot be used."""
    return MsrtraceError(
        f"cannot listen on {place(*address)}: {error.strerror}; choose another address with --web.listen-address"
    )


def place(host: str, port: int) -> str:
    """A host and a port, as in a URL."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def leaves_machine(listening: socket.socket) -> bool:
    """Whether other machines may reach a socket."""
    address = ip_address(str(listening.getsockname()[0]).partition("%")[0])
    if isinstance(address, IPv6Address):
        address = address.ipv4_mapped or address
    return not address.is_loopback
