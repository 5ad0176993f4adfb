# SPDX-License-Identifier: GPL-2.0-or-later
"""What tracing costs, in emulated instructions, and how it is said.

The workload measures the KVM_RUN that applies a filter update; on the emulated host its TSC ticks once an instruction.
What a tracer adds is the median under it less the median without it. A filter update is one vmx_msr_filter_changed()
that makes CALLS calls of vmx_{enable,disable}_intercept_for_msr(). Tracers probe all three functions, and the *cost
per call* is what is added to the whole update divided by its calls: a tracer pays in it for the update's probe too.
"""

from __future__ import annotations

import re
from pathlib import Path

#: With how many calls a filter update is made, patched and unpatched, and how many change nothing (KERNEL.md 3).
PER_UPDATE = {
    "bookworm": {"patched": (13, 11), "unpatched": (30, 28)},
    "trixie": {"patched": (13, 11), "unpatched": (32, 30)},
}
#: Calls that the creation of a vCPU makes, each of which changes something.
PER_VCPU = 7


_BOOT_OPTIONS = (Path(__file__).parent / "guest/isolinux.cfg").read_text()
#: Of the guest's seconds: what its kernel is told of the TSC.
INSTRUCTIONS_PER_SECOND = 1000 * int(re.findall(r"tsc_early_khz=(\d+)", _BOOT_OPTIONS)[0])


def per_call(host: str, variant: str, ticks: int, untraced: int) -> float:
    """The cost per call of a tracer under which an update takes TICKS instead of UNTRACED."""
    calls, _ = PER_UPDATE[host][variant]
    return (ticks - untraced) / calls
