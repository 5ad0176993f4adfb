# SPDX-License-Identifier: GPL-2.0-or-later
"""What a user chooses of how to trace."""

from __future__ import annotations

from dataclasses import dataclass

BACKENDS = ("kprobe", "fentry")


@dataclass(frozen=True)
class Options:
    """To break counts down by VM, to trace the VMM with one pid alone, and by which of BACKENDS or `auto`."""

    by_vm: bool = False
    pid: int | None = None
    backend: str = "auto"
