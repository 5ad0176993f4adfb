# SPDX-License-Identifier: GPL-2.0-or-later
"""BCC's library without its compiler: what attaches programs. By ctypes, since BCC's Python module brings LLVM along.

What is attached hangs on the descriptor that it gives, so nothing outlives the process. Signatures are those of
src/cc/libbpf.h, the same from BCC 0.18 to 0.37. Its functions print to fd 2, which is taken for the time of a call.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from tracer.model.errors import MsrtraceError

#: The second has LLVM, too: 100 MB of memory, for an installation that lacks the first.
_NAMES = ("libbcc_bpf.so.0", "libbcc.so.0")
_PMU = Path("/sys/bus/event_source/devices/kprobe/type")

# enum bpf_probe_attach_type
_ENTRY, _RETURN = 0, 1

#: Where the kernel refuses a perf event, BCC turns to tracefs (bpf_attach_probe(), src/cc/libbpf.c), and what it makes
#: there would stay if the process died, or if the kernel refused the perf event on that, too, as it does without
#: CAP_SYS_ADMIN under Debian's perf_event_paranoid=3. So its event gets a name that BCC refuses to write: it has a
#: buffer of 256 bytes for NAME_bcc_PID since 0.12. One that wrote it would be refused by the kernel, to which more than
#: 64 characters and hyphens are no name (traceprobe_parse_event_name(), kernel/trace/trace_probe.c).
_NO_EVENT = b"-" * 256

#: What the functions that are called here print, as its lines begin.
_OF_BCC = re.compile(
    rb"(create_probe_event: )?open\(|Event name \(|ioctl\(|perf_event_open: |bpf_attach_raw_tracepoint "
)
_INSTALL = "install libbpfcc (Debian, Ubuntu), bcc (Fedora, Arch, Alpine) or libbcc0 (SUSE)"
_lock = threading.Lock()


class FunctionRefused(OSError):
    """The kernel lets this process probe functions, but not this one, or finds none by that name."""


@cache
def library() -> ctypes.CDLL:
    """The library. Raises MsrtraceError that says what to install."""
    reasons = []
    for name in _NAMES:
        try:
            found = ctypes.CDLL(name, use_errno=True)
        except OSError as error:
            reasons.append(str(error))
            continue
        of_kprobe = (ctypes.c_int, ctypes.c_int, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_uint64, ctypes.c_int)
        found.bpf_attach_kprobe.argtypes = of_kprobe
        found.bpf_attach_kfunc.argtypes = (ctypes.c_int,)
        found.bpf_open_perf_event.argtypes = (ctypes.c_uint32, ctypes.c_uint64, ctypes.c_int, ctypes.c_int)
        return found
    raise MsrtraceError(f"BCC's library cannot be loaded ({'; '.join(reasons)}): {_INSTALL}")


def attach_kprobe(program: int, function: str, address: int = 0, *, at_return: bool) -> int:
    """Run `program` (of type kprobe) at the entry or the return of a function, as long as the descriptor is open: it.

    `function` is a symbol, with or without its module and a colon before it, or "" where there is an `address`
    (perf_kprobe_init(), kernel/trace/trace_event_perf.c). Raises FunctionRefused, or OSError for all else: it then has
    nothing to do with the function. MsrtraceError as `library`.
    """
    try:
        pmu = int(_PMU.read_text())
    except OSError as error:
        raise OSError(error.errno, f"this kernel's perf has no kprobes ({_PMU}: {error.strerror})") from None
    attach = library().bpf_attach_kprobe
    # The last, maxactive, must be 0: with another BCC goes to tracefs at once.
    kind = _RETURN if at_return else _ENTRY
    try:
        return _call(attach, program, kind, _NO_EVENT, function.encode(), address, 0)
    except OSError as error:
        if "ioctl" in str(error):  # what happened after the perf event was there
            raise
    # What the kernel said is lost: BCC went on to tracefs. What it says to an event of no function at all is EINVAL,
    # after all that it asks of who wants to probe, see kprobe_addr() in kernel/kprobes.c.
    try:
        os.close(_call(library().bpf_open_perf_event, pmu, 0, -1, 0))
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    what = f"{function or hex(address)}: see /sys/kernel/debug/kprobes/blacklist"
    raise FunctionRefused(errno.EINVAL, f"the kernel takes no kprobe on {what}")


def attach_tracing(program: int) -> int:
    """Run `program` (of type tracing) at the function it was loaded for, as long as the descriptor is open: it.

    Raises OSError; MsrtraceError as `library`.
    """
    return _call(library().bpf_attach_kfunc, program)


def _call(function: Callable[..., int], *arguments: int | bytes) -> int:
    """The descriptor that `function` of the library gives. Raises OSError, with what it printed.

    All threads have one fd 2. What another prints in that time comes out at the end of the call; a process that it
    starts then has no stderr.
    """
    with _lock, open(os.memfd_create("stderr"), "w+b") as printed:
        with _stderr_in(printed.fileno()):
            ctypes.set_errno(0)
            result = int(function(*arguments))
            number = ctypes.get_errno()
        printed.seek(0)
        lines = printed.read().splitlines(keepends=True)
    own = [line for line in lines if _OF_BCC.match(line)]
    with suppress(OSError):
        os.write(2, b"".join(line for line in lines if line not in own))
    if result < 0:
        raise OSError(number, "; ".join(line.decode(errors="replace").strip() for line in own) or os.strerror(number))
    return result


@contextmanager
def _stderr_in(file: int) -> Iterator[None]:
    try:
        stderr = os.dup(2)
    except OSError:  # closed, so no one misses it
        stderr = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(file, 2)
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
