# SPDX-License-Identifier: GPL-2.0-or-later
"""Compiled programs in files, so that each is compiled once on a host."""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from pathlib import Path

import msgspec

from tracer.program.program import (
    Program,
)

_CACHE = Path("/var/cache/msrtrace")
_KEPT = 16  # programs: five of a kernel
_DIGEST = 32  # bytes of SHA-256


def seal(content: bytes) -> bytes:
    """Content with its digest, so that `unseal` tells whether it is whole."""
    return hashlib.sha256(content).digest() + content


def unseal(sealed: bytes) -> bytes:
    """The content of what `seal` made. Raises ValueError if it is not whole."""
    digest, content = sealed[:_DIGEST], sealed[_DIGEST:]
    if hashlib.sha256(content).digest() != digest:
        raise ValueError("the digest is another")
    return content


def cache_dir() -> Path:
    """Where programs are cached: what systemd's CacheDirectory= says, else where caches are by the FHS and by XDG."""
    given = os.environ.get("CACHE_DIRECTORY", "").partition(":")[0]
    if given or not os.geteuid():
        return Path(given or _CACHE)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "msrtrace"


def cache_get(key: str) -> Program | None:
    """The program cached by a key; None if it is not there, not whole, or was in reach of another user."""
    path = cache_dir() / key
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            if status.st_uid not in (0, os.geteuid()) or status.st_mode & 0o022:
                return None
            content = file.read()
        program = msgspec.msgpack.decode(unseal(content), type=Program)
    except (OSError, ValueError):
        return None
    with suppress(OSError):
        os.utime(path)
    return program


def cache_put(key: str, program: Program) -> None:
    """Cache a program by a key, if it can be written; of all that is cached what was used last stays."""
    content = msgspec.msgpack.encode(program)
    path = cache_dir() / key
    with suppress(OSError):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        new = path.with_name(f"{key}.{os.getpid()}")
        try:
            with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
                file.write(seal(content))
            new.replace(path)
        finally:
            new.unlink(missing_ok=True)
        for old in sorted(path.parent.iterdir(), key=lambda file: file.stat().st_mtime, reverse=True)[_KEPT:]:
            old.unlink(missing_ok=True)
