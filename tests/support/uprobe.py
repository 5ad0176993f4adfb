# SPDX-License-Identifier: GPL-2.0-or-later
"""BPF programs at functions of this process, where tests have no kernel to probe."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

from tracer.program import bcc_library


def attach_uprobe(file: Path, offset: int, program: int, *, at_return: bool) -> int:
    """Run PROGRAM (of type kprobe) at the entry or the return of the function at OFFSET of FILE, in this process.

    It does as long as the descriptor is open: it. Raises OSError.
    """
    attach = bcc_library.library().bpf_attach_uprobe
    what = (os.fsencode(file), ctypes.c_uint64(offset), os.getpid(), 0)
    fd = attach(program, int(at_return), b"-" * 256, *what)
    if fd < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return int(fd)
