# SPDX-License-Identifier: GPL-2.0-or-later
"""Why KVM made a call. Which function of KVM stands for which cause is in the vendors' tables."""

from __future__ import annotations

FILTER_CHANGE, VCPU_CREATE, VCPU_RESET = "filter_change", "vcpu_create", "vcpu_reset"
CPUID_UPDATE, MSR_WRITE = "cpuid_update", "msr_write"
X2APIC, LBR, PT, NESTED, RECALC, OTHER = "x2apic", "lbr", "pt", "nested", "recalc", "other"
#: What each stands for, in words.
CAUSES = {
    FILTER_CHANGE: "a filter update",
    RECALC: "a recalculation for another reason (6.17+)",
    VCPU_CREATE: "the creation of a vCPU",
    VCPU_RESET: "a reset of a vCPU",
    CPUID_UPDATE: "a CPUID update",
    MSR_WRITE: "a write to an MSR",
    X2APIC: "a change of the x2APIC mode",
    LBR: "LBR",
    PT: "Intel PT",
    NESTED: "a guest that will have guests",
    OTHER: "something else",
}
