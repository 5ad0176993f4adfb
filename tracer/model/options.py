# SPDX-License-Identifier: GPL-2.0-or-later
"""The options of a trace."""

from __future__ import annotations

from dataclasses import dataclass

BACKENDS = ("kprobe", "fentry")


@dataclass(frozen=True)
class Options:
    """Whether to break counts down by VM, the pid of the only VMM to trace (None: all), one of BACKENDS or `auto`.

    `exits`: whether to count the exits of guests' accesses, too.
    """

    by_vm: bool = False
    pid: int | None = None
    backend: str = "auto"
    exits: bool = False
