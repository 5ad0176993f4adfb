# SPDX-License-Identifier: GPL-2.0-or-later
"""What becomes of the module that is traced while it is: it is unloaded and loaded again."""

from __future__ import annotations

from dataclasses import dataclass

#: How often a reload is looked for, and how long a module that cannot be traced is left alone.
FOLLOW_SECONDS, RETRY_SECONDS = 0.2, 10.0


@dataclass(frozen=True)
class ModuleChange:
    """MODULE is traced again; or was unloaded; or was loaded and cannot be traced, which `problem` says why."""

    module: str
    traced: bool
    problem: str = ""

    def __str__(self) -> str:
        if self.problem:
            return f"{self.module} is not traced, trying again in {RETRY_SECONDS:.0f} s: {self.problem}"
        if self.traced:
            return f"{self.module} was loaded again"
        return f"{self.module} was unloaded; its counts are kept, and it is traced again when it comes back"
