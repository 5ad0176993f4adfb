# SPDX-License-Identifier: GPL-2.0-or-later
"""Things that are built once and kept: each in a directory named by what it is made from."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

REPO = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
#: Everything built lands here, outside git. MSRTRACE_BUILD moves it, so that checkouts can share one.
BUILD = Path(os.environ.get("MSRTRACE_BUILD", REPO / "build")).resolve() / "kvmhost"

UNUSED_SECONDS = 24 * 3600


class RigError(Exception):
    """The emulated host could not be made or run; the message is one line for the user."""


def say(text: str) -> None:
    """Progress, on stderr: stdout belongs to the guest's command."""
    print(f"kvmhost: {text}", file=sys.stderr, flush=True)


@contextmanager
def locked(name: str) -> Iterator[None]:
    """Hold build/kvmhost/NAME.lock; a second process or thread waits. The kernel drops the lock of a killed one."""
    BUILD.mkdir(parents=True, exist_ok=True)
    with open(BUILD / f"{name}.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"waiting for {name}, which another run or part of this one is making")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def digest(*parts: object) -> str:
    """A short stable name for PARTS: plain data by value, a Path by the content of that file."""
    total = hashlib.sha256()
    for part in parts:
        data = part.read_bytes() if isinstance(part, Path) else json.dumps(part).encode()
        total.update(hashlib.sha256(data).digest())
    return total.hexdigest()[:12]


def cached(kind: str, inputs: Sequence[object], make: Callable[[Path], None]) -> Path:
    """The directory that MAKE fills, from the cache when INPUTS (see `digest`) were built before.

    MAKE gets an empty directory that is renamed into place when it returns, so a build that was interrupted
    is never taken for a finished one, and two builds at once become one.
    """
    name = f"{kind}-{digest(*inputs)}"
    final = BUILD / name
    if final.is_dir():
        os.utime(final)  # used: not yet to be cleared away
        return final
    with locked(name):
        if final.is_dir():
            return final
        for stale in BUILD.glob(f".{name}.*"):
            remove_tree(stale)
        _clear_away(kind)
        work = Path(tempfile.mkdtemp(prefix=f".{name}.", dir=BUILD))
        work.chmod(0o755)
        say(f"making {name}")
        started = time.monotonic()
        try:
            make(work)
            work.rename(final)
        finally:
            remove_tree(work)
        say(f"made {name} in {time.monotonic() - started:.0f} s")
    return final


def _clear_away(kind: str) -> None:
    """Remove what was made as KIND from other inputs and has not been used for a day."""
    for old in BUILD.glob(f"{kind}-{'?' * 12}"):
        if old.is_dir() and time.time() - old.stat().st_mtime > UNUSED_SECONDS:
            remove_tree(old)


def remove_tree(path: Path) -> None:
    """Remove PATH, but never walk into something still mounted below it."""
    if path.exists():
        mounts = Path("/proc/self/mounts").read_text()
        below = [m.split()[1] for m in mounts.splitlines() if m.split()[1].startswith(f"{path}/")]
        for mount in sorted(below, reverse=True):
            subprocess.run(["umount", "-l", mount], check=True)
        shutil.rmtree(path)


def sh(command: Sequence[str | Path], *, cwd: Path | None = None, log: Path | None = None) -> str:
    """Run COMMAND and return its stdout; its whole output goes to LOG, or into the error when it fails."""
    argv = [str(word) for word in command]
    with tempfile.TemporaryFile("w+") as errors, open(log, "a") if log else errors as sink:
        done = subprocess.run(
            argv,
            check=False,
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=sink if log else subprocess.PIPE,
            stderr=sink,
            text=True,
            errors="replace",
            env={**os.environ, "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"},
        )
        if done.returncode == 0:
            return done.stdout or ""
        if log:
            tail = log.read_text(errors="replace")[-3000:]
        else:
            errors.seek(0)
            tail = (done.stdout + errors.read())[-3000:]
    raise RigError(f"{' '.join(argv)[:300]} failed with status {done.returncode}:\n{tail}")


def retried(what: str, action: Callable[[], T], attempts: int = 4) -> T:
    """ACTION's result; a download may fail for a moment, so it is tried again, with a pause that doubles."""
    for attempt in range(1, attempts):
        try:
            return action()
        except RigError as error:
            say(f"{what}: attempt {attempt} of {attempts} failed, trying again: {str(error).splitlines()[-1]}")
            time.sleep(2**attempt)
    return action()
