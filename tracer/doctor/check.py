# SPDX-License-Identifier: GPL-2.0-or-later
"""What a check of a machine finds."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class State(enum.Enum):
    """How a check ended: FAILED prevents tracing, WARNING costs a part of the result."""

    OK = "ok"
    WARNING = "warning"
    FAILED = "failed"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class Check:
    """One requirement. `detail` and `fix` are one line each; `fix` is None where there is nothing to do."""

    name: str
    state: State
    detail: str
    fix: str | None = None


#: What a check finds: its state, detail and fix.
Found = tuple[State, str, str | None]
