# SPDX-License-Identifier: GPL-2.0-or-later
"""How fast this machine's time stamp counter runs, which is that of hosts in QEMU that do not count instructions."""

from __future__ import annotations

import ctypes
import mmap
import time
from collections.abc import Callable

#: rdtsc; shl $32, %rdx; or %rdx, %rax; ret
_READ = bytes.fromhex("0f31 48c1e220 4809d0 c3")
_APART_SECONDS = 0.1
#: Readings of both clocks, of which the quickest counts: this process may be interrupted in between.
_TRIES = 50


def tsc_khz() -> int:
    """Its frequency in kHz, measured against the monotonic clock, however busy the machine is."""
    with mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC) as code:
        code.write(_READ)
        held = ctypes.c_char.from_buffer(code)
        read = ctypes.CFUNCTYPE(ctypes.c_uint64)(ctypes.addressof(held))
        first, begun = _together(read)
        time.sleep(_APART_SECONDS)
        last, ended = _together(read)
        del held, read  # or the memory could not be freed
    return round((last - first) * 1e6 / (ended - begun))


def _together(read: Callable[[], int]) -> tuple[int, float]:
    """The counter, and nanoseconds of the monotonic clock at the same time."""
    found = []
    for _ in range(_TRIES):
        before, ticks, after = time.monotonic_ns(), read(), time.monotonic_ns()
        found.append((after - before, ticks, (before + after) / 2))
    _, ticks, when = min(found)
    return ticks, when
