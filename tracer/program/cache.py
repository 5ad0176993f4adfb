# SPDX-License-Identifier: GPL-2.0-or-later
"""Compiled programs in files, so that each is compiled once on a host."""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from contextlib import suppress
from pathlib import Path

import msgspec

from tracer.program.program import Program

_CACHE = Path("/var/cache/msrtrace")
_KEPT = 16  # programs: five of a kernel
_DIGEST = 32  # bytes of SHA-256
_NAME = re.compile(r"[0-9a-f]{64}(\..+)?")  # a key, which is a digest; what was not finished, as by SIGKILL


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
        if not _ours(path.parent.stat()):
            return None
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
            if not _ours(os.fstat(file.fileno())):
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
        if not _ours(path.parent.stat()):
            return
        descriptor, new = tempfile.mkstemp(prefix=f"{key}.", dir=path.parent)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(seal(content))
            os.replace(new, path)
        except BaseException:
            os.unlink(new)
            raise
        _tidy(path.parent)


def _ours(status: os.stat_result) -> bool:
    """Whether nobody but root and this user may have changed a file or what is in a directory."""
    return status.st_uid in (0, os.geteuid()) and not status.st_mode & 0o022


def _tidy(directory: Path) -> None:
    """Remove what was not used for longest, and nothing that is not ours: the directory may be used for more."""
    found = [file for file in directory.iterdir() if _NAME.fullmatch(file.name)]
    for old in sorted(found, key=lambda file: file.stat().st_mtime, reverse=True)[_KEPT:]:
        old.unlink(missing_ok=True)
