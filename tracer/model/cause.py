# SPDX-License-Identifier: GPL-2.0-or-later
"""Why KVM called: the cause of a call, from the function that made it."""

from __future__ import annotations

import re

from tracer.model.symbol_name import plain_name

FILTER_CHANGE, VCPU_CREATE, CPUID_UPDATE, MSR_WRITE = (
    "filter_change",
    "vcpu_create",
    "cpuid_update",
    "msr_write",
)
X2APIC, LBR, PT, RECALC, OTHER = "x2apic", "lbr", "pt", "recalc", "other"

#: Callers in arch/x86/kvm/, Linux 5.13 to 7.3; the first match counts. Functions between these and the call are
#: inlined in some builds and not in others, and one whose last act is the call jumps to it, so that its own caller
#: shows: __kvm_apic_set_base() for vmx_set_virtual_apic_mode() in Debian's 6.12.
_CALLERS = tuple(
    (re.compile(pattern), cause)
    for pattern, cause in (
        (r"vmx_msr_filter_changed", FILTER_CHANGE),
        (r"vmx_recalc_.*intercepts", RECALC),
        (r"vmx_vcpu_create|vmx_create_vcpu", VCPU_CREATE),
        (r".*(after_set_cpuid|cpuid_update)", CPUID_UPDATE),
        (r".*apic.*", X2APIC),
        (r".*lbr.*|vmx_vcpu_run", LBR),
        (r"pt_.*", PT),
        (r".*_set_msr.*", MSR_WRITE),
    )
)


def cause_of(function: str) -> str:
    """The cause that a call by FUNCTION of KVM stands for, whatever a compiler has added to its name."""
    name = plain_name(function)
    return next((cause for pattern, cause in _CALLERS if pattern.fullmatch(name)), OTHER)
