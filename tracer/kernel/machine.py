# SPDX-License-Identifier: GPL-2.0-or-later
"""A machine as files below a root, and the process that looks at it: what checks and tracing ask it for."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from pathlib import Path

from tracer.kernel.symbols import Symbols
from tracer.model.vendor import Vendor
from tracer.model.vendors import FIRST, VENDORS

# include/uapi/linux/capability.h; CAP_SYS_ADMIN stands for the two, which were split off it in 5.8.
SYS_ADMIN, NEEDED = 21, {39: "CAP_BPF", 38: "CAP_PERFMON"}


@dataclass(frozen=True)
class Cpu:
    """As /proc/cpuinfo has it; `model` and `maker` are empty where it does not say."""

    model: str
    maker: str
    flags: frozenset[str]


@dataclass(frozen=True)
class Machine:
    """The files of a machine below `root`, and of a process: `python_path` is sys.path, `venv` sys.prefix if in one."""

    root: Path = Path("/")
    euid: int = 0
    release: str = ""
    environ: Mapping[str, str] = field(default_factory=dict)
    python_path: tuple[str, ...] = ()
    python: str = "python3"
    venv: str | None = None

    @classmethod
    def here(cls) -> Machine:
        """This machine and this process."""
        venv = sys.prefix if sys.prefix != sys.base_prefix else None
        return cls(Path("/"), os.geteuid(), os.uname().release, os.environ, tuple(sys.path), sys.executable, venv)

    @property
    def command(self) -> str:
        """How root starts this msrtrace: sudo does not search a virtual environment."""
        return f"sudo {self.venv}/bin/msrtrace" if self.venv else "sudo msrtrace"

    def at(self, path: str) -> Path:
        """The absolute PATH, as found below `root`."""
        return self.root / path.lstrip("/")

    def text(self, path: str, otherwise: str | None = None) -> str:
        """What the file at PATH holds; where it cannot be read OTHERWISE, if given, else OSError is raised."""
        try:
            return self.at(path).read_bytes().decode(errors="replace").strip()
        except OSError:
            if otherwise is None:
                raise
            return otherwise

    @cached_property
    def symbols(self) -> Symbols:
        """The functions of the running kernel. Raises MsrtraceError."""
        return Symbols.read(self.at("/proc/kallsyms"), self.at("/sys/kernel/livepatch"))

    @cached_property
    def cpu(self) -> Cpu:
        """The first CPU. Raises OSError."""
        with self.at("/proc/cpuinfo").open(errors="replace") as file:
            first = file.read(8192).partition("\n\n")[0]  # all of it is slow on many CPUs
        maker, flags = search(r"^vendor_id\s*:\s*(.*)", first).strip(), search(r"^flags\s*:(.*)", first).split()
        return Cpu(search(r"^model name\s*:\s*(.*)", first), maker, frozenset(flags))

    @cached_property
    def vendor(self) -> Vendor:
        """The vendor whose virtualisation the CPU has; where that cannot be told, the one whose module is loaded."""
        try:
            flags = self.cpu.flags
        except OSError:
            flags = frozenset()
        by_cpu = (vendor for vendor in VENDORS if vendor.cpu_flag in flags)
        by_module = (vendor for vendor in VENDORS if self.at(f"/sys/module/{vendor.module}").exists())
        return next(chain(by_cpu, by_module), FIRST)

    def capable(self, capability: int) -> bool:
        """Whether this process has CAPABILITY (CapEff in proc(5)). Raises OSError."""
        return bool(int(search(r"^CapEff:\s*(\w+)", self.text("/proc/self/status")), 16) >> capability & 1)

    @cached_property
    def missing(self) -> str:
        """The capabilities that tracing needs and this process lacks."""
        return " and ".join(NEEDED[c] for c in NEEDED if not self.capable(c) and not self.capable(SYS_ADMIN))


def search(pattern: str, text: str) -> str:
    """The first group of PATTERN in TEXT, line by line, or ""."""
    return found[1] if (found := re.search(pattern, text, re.MULTILINE)) else ""
