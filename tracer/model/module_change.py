# SPDX-License-Identifier: GPL-2.0-or-later
"""What changes in the kernel while it is traced: the module is unloaded or loaded, probes are switched off or on."""

from __future__ import annotations

from dataclasses import dataclass

#: How often to check for a reload, and how long to wait before retrying a module that cannot be traced.
FOLLOW_SECONDS, RETRY_SECONDS = 0.2, 10.0


@dataclass(frozen=True)
class ModuleChange:
    """`module` is traced again; or was unloaded; or was loaded but cannot be traced, and `problem` says why."""

    module: str
    traced: bool
    problem: str = ""

    def __str__(self) -> str:
        if self.problem:
            return f"{self.module} is not traced, trying again in {RETRY_SECONDS:.0f} s: {self.problem}"
        if self.traced:
            return f"{self.module} was loaded again"
        return f"{self.module} was unloaded; its counts are kept, and it is traced again when it comes back"


@dataclass(frozen=True)
class ProbesSwitched:
    """The kernel's probes were switched off, and `problem` says what to do; or they are on again, after `seconds`."""

    seconds: float = 0.0
    problem: str = ""
    traced = False  # no module was

    def __str__(self) -> str:
        if self.problem:
            return f"the kernel's probes have been switched off, so nothing is counted: {self.problem}"
        return f"the kernel's probes are on again; what happened in these {self.seconds:.1f} s was not counted"


Change = ModuleChange | ProbesSwitched
