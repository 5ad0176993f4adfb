# SPDX-License-Identifier: GPL-2.0-or-later
"""What a process that traces may do: few capabilities while it serves, for good; and which system calls."""

from __future__ import annotations

import ctypes
import errno
import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tracer.program.syscalls import last_error

_libc = ctypes.CDLL(None, use_errno=True)
# include/uapi/linux/prctl.h
_PR_CAPBSET_READ, _PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS, _PR_CAP_AMBIENT = 23, 24, 38, 47
_PR_CAP_AMBIENT_CLEAR_ALL = 4
_VERSION_3 = 0x20080522  # include/uapi/linux/capability.h
_CAP_SYS_PTRACE, _CAP_SYS_ADMIN, _CAP_SYSLOG, _CAP_PERFMON, _CAP_BPF = 19, 21, 34, 38, 39
_SYS_PERF_EVENT_OPEN, _SYS_BPF = 298, 321  # on x86-64
_NAMES = (
    *("CHOWN", "DAC_OVERRIDE", "DAC_READ_SEARCH", "FOWNER", "FSETID", "KILL", "SETGID", "SETUID", "SETPCAP"),
    *("LINUX_IMMUTABLE", "NET_BIND_SERVICE", "NET_BROADCAST", "NET_ADMIN", "NET_RAW", "IPC_LOCK", "IPC_OWNER"),
    *("SYS_MODULE", "SYS_RAWIO", "SYS_CHROOT", "SYS_PTRACE", "SYS_PACCT", "SYS_ADMIN", "SYS_BOOT", "SYS_NICE"),
    *("SYS_RESOURCE", "SYS_TIME", "SYS_TTY_CONFIG", "MKNOD", "LEASE", "AUDIT_WRITE", "AUDIT_CONTROL", "SETFCAP"),
    *("MAC_OVERRIDE", "MAC_ADMIN", "SYSLOG", "WAKE_ALARM", "BLOCK_SUSPEND", "AUDIT_READ", "PERFMON", "BPF"),
    "CHECKPOINT_RESTORE",
)
_LAST = Path("/proc/sys/kernel/cap_last_cap")
_PARANOID = Path("/proc/sys/kernel/perf_event_paranoid")
_MOUNTS = Path("/proc/self/mounts")


def drop_capabilities(attaches_again: bool) -> list[str]:
    """Keep what it takes to read maps and, if it `attaches_again`, to probe a module that was reloaded.

    That is CAP_BPF, and CAP_PERFMON and CAP_SYSLOG (for the addresses in /proc/kallsyms). Where Debian's and Ubuntu's
    kernels ask for CAP_SYS_ADMIN to probe (kernel.perf_event_paranoid above 2), and before 5.8, which has not the
    first two, that is kept, too, but for `raised` alone; and CAP_SYS_PTRACE where /proc hides processes. All else is
    given up for good, by the calling thread and those that it starts, and by programs that they run. Raises OSError.

    :returns: the names of capabilities that stay in the bounding set, which only CAP_SETPCAP can change (that of root,
        but not of a user with ambient capabilities). No program gains any of them, as nothing here has new privileges.
    """
    _check(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    permitted = _state("CapPrm")
    wanted = {_CAP_BPF, *((_CAP_PERFMON, _CAP_SYSLOG) if attaches_again else ())}
    wanted |= {_CAP_SYS_PTRACE} if _hides_processes() else set()
    fine = all(permitted >> capability & 1 for capability in wanted)
    reserve = {_CAP_SYS_ADMIN} if not fine or (attaches_again and int(_PARANOID.read_text()) > 2) else set()
    kept = _mask(wanted | reserve) & permitted
    left = []
    for capability in (c for c in range(int(_LAST.read_text()) + 1) if not kept >> c & 1):
        in_bounds = _libc.prctl(_PR_CAPBSET_READ, capability, 0, 0, 0) == 1
        if in_bounds and _libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0):
            left.append(f"CAP_{_NAMES[capability]}" if capability < len(_NAMES) else str(capability))
    _check(_libc.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0))
    _set(effective=kept & _mask(wanted) if fine else kept, permitted=kept)
    return left


@contextmanager
def raised() -> Iterator[None]:
    """Use all that was kept, in this thread. Raises OSError."""
    effective, permitted = _state("CapEff"), _state("CapPrm")
    _set(permitted, permitted)
    try:
        yield
    finally:
        _set(effective, permitted)


def sees_processes() -> bool:
    """Whether a process that is not in /proc does not exist."""
    return not _hides_processes() or bool(_state("CapEff") >> _CAP_SYS_PTRACE & 1)


def refused_calls() -> tuple[str, ...]:
    """The system calls of a tracer that fail with EPERM or ENOSYS whatever they ask for, as seccomp forbids them.

    For a process with the capabilities that they take. Each asks for what there is not, a command or flags: the kernel
    itself answers EINVAL or EFAULT.
    """
    nothing = ctypes.c_void_p()
    calls = {"bpf": (_SYS_BPF, -1, nothing, 0), "perf_event_open": (_SYS_PERF_EVENT_OPEN, nothing, 0, -1, -1, -1)}
    refused = []
    for name, arguments in calls.items():
        if _libc.syscall(*arguments) < 0 and ctypes.get_errno() in (errno.EPERM, errno.ENOSYS):
            refused.append(name)
    return tuple(refused)


def _hides_processes() -> bool:
    """Whether /proc is mounted with `hidepid`, proc(5)."""
    mounts = (line.split() for line in _MOUNTS.read_text().splitlines())
    options = [option for _, where, _, what, *_ in mounts if where == "/proc" for option in what.split(",")]
    return any(option.startswith("hidepid=") and option not in ("hidepid=0", "hidepid=off") for option in options)


def _state(which: str) -> int:
    text = Path("/proc/thread-self/status").read_text()
    return int(re.findall(rf"^{which}:\s*(\w+)", text, re.MULTILINE)[0], 16)


def _mask(capabilities: set[int]) -> int:
    return sum(1 << capability for capability in capabilities)


def _set(effective: int, permitted: int) -> None:
    # Effective, permitted and inheritable, first of capabilities 0 to 31, then of the others
    low, high = effective & 0xFFFFFFFF, effective >> 32
    data = struct.pack("6I", low, permitted & 0xFFFFFFFF, 0, high, permitted >> 32, 0)
    _check(_libc.capset(struct.pack("Ii", _VERSION_3, 0), data))


def _check(result: int) -> None:
    if result:
        raise last_error()
