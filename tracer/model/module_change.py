# SPDX-License-Identifier: GPL-2.0-or-later
"""Unloads and reloads of the module while it is traced."""

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
