# SPDX-License-Identifier: GPL-2.0-or-later
"""What an exit of RDMSR or WRMSR takes, in ticks of the TSC: on a host that counts them, these are instructions.

A guest executes FEW and then MANY accesses in one KVM_RUN: the difference is MANY - FEW exits, and nothing else. Of
ROUNDS the one that took the fewest counts, and each is so much shorter than the time between two ticks of the host's
timer (a million instructions in Bochs, four in QEMU) that one has none of them in it.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from guest import output_of

EFER, FS_BASE = 0xC0000080, 0xC0000100
FEW, MANY, ROUNDS = 20, 120, 20
#: What the guest does, and how it is told to: each leaves the guest.
KINDS = {
    "read": ("--read", EFER, ""),
    "write": ("--write", EFER, ""),
    "denied read": ("--read", FS_BASE, f"--deny {FS_BASE:#x}"),
}


def command(kind: str, count: int) -> list[str]:
    """The program that does COUNT accesses of a kind a round."""
    option, msr, more = KINDS[kind]
    return ["accesses", "--rounds", str(ROUNDS), option, f"{msr:#x}={count}", *more.split()]


def ticks_in(text: str) -> int:
    """What `accesses` says it took."""
    found = re.search(r"^accesses: .* ticks=(\d+)$", text, re.M)
    if not found:
        raise RuntimeError(f"no ticks: {text[-500:]}")
    return int(found[1])


def instructions(run: Callable[[list[str]], str]) -> dict[str, float]:
    """By kind, what an exit takes; RUN runs a program, and gives what it printed."""
    found = {}
    for kind in KINDS:
        few, many = (ticks_in(run(command(kind, count))) for count in (FEW, MANY))
        found[kind] = (many - few) / (MANY - FEW)
    return found


def plainly(what: list[str]) -> str:
    """Run a program under a tracer that runs beside it."""
    done = output_of(*what)
    if done["status"]:
        raise RuntimeError(done)
    return str(done["stdout"])
