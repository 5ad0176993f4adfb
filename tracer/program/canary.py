# SPDX-License-Identifier: GPL-2.0-or-later
"""Whether the kernel runs probes now: they stay attached, and silent, where they have been switched off.

Both switches (kernel/trace/ftrace.c, ftrace_enable_sysctl(); kernel/kprobes.c, write_enabled_file_bool()) disarm all
probes without a word to their owners, and no count of missed ones grows.
"""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress
from pathlib import Path

from tracer.program.syscalls import last_error

_FTRACE = Path("/proc/sys/kernel/ftrace_enabled")
_KPROBES = Path("/sys/kernel/debug/kprobes/enabled")  # for root alone
_PMU = Path("/sys/bus/event_source/devices/kprobe/type")
#: What hardly anyone calls: its probe runs for all who do. Docker's and systemd's filters of system calls allow it.
_FUNCTION = b"__x64_sys_sched_rr_get_interval"
_SYS_PERF_EVENT_OPEN, _CLOSE_ON_EXEC = 298, 8  # on x86-64; PERF_FLAG_FD_CLOEXEC
_TRIES = 3
_libc = ctypes.CDLL(None, use_errno=True)


class _Attributes(ctypes.Structure):
    """The first version of struct perf_event_attr that has config2 (include/uapi/linux/perf_event.h)."""

    _fields_ = [
        ("type", ctypes.c_uint32),
        ("size", ctypes.c_uint32),
        ("config", ctypes.c_uint64),
        ("unused", ctypes.c_uint64 * 5),
        ("kprobe_func", ctypes.c_char_p),
        ("probe_offset", ctypes.c_uint64),
    ]


class Canary:
    """A kprobe of perf's on a system call, which counts the calls of the thread that makes this and of no other."""

    def __init__(self) -> None:
        """Raises OSError."""
        attributes = _Attributes(type=int(_PMU.read_text()), size=ctypes.sizeof(_Attributes), kprobe_func=_FUNCTION)
        here, any_cpu, no_group = 0, -1, -1
        self._file = int(
            _libc.syscall(_SYS_PERF_EVENT_OPEN, ctypes.byref(attributes), here, any_cpu, no_group, _CLOSE_ON_EXEC)
        )
        if self._file < 0:
            raise last_error()

    def clear(self) -> bool:
        """Whether kprobes run. To be asked in the thread that made this."""
        for _ in range(_TRIES):
            before = os.read(self._file, 8)
            try:
                os.sched_rr_get_interval(0)
            except OSError:  # a filter of system calls, so that nothing is known
                return True
            if os.read(self._file, 8) != before:
                return True
        return False

    def close(self) -> None:
        """Remove the probe."""
        os.close(self._file)


class FtraceSwitch:
    """What programs at fentry depend on, and no other switch."""

    def clear(self) -> bool:
        """Whether they run."""
        with suppress(OSError):
            return _FTRACE.read_text().strip() != "0"
        return True

    def close(self) -> None:
        """There is nothing to release."""


def remedy() -> str:
    """The command that switches probes on again."""
    return f"echo 1 | sudo tee {_KPROBES}" if FtraceSwitch().clear() else "sudo sysctl -w kernel.ftrace_enabled=1"
