# SPDX-License-Identifier: GPL-2.0-or-later
"""Which process a VMM is: its pid, and when it began, as one number, as the BPF programs count by (bpf/places.h).

After a process has ended, another may get its pid. A number without a start is of any process with this pid.
"""

from __future__ import annotations

_PID_BITS = 22  # PID_MAX_LIMIT, include/linux/threads.h


def pid_of(vmm: int) -> int:
    """The pid; 0 where processes are not told apart, or have ended."""
    return vmm & ((1 << _PID_BITS) - 1)


def start_of(vmm: int) -> int:
    """When it began, in clock ticks after boot; 0 if that is not known. Field 22 of /proc/<pid>/stat."""
    return vmm >> _PID_BITS


def vmm_id(pid: int, start: int) -> int:
    """The number of a process."""
    return start << _PID_BITS | pid
