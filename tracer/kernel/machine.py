# SPDX-License-Identifier: GPL-2.0-or-later
"""A machine, as its files below a root directory, and the process that examines it."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from tracer.kernel.cpu import Cpu
from tracer.kernel.symbols import Symbols
from tracer.model.errors import MsrtraceError
from tracer.model.vendor import Vendor
from tracer.model.vendors import VENDORS

# include/uapi/linux/capability.h; CAP_SYS_ADMIN includes the other two, which were split off in 5.8.
SYS_ADMIN, NEEDED = 21, {39: "CAP_BPF", 38: "CAP_PERFMON"}


@dataclass(frozen=True)
class Machine:
    """The files of a machine, below `root`, and a process: `python_path` is sys.path, `venv` its virtualenv."""

    root: Path = Path("/")
    euid: int = 0
    release: str = ""
    environ: Mapping[str, str] = field(default_factory=dict)
    python_path: tuple[str, ...] = ()
    python: str = "python3"
    venv: str | None = None
    #: the backends whose BPF program is already compiled, so that it takes neither BCC's compiler nor headers
    compiled: frozenset[str] = frozenset()
    #: the backends that a trace would try, in this order; the function may raise MsrtraceError
    expected: Callable[[Machine], tuple[str, ...]] = lambda _: ()
    #: the system calls that tracing takes and that a seccomp filter refuses
    refused_calls: Callable[[], tuple[str, ...]] = tuple

    @classmethod
    def here(
        cls,
        compiled: frozenset[str] = frozenset(),
        expected: Callable[[Machine], tuple[str, ...]] = lambda _: (),
        refused_calls: Callable[[], tuple[str, ...]] = tuple,
    ) -> Machine:
        """This machine and this process; what is compiled, expected and refused is for the caller to know."""
        venv = sys.prefix if sys.prefix != sys.base_prefix else None
        process = (os.environ, tuple(sys.path), sys.executable, venv)
        return cls(Path("/"), os.geteuid(), os.uname().release, *process, compiled, expected, refused_calls)

    @property
    def command(self) -> str:
        """The command that starts this msrtrace as root: sudo does not search a virtual environment."""
        return f"sudo {self.venv}/bin/msrtrace" if self.venv else "sudo msrtrace"

    def at(self, path: str) -> Path:
        """The absolute path, below `root`."""
        return self.root / path.lstrip("/")

    def text(self, path: str, default: str | None = None) -> str:
        """The content of a file, stripped; if it cannot be read, the default, or OSError if that is None."""
        try:
            return self.at(path).read_bytes().decode(errors="replace").strip()
        except OSError:
            if default is None:
                raise
            return default

    @cached_property
    def symbols(self) -> Symbols:
        """The functions of the running kernel. Raises MsrtraceError."""
        return Symbols.read(self.at("/proc/kallsyms"), self.at("/sys/kernel/livepatch"))

    @cached_property
    def cpu(self) -> Cpu:
        """The first CPU in /proc/cpuinfo. Raises OSError."""
        return Cpu.read(self.at("/proc/cpuinfo"))

    @cached_property
    def vendors(self) -> tuple[Vendor, ...]:
        """The vendors that it may be: whose flag the CPU has, or that made the CPU, or whose module is there; else all.

        Modules come last: those that are built into the kernel are all there, whatever the CPU.
        """
        try:
            cpu = self.cpu
        except OSError:
            cpu = Cpu()
        by_flag = tuple(vendor for vendor in VENDORS if vendor.cpu_flag in cpu.flags)
        by_maker = tuple(vendor for vendor in VENDORS if cpu.maker in vendor.makers)
        by_module = tuple(vendor for vendor in VENDORS if self.at(f"/sys/module/{vendor.module}").exists())
        return by_flag or by_maker or by_module or VENDORS

    @property
    def vendor(self) -> Vendor:
        """The first of `vendors`."""
        return self.vendors[0]

    @cached_property
    def backends(self) -> tuple[str, ...]:
        """The backends that a trace would try, in this order; () where that cannot be known yet.

        Without CAP_SYS_ADMIN, fentry is none of them where it takes that, unless it was chosen.
        """
        try:
            found = self.expected(self)
            if "fentry" in found and self.fentry_takes_sys_admin and not self.capable(SYS_ADMIN):
                return tuple(backend for backend in found if backend != "fentry") or found
        except (MsrtraceError, OSError, ValueError):
            return ()
        return found

    @property
    def fentry_takes_sys_admin(self) -> bool:
        """Whether the functions are a module's: its BTF, which fentry needs, is given only to those with CAP_SYS_ADMIN.

        bpf_btf_get_fd_by_id() in kernel/bpf/syscall.c; what is built in needs no descriptor. Raises MsrtraceError.
        """
        return bool(self.symbols.module)

    def capable(self, capability: int) -> bool:
        """Whether this process has the capability of that number (CapEff in proc(5)). Raises OSError."""
        return bool(int(search(r"^CapEff:\s*(\w+)", self.text("/proc/self/status")), 16) >> capability & 1)

    @cached_property
    def missing(self) -> str:
        """The capabilities that tracing needs and this process lacks."""
        return " and ".join(NEEDED[c] for c in NEEDED if not self.capable(c) and not self.capable(SYS_ADMIN))


def search(pattern: str, text: str) -> str:
    """The first group of the first match, with `^` and `$` at line ends, or ""."""
    return found[1] if (found := re.search(pattern, text, re.MULTILINE)) else ""
