# SPDX-License-Identifier: GPL-2.0-or-later
"""Why KVM made a call. Which function of KVM stands for which cause is in the vendors' tables."""

from __future__ import annotations

FILTER_CHANGE, VCPU_CREATE, VCPU_RESET = "filter_change", "vcpu_create", "vcpu_reset"
CPUID_UPDATE, MSR_WRITE = "cpuid_update", "msr_write"
X2APIC, LBR, PT, RECALC, OTHER = "x2apic", "lbr", "pt", "recalc", "other"
