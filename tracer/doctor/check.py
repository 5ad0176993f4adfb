# SPDX-License-Identifier: GPL-2.0-or-later
"""The result of a check."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class State(enum.Enum):
    """The state of a requirement: FAILED prevents tracing, WARNING makes its results incomplete."""

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


#: The result of a check: state, detail and fix.
Found = tuple[State, str, str | None]
