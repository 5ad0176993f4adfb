# SPDX-License-Identifier: GPL-2.0-or-later
"""The CPU of a machine."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Cpu:
    """A CPU, from /proc/cpuinfo; `model` and `maker` are empty if they are not there."""

    model: str = ""
    maker: str = ""
    flags: frozenset[str] = frozenset()

    @classmethod
    def read(cls, cpuinfo: Path) -> Cpu:
        """The first CPU in the file. Raises OSError."""
        with cpuinfo.open(errors="replace") as file:
            first = file.read(8192).partition("\n\n")[0]  # reading all of it is slow with many CPUs

        def value(name: str) -> str:
            found = re.search(rf"^{name}\s*:\s*(.*)", first, re.MULTILINE)
            return found[1] if found else ""

        return cls(value("model name"), value("vendor_id").strip(), frozenset(value("flags").split()))
