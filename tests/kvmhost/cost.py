# SPDX-License-Identifier: GPL-2.0-or-later
"""What tracing costs, in emulated instructions, and how it is said.

The workload measures the KVM_RUN that applies a filter update; on the emulated host its TSC ticks once an instruction.
What a tracer adds is the median under it less the median without it. A filter update is one vmx_msr_filter_changed() or
svm_msr_filter_changed() that makes CALLS calls of vmx_{enable,disable}_intercept_for_msr() or of
set_msr_interception_bitmap(). Tracers probe all of these functions, and the *cost per call* is what is added to the
whole update divided by its calls: a tracer pays in it for the update's probe too.
"""

from __future__ import annotations

import re
from pathlib import Path

from answers import AMD, PER_UPDATE

_BOOT_OPTIONS = (Path(__file__).parent / "guest/isolinux.cfg").read_text()
#: Of the guest's seconds: what its kernel is told of the TSC.
_BOCHS_PER_SECOND = 1000 * int(re.findall(r"tsc_early_khz=(\d+)", _BOOT_OPTIONS)[0])
_QEMU_PER_SECOND = 1_000_000_000  # -icount shift=0


def instructions_per_second(host: str) -> int:
    """How many instructions a second of HOST's is."""
    return _QEMU_PER_SECOND if host in AMD else _BOCHS_PER_SECOND


def per_call(host: str, variant: str, ticks: int, untraced: int) -> float:
    """The cost per call of a tracer under which an update takes TICKS instead of UNTRACED."""
    calls, _ = PER_UPDATE[host][variant]
    return (ticks - untraced) / calls
